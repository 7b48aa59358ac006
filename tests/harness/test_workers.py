"""Tests in several processes: each gets its result, and one that ends its process does not affect others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.harness.launcher import ROOT
from tests.harness.waiting import PATIENCE
from tests.harness.workers import LONGEST_FIRST, TESTS

HOOKS = """
from tests.harness import launcher
from tests.harness.workers import pytest_addoption, pytest_collection, pytest_runtestloop

class Launcher:  # nothing is launched here: the start of what forks llmuxes took half of the time
    def close(self): ...

launcher.engines, launcher.share = Launcher, Launcher
"""
FIRST = """
import os, signal
import pytest

@pytest.fixture(scope="module")
def shared():
    yield os.getpid()
    print("torn down")

def test_one(shared, tmp_path):
    tmp_path.joinpath("file").touch()

def test_another(shared, tmp_path):
    print("said before")
    assert shared == 0

def test_that_is_killed():
    os.kill(os.getpid(), signal.SIGKILL)

def test_after_it(tmp_path):
    assert not list(tmp_path.iterdir())

@pytest.mark.skip
def test_left_out(): ...
"""
SECOND = """
import os
import pytest

@pytest.mark.parametrize("number", range(3))
def test_with(number):
    os.system("echo number $LLMUX_TEST_WORKER")
    assert number != 1
"""


def test_each_has_its_result(tmp_path: Path) -> None:
    for name, text in (("conftest", HOOKS), ("test_first", FIRST), ("test_second", SECOND)):
        (tmp_path / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-rA", "--color=no", "--workers=2", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )
    results = re.findall(r"^(PASSED|FAILED|ERROR) test_(\S+)", done.stdout, re.MULTILINE)
    assert sorted(results) == [
        ("FAILED", "first.py::test_another"),
        ("FAILED", "first.py::test_that_is_killed"),
        ("FAILED", "second.py::test_with[1]"),
        ("PASSED", "first.py::test_after_it"),
        ("PASSED", "first.py::test_one"),
        ("PASSED", "second.py::test_with[0]"),
        ("PASSED", "second.py::test_with[2]"),
    ], done.stdout + done.stderr
    assert "3 failed, 4 passed, 1 skipped in" in done.stdout
    assert done.returncode == 1
    assert "said before" in done.stdout
    assert "the process that ran this test has ended, with -9" in done.stdout
    assert len(set(re.findall(r"^number (\d)$", done.stdout, re.MULTILINE))) == 1  # a file stays in one process


def test_the_files_that_come_first_are_there() -> None:
    assert [name for name in LONGEST_FIRST if not (TESTS / name).exists()] == []
