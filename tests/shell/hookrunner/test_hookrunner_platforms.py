"""Places where processes behave otherwise: without pidfd, as process 1, with SIGCHLD ignored."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmux.hookrunner.job import ExitStatus, describe, format_seconds, signal_name


@pytest.fixture
def without_pidfd(monkeypatch):
    def refuse(_pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)


@pytest.fixture
def without_waitid(without_pidfd, monkeypatch):  # noqa: ARG001
    monkeypatch.delattr(os, "waitid")


@pytest.mark.parametrize("place", ["without_pidfd", "without_waitid"])
async def test_a_thread_waits_instead(bench, request, open_files, place):
    request.getfixturevalue(place)
    before = open_files()
    assert (await bench.run("echo yes")).tail == "yes\n"
    result = await bench.run("sleep 1000 & exit 3")
    assert (result.exit_code, result.detail) == (3, "exited with 3")
    job, future = bench.start("sleep 1000")
    bench.runner.kill(job.id, "timeout")
    assert (await future).killed == "timeout"
    assert (await bench.run("kill -9 $$")).signal == 9
    assert open_files() == before


def children() -> set[str]:
    """Return the processes which this one has started and not buried."""
    found, ours = set(), str(os.getpid())
    for process in Path("/proc").glob("[0-9]*"):  # not by /proc/self/task: a thread that ends hands its own on
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (process / "stat").read_text().rpartition(")")[2].split()[1] == ours:
                found.add(process.name)
    return found


async def test_nothing_left_to_watch_it_with(bench, without_pidfd, monkeypatch, open_files):  # noqa: ARG001
    def refuse(*_args: object, **_options: object) -> None:
        raise RuntimeError("can't start new thread")

    before = open_files(), children()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    result = await bench.run("sleep 1000")
    assert result.detail == "could not be started: can't start new thread"
    assert (open_files(), children()) == before, "something is left behind"


async def test_somebody_else_takes_the_status(bench):
    _, future = bench.start("exit 0")
    (process,) = bench.runner._processes.values()
    os.waitpid(process.pid, 0)  # noqa: ASYNC222
    result = await future
    assert (result.ok, result.exit_code, result.signal) == (False, None, None)
    assert "something else has waited for it" in result.detail


def python(program: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


RUN = """
import asyncio, ctypes, signal, sys
from llmux.core.spec import HookKind
from llmux.hookrunner import HookJob, HookRunner

async def run(script, **options):
    runner = HookRunner(kill_grace=0.2, **options)
    result = await runner.run(HookJob(1, "m", HookKind.SLEEP, script, "/"), timeout=40)
    await runner.close()
    print(result.ok, result.detail)
"""


def test_sigchld_is_ignored():
    assert python(RUN + "signal.signal(signal.SIGCHLD, signal.SIG_IGN); asyncio.run(run('exit 3'))") == (
        "False exited with 3\n"
    )


# The kernel gives the orphans of its descendants to a subreaper, as it does to process 1.
SUBREAPER = RUN + "assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0\n"
KILLS_AND_WAITS = """
pid=$(setsid sh -c 'sleep 1000 > /dev/null & echo $!')
kill $pid
while kill -0 $pid 2> /dev/null; do sleep 0.01; done
"""


def test_a_hook_that_waits_for_an_engine_which_llmux_has_to_bury():
    program = SUBREAPER + f"asyncio.run(run({KILLS_AND_WAITS!r}, adopts_orphans=True))"
    assert python(program) == "True exited with 0\n"


def test_the_children_of_a_failed_hook_are_buried():
    program = SUBREAPER + "asyncio.run(run('(sleep 1000 & sleep 1000) & exit 3', adopts_orphans=False))"
    assert python(program) == "False exited with 3\n"


def test_the_children_of_other_code_are_left_to_it():
    program = (
        SUBREAPER
        + """
import subprocess, os
other = subprocess.Popen(["sh", "-c", "exit 7"])
os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
asyncio.run(run("sleep 0.3", adopts_orphans=True))
print(other.wait())
"""
    )
    assert python(program) == "True exited with 0\n7\n"


def test_a_hook_that_has_exited_is_left_to_its_watcher():
    program = """
import os, subprocess
from pathlib import Path
from llmux.hookrunner.hook_process import reap_orphans

def exited(code):
    process = subprocess.Popen(["sh", "-c", f"exit {code}"], process_group=0)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process

hook = exited(3)
reap_orphans([hook.pid])
print(hook.wait())
orphan = exited(4)
reap_orphans([])
print(Path(f"/proc/{orphan.pid}").exists())
orphan.returncode = 0
"""
    assert python(program) == "3\nFalse\n"


def test_words():
    assert signal_name(15) == "SIGTERM"
    assert signal_name(40) == "signal 40"
    assert [format_seconds(s) for s in (0.2, 5.004, 12.6, 1800.2)] == ["0.2 s", "5 s", "13 s", "1800 s"]
    assert describe(ExitStatus(code=0), "", killed="operator") == "was ended: operator"
    long = describe(ExitStatus(code=1), "x" * 2000)
    assert long.startswith("exited with 1: …xxx")
    assert len(long) < 600
