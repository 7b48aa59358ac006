"""What becomes of llama-swap's settings, and what is said about those that nothing becomes of."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmux.cli.hooks import find
from llmux.config.load import parse_yaml
from llmux.llama_swap.conversion import as_yaml
from llmux.plugins import load_policy

EVERYTHING = (Path(__file__).parent / "everything.yaml").read_text()


@pytest.fixture
def everything(load):
    return load(EVERYTHING, {"MODELS": "/m", "SECOND_KEY": "sk-two"})


class TestEverything:
    def test_the_file(self, everything):
        config = everything.config
        assert (config.port, config.log_level, config.idle_sleep, config.progress) == (3000, "warning", 600, True)
        assert [entry.key.get_secret_value() for entry in config.api_keys] == ["sk-one", "sk-two"]
        assert config.policy.use == "priority"
        assert config.policy.options == {"priorities": {"big": 10, "small": -1}, "default": 0}
        load_policy(config.policy.use, config.policy.options, config.folder)

    def test_a_model(self, everything):
        model = everything.config.models["big"]
        assert (model.port, model.upstream_model, model.max_in_flight) == (10001, "vendor/big", 4)
        assert model.aliases == ()
        assert everything.config.virtual["coder"].first == ("big:filtered",)
        stripped = ("temperature", "top_p")
        rules = {name: (it.set, it.strip) for name, it in model.variants.items()}
        assert rules == {
            "gpt-4o-mini": ({"top_k": 10}, stripped),
            "big:high": ({"top_k": 10, "reasoning_effort": "high"}, stripped),
            "big:filtered": ({"top_k": 10, "reasoning_effort": "low"}, stripped),
        }
        (route,) = everything.config.routes
        assert (route.when.model, route.to) == (("big",), "big:filtered")
        assert (model.idle_sleep, model.preload, model.timeouts.wake) == (60, True, 500)
        assert model.env["CUDA_VISIBLE_DEVICES"] == "0"
        assert (model.env["HEALTH_PATH"], model.env["GRACE"]) == ("/v1/models", "30")
        assert everything.words("big") == [
            "/opt/llama/llama-server", "--host", "127.0.0.1", "--port", "10001", "--ctx-size", "16384",
            "--flash-attn", "on", "--model", "/m/gguf/a big one.gguf", "--temp", "0.7",
        ]  # fmt: skip
        assert everything.config.idle_sleep_of("small") is None
        assert everything.config.idle_sleep_of("embed") == 600

    def test_a_name_for_the_one_that_is_loaded(self, everything):
        assert everything.config.virtual["any"].awake == ("small", "big:filtered")

    def test_what_clients_are_told(self, everything):
        big, small = (everything.config.models[name].info for name in ("big", "small"))
        assert (big.name, big.description) == ("The big one", "Thinks.")
        assert (big.context, big.capabilities) == (16384, ("tools",))
        assert (big.unlisted, small.unlisted, everything.config.list_aliases) == (False, True, True)

    def test_a_container(self, everything):
        model = everything.config.models["in a box"]
        assert (model.port, model.env["HEALTH_PATH"], model.env["GRACE"]) == (10003, "none", "20")
        assert everything.words("in a box")[:7] == [
            "docker",
            "run",
            "--rm",
            "--name",
            "box-10003",
            "-p",
            "10003:8080",
        ]
        assert everything.words("in a box", "STOP_COMMAND") == ["docker", "stop", "box-10003"]

    def test_another_address(self, everything):
        assert everything.config.models["elsewhere"].address.url == "http://127.0.0.1:9999/base"

    def test_the_peers(self, everything):
        remote = everything.config.remotes["other"]
        assert (remote.url, dict(remote.models), remote.secret) == (
            "http://192.168.1.23:80",
            {"a": "a", "big": "big"},
            "unset",
        )
        assert "key: ${NOT_SET}" in everything.text
        assert (remote.timeouts.connect, remote.timeouts.first_byte) == (30.0, 60.0)
        assert everything.config.virtual["a"].first == ("other/a",)
        assert "big" not in everything.config.virtual
        assert all(everything.config.may_leave(entry) for entry in everything.config.api_keys)
        assert not everything.config.remotes_for_all

    def test_the_groups(self, everything):
        groups = {name: group.model_dump() for name, group in everything.config.groups.items()}
        assert groups == {
            "together": {
                "models": ("small", "in a box"),
                "together": True,
                "exclusive": False,
                "persistent": False,
            },
            "always": {"models": ("embed",), "together": True, "exclusive": False, "persistent": True},
        }

    def test_all_else_is_named_on_its_line(self, everything):
        assert set(everything.lost()) == {
            "logTimeFormat", "logToStdout", "metricsMaxInMemory", "captureBuffer", "store", "ui", "performance",
            "upstream", "profiles",
            "models.big.compat", "models.big.metadata",
            "models.big.sendLoadingState",
            "models.big.timeouts", "models.nowhere", "hooks.on_startup.preload[2]",
            "routing.router.settings.groups.together.members[2]",
            "routing.scheduler.settings.fifo.priority.strange", "peers.other.models[1]",
            "peers.other.filters.stripParams",
        }  # fmt: skip
        assert everything.differs() == [
            "sendLoadingState",
            "selectors.any",
            "models.big.concurrencyLimit",
            "routing.router.settings.groups.together.exclusive",
            "routing.scheduler.settings.fifo.priority",
        ]
        lines = EVERYTHING.splitlines()
        for note in everything.notes:
            assert str(note.path[-1] if isinstance(note.path[-1], str) else note.path[-2]) in lines[note.line - 1]

    def test_the_notes_are_in_the_file_where_they_belong(self, everything):
        text = " ".join(line.strip().removeprefix("# ") for line in everything.text.splitlines())
        for note in everything.notes:
            assert note.message in text
        before_big = everything.text.partition("\n  big:\n")[0].rpartition("\n\n")[2]
        assert "# compat: not carried over" in before_big

    def test_a_setting_that_llama_swap_will_have_one_day_is_named(self, load):
        result = load("later: 1\nx-mine: 2\nmodels: {m: {cmd: 'x ${PORT}', sooner: 2}}")
        assert set(result.lost()) == {"later", "models.m.sooner"}


# ---- one at a time


def test_the_least_file(load):
    result = load("models: {m: {cmd: 'x --port ${PORT}'}}")
    assert not any(note.lost for note in result.translation.notes)
    assert not result.notes
    assert result.config.models["m"].model_dump(exclude_defaults=True, include={"port", "aliases", "env"}) == {
        "port": 5800,
        "env": {"COMMAND": 'x \\\n  --port "$LLMUX_PORT"'},
    }


@pytest.mark.parametrize(
    ("filters", "rules", "own", "lost"),
    [
        ("{setParamsByID: {x: {n: 1}}}", {"set": {"n": 1}}, None, []),
        (
            "{setParamsByID: {x: {n: 1, model: y}}, stripParams: 'model, n,top_p,'}",
            {"set": {"n": 1}, "strip": ["top_p"]},
            {"strip": ["n", "top_p"]},
            [],
        ),
        (
            "{setParams: {n: 2, a.b: '${MONEY'}, setParamsByID: {x: {n: 1}}}",
            {"set": {"n": 1, "a.b": "${MONEY"}},
            {"set": {"n": 2, "a.b": "${MONEY"}},
            [],
        ),
        ("{setParamsByID: {m: {n: 3}, x: }}", None, {"set": {"n": 3}}, []),
        ("{setParamsByID: {x: {a: {b: 1}, a.c: 2}}}", {"set": {"a": {"b": 1}}}, None, ["filters"]),
        ("{setParamsByID: {x: {'0': 1}}}", None, None, ["filters"]),
        ("{setParamsByID: {x: }}", None, None, []),
    ],
)
def test_filters_are_variants(load, filters, rules, own, lost):
    result = load(f"models:\n  m:\n    cmd: 'x --port ${{PORT}}'\n    filters: {filters}")
    model = result.config.models["m"]
    assert set(model.aliases) == ({"x"} if rules is None else set())
    found = {name: it.model_dump(mode="json", exclude_defaults=True) for name, it in model.variants.items()}
    wanted = {"x": rules, "m:filtered": own}
    assert found == {name: {**each, "unlisted": True} for name, each in wanted.items() if each is not None}
    assert [(it.when.model, it.to) for it in result.config.routes] == [(("m",), "m:filtered")] * (own is not None)
    assert list(result.lost()) == [f"models.m.{place}" for place in lost]


@pytest.mark.parametrize(("aliases", "unlisted"), [(False, False), (False, True), (True, True), (True, False)])
def test_aliases_that_change_requests_are_listed_where_aliases_are(load, aliases, unlisted):
    result = load(f"""
