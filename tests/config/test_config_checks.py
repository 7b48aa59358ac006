"""What is refused, and what is said about it."""

import pytest

from llmux.config.gateway import GatewayConfig
from llmux.config.problems import with_lines

MISSING = "is missing; every model needs the hooks wake, sleep and alive (`hooks: NAME` gives all of them)"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("prot: 1", "config.yaml:1: prot: unknown setting; did you mean `port`?"),
        ("policy: {policy: fifo}", "config.yaml:1: policy.policy: unknown setting; did you mean `use`?"),
        ("wake: x", "config.yaml:1: wake: unknown setting here; it belongs under `models.NAME`"),
        ("max_wait: 1", "config.yaml:1: max_wait: unknown setting here; it belongs under `policy`"),
        (
            "policy: {capacity: 1}",
            "config.yaml:1: policy.capacity: unknown setting here; it belongs at the top level",
        ),
        # Nearer to a setting here by its letters, but a setting elsewhere as it stands.
        ("max_queued: 1", "config.yaml:1: max_queued: unknown setting here; it belongs under `models.NAME`"),
        ("hooks: x", "config.yaml:1: hooks: unknown setting here; it belongs under `models.NAME`"),
        ("request_timeout: 1", "config.yaml:1: request_timeout: unknown setting here; it belongs under `policy`"),
        ("otlp: x:1", "config.yaml:1: otlp: 'x:1' is not an http or https URL; write it as http://127.0.0.1:4318"),
        ("policy: {max_wiat: 1}", "config.yaml:1: policy.max_wiat: unknown setting; did you mean `max_wait`?"),
        ("backoff: {zz: 1}", "config.yaml:1: backoff.zz: unknown setting; known here: first, max"),
        ("port: 70000", "config.yaml:1: port: must be at most 65535, not 70000"),
        ("port: -1", "config.yaml:1: port: must be at least 0, not -1"),
        ("port: true", "config.yaml:1: port: must be a number, not true"),
        ("port: 1.5", "config.yaml:1: port: must be a whole number, not 1.5"),
        ("port: x", "config.yaml:1: port: must be a whole number, not 'x'"),
        ("port:", "config.yaml:1: port: must be a whole number, not null"),
        ("host: 7", "config.yaml:1: host: must be text (in quotes where YAML would read something else), not 7"),
        (
            "host: http://x",
            "config.yaml:1: host: 'http://x' is not an address to listen on; write 127.0.0.1, 0.0.0.0 or",
        ),
        ("on_exit: keep", "config.yaml:1: on_exit: must be leave or sleep, not 'keep'"),
        ("log_level: warn", "config.yaml:1: log_level: must be debug, info, warning or error, not 'warn'"),
        ("access_log: maybe", "config.yaml:1: access_log: must be true or false, not 'maybe'"),
        ("policy: fifo", "config.yaml:1: policy: must be a mapping of settings, not 'fifo'"),
        ("cors: x", "config.yaml:1: cors: must be a list, not 'x'"),
        ("cors: ['file://']", "config.yaml:1: cors[0]: 'file://' is not an origin; write scheme and host as"),
        ("cors: [x]", "config.yaml:1: cors[0]: 'x' is not an origin; write scheme and host"),
        ("forward: [v1]", "config.yaml:1: forward: 'v1' is not a path; write one as /v1/**"),
        ("admin_key: ''", "config.yaml:1: admin_key: must be printable ASCII without spaces"),
        (
            "admin_key: k\napi_keys: [{name: admin_key, key: b}]",
            "config.yaml:2: api_keys[0].name: 'admin_key' is the name of `admin_key`; choose another",
        ),
        ("api_keys: [a, 'b c']", "config.yaml:1: api_keys[1]: must be printable ASCII without spaces"),
        ("api_keys: ['$argon2id$…']", "config.yaml:1: api_keys[0]: is not a whole hash; copy all of it"),
        ("capacity: 18G", "config.yaml:1: capacity: '18G' has an unknown unit 'G'; write GiB or GB"),
        ("capacity: 0", "config.yaml:1: capacity: must be more than 0 bytes"),
        ("policy: {max_wait: null}", "config.yaml:1: policy.max_wait: is not a duration"),
        ("policy: {use: ''}", "config.yaml:1: policy.use: must not be empty, not ''"),
        ("backoff: {first: 1m}", "config.yaml:1: backoff.first: is longer than `backoff.max`"),
        ("backoff: {first: 0}", "config.yaml:1: backoff.first: must be longer than 0"),
        (
            "policy: {drain_before_switch: false, drain_timeout: 5}",
            "config.yaml:1: policy: says both `drain_before_switch: false` and a `drain_timeout`",
        ),
        (
            "capacity: 1GiB",
            "config.yaml:1: capacity: needs the `memory` of every model; missing for a, b; give it",
        ),
        ("default_model: bb", "config.yaml:1: default_model: 'bb' is not a model; did you mean 'b'?"),
        ("default_model: zz", "config.yaml:1: default_model: 'zz' is not a model; name one of `models`"),
        ("default_after: 0", "config.yaml:1: default_after: must be longer than 0"),
        ("port: 8001", "config.yaml:3: models.a.port: 127.0.0.1:8001 is llmux's own address"),
        ("{host: localhost, port: 8002}", None),
    ],
)
def test_a_setting(refused, model, settings, line):
    if line is None:
        settings = "host: 0.0.0.0\nport: 8002\ninsecure: true"
        line = "config.yaml:6: models.b.port: 127.0.0.1:8002 is llmux's own address"
    (said,) = refused(f"{settings}\nmodels:\n  a: {model()}\n  b: {model('port: 8002')}\n")
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("port: 0", "m.port: must be at least 1, not 0"),
        ("url: 'http://x', port: 1", "m: has both `port` and `url`; keep one of them"),
        (
            "port: 1, keep_awake: true, idle_sleep: 5m",
            "m.idle_sleep: is there beside `keep_awake: true`; keep one of them",
        ),
        ("preload: true", "m: needs `port`: the port on which its engine listens (or `url`)"),
        ("url: ftp://x", "m.url: 'ftp://x' is not an http or https URL; write it as http://127.0.0.1:8001"),
        ("url: 127.0.0.1:80", "m.url: '127.0.0.1:80' is not an http or https URL"),
        ("url: 'http://x:99999'", "m.url: 'http://x:99999' is not a URL: Port out of range 0-65535"),
        ("url: 'http://a:b@x'", "m.url: contains a user or password"),
        ("url: 'http://x/?a=b'", "m.url: 'http://x/?a=b' has a query or fragment"),
        ("url: 'http://x/a b'", "m.url: 'http://x/a b' is not a URL"),
        (
            "url: 'http://x/é'",
            "m.url: 'http://x/é' has other characters than ASCII in its path; percent-encode them",
        ),
        ("url: 'http://é..x'", "m.url: 'é..x' is not a host name"),
        (
            "port: 1, verify: true",
            'm.verify: is read as the truth value true; write the command in quotes: "true"',
        ),
        ("port: 1, stop: [a, b]", "m.stop: is a list; write one script: on one line, or on the lines after `|`"),
        ("port: 1, stop: ' '", "m.stop: is empty; write a command"),
        ("port: 1, stop: 7", "m.stop: is not text; write a command in quotes"),
        ('port: 1, stop: "a\\0b"', "m.stop: holds a NUL character"),
        (f"port: 1, stop: {'x' * 131_072}", "m.stop: is longer than 128 KiB"),
        ("port: 1, max_in_flight: 0", "m.max_in_flight: must be at least 1, not 0"),
        ("port: 1, max_in_flight: true", "m.max_in_flight: must be a number, not true"),
        ("port: 1, max_queued: -1", "m.max_queued: must be at least 0, not -1"),
        ("port: 1, idle_sleep: 0", "m.idle_sleep: must be longer than 0"),
        ("port: 1, timeouts: {wake: 0}", "m.timeouts.wake: must be longer than 0"),
        ("port: 1, timeouts: {wkae: 1}", "m.timeouts.wkae: unknown setting; did you mean `wake`?"),
        ("port: 1, aliases: x", "m.aliases: must be a list, not 'x'"),
        ("port: 1, aliases: ['']", "m.aliases[0]: is empty"),
        ("port: 1, aliases: [m]", "m.aliases[0]: 'm' is the name of a model; choose another"),
        ("port: 1, aliases: [x, x]", "m.aliases[1]: 'x' is already an alias of m; keep one of them"),
        ("port: 1, upstream_model: ''", "m.upstream_model: is empty"),
        ("port: 1, env: {1A: b}", "m.env.1A: is not a name for an environment variable"),
        ("port: 1, env: {LLMUX_MODEL: b}", "m.env.LLMUX_MODEL: is reserved"),
        ("port: 1, env: {A: [1]}", "m.env.A: must be text"),
        ("port: 1, env: {A: }", 'm.env.A: has no value; write "" for the empty text'),
        ("port: 1, memory: lots", "m.memory: 'lots' is not a size"),
        ("port: 1, cards: [0]", "m.cards: unknown setting"),
        ("port: 1, gpus: 0", "m.gpus: must be a list; write [0]"),
        ("port: 1, gpus: [[0]]", "m.gpus[0]: is not a name of a GPU"),
        ("port: 1, memory: {}", "m.memory: names no GPU"),
        ("port: 1, memory: {0: lots}", "m.memory: 0: 'lots' is not a size"),
        ("port: 1, gpus: [0]", "m.gpus: names a GPU; say at the top level what each has"),
    ],
)
def test_a_models_setting(refused, model, settings, line):
    (said,) = refused(f"models:\n  m: {model(settings)}\n")
    assert said.startswith(f"config.yaml:2: models.{line}")


