"""What every shipped hook script has to look like."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmux.cli.hooks import complete, find
from llmux.config import Config
from tests.engine.real import ROOT

SCRIPTS = sorted((ROOT / "hooks").glob("*.sh"))
LIBRARY = sorted((ROOT / "hooks" / "lib").glob("*.sh"))
USERS = [script for script in SCRIPTS if "lib=" in script.read_text()]  # of the library
ENGINE_SCRIPTS = [script for script in SCRIPTS if "wake)" in complete(script)]
FUNCTION = re.compile(r"^(\w+)\(\) \{", re.MULTILINE)
# Set by llmux or the system, or the script's own business, or awk's.
GIVEN = {"HOME", "IFS", "NF", "XDG_STATE_HOME", "CUDA_VISIBLE_DEVICES"}


LONGEST = 122


def header_of(script: Path) -> str:
    head, _, _ = script.read_text().partition("\nset -u")
    return head


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
class TestScript:
    def test_is_executable_and_posix_sh(self, script):
        assert os.access(script, os.X_OK)
        assert script.read_text().startswith("#!/bin/sh\n")

    @pytest.mark.parametrize("part", ["models:", "Needs:", "Environment", "Exit codes:", "Tested with"])
    def test_header_says(self, script, part):
        assert part in header_of(script)

    def test_header_names_every_variable_that_is_read(self, script):
        body = complete(script).removeprefix(header_of(script))
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


@pytest.mark.parametrize("script", USERS, ids=lambda path: path.name)
class TestComplete:
    """What `llmux hooks show` and `copy` write."""

    def test_nothing_of_the_library_is_left_over_or_missing(self, script):
        text = complete(script)
        assert "$lib" not in text
        assert "shellcheck shell" not in text
        assert "\n\n\n" not in text
        own = FUNCTION.findall(script.read_text())
        library = [name for part in LIBRARY for name in FUNCTION.findall(part.read_text())]
        names = FUNCTION.findall(text)
        assert len(names) == len(set(names))
        assert set(own) <= set(names)
        called = {name for name in library if re.search(rf"(?m)^[^#\n]*\b{name}\b(?!\(\))", text)}
        assert called <= set(names)

    def test_each_function_is_used(self, script):
        text = complete(script)
        unused = [name for name in FUNCTION.findall(text) if len(re.findall(rf"\b{name}\b", text)) == 1]
        assert not unused

    def test_begins_as_the_script_does(self, script):
        assert complete(script).startswith(header_of(script))


@pytest.mark.parametrize("name", ["docker", "sglang", "tabbyapi"])  # which together have all parts of the library
def test_what_is_put_together_is_clean_for_shellcheck(name, tmp_path):
    # `make shellcheck` looks at each script as it stands in hooks/, with the library.
    copy = tmp_path / f"{name}.sh"
    copy.write_text(complete(find(name).path))
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-s", "sh", copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_parts_of_the_library_do_nothing_by_themselves():
    assert LIBRARY
    for part in LIBRARY:
        text = part.read_text()
        assert text.startswith("# shellcheck shell=sh\n# ")
        statements, inside = [], False
        for line in text.splitlines():
            begins = FUNCTION.match(line)
            if not inside and line and not begins and not line.startswith("#"):
                statements.append(line)
            inside = line != "}" if inside else bool(begins) and "; }" not in line
        assert statements == (["nl='", "'"] if part.stem == "words" else []), part.name


def test_each_part_of_the_library_is_used():
    texts = [script.read_text() for script in USERS]
    used = {name for text in texts for name in re.findall(r'^\. "\$lib/(.+)"$', text, re.MULTILINE)}
    assert used == {part.name for part in LIBRARY}


def test_no_script_has_a_function_that_another_has():
    texts = [path.read_text() for path in (*SCRIPTS, *LIBRARY)]
    several: dict[str, int] = {}
    for text in texts:
        for body in re.findall(r"(?ms)^\w+\(\) \{[^\n]*\n.*?^\}$", text):
            if body.count("\n") > 4:
                several[body] = several.get(body, 0) + 1
    assert not [body for body, count in several.items() if count > 1]


def test_the_shell_in_this_folder_stays_small():
    assert sum(len(path.read_text().splitlines()) for path in (*SCRIPTS, *LIBRARY)) <= 2900


def test_engine_scripts_know_all_actions():
    assert ENGINE_SCRIPTS
    for script in ENGINE_SCRIPTS:
        for action in ("wake", "sleep", "stop", "alive", "verify"):
            assert re.search(rf"^\s*{action}\)", complete(script), re.MULTILINE), (script.name, action)
