"""Files written for llmux 2.x load unchanged."""

import json

import pytest

from llmux.config import to_specs
from llmux.core.spec import HookKind

ORIGINAL = r"""
models:
  facebook/opt-125m:
    port: 8001
    wake: |
      CONTAINER=opt
      # already there
      if podman inspect "$CONTAINER" --format '{{.State.Status}}' 2>/dev/null | grep -q running; then
        exit 0
      fi
      podman run -d --name "$CONTAINER" \
        -v ~/.cache:/root/.cache -p 8001:8000 image ${EXTRA:-} ${UNSET}
      for i in $(seq 1 60); do
        curl -sf http://localhost:8001/health && exit 0
        sleep 1
      done
      exit 1
    sleep: podman container checkpoint --tcp-established opt
    alive: curl -sf http://localhost:8001/health

  Qwen/Qwen2.5-3B-Instruct:
    port: 8002
    wake: "true"
    sleep: "true"
    alive: "true"

policy:
  request_timeout_secs: 300
  drain_before_switch: false
  min_active_secs: 5
port: 3001
"""


def test_a_yaml_file(read, tmp_path):
    config = read(ORIGINAL)
    models, rules = to_specs(config)
    opt, qwen = models
    assert [opt.name, qwen.name] == ["facebook/opt-125m", "Qwen/Qwen2.5-3B-Instruct"]
    wake = opt.definition.scripts[HookKind.WAKE]
    assert wake.startswith("CONTAINER=opt\n")
    assert "$(seq 1 60)" in wake
    assert "${EXTRA:-} ${UNSET}" in wake
    assert "\\\n" in wake
    assert opt.hooks == {HookKind.WAKE, HookKind.SLEEP, HookKind.ALIVE}
    assert (opt.definition.host, opt.definition.port, opt.definition.cwd) == ("127.0.0.1", 8001, tmp_path)
    assert (rules.request_timeout, rules.min_active, rules.drain_timeout) == (300.0, 5.0, 0.0)
    assert config.port == 3001
    assert config.warnings == ()


MINIMAL = {"models": {"llama": {"port": 8001, "wake": "./w", "sleep": "./s", "alive": "./a"}}}


@pytest.mark.parametrize("name", ["c.json", "c.JSON", "c.conf", "c"])
@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_a_json_file(read, name, indent):
    config = read(json.dumps(MINIMAL, indent=indent), name=name)
    assert config.models["llama"].port == 8001
    assert (config.port, config.policy.request_timeout, config.policy.min_active) == (3000, None, 0.0)
    assert config.policy.drain_before_switch is True


@pytest.mark.parametrize("name", ["c.yml", "c.YAML", "c.conf"])
def test_a_yaml_file_by_any_name(read, name):
    assert read(f"# comment\nmodels: {json.dumps(MINIMAL['models'])}\n", name=name).models["llama"].wake == "./w"


def test_no_timeout_is_null(read):
    config = read(json.dumps(MINIMAL | {"policy": {"request_timeout_secs": None}}), name="c.json")
    assert config.policy.request_timeout is None


@pytest.mark.parametrize("name", ["request_timeout", "max_wait", "min_active", "drain_timeout"])
def test_both_spellings_at_once(refused, name):
    text = json.dumps(MINIMAL | {"policy": {name: 1, f"{name}_secs": 2}})
    assert refused(text) == [f"config.yaml:1: policy: says both `{name}` and `{name}_secs`; keep one of them"]


@pytest.mark.parametrize("name", ["request_timeout", "max_wait", "min_active", "drain_timeout"])
def test_either_spelling(read, name):
    long = read(json.dumps(MINIMAL | {"policy": {f"{name}_secs": 7}}))
    assert getattr(long.policy, name) == getattr(read(json.dumps(MINIMAL | {"policy": {name: "7s"}})).policy, name)


def test_a_problem_is_said_in_the_files_own_spelling(refused):
    text = "models: {a: {port: 1, wake: w, sleep: s, alive: a}}\npolicy:\n  min_active_secs: -1\n"
    (line,) = refused(text)
    assert line.startswith("config.yaml:3: policy.min_active_secs: is negative: -1; write seconds")
