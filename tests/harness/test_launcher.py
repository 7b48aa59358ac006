"""The launcher outlives what a test ends, and can start llmux stopped; the one for engines blocks no hook."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.engine.real import end_engines
from tests.harness import launcher
from tests.harness.lease.lab import Lab, running
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


def test_one_that_is_stopped_begins_when_it_gets_cont(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        stopped = launcher.launch(["--version"], log=log.fileno(), env=os.environ, stopped=True)
    status = Path(f"/proc/{stopped.pid}/status")
    until = time.monotonic() + PATIENCE
    while "State:\tT" not in status.read_text():
        assert time.monotonic() < until
        time.sleep(0.002)
    assert not (tmp_path / "log").stat().st_size
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(PATIENCE) == 0
    assert (tmp_path / "log").read_text().startswith("llmux ")


async def test_a_hook_that_is_ended_before_it_has_asked_for_an_engine_holds_nothing_up(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.write("a")
    lab.script("a", "wake", ': >"$LAB/run/a.asked"; kill -KILL $$', times=1)

    async def served() -> bool:
        return (await lab.chat("a")).status == 200

    lab.start()
    try:
        assert not await served()
        await lab.until(served)
        pid = lab.engine_pid("a")
        assert [number for number, _ in lab.processes()] == [pid]
    finally:
        lab.finish()
    await lab.until(lambda: not running(pid))