@pytest.mark.parametrize("hook", ["wake", "sleep", "alive"])
def test_a_missing_hook(refused, hook):
    hooks = "".join(f"    {name}: x\n" for name in ("wake", "sleep", "alive") if name != hook)
    assert refused(f"models:\n  m:\n    port: 1\n{hooks}") == [f"config.yaml:2: models.m.{hook}: {MISSING}"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ('""', "is empty"),
        ('"  "', "is empty"),
        ('"a "', "'a ' begins or ends with a blank; remove it"),
        ('"a\\nb"', "cannot be printed"),
        ("x" * 257, "longer than 256"),
        ('"\\u200b"', "printed"),
    ],
)
def test_names_that_cannot_be(refused, model, name, words):
    (said,) = refused(f"models:\n  {name}: {model()}\n")
    assert words in said


@pytest.mark.parametrize(
    "name", ["7", "true", "null", "a b", "Qwen/Qwen2.5-3B-Instruct", "größe:1", "x-y", "x" * 256]
)
def test_names_that_can_be(read, model, name):
    assert list(read(f"models:\n  {name}: {model()}\n").models) == [name]


def test_every_problem_is_said_in_the_order_of_the_file(refused):
    how = "write seconds, or a duration such as 90s, 10m, 1h30m"
    assert refused(
        """\
        prot: 3000
        models:
          a:
            port: 8001
            wake: true
            sleep: ./s
            timeouts: {wake: soon}
            port: 8002
          b: {}
        policy:
          min_active: -1
          max_wait: ${NO}
        """
    ) == [
        "config.yaml:1: prot: unknown setting; did you mean `port`?",
        f"config.yaml:3: models.a.alive: {MISSING}",
        'config.yaml:5: models.a.wake: is read as the truth value true; write the command in quotes: "true"',
        f"config.yaml:7: models.a.timeouts.wake: 'soon' is not a duration; {how}",
        "config.yaml:8: models.a.port: is there twice, first on line 4; keep one of them",
        f"config.yaml:9: models.b.wake: {MISSING}",
        f"config.yaml:9: models.b.sleep: {MISSING}",
        f"config.yaml:9: models.b.alive: {MISSING}",
        f"config.yaml:11: policy.min_active: is negative: -1; {how}",
        "config.yaml:12: policy.max_wait: the variable NO is not set; set it, or write ${NO:-default}",
    ]


