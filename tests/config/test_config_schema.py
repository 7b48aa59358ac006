"""What is accepted, and what becomes of it."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from llmux.config import Config, EngineDefinition, ModelConfig, PolicyConfig, to_specs
from llmux.config.access import DEFAULT_FORWARD
from llmux.config.specs import first_costs
from llmux.core.spec import DEFAULT_TIMEOUTS, HookKind, Rules
from llmux.errors import ConfigError

HOOKS = {"wake": "w", "sleep": "s", "alive": "a"}

EVERYTHING = """
host: 127.0.0.1
port: 4000
x-common: &common {max_in_flight: 32, timeouts: {wake: 1h}}
models:
  llama:
    <<: *common
    port: 8001
    wake: ./w
    sleep: ./s
    alive: ./a
    verify: ./v
    stop: ./x
    prefetch: ./p
    aliases: [gpt-4o-mini]
    upstream_model: served
    memory: 18GiB
    idle_sleep: null
    preload: true
    env: {CTX: 8192, RATIO: 0.90, ON: true}
    cost: {wake: 20s, sleep: 5s}
  qwen: {url: "https://gpu:9000/base/", wake: w, sleep: s, alive: a, memory: 5GB, shared_address: true}
policy:
  use: fifo
  request_timeout: 5m
  max_wait: 2m
  min_active: 10
  drain_timeout: 1m
