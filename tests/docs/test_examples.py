"""Every configuration among the examples is one that llmux takes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from llmux.config import Config
from llmux.config.gateway import GatewayConfig
from llmux.config.reference import gateway_schema
from tests.docs.pages import ROOT, markdown_files
from tests.harness.launcher import run

EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.rglob("config.*"))
HOOKS = ("wake", "sleep", "alive", "verify", "stop", "prefetch")


def name_of(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


@pytest.mark.parametrize("config", [*CONFIGS, EXAMPLES / "fleet" / "gateway.yaml"], ids=name_of)
def test_llmux_check_takes_it(config):
    code, said = run(["check", str(config)], env=os.environ, cwd=config.parent)
    assert code == 0, said


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_the_hook_scripts_that_it_names_are_there(config):
    for name, model in Config.from_file(config).models.items():
        scripts = [text.split()[0] for hook in HOOKS if (text := getattr(model, hook))]
        for script in scripts:
            if script.startswith(("./", "../")):
                assert os.access(config.parent / script, os.X_OK), f"{name}: {script}"


@pytest.mark.parametrize("folder", sorted(path for path in EXAMPLES.iterdir() if path.is_dir()), ids=name_of)
def test_each_example_says_what_it_is(folder):
    if folder.name != "__pycache__":
        assert (folder / "README.md").is_file()
        assert f"({folder.name}/README.md)" in (EXAMPLES / "README.md").read_text()


def test_there_are_examples():
    assert {"quickstart/config.yaml", "llama-cpp/config.yaml", "original/config.yaml"} <= set(
        map(name_of, CONFIGS)
    )


def test_the_compose_file_of_a_fleet_gives_the_gateway_what_its_configuration_names():
    folder = EXAMPLES / "fleet"
    gateway = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["gateway"]
    named = set(re.findall(r"\$\{(\w+)", (folder / "gateway.yaml").read_text()))
    assert named == set(gateway["environment"])
    mounted = [volume.partition(":")[0] for volume in gateway["volumes"] if volume.startswith("./")]
    assert all((folder / name).exists() for name in mounted)
    assert (folder / gateway["build"]["context"] / gateway["build"]["dockerfile"]).resolve().exists()
    assert (folder / gateway["build"]["context"] / "pyproject.toml").resolve().exists()


def test_the_units_of_a_fleet_start_what_is_there():
    folder = EXAMPLES / "fleet"
    unit = (folder / "llmux-gateway.service").read_text()
    host = (EXAMPLES / "systemd" / "llmux.service").read_text()
    program = re.search(r"ExecStart=(\S+) gateway -c (\S+)", unit)
    assert program
    assert f"ExecStart={program[1]} " in host
    socket = re.search(r"-R (\S+):localhost:3000", (folder / "llmux-tunnel.service").read_text())
    assert socket
    assert f"unix:{socket[1]}" in (folder / "gateway.yaml").read_text()


def test_the_schema_of_a_gateway_takes_its_example_and_nothing_unknown():
    schema = gateway_schema()
    given = yaml.safe_load((EXAMPLES / "fleet" / "gateway.yaml").read_text())
    jsonschema.validate(given, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(given | {"hostz": {}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(given | {"hosts": {"one": {}}}, schema)


# ---- the blocks of the pages

HASH = "$argon2id$v=19$m=19456,t=2,p=1$QIyPL+jCck3klU6Cum5SPg$GLiUOMkd+sA27C+hGgRDTV1tjvJeJGrPOlxownTtssY"
MODELS = ("qwen", "llama", "big", "mid", "small", "vision", "long-context", "embedder", "reranker")
BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> list[object]:
    """Return each block of YAML, with its page and line."""
    return [
        pytest.param(found[1], id=f"{path.relative_to(ROOT)}:{text[: found.start()].count(chr(10)) + 1}")
        for path in markdown_files()
        for text in [path.read_text()]
        for found in BLOCK.finditer(text)
    ]


def completed(text: str, folder: Path) -> dict[str, object]:
    """Return what a reader makes of a block: it stands beside the rest of the page, and … for one's own."""
    shown = yaml.safe_load(text.replace("$argon2id$…", HASH).replace(", …}", "}"))
    if "hosts" in shown or "# gateway.yaml" in text:
        hosts = {} if "fleet" in shown else {"hosts": {"gpu1": {"url": "http://10.0.0.11:3000"}}}
        return hosts | shown
    for script in re.findall(r"hooks: (\./\S+)", text):
        (folder / script).parent.mkdir(exist_ok=True)
        (folder / script).write_text("#!/bin/sh\n")
    if "env" in shown:  # the settings of one model
        shown = {"models": {"qwen": shown}}
    named = {name for name in MODELS if re.search(rf"\b{name}\b", text)} or {"qwen"}
    models = {name: {} for name in named - shown.get("virtual", {}).keys()} | shown.get("models", {})
    models |= {"small-1": {}} if "small-" in text else {}
    for number, model in enumerate(models.values()):
        if "cmd" not in model:
            model.setdefault("port", 9001 + number)
            model.update({} if "wake" in model else {"hooks": model.get("hooks", "llama-cpp")})
    keys = [
        {"name": name, "key": HASH} for name in ("alice", "boss", "eu-team") if re.search(rf"\b{name}\b", text)
    ]
    rest = {"api_keys": keys} if keys else {"remotes_for_all": True}
    if "intern" in text:
        rest["roles"] = {"intern": {}}
    if "openrouter/" in text:
        rest["remotes"] = {"openrouter": {"url": "https://openrouter.ai/api", "models": {"qwen3": "q"}}}
    return rest | shown | {"models": models}


@pytest.mark.parametrize("text", blocks())
def test_what_the_pages_show_is_taken(text, tmp_path):
    file = tmp_path / "config.yaml"
    whole = completed(text, tmp_path)
    file.write_text(yaml.safe_dump(whole, allow_unicode=True))
    environ = dict.fromkeys(re.findall(r"\$\{(\w+)\}", text), "1")
    kind = Config if "models" in whole else GatewayConfig
    kind.from_file(file, environ=environ)


def test_there_are_blocks():
    assert len(blocks()) > 25