def test_secrets_are_not_repeated(refused, model):
    said = "\n".join(refused(f"admin_key: 12345\napi_keys: [67890, 'se cret']\nmodels: {{a: {model()}}}\n"))
    assert "admin_key: must be text" in said
    assert "12345" not in said
    assert "67890" not in said
    assert "se cret" not in said


@pytest.mark.parametrize(
    ("one", "two", "fine"),
    [
        ("port: 8001", "port: 8001", False),
        ("port: 8001", "url: 'http://localhost:8001'", False),
        ("url: 'http://gpu:80/'", "url: 'http://GPU'", False),
        ("url: 'http://gpu/a'", "url: 'http://gpu/b'", True),
        ("port: 8001, upstream_model: x", "port: 8001", False),
        ("port: 8001, upstream_model: x", "port: 8001, upstream_model: y", True),
        ("port: 8001, shared_address: true", "port: 8001", False),
        ("port: 8001, shared_address: true", "port: 8001, shared_address: true", True),
        ("port: 8001, shared_address: true, upstream_model: x", "port: 8001, upstream_model: y", True),
        ("port: 8001", "url: 'http://gpu:8001'", True),
        ("url: 'http://[::1]:8001'", "port: 8001", False),
    ],
)
def test_two_models_on_one_address(read, refused, model, one, two, fine):
    text = f"models:\n  a: {model(one)}\n  b: {model(two)}\n"
    if fine:
        assert list(read(text).models) == ["a", "b"]
    else:
        said = refused(text)
        assert "is also the address of" in said[0]
        assert "shared_address: true" in said[0]
        assert any("url: " in line or ".port: " in line for line in said)