capacity: 24GiB
backoff: {first: 500ms, max: 1m}
alive_every: 0
alive_failures: 5
idle_sleep: 10m
state: ./state.json
on_exit: sleep
shutdown_grace: 1m
max_body: 1GiB
max_buffered: 2GiB
body_idle_timeout: 10s
forward: [/mine/**, default, /v1/**]
cors: ["http://LOCALHOST:5173"]
admin_key: secret-a
api_keys: [secret-b]
access_log: true
log_level: debug
log_format: json
"""


def test_defaults(read, model):
    config = read(f"models: {{a: {model()}}}\n")
    models, rules = to_specs(config)
    assert rules == Rules()
    assert models[0].timeouts == DEFAULT_TIMEOUTS
    assert (models[0].max_in_flight, models[0].max_queued, models[0].idle_sleep) == (None, 1000, None)
    assert config.host == "127.0.0.1"
    assert config.port == 3000
    assert config.policy.use == "adaptive"
    assert config.forward == DEFAULT_FORWARD
    assert (config.max_body, config.max_buffered, config.body_idle_timeout) == (2**28, 2**30, 60.0)
    assert (config.admin_key, config.api_keys, config.cors) == (None, (), ())


def test_everything(read, tmp_path):
    config = read(EVERYTHING)
    (llama, qwen), rules = to_specs(config)
    assert rules == Rules(
        request_timeout=300.0,
        max_wait=120.0,
        min_active=10.0,
        drain_timeout=60.0,
        backoff_first=0.5,
        backoff_max=60.0,
        alive_every=0.0,
        alive_failures=5,
        capacity=24 * 2**30,
        shutdown_grace=60.0,
        sleep_on_exit=True,
    )
    assert llama.definition == EngineDefinition(
        name="llama",
        host="127.0.0.1",
        port=8001,
        url="http://127.0.0.1:8001",
        scripts=dict(zip(HookKind, ["./w", "./s", "./a", "./v", "./x", "./p"], strict=True)),
        env={"CTX": "8192", "RATIO": "0.90", "ON": "true"},
        cwd=tmp_path,
        upstream_model="served",
    )
    assert llama.hooks == frozenset(HookKind)
    assert llama.timeouts[HookKind.WAKE] == 3600.0
    assert (llama.max_in_flight, llama.memory, llama.idle_sleep, llama.preload) == (32, 18 * 2**30, None, True)
    assert llama.shared_address is None
    assert (qwen.definition.tls, qwen.definition.host, qwen.definition.port) == (True, "gpu", 9000)
    assert (qwen.definition.base_path, qwen.definition.url) == ("/base", "https://gpu:9000/base")
    assert (qwen.shared_address, qwen.idle_sleep, qwen.memory) == ("gpu:9000", 600.0, 5 * 10**9)
    assert first_costs(config) == {"llama": (20.0, 5.0)}
    assert config.names == {"llama": "llama", "qwen": "qwen", "gpt-4o-mini": "llama"}
    assert config.forward == ("/mine/**", *DEFAULT_FORWARD)
    assert config.cors == ("http://localhost:5173",)
    assert config.state_path == tmp_path / "state.json"
    assert config.admin_key.get_secret_value() == "secret-a"
    assert "secret" not in repr(config)


def test_shared_addresses_are_one_however_they_are_written(read, model):
    config = read(
        f"""
        models:
          a: {model("port: 8001, shared_address: true")}
          b: {model("url: 'http://localhost:8001', shared_address: true")}
          c: {model("url: 'http://[::1]:8001/x', shared_address: true")}
        """
    )
    assert {spec.shared_address for spec in to_specs(config)[0]} == {"127.0.0.1:8001"}
    assert to_specs(config)[0][2].definition.url == "http://[::1]:8001/x"


def test_drain_before_switch_false_is_no_drain(read, model):
    config = read(f"policy: {{drain_before_switch: false, drain_timeout: 0}}\nmodels: {{a: {model()}}}\n")
    assert to_specs(config)[1].drain_timeout == 0.0


CHANGES = {
    "max_in_flight": ({"max_in_flight": 3}, True),
    "aliases": ({"aliases": ("x",)}, True),
    "timeouts": ({"timeouts": {"wake": 3}}, True),
    "memory": ({"memory": 3}, True),
    "wake": ({"wake": "other"}, False),
    "stop": ({"stop": "new"}, False),
    "env": ({"env": {"A": "1"}}, False),
    "port": ({"port": 8002}, False),
    "upstream_model": ({"upstream_model": "x"}, False),
}


@pytest.mark.parametrize(("change", "same"), CHANGES.values(), ids=CHANGES)
def test_a_definition_changes_with_what_a_running_engine_is(change, same):
    before = Config.model_validate({"models": {"a": {"port": 8001, **HOOKS}}})
    after = Config.model_validate({"models": {"a": {"port": 8001, **HOOKS} | change}})
    assert (to_specs(before)[0][0].definition == to_specs(after)[0][0].definition) is same


def test_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(
        models={"a": ModelConfig(port=8001, wake="w", sleep="s", alive="a", env={"N": 3})},
        policy=PolicyConfig(max_wait="2m", min_active=3),
    )
    monkeypatch.chdir("/")
    assert (config.file, config.folder) == (None, tmp_path)
    assert to_specs(config)[0][0].definition.cwd == tmp_path
    assert config.policy.max_wait == 120.0
    with pytest.raises(ValidationError):
        config.port = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        Config.model_validate({"models": {"a": {"port": 1, **HOOKS}}, "prot": 1})
    with pytest.raises(ValidationError, match=r"models\.a\.memory: 2GiB does not fit"):
        Config.model_validate({"models": {"a": {"port": 1, "memory": "2GiB", **HOOKS}}, "capacity": "1GiB"})
    # Variables are a matter of files: Python has os.environ.
    assert ModelConfig(port=1, wake="w", sleep="s", alive="a", upstream_model="${X}").upstream_model == "${X}"


def test_the_same_file_twice_is_equal(read):
    assert read(EVERYTHING) == read(EVERYTHING)
    assert read(EVERYTHING) != read(EVERYTHING.replace("port: 4000", "port: 4001"))


class TestState:
    @pytest.fixture(autouse=True)
    def home(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))

    def test_two_configurations_never_share_one(self, read, model, tmp_path):
        text = f"models: {{a: {model()}}}\n"
        (tmp_path / "other").mkdir()
        paths = {read(text, name=name).state_path for name in ("a.yaml", "b.yaml", "other/a.yaml")}
        assert len(paths) == 3
        assert {path.parent for path in paths} == {tmp_path / "xdg" / "llmux"}
        assert read(text, name="a.yaml").state_path in paths

    def test_none(self, read, model):
        assert read(f"state: null\nmodels: {{a: {model()}}}\n").state_path is None

    @pytest.mark.parametrize("value", ["", "relative/path"])
    def test_home_without_a_valid_variable(self, read, model, monkeypatch, tmp_path, value):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path))
        path = read(f"models: {{a: {model()}}}\n").state_path
        assert path.parent == tmp_path / ".local" / "state" / "llmux"
        assert path.name.startswith("config-")

    def test_no_home_at_all(self, read, model, monkeypatch):
        def no_home():
            raise RuntimeError

        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
        with pytest.raises(ConfigError, match="no home folder is known"):
            _ = read(f"models: {{a: {model()}}}\n").state_path

    def test_in_python_it_depends_on_folder_and_port(self):
        one, two = (
            Config.model_validate({"port": n, "models": {"a": {"port": 1, **HOOKS}}}) for n in (1000, 1001)
        )
        assert one.state_path != two.state_path
