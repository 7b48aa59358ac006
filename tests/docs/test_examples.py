"""Every configuration among the examples is one that llmux takes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from llmux.config import Config
from llmux.config.reference import gateway_schema
from tests.docs.pages import ROOT
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