includeAliasesInList: {str(aliases).lower()}
models: {{m: {{cmd: "x ${{PORT}}", aliases: [a], unlisted: {str(unlisted).lower()}, filters: {{stripParams: n}}}}}}
""")
    assert result.config.models["m"].variants["a"].unlisted is not (aliases and not unlisted)


@pytest.mark.parametrize(
    ("capabilities", "found"),
    [
        ("{in: [text, image]}", ("vision",)),
        ("{in: [text, image], out: [text], tools: true}", ("tools", "vision")),
        ("{in: [audio], out: [text]}", ("transcription",)),
        ("{in: [text], out: [audio]}", ("speech",)),
        ("{in: [text, image], out: [image]}", ("images", "image_edit")),
        ("{reranker: true}", ("rerank",)),
        ("{in: [text], out: [text]}", ()),
        ("{}", ()),
    ],
)
def test_capabilities(load, capabilities, found):
    result = load(f"models:\n  m:\n    cmd: x --port ${{PORT}}\n    capabilities: {capabilities}")
    assert result.config.models["m"].info.capabilities == found
    assert not result.notes


@pytest.mark.parametrize("text", ["x" * 2000, "costs ${MONEY", "two\nlines"])
def test_any_description_can_be_read_again(load, text):
    result = load(f"models:\n  m:\n    cmd: x --port ${{PORT}}\n    description: {json.dumps(text)}")
    assert result.config.models["m"].info.description == text[:1024]


@pytest.mark.parametrize(
    "setting",
    [
        "name: ''",
        "metadata: {}",
        "unlisted: false",
        "filters:",
        "filters: {stripParams: ''}",
        "aliases:",
        "ttl: -1",
    ],
)
def test_what_changes_nothing_is_not_worth_a_word(load, setting):
    assert not load(f"captureBuffer: 5\nmodels:\n  m:\n    cmd: x --port ${{PORT}}\n    {setting}").notes


@pytest.mark.parametrize(
    ("proxy", "url"),
    [
        ("http://localhost:9000", "http://127.0.0.1:9000"),
        ("http://127.0.0.1:9000/", "http://127.0.0.1:9000"),
        ("https://localhost:9000", "https://localhost:9000"),
        ("http://gpu.lan:9000/x/", "http://gpu.lan:9000/x"),
        ("http://[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_addresses(load, proxy, url):
    assert load(f"models: {{m: {{cmd: x, proxy: '{proxy}'}}}}").config.models["m"].address.url == url


@pytest.mark.parametrize("option", ["--port 9999", "--port=9999", "--listen-port 9999"])
def test_a_port_that_only_the_command_says(load, option):
    result = load(f"models: {{m: {{cmd: x {option}}}}}")
    assert result.config.models["m"].port == 9999
    assert result.differs() == ["models.m"]


def test_models_on_one_port_take_turns(load):
    result = load("""
        models:
          a: {cmd: x --port 9, proxy: "http://localhost:9"}
          b: {cmd: y --port 9, proxy: "http://127.0.0.1:9"}
          c: {cmd: z, proxy: "http://localhost:10", useModelName: one}
          d: {cmd: z, proxy: "http://localhost:10", useModelName: two}
    """)
    assert [model.shared_address for model in result.config.models.values()] == [True, True, False, False]


def test_llmux_listens_where_no_engine_does(load):
    text = "startPort: 3000\nmodels: {a: {cmd: 'x ${PORT}'}, b: {cmd: 'x ${PORT}'}}"
    assert load(text).config.port == 3002
    assert load(text, port=8080).config.port == 8080


def test_variables_of_the_engine_that_the_script_would_take_for_its_own(load):
    result = load("""
        models:
          m:
            cmd: srv --port ${PORT}
            cmdStop: end it
            env: ["PORT=7", "lower=${env.X} y", "A.B=1", "OK=a=b"]
    """)
    env = result.config.models["m"].env
    assert set(env) == {"COMMAND", "STOP_COMMAND", "OK"}
    assert env["OK"] == "a=b"
    before = ["env", "PORT=7", "lower=z y", "A.B=1"]
    assert result.words("m", X="z") == [*before, "srv", "--port", "5800"]
    assert result.words("m", "STOP_COMMAND", X="z") == [*before, "end", "it"]


def test_all_that_the_script_reads_is_known(load):
    script = find("process").text
    read = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", script.partition("\nset -u")[2]))
    own = sorted(name for name in read if not name.startswith("LLMUX_") and name not in {"HOME", "XDG_STATE_HOME"})
    assert {"COMMAND", "GRACE", "PORT"} <= set(own)
    result = load(f"models: {{m: {{cmd: 'srv ${{PORT}}', env: [{', '.join(f'{name}=x' for name in own)}]}}}}")
    assert set(result.config.models["m"].env) == {"COMMAND"}
    assert result.words("m") == ["env", *(f"{name}=x" for name in own), "srv", "5800"]


def test_a_variable_that_is_none(load):
    assert set(load("models: {m: {cmd: 'x ${PORT}', env: [A, =b, C=1]}}").lost()) == {
        "models.m.env[0]",
        "models.m.env[1]",
    }


def test_a_slow_end_is_waited_for(load):
    result = load("unloadTimeout: 400\nmodels: {m: {cmd: 'x ${PORT}'}}")
    model = result.config.models["m"]
    assert (model.env["GRACE"], model.timeouts.sleep) == ("400", 860)


@pytest.mark.parametrize(
    ("given", "wake"), [("", 1800), ("healthCheckTimeout: 500", 500), ("healthCheckTimeout: 1", 15)]
)
def test_how_long_a_wake_may_take(load, given, wake):
    assert load(f"{given}\nmodels: {{m: {{cmd: 'x ${{PORT}}'}}}}").config.models["m"].timeouts.wake == wake


class TestRelativePaths:
    def test_none(self, load):
        assert (
            "FOLDER" not in load("models: {m: {cmd: 'x --port ${PORT} -m /m/x.gguf a/b'}}").config.models["m"].env
        )

    def test_of_the_program(self, load, tmp_path):
        result = load("models: {m: {cmd: './bin/x --port ${PORT}'}}")
        assert result.config.models["m"].env["FOLDER"] == str(tmp_path)
        assert result.differs() == ["models.m.cmd"]

    @pytest.mark.parametrize("word", ["models/x.gguf", "--model=models/x.gguf"])
    def test_of_a_file_that_is_there(self, load, tmp_path, word):
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "x.gguf").touch()
        result = load(f"models: {{m: {{cmd: 'x --port ${{PORT}} {word}'}}}}")
        assert result.config.models["m"].env["FOLDER"] == str(tmp_path)
        assert not result.notes


class TestAliases:
    def test_one_that_is_a_models_name(self, load):
        result = load("models: {a: {cmd: 'x ${PORT}', aliases: [b, c, c]}, b: {cmd: 'x ${PORT}'}}")
        assert result.config.models["a"].aliases == ("c",)
        assert set(result.lost()) == {"models.a.aliases[0]"}

    def test_one_of_two_models(self, problems):
        text = "models:\n  a: {cmd: 'x ${PORT}', aliases: [c]}\n  b:\n    cmd: x ${PORT}\n    aliases:\n    - c"
        assert problems(text) == [
            (6, "models.b.aliases[0]: 'c' is already an alias of a; keep one of them"),
        ]

    def test_strange_names(self, load):
        name = 'org/mödel: "x" #1 \'${y}'
        quoted = yaml.safe_dump({name: {"cmd": "x --port ${PORT} '${MODEL_ID'"}})
        result = load("models:\n" + "\n".join("  " + line for line in quoted.splitlines()))
        assert list(result.config.models) == [name]


# ---- who runs beside whom


TWO = "models: {a: {cmd: 'x ${PORT}'}, b: {cmd: 'x ${PORT}'}, c: {cmd: 'x ${PORT}'}}\n"


def groups_of(result):
    return {name: (group.models, group.together) for name, group in result.config.groups.items()}


def test_groups_as_older_versions_write_them(load):
    result = load(TWO + "groups: {g: {swap: false, members: [a, b]}, none: {members: []}}")
    assert groups_of(result) == {"g": (("a", "b"), True)}
    assert not result.notes


def test_a_persistent_group_that_is_exclusive_is_not_quite_the_same(load):
    result = load(TWO + "groups: {g: {persistent: true, members: [a]}}")
    assert result.differs() == ["groups.g.persistent"]


def test_a_matrix(load):
    result = load(
        TWO + "matrix: {vars: {x: a}, evict_costs: {x: 5}, sets: {one: (x | b) & c, two: a, three: +one}}"
    )
    assert groups_of(result) == {"one-1": (("a", "c"), True), "one-2": (("b", "c"), True)}
    assert set(result.lost()) == {"matrix.evict_costs"}


def test_a_matrix_as_newer_versions_write_it(load):
    result = load(TWO + "routing: {router: {use: matrix, settings: {matrix: {sets: {s: a & b & d}}}}}")
    assert groups_of(result) == {"s": (("a", "b"), True)}
    assert set(result.lost()) == {"routing.router.settings.matrix.sets.s"}


def test_a_matrix_that_groups_cannot_say(load):
    result = load(TWO + "matrix: {sets: {s: a & b | b & c | a & c}}")
    assert len(result.config.groups) == 2
    assert "memory" in result.lost()["matrix.sets.s"]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("groups:\n  g: {members: [a]}\n  h: {members: [b, a]}", 4, "'a' is there already in the group g"),
        ("groups: {g: {members: [a, a]}}", 2, "'a' is there already; keep one"),
        ("groups: {g: {members: [a]}}\nmatrix: {sets: {s: a}}", 3, "is there beside `groups`"),
        ("groups: {g: {members: [a]}}\nrouting: {router: {use: group}}", 2, "is there beside `routing.router`"),
        ("routing: {router: {use: matrix, settings: {groups: {g: {members: [a]}}}}}", 2, "is not there"),
        ("routing: {router: {use: magic}}", 2, "must be group or matrix"),
        ("matrix:\n  sets:\n    s: a & (b", 4, "a parenthesis is never closed"),
        ("matrix: {sets: {}}", 2, "needs at least one entry"),
        ("groups: [g]", 2, "groups: must be a mapping"),
    ],
)
def test_what_is_wrong_with_them(problems, text, line, said):
    assert any(found[0] == line and said in found[1] for found in problems(TWO + text)), problems(TWO + text)


# ---- files that cannot be used


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", None, "is empty"),
        ("- a", None, "must be a mapping"),
        ("models:\n  m:\n    cmd: 'x\n", 3, "never closed"),
        ("models:\n  m:\n\tcmd: x", 3, "tab"),
        ("models: {}", 1, "models: has no model"),
        ("startPort: 1", 1, "models: has no model"),
        ("models:\n  m: {}", 2, "models.m: has no command"),
        ("models:\n  m:\n    cmd:", 2, "models.m: has no command"),
        ("models:\n  m: llama-server", 2, "must be a mapping"),
        ("models:\n  m:\n    cmd: [a, b]", 3, "must be text"),
        ("models:\n  m:\n    cmd: '# nothing'", 3, "has no command"),
        ('models:\n  m:\n    proxy: http://x\n    cmd: a "b', 4, "never closed"),
        ("models:\n  m:\n    cmd: x\n    proxy: localhost", 4, "is not an http or https URL"),
        ("models:\n  m:\n    cmd: x\n    proxy: http://a:b@c", 4, "contains a user or password"),
        ("models:\n  m:\n    cmd: x ${PORT}\n    ttl: soon", 4, "must be a whole number, not 'soon'"),
        ("models:\n  m:\n    cmd: x ${PORT}\n    ttl: -2", 4, "must be at least -1"),
        ("models:\n  m:\n    cmd: x ${PORT}\n    ttl: true", 4, "must be a whole number, not true"),
        ("models:\n  m:\n    cmd: x ${PORT}\n    env: {A: b}", 4, "must be a list"),
        ("models:\n  m:\n    cmd: x ${PORT}\n    aliases: one", 4, "must be a list"),
        ("models:\n  m:\n    cmd: x ${PORT}\n  m:\n    cmd: y", 4, "is there twice"),
        ("models:\n  m:\n    cmd: x", 1, "models: has no model that can be carried over"),
        ("models:\n  m:\n    cmd: x", 2, "nothing says on which port"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(problems, text, line, said):
    found = problems(text)
    assert any((line is None or at == line) and said in message for at, message in found), found


def test_everything_that_is_wrong_is_said_at_once(problems):
    found = problems("startPort: soon\nmodels:\n  m:\n    cmd: x ${nope}\n    ttl: soon\nglobalTTL: -1")
    assert [line for line, _ in found] == [1, 4, 5, 6]


@pytest.mark.parametrize(
    ("model", "place", "said"),
    [
        ("bad:\n    proxy: http://x", "models.bad", "has no command"),
        ("bad:", "models.bad", "has no command"),
        ("bad: {cmd: '# nothing', proxy: 'http://x'}", "models.bad.cmd", "has no command"),
        ('bad: {cmd: "x \'y ${PORT}"}', "models.bad.cmd", "before 'y ${PORT}' is never closed"),
        ("bad: {cmd: x, proxy: 'localhost:8080'}", "models.bad.proxy", "is not an http or https URL"),
    ],
)
def test_a_model_that_llama_swap_could_not_start_is_left_out_alone(load, model, place, said):
    result = load(f"models:\n  good: {{cmd: 'x ${{PORT}}'}}\n  {model}\ngroups: {{g: {{members: [good, bad]}}}}")
    assert list(result.config.models) == ["good"]
    assert said in result.lost()[place]


def test_a_stop_command_that_cannot_be_read_is_named_and_the_model_stays(load):
    result = load("models:\n  m:\n    cmd: x ${PORT}\n    cmdStop: kill 'x ${PID}")
    assert "before 'x ${PID}' is never closed" in result.lost()["models.m.cmdStop"]
    assert "STOP_COMMAND" not in result.config.models["m"].env


@pytest.mark.parametrize(("given", "asked"), [("health", "/health"), ("v1/models", "/v1/models"), ("''", "/")])
def test_a_health_path_without_a_slash(load, given, asked):
    result = load(f"models: {{m: {{cmd: 'x ${{PORT}}', checkEndpoint: {given}}}}}")
    assert result.config.models["m"].env.get("HEALTH_PATH", "/health") == asked


@pytest.mark.parametrize(
    ("given", "level", "differs"),
    [("INFO", "info", []), ("' Warn'", "warning", []), ("loud", "info", ["logLevel"]), ("''", "info", [])],
)
def test_any_log_level_is_one(load, given, level, differs):
    result = load(f"models: {{m: {{cmd: 'x ${{PORT}}'}}}}\nlogLevel: {given}")
    assert (result.config.log_level, result.differs(), result.lost()) == (level, differs, {})


def test_values_that_mean_nothing_there(load):
    result = load(
        "models: {m: {cmd: 'x ${PORT}', concurrencyLimit: -1, aliases: ['', true]}}\ngroups: {g: }\nhooks:\n"
    )
    assert result.config.models["m"].aliases == ("true",)
    assert (result.config.models["m"].max_in_flight, result.lost()) == (None, {})


def test_a_file_of_peers_alone(load):
    result = load("peers: {far: {proxy: 'http://h:1', models: [x]}}")
    assert not result.config.models
    assert result.config.virtual["x"].first == ("far/x",)


def test_a_program_in_a_folder_of_the_environment_is_not_relative(load):
    result = load("models: {m: {cmd: '${env.BIN}/srv --port ${PORT}'}}", {"BIN": "/opt"})
    assert result.words("m")[0] == "/opt/srv"
    assert ("FOLDER" in result.config.models["m"].env, result.notes) == (False, [])
    relative = load("models: {m: {cmd: './${env.BIN}/srv --port ${PORT}'}}", {"BIN": "bin"})
    assert "'./${env.BIN}/srv' is relative" in relative.notes[0].message


def test_the_policy_is_written_out_where_the_file_names_none(load):
    config = load("models: {a: {cmd: 'serve --port ${PORT}'}}").config
    assert config.policy.use == "idle"  # as llama-swap switches


CMD = 'cmd: "x ${PORT}"'


def test_what_llama_swap_does_not_know_is_named_wherever_it_is(load):
    got = load(f"""
        models: {{m: {{{CMD}, ttll: 3, filters: {{stripParam: top_p}}, capabilities: {{tool: true, in: [text]}}}}}}
        x-notes: [a]
        groups:
          always: {{persistent: true, preload: [m]}}
          some: {{members: [m], exclusiv: false}}
        hooks: {{on_start: {{preload: [m]}}, on_startup: {{preloads: [m]}}}}
        peers:
          near: {{proxy: "http://10.0.0.1:80", models: [y], filter: {{}}, timeouts: {{keepalive: 5, conect: 1}}}}
    """)
    assert set(got.lost()) - {"peers.near.timeouts.keepalive"} == {
        "models.m.ttll", "models.m.filters.stripParam", "models.m.capabilities.tool", "groups.always.preload",
        "groups.some.exclusiv", "hooks.on_start", "hooks.on_startup.preloads", "peers.near.filter",
        "peers.near.timeouts.conect",
    }  # fmt: skip
    assert got.lost()["groups.always.preload"] == "is an unknown setting of llama-swap"


def test_peers_without_keys_and_selectors_of_them(load):
    got = load(f"""
        models: {{m: {{{CMD}, filters: {{setParamsByID: {{"m:hot": {{temperature: 2}}}}}}}}, n: {{{CMD}}}}}
        peers:
          far away: {{proxy: "https://h.example/api", models: [org/x, y], timeouts: {{connect: 3}}}}
          near: {{proxy: "http://10.0.0.1:8080", models: [y, z], timeouts: {{keepalive: 5}}}}
        selectors:
          warm: {{strategy: warm, targets: [m, near/y]}}
          spills: {{strategy: spillover, targets: [n, org/x], settings: {{spillover: 4}}}}
          pinned: {{strategy: pin, targets: [z, m]}}
          hot: {{strategy: pin, targets: ["m:hot"]}}
          of nothing: {{strategy: warm, targets: [m, nowhere]}}
          of another kind: {{strategy: random, targets: [m]}}
    """)
    assert {name: (each.url, tuple(each.models)) for name, each in got.config.remotes.items()} == {
        "far-away": ("https://h.example:443/api", ("org/x", "y")),
        "near": ("http://10.0.0.1:8080", ("y", "z")),
    }
    assert got.config.remotes["far-away"].timeouts.connect == 3.0
    assert got.config.remotes_for_all
    assert {name: (each.kind, each.targets) for name, each in got.config.virtual.items()} == {
        "org/x": ("first", ("far-away/org/x",)),
        "y": ("first", ("far-away/y",)),
        "z": ("first", ("near/z",)),
        "warm": ("awake", ("m", "near/y")),
        "spills": ("first", ("n", "org/x")),
        "pinned": ("first", ("z",)),
        "hot": ("first", ("m:hot",)),
    }
    assert set(got.lost()) == {
        "peers.near.models[0]",
        "peers.near.timeouts.keepalive",
        "selectors.of nothing",
        "selectors.of another kind",
    }
    assert got.differs() == ["selectors.warm", "selectors.spills"]


@pytest.mark.parametrize(
    ("peer", "said"),
    [("{models: [a]}", "peers.p.proxy"), ("{proxy: x, models: [a]}", "peers.p.proxy"), ("[]", "peers.p")],
)
def test_peers_that_cannot_be_used(problems, peer, said):
    assert any(said in found for _, found in problems(f"models: {{m: {{{CMD}}}}}\npeers: {{p: {peer}}}"))


def test_a_peer_without_models_is_named(load):
    got = load(f'models: {{m: {{{CMD}}}}}\npeers: {{p: {{proxy: "http://x"}}}}')
    assert set(got.lost()) == {"peers.p"}
    assert not got.config.remotes


TEXTS = st.text(max_size=9) | st.from_regex(r"[-+0-9.eEox_:~<]{1,6}", fullmatch=True)


@given(st.dictionaries(TEXTS.filter(bool), TEXTS, min_size=1, max_size=3))
def test_what_is_written_is_read_as_it_was(settings):
    written = as_yaml({"a": settings, "b": list(settings.values())})
    read = parse_yaml(written)
    assert not read.problems, written
    assert read.data == {"a": settings, "b": list(settings.values())}
    assert yaml.safe_load(written) == read.data


@pytest.mark.parametrize("name", ["${X:-", "$${", "1e3"])
def test_a_peer_s_model_is_called_whatever_it_is(load, name):
    config = load(json.dumps({"peers": {"far": {"proxy": "http://h:1", "models": [name]}}})).config
    assert config.remotes["far"].models == {name: name}
    assert config.virtual[name].first == (f"far/{name}",)