def test_only_those_who_do_not_share_are_named(refused, model):
    (said,) = refused(f"models:\n  a: {model('port: 1, shared_address: true')}\n  b: {model('port: 1')}\n")
    assert said.startswith("config.yaml:3: models.b.port: 127.0.0.1:1 is also the address of a; ")


def test_an_alias_of_two_models(refused, model):
    text = f"models:\n  a: {model('port: 1, aliases: [x, b]')}\n  b: {model('port: 2, aliases: [x]')}\n"
    assert refused(text) == [
        "config.yaml:2: models.a.aliases[1]: 'b' is the name of a model; choose another",
        "config.yaml:3: models.b.aliases[0]: 'x' is already an alias of a; keep one of them",
    ]


def test_a_model_that_can_never_fit(refused, model):
    (said,) = refused(f"capacity: 24GiB\nmodels:\n  a: {model('port: 1, memory: 30GiB')}\n")
    assert said.startswith(
        "config.yaml:3: models.a.memory: 30GiB does not fit into the capacity of 24GiB: 6GiB too much"
    )


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        ("host: 0.0.0.0\ninsecure: true", "", None),
        ("host: 0.0.0.0\napi_keys: [k]", "", None),
        ("host: 0.0.0.0\napi_keys: [{key: k, name: me}]", "", None),
        ("host: localhost", "", None),
        ("host: 127.0.0.2", "", None),
        ("policy: {request_timeout: 0}", "", "policy.request_timeout: is 0"),
        ("cors: ['app://*']", "", "cors[0]: 'app://*' lets nothing in: a * stands alone, for all; write each"),
        ("cors: ['http://a', 'http://*.lan:1']", "", "cors[1]: 'http://*.lan:1' lets nothing in"),
        ("cors: ['*']", "", None),
        ("capacity: 24", ", memory: 18", "capacity: is only 24 bytes; write a unit, as 24GiB"),
        ("capacity: 24GiB", ", memory: 18", "models.a.memory: is only 18 bytes; write a unit, as 18GiB"),
        ("capacity: 24GiB", ", memory: 0", None),
        ("port: 3000", ", memory: 1GiB", "models.a.memory: has no effect without the top-level `capacity`"),
        ("port: 3000", ", shared_address: true", "models.a.shared_address: no other model has this address"),
        ("port: 3000", "", None),
    ],
)
def test_warnings(read, model, settings, more, words):
    warnings = read(f"{settings}\nmodels:\n  a: {model('port: 8001' + more)}\n").warnings
    if words is None:
        assert warnings == ()
    else:
        assert warnings[0].startswith(words)


@pytest.mark.parametrize("setting", ["preload", "keep_awake"])
@pytest.mark.parametrize(
    ("top", "memory", "named"),
    [
        ("port: 3000", {}, {"b": "a", "d": "a"}),
        ("capacity: 24GiB", {"a": "8GiB", "b": "8GiB", "d": "9GiB"}, {"d": "a and b"}),
        ("capacity: 24GiB", {"a": "8GiB", "b": "8GiB", "d": "8GiB"}, {}),
        ("groups: {g: {models: [a, d], together: true}}", {}, {"b": "a"}),
    ],
)
def test_more_than_can_be_awake_together_are_to_be(read, model, setting, top, memory, named):
    lines = [top, "models:"]
    for port, name in enumerate("abcd", 1):
        own = "" if name == "c" else f", {setting}: true"
        size = f", memory: {memory.get(name, '24GiB')}" if memory else ""
        lines.append(f"  {name}: {model(f'port: {port}{own}{size}')}")
    said = "models.{}.{}: cannot be awake beside {}, and so waits for a request"
    assert read("\n".join(lines)).warnings == tuple(said.format(one, setting, by) for one, by in named.items())


