"""The setting ``hosts``: what is no name is refused where it stands."""

from __future__ import annotations

import json

import pytest

from llmux.config import Config
from llmux.errors import ConfigError
from llmux.middleware.origin import Origins
from llmux.upstream.engine import EngineAddress

MODEL = {"port": 9, "wake": "true", "sleep": "true", "alive": "true"}


@pytest.mark.parametrize("name", ["http://gpu.lan", "gpu.lan:3000", "gpu.lan/x", "a b", "", "*.lan", "é..x"])
def test_what_is_no_name_is_refused_where_it_stands(tmp_path, name):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"models": {"m": MODEL}, "hosts": ["gpu.lan", name]}))
    with pytest.raises(ConfigError) as caught:
        Config.from_file(file, environ={})
    assert caught.value.path.startswith("hosts")
    assert "1" in caught.value.path


def test_international_names_are_as_browsers_send_them(tmp_path):
    file = tmp_path / "config.json"
    model = {key: value for key, value in MODEL.items() if key != "port"} | {"url": "http://GPÜ:8001"}
    given = {"models": {"m": model}, "hosts": ["gpü.example"], "cors": ["https://Bücher.example:8443", "*"]}
    file.write_text(json.dumps(given))
    config = Config.from_file(file, environ={})
    assert config.hosts == ("xn--gp-yka.example",)
    assert config.cors == ("https://xn--bcher-kva.example:8443", "*")
    assert EngineAddress.from_url("http://gpü:8001").host_header == b"xn--gp-yka:8001"
    assert config.models["m"].address.authority == "xn--gp-yka:8001"


@pytest.mark.parametrize(
    "origin", ["app://obsidian.md", "chrome-extension://mlpkjgfoibnhfbfjaeogkgdhkjplgaof", "tauri://localhost"]
)
def test_programs_that_are_pages_may_be_listed_under_schemes_of_their_own(tmp_path, origin):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"models": {"m": MODEL}, "cors": [origin.upper()]}))
    config = Config.from_file(file, environ={})
    assert config.cors == (origin,)
    origins = Origins(config.cors)
    assert origins.check(origin, "127.0.0.1:3000").headers["Access-Control-Allow-Origin"] == origin
    assert not origins.check("app://other.example", "127.0.0.1:3000").allowed
