"""A definition survives in the state file."""

from __future__ import annotations

import json

import pytest

from llmux.config import Config, to_specs
from llmux.config.specs import recall, remember
from llmux.core.spec import ModelSpec

TEXT = """
models:
  a/b:
    url: https://box:8443/v
    wake: ./up.sh wake
    sleep: "pkill x"
    alive: "true"
    verify: ./free.sh
    upstream_model: other
    env: {A: "1", B: "ü"}
    timeouts: {wake: 90s}
    levels: [ram: 3GiB, disk]
"""


def spec(tmp_path) -> ModelSpec:
    file = tmp_path / "config.yaml"
    file.write_text(TEXT)
    return to_specs(Config.from_file(file))[0][0]


def test_what_hooks_need_comes_back(tmp_path):
    before = spec(tmp_path)
    after = recall(json.loads(json.dumps(remember(before))))
    assert after.name == before.name
    assert after.hooks == before.hooks
    assert after.timeouts == before.timeouts
    assert after.levels == before.levels
    assert len(after.levels) == 2
    for what in ("name", "host", "port", "tls", "base_path", "url", "scripts", "env", "cwd"):
        assert getattr(after.definition, what) == getattr(before.definition, what), what


def test_what_is_for_no_engine_is_not_kept():
    assert remember(ModelSpec("a", definition="mine")) is None


@pytest.mark.parametrize("damaged", [None, [], {}, {"name": "a"}, {"scripts": {"dance": "x"}}])
def test_a_damaged_one_is_an_error(damaged):
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        recall(damaged)