@pytest.mark.parametrize("name", ["a;b", "a\\b", "..", "a/./b", "%2e.", "a%3Bb", "a%00b"])
def test_a_name_that_can_stand_in_no_path(read, model, name, tmp_path):
    [warning] = read(f"models:\n  '{name}': {model()}\n").warnings
    assert warning.startswith(f"models.{name}: its name can stand in no path")
    assert read(f"models:\n  '{name}': {model('port: 1, aliases: [a.b]')}\n").warnings == ()
    fleet = f"fleet: {{store: embedded, url: http://h:1, name: '{name}'}}\n"
    [warning] = read(f"{fleet}models:\n  a: {model()}\n").warnings
    assert warning.startswith("fleet.name: the name can stand in no path")
    (tmp_path / "gateway.yaml").write_text(f"hosts:\n  '{name}': {{url: http://h:1}}\n  b: {{url: http://h:2}}\n")
    [warning] = GatewayConfig.from_file(tmp_path / "gateway.yaml").warnings
    assert warning.startswith(f"hosts.{name}: the name can stand in no path")


class Counted(dict):
    looked = 0

    def __iter__(self):
        self.looked += 1
        return super().__iter__()

    def items(self):
        self.looked += 1
        return super().items()


def test_a_message_has_the_line_of_the_place_that_it_begins_with():
    models = {("models", f"m{n}", "memory"): 10 + n for n in range(100)}
    lines = Counted({(): 1, ("models",): 2, ("models", "a.b"): 3, ("routes", 0): 4, **models})
    texts = {
        "models.a.b.wake: is missing": 3,
        "routes[0].when: fits nothing": 4,
        "routes[01]: is no route": None,
        "modelsX: is unknown": None,
        "is not there": None,
        **{f"models.m{n}.memory: has no effect: none": 10 + n for n in range(100)},
    }
    assert dict(with_lines(texts, lines)) == texts
    assert lines.looked == 1  # not for each message again


HASH = "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHRzb21lc2FsdA$" + "A" * 43


@pytest.mark.parametrize("host", ["0.0.0.0", "'::'", "gpu.lan", "192.168.1.2"])
def test_beyond_this_machine_only_with_keys(read, refused, model, host):
    text = f"host: {host}\nmodels: {{a: {model()}}}\n"
    (said,) = refused(text)
    assert said.startswith(
        f"config.yaml:1: host: is {host.strip(chr(39))}, beyond this machine, without `api_keys`"
    )
    assert "llmux key new" in said
    assert "insecure: true" in said
    assert read(f"insecure: true\n{text}")
    assert read(f"api_keys: [k]\n{text}")
    (said,) = refused(f"admin_key: k\n{text}")
    assert "beyond this machine" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (f"[{HASH}]", "config.yaml:1: api_keys[0]: is not a whole hash; copy all of it, in quotes"),
        (f"['{HASH[:-30]}']", "config.yaml:1: api_keys[0]: is not a whole hash"),
        ("['$argon2i$v=19$x']", "config.yaml:1: api_keys[0]: is a hash of another kind than Argon2id"),
        ("[{name: a}]", "config.yaml:1: api_keys[0].key: is missing"),
        ("[{name: a, key: k, secret: s}]", "config.yaml:1: api_keys[0]: has a setting that is not known here"),
        (
            "[{key: k, wieght: 3}]",
            "config.yaml:1: api_keys[0]: has a setting that is not known here; did you mean `weight`?",
        ),
        ("[{name: '', key: k}]", "config.yaml:1: api_keys[0].name: "),
        ("[{name: a, key: 'x y'}]", "config.yaml:1: api_keys[0].key: must be printable ASCII"),
        ("[[k]]", "config.yaml:1: api_keys[0]: must be a key, its hash, or {name: …, key: …}"),
        ("[{name: a, key: k}, {name: a, key: l}]", "config.yaml:1: api_keys[1].name: 'a' is the name of another"),
        ("secret-k", "config.yaml:1: api_keys: must be a list"),
    ],
)
def test_keys_that_cannot_be(refused, model, keys, said):
    found = refused(f"api_keys: {keys}\nmodels: {{a: {model()}}}\n")
    assert found[0].startswith(said)
    assert "secret-k" not in found[0]


def test_keys_that_can_be(read, model):
    config = read(f"api_keys: ['{HASH}', {{name: me, key: '{HASH}'}}, plain]\nmodels: {{a: {model()}}}\n")
    assert [entry.name for entry in config.api_keys] == [None, "me", None]
    assert config.api_keys[2].key.get_secret_value() == "plain"
    assert "argon2" not in repr(config)
    assert "plain" not in repr(config)
