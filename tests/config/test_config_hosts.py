"""The setting ``hosts``: what is no name is refused where it stands."""

from __future__ import annotations

import json

import pytest

from llmux.config import Config
from llmux.errors import ConfigError

MODEL = {"port": 9, "wake": "true", "sleep": "true", "alive": "true"}


@pytest.mark.parametrize("name", ["http://gpu.lan", "gpu.lan:3000", "gpu.lan/x", "a b", "", "*.lan"])
def test_what_is_no_name_is_refused_where_it_stands(tmp_path, name):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"models": {"m": MODEL}, "hosts": ["gpu.lan", name]}))
    with pytest.raises(ConfigError) as caught:
        Config.from_file(file, environ={})
    assert caught.value.path.startswith("hosts")
    assert "1" in caught.value.path
