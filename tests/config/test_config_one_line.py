"""One line a model: `hooks:` and `cmd:`."""

import pytest

from llmux.config import Config
from llmux.config.model_settings import FIRST_PORT, GIVEN, PORTS, hook_folder
from llmux.core.spec import HookKind


def test_a_script_that_comes_with_llmux_by_its_name(read):
    model = read("models: {m: {port: 8001, hooks: llama-cpp, env: {MODEL: x.gguf}}}").models["m"]
    path = str(hook_folder() / "llama-cpp.sh")
    assert model.scripts == {kind: f"{path} {kind}" for kind in GIVEN}
    assert read("models: {m: {port: 8001, hooks: llama-cpp.sh}}").models["m"].wake == f"{path} wake"


def test_a_script_of_ones_own_and_hooks_that_are_given_beside_it(read):
    model = read("models: {m: {port: 8001, hooks: ./my.sh, verify: 'true', prefetch: ./p}}").models["m"]
    assert model.scripts == {
        HookKind.WAKE: "./my.sh wake",
        HookKind.SLEEP: "./my.sh sleep",
        HookKind.ALIVE: "./my.sh alive",
        HookKind.VERIFY: "true",
        HookKind.STOP: "./my.sh stop",
        HookKind.PREFETCH: "./p",
    }
    assert read("models: {m: {port: 8001, hooks: 'sh my.sh'}}").models["m"].wake == "sh my.sh wake"


def test_variables_are_the_shells(read):
    text = "models: {m: {port: 8001, hooks: '${HOME}/x.sh'}, n: {cmd: 'serve --port ${PORT} ${MORE}'}}"
    config = read(text, environ={})
    assert config.models["m"].wake == "${HOME}/x.sh wake"
    assert config.models["n"].env["COMMAND"] == "serve --port ${PORT} ${MORE}"


def test_a_command_and_the_port_that_is_chosen_for_it(read):
    text = "models: {a: {cmd: 'serve ${PORT}'}, b: {cmd: x, env: {HEALTH_PATH: /up}}, c: {cmd: x, port: 8003}}"
    config = read(text)
    a, b, c = config.models.values()
    assert a.wake == f"{hook_folder() / 'process.sh'} wake"
    assert b.env == {"COMMAND": "x", "PORT": str(b.port), "HEALTH_PATH": "/up"}
    assert (c.port, c.env["PORT"]) == (8003, "8003")
    assert a.port != b.port
    assert all(FIRST_PORT <= model.port < FIRST_PORT + PORTS for model in (a, b))
    assert [model.port for model in read(text).models.values()] == [a.port, b.port, c.port]  # at every start
    other = read(f"port: 3001\n{text}")
    assert other.models["a"].port != a.port  # two llmuxes on one machine
    by_url = read("models: {a: {cmd: x, url: 'http://127.0.0.1:8009'}}").models["a"]
    assert by_url.env["PORT"] == "8009"


def test_no_two_ports_are_the_same():
    models = {f"m{number}": {"cmd": "x"} for number in range(400)}
    taken = Config(models={"m0": {"cmd": "x"}}).models["m0"].port
    ports = [
        model.port for model in Config(models={**models, "other": {"cmd": "x", "port": taken}}).models.values()
    ]
    assert len(set(ports)) == len(ports) == 401


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            "port: 1, hooks: lama-cpp",
            "models.m.hooks: no script 'lama-cpp' comes with llmux; did you mean llama-cpp? One of your own is",
        ),
        ("port: 1, hooks: prefetch", "models.m.hooks: no script 'prefetch' comes with llmux; "),
        ("port: 1, hooks: ''", "models.m.hooks: is empty; "),
        ("port: 1, hooks: [a]", "models.m.hooks: is a list; "),
        ("cmd: ''", "models.m.cmd: is empty; "),
        ("cmd: 5, port: 1", "models.m.cmd: is not text; "),
        ("cmd: x, hooks: llama-cpp", "models.m: has both `hooks` and `cmd`; keep one of them"),
        ("hooks: llama-cpp", "models.m: needs `port`: "),
        ("cmd: x, url: 'ftp://x'", "models.m.url: "),
    ],
)
def test_what_is_wrong_with_a_line(refused, settings, why):
    lines = refused(f"models: {{m: {{{settings}}}}}")
    assert any(line.startswith(f"config.yaml:1: {why}") for line in lines), lines


@pytest.mark.parametrize(
    ("word", "setting"),
    [
        ("ttl", "idle_sleep"),
        ("idle_timeout", "idle_sleep"),
        ("keep_alive", "idle_sleep"),
        ("cmdStop", "stop"),
        ("useModelName", "upstream_model"),
        ("concurrencyLimit", "max_in_flight"),
        ("healthCheckTimeout", "timeouts.wake"),
    ],
)
def test_the_words_of_others_lead_to_the_setting(refused, word, setting):
    (line,) = refused(f"models: {{m: {{port: 1, hooks: ./h.sh, {word}: 5}}}}")
    assert line == f"config.yaml:1: models.m.{word}: unknown setting; here it is `{setting}`"


def test_a_word_of_others_in_the_wrong_place_and_one_that_nothing_is_like(refused):
    first, second = refused("usemodelname: x\nzzzz: 1\nmodels: {m: {port: 1, hooks: ./h.sh}}")
    assert first.endswith("unknown setting here; `upstream_model`, which does that, belongs under `models.NAME`")
    assert second == "config.yaml:2: zzzz: unknown setting; `llmux schema` prints all that there are"
