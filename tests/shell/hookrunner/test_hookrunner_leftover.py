"""Hooks that a killed llmux has left behind are ended by the next one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from llmux.core.spec import HookKind
from llmux.hookrunner import HookJob, HookRunner
from llmux.hookrunner.hook_process import Trace, end_leftovers, trace_of
from tests.harness.waiting import PATIENCE


@contextlib.contextmanager
def hook(script: str, *, foreign: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, "LLMUX_HOOK": "sleep"}
    if foreign:
        del env["LLMUX_HOOK"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["sh", "-c", script], process_group=0, env=env, **pipes) as process:
        process.stdout.read(1)
        yield process


async def test_it_is_ended_with_its_group():
    with hook("echo; sleep 60 & wait") as process:
        trace = trace_of(process.pid)
        assert trace is not None
        assert await end_leftovers([trace], grace=5) == [trace._replace(ending=True)]
        assert process.wait() == -15
        assert process.stdout.read() == b""  # the sleeper, who held the pipe, is gone too


async def test_one_that_ignores_term_is_killed():
    with hook("trap '' TERM; echo; while :; do sleep 0.05; done") as process:
        assert await end_leftovers([trace_of(process.pid)], grace=0.1)
        assert process.wait() == -9


async def test_another_process_with_the_same_number_is_left_alone():
    with hook("echo; sleep 60") as process:
        trace = trace_of(process.pid)
        others = [trace._replace(started=trace.started - 1), trace._replace(boot="another")]
        assert await end_leftovers(others) == []
        assert process.poll() is None
        process.kill()
        process.wait()
        assert await end_leftovers([trace]) == []


async def test_what_leads_no_group_is_left_alone():
    assert await end_leftovers([trace_of(os.getpid()), Trace(1, 0, ""), Trace(0, 0, "")]) == []


def ends_soon(process: int) -> bool:
    """Whether it has ended, or does so in a moment."""
    select.select([], [], [], 0.2)
    return trace_of(process) is None


async def test_that_it_is_being_ended_is_written_down_before_term_is_sent():
    taken = []

    def written_down(found: list[Trace]) -> None:
        taken.extend((trace.ending, ends_soon(trace.pid)) for trace in found)

    with hook("echo; sleep 60") as process:
        assert await end_leftovers([trace_of(process.pid)], on_ending=written_down)
        assert process.wait() == -15
    runner = HookRunner(on_ending=lambda _job: written_down(list(runner.traces())))
    job = HookJob(1, "m", HookKind.SLEEP, "exec sleep 60", Path.cwd())
    result = await runner.run(job, timeout=0.05)
    await runner.close()
    assert result.killed == "timeout"
    assert taken == [(True, False), (True, False)]


LEADERLESS = "sh -c \"trap '' TERM; echo; sleep 60; :\" & wait"


async def test_what_a_hook_that_was_being_ended_has_left_of_its_group_is_ended():
    with hook(LEADERLESS) as process:
        trace = trace_of(process.pid)._replace(ending=True)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait() == -15
        assert await end_leftovers([trace], grace=0.1) == [trace]
        assert process.stdout.read() == b""  # those who held the pipe are gone
        assert await end_leftovers([trace], grace=0.1) == []


async def test_what_a_hook_has_left_behind_when_it_was_done_stays():
    with hook("sleep 60 & echo; read -r line; exit 0") as process:
        trace = trace_of(process.pid)
        assert trace is not None
        process.stdin.close()
        assert process.wait() == 0
        assert await end_leftovers([trace]) == []
        os.killpg(process.pid, 0)  # it lives
        os.killpg(process.pid, signal.SIGKILL)


async def test_a_group_that_no_hook_of_llmux_leads_is_left_alone():
    with hook(LEADERLESS, foreign=True) as process:
        trace = trace_of(process.pid)._replace(ending=True)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        assert await end_leftovers([trace]) == []
        os.killpg(process.pid, signal.SIGKILL)


async def test_cut_short_it_ends_them_at_once():
    with hook("trap '' TERM; echo; while :; do sleep 0.05; done") as process:
        ending = asyncio.create_task(end_leftovers([trace_of(process.pid)], grace=60))
        await asyncio.sleep(0)
        ending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ending
        assert await asyncio.to_thread(process.wait, 5) == -9


async def test_a_script_begins_when_its_process_has_been_written_down(tmp_path: Path):
    traces = []

    def written_down(_job: HookJob) -> None:
        traces.extend(runner.traces())
        select.select([], [], [], 0.2)  # a script that does not wait would be through by then
        (tmp_path / "known").touch()

    runner = HookRunner(on_started=written_down)
    result = await runner.run(HookJob(1, "m", HookKind.WAKE, "echo $$; ls known; cat", tmp_path), PATIENCE)
    await runner.close()
    assert (result.ok, result.tail) == (True, f"{traces[0].pid}\nknown\n")  # and there is nothing to read


KILLED_AT_ONCE = """
import asyncio, os, signal, sys
from pathlib import Path
from llmux.core.spec import HookKind
from llmux.hookrunner import HookJob, HookRunner

def die(job):
    print(runner.traces()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    runner.start(HookJob(1, "m", HookKind.WAKE, "touch begun", Path(sys.argv[1])), print)

runner = HookRunner(on_started=die)
asyncio.run(main())
"""


async def test_the_script_of_a_llmux_that_was_killed_before_it_had_written_it_down_never_begins(tmp_path: Path):
    command = [sys.executable, "-c", KILLED_AT_ONCE, str(tmp_path)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == -signal.SIGKILL
    async with asyncio.timeout(PATIENCE):
        while trace_of(int(output)) is not None:  # noqa: ASYNC110 - not our child
            await asyncio.sleep(0.01)
    assert not (tmp_path / "begun").exists()


ONLY_THREADS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


async def test_one_of_which_only_threads_are_left_is_ended():
    with hook(f"exec {sys.executable} -c '{ONLY_THREADS}'") as process:
        trace = trace_of(process.pid)
        while ") Z " not in Path(f"/proc/{process.pid}/stat").read_text():  # noqa: ASYNC110, ASYNC240 - no event says it
            await asyncio.sleep(0.01)
        assert await end_leftovers([trace], grace=5) == [trace._replace(ending=True)]
        assert process.wait() == -15
