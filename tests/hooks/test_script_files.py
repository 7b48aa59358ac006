"""What every shipped hook script has to look like."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmux.cli.hook_scripts import find
from llmux.config import Config
from tests.engine.real import ROOT
from tests.hooks.shared_blocks import blocks_of

SCRIPTS = sorted((ROOT / "hooks").glob("*.sh"))
ENGINE_SCRIPTS = [script for script in SCRIPTS if "wake)" in script.read_text()]
# Set by llmux or the system, or the script's own business, or awk's.
GIVEN = {"HOME", "IFS", "NF", "XDG_STATE_HOME", "CUDA_VISIBLE_DEVICES"}


LONGEST = 122


def header_of(script: Path) -> str:
    head, _, _ = script.read_text().partition("\nset -u")
    return head


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
class TestScript:
    def test_is_clean_for_shellcheck(self, script):
        shellcheck = Path(sys.executable).with_name("shellcheck")
        done = subprocess.run([shellcheck, "-s", "sh", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout

    def test_is_executable_and_posix_sh(self, script):
        assert os.access(script, os.X_OK)
        assert script.read_text().startswith("#!/bin/sh\n")

    @pytest.mark.parametrize("part", ["models:", "Needs:", "Environment", "Exit codes:", "Tested with"])
    def test_header_says(self, script, part):
        assert part in header_of(script)

    def test_header_names_every_variable_that_is_read(self, script):
        body = script.read_text().removeprefix(header_of(script))
        read = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", body)) - GIVEN
        missing = {name for name in read if not re.search(rf"\b{name}\b", header_of(script))}
        assert not missing

    def test_header_has_a_configuration_that_llmux_takes(self, script, tmp_path, monkeypatch):
        monkeypatch.setenv("TABBY_ADMIN_KEY", "k")
        monkeypatch.setenv("TRTLLM_RUNTIME_CONTROL_API_KEY", "k")
        example = yaml.safe_load(find(script.stem).example)
        for port, (name, model) in enumerate(example["models"].items(), 1):  # what an example leaves out
            example["models"][name] = {"port": port, "wake": "w", "sleep": "s", "alive": "a"} | model
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(example))
        for model in Config.from_file(tmp_path / "config.yaml").models.values():
            assert any(f"./hooks/{script.name}" in hook for hook in model.scripts.values())

    def test_header_ends_its_lines_in_time(self, script):
        assert max(map(len, header_of(script).splitlines())) <= LONGEST

    def test_is_described_in_the_readme(self, script):
        assert script.name in (ROOT / "hooks" / "README.md").read_text()


def test_what_is_said_to_be_shared_is_the_same_everywhere():
    seen: dict[str, dict[str, list[str]]] = {}
    for script in SCRIPTS:
        for name, text in blocks_of(script).items():
            seen.setdefault(name, {}).setdefault(text, []).append(script.name)
    assert {"words", "http", "process"} <= set(seen)
    assert not {name: list(texts.values()) for name, texts in seen.items() if len(texts) > 1}


def test_no_mark_of_a_shared_part_is_left_over():
    for script in SCRIPTS:
        marks = re.findall(r"^# ---- (?:shared:|end of) (.+)$", script.read_text(), re.MULTILINE)
        assert sorted(marks) == sorted([*blocks_of(script), *blocks_of(script)]), script.name


def test_engine_scripts_know_all_actions():
    assert ENGINE_SCRIPTS
    for script in ENGINE_SCRIPTS:
        for action in ("wake", "sleep", "stop", "alive", "verify"):
            assert re.search(rf"^{action}\)", script.read_text(), re.MULTILINE), (script.name, action)
