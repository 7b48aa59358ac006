"""The process that forks llmuxes outlives the tests that use it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.engine.real import end_engines
from tests.harness import launcher
from tests.harness.waiting import PATIENCE


def test_a_test_that_ends_what_it_started_leaves_the_launcher(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PID_DIR", str(tmp_path))
    monkeypatch.setattr(launcher, "_launcher", lambda: mine)
    mine = launcher.Launcher()
    try:
        end_engines(tmp_path)
        with (tmp_path / "log").open("wb") as log:
            ran = launcher.launch(["--version"], log=log.fileno(), env=os.environ)
        assert ran.wait(PATIENCE) == 0
    finally:
        mine.close()
    assert (tmp_path / "log").read_text().startswith("llmux ")
