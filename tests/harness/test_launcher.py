"""The launcher outlives what a test ends, and can start llmux stopped; the one for engines blocks no hook.

A test ends all that its engines have begun, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.real import end_engines, runs, wait_until
from tests.harness import launcher
from tests.harness.lease.lab import Lab, running
from tests.harness.waiting import PATIENCE, processes_with


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


# As engines which write their names where their environment was, with a worker in a process group of its own.
ENGINE = """
import ctypes, os, signal, sys
worker = os.fork()
if not worker:
    os.setpgid(0, 0)
if not worker or "overwrite" in sys.argv:
    with open("/proc/self/stat") as stat:
        begin, end = stat.read().rpartition(") ")[2].split()[47:49]
    ctypes.memset(int(begin), 0, int(end) - int(begin))
os.write(1, b"%d\\n" % os.getpid())
signal.pause()
"""


@pytest.fixture(name="engine")
def _engine() -> Iterator[Callable[..., tuple[int, int]]]:
    leaders: list[subprocess.Popen[bytes]] = []

    def engine(*words: str, **env: str) -> tuple[int, int]:
        """Return the leader of a session and its worker."""
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", ENGINE, *words],
            env={**os.environ, **env}, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        leaders.append(process)
        assert process.stdout is not None
        with process.stdout as output:
            pids = {int(output.readline()), int(output.readline())}
        (worker,) = pids - {process.pid}
        return process.pid, worker

    yield engine
    for process in leaders:
        process.kill()
        process.wait()
    wait_until(lambda: not list(members({process.pid for process in leaders})), what="the end of the workers")


def members(sessions: set[int]) -> Iterator[int]:
    """Kill what is in the sessions, and return it."""
    for pid in (int(process.name) for process in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) in sessions and runs(pid):
                os.kill(pid, signal.SIGKILL)
                yield pid


def noted(pid: int) -> str:
    """What a hook writes into a pid file."""
    birth = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
    return f"{pid} {birth}-{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} ready\n"


def test_what_an_engine_began_is_ended_whatever_it_wrote_over_its_environment(tmp_path: Path, engine) -> None:
    pids = engine(PID_DIR=str(tmp_path))
    assert [*processes_with(f"PID_DIR={tmp_path}")] == [pids[0]]
    hidden = engine("overwrite", PID_DIR=str(tmp_path))
    (tmp_path / "a-1.pid").write_text(noted(hidden[0]))
    assert all(runs(pid) for pid in pids + hidden)
    end_engines(tmp_path)
    assert not any(runs(pid) for pid in pids + hidden)


def test_no_bystander_is_ended_with_an_engine(tmp_path: Path, engine) -> None:
    pids = engine(PID_DIR=str(tmp_path))
    other = engine(PID_DIR=f"{tmp_path}/other")
    reused = engine()
    (tmp_path / "a-1.pid").write_text(noted(reused[0]).replace(" ", " 1", 1))  # the number is another's by now
    (tmp_path / "b-2.pid").write_text("")
    line = "PID_DIR=$0 sleep 600 >&2 & echo $!; exec sleep 600 >&2"  # what is to be ended, in a session of others
    with subprocess.Popen(["sh", "-c", line, tmp_path], stdout=subprocess.PIPE, start_new_session=True) as others:
        assert others.stdout is not None
        member = int(others.stdout.read())
        try:
            wait_until(lambda: member in processes_with(f"PID_DIR={tmp_path}"), what="what has the variable")
            end_engines(tmp_path)
            wait_until(lambda: not runs(member), what="its end")
            assert not any(runs(pid) for pid in pids)
            assert all(runs(pid) for pid in (*other, *reused, others.pid))
        finally:
            others.kill()


def test_the_session_of_what_ends_engines_is_spared(tmp_path: Path, engine, monkeypatch) -> None:
    leader, worker = engine(PID_DIR=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getsid", lambda pid: {0: leader}[pid])
        end_engines(tmp_path)
    wait_until(lambda: not runs(leader), what="the end of the one with the variable")
    assert runs(worker)


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
