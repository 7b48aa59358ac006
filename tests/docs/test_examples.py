"""Every configuration among the examples is one that llmux takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmux.config import Config
from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.rglob("config.*"))
HOOKS = ("wake", "sleep", "alive", "verify", "stop", "prefetch")


def name_of(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_llmux_check_takes_it(config):
    llmux = Path(sys.executable).with_name("llmux")
    done = subprocess.run(
        [llmux, "check", config], env=os.environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
