"""The unit for systemd, and the commands that set it up, say the same and are taken by systemd's own check."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess

import pytest

from tests.docs.pages import ROOT

FOLDER = ROOT / "examples" / "systemd"
UNIT = FOLDER / "llmux.service"


def service() -> configparser.SectionProxy:
    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    return unit["Service"]


def commands() -> list[str]:
    """Return the commands that set it up: the first block of its page."""
    block = re.search(r"```console\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert block
    return [line.removeprefix("# ").partition("  #")[0].strip() for line in block[1].splitlines()]


def test_there_are_five_commands_and_they_agree_with_the_unit():
    user, environment, groups, unit, enable = commands()
    settings = service()
    assert user.split()[0] == "useradd"
    assert user.split()[-1] == groups.split()[-1] == settings["User"]
    home = user.split()[user.split().index("--home-dir") + 1]
    assert home == f"{settings['Environment'].partition('XDG_STATE_HOME=')[2]}/{settings['StateDirectory']}"
    made = environment.split()[3]
    assert settings["ExecStart"].split()[0] == f"{made}/bin/llmux"
    assert environment.split()[5] == f"{made}/bin/python"
    assert str(UNIT.relative_to(ROOT)) in unit.split()
    assert enable.split()[-1] == UNIT.stem


def test_the_configuration_is_where_the_unit_looks():
    config = service()["ExecStart"].split()[-1]
    text = (FOLDER / "README.md").read_text()
    assert f"init --out {config.rpartition('/')[0]}\n" in text
    assert f"check {config}\n" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    def verify(text: str) -> str:
        unit = tmp_path / "llmux.service"
        # Neither is on the machine that tests: the program and the user.
        text = text.replace("/opt/llmux/bin/llmux", shutil.which("true") or "/bin/true")
        unit.write_text(text.replace("User=llmux", "User=root"))
        done = subprocess.run(
            ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False
        )
        said = [line for line in done.stderr.splitlines() if "llmux" in line]
        return "\n".join([*said, *([f"exit code {done.returncode}"] if done.returncode else [])])

    text = UNIT.read_text()
    assert verify(text) == ""
    assert "WatchdogSecs" in verify(text.replace("WatchdogSec=", "WatchdogSecs="))
