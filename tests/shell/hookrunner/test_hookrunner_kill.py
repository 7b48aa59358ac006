"""Ending hooks: nothing they started in their group outlives a failure, a timeout or llmux."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from llmux.core.spec import HookKind
from llmux.hookrunner import HookJob, HookRunner
from llmux.hookrunner import hook_process as process_module
from llmux.hookrunner.hook_process import signal_group
from tests.harness.waiting import PATIENCE

IGNORES_TERM = "trap '' TERM; echo pid $$; while :; do sleep 0.01; done"


async def test_a_hook_that_hangs(bench, is_alive):
    bench.runner._kill_grace = PATIENCE
    job, future = bench.start("echo pid $$; echo loading weights; sleep 1000; echo never")
    pid = await bench.pid("pid")
    await bench.said("loading")
    bench.runner.kill(job.id, "timeout")
    result = await future
    assert (result.ok, result.killed, result.signal) == (False, "timeout", signal.SIGTERM)
    assert result.detail.startswith("ran past its timeout of 0")
    assert result.detail.endswith(f" s and was ended: pid {pid} | loading weights")
    assert not is_alive(pid)


async def test_a_hook_that_exits_with_0_on_term_has_not_succeeded(bench):
    bench.runner._kill_grace = PATIENCE
    job, future = bench.start("trap 'echo bye; exit 0' TERM; echo pid $$; while :; do sleep 0.01; done")
    await bench.said("pid")
    bench.runner.kill(job.id, "stopping")
    result = await future
    assert (result.ok, result.exit_code, result.killed) == (False, 0, "stopping")
    assert result.detail.startswith("was ended because llmux is stopping: ")
    assert result.detail.endswith("bye")


async def test_a_hook_that_ignores_term(bench, is_alive):
    job, future = bench.start(IGNORES_TERM)
    pid = await bench.pid("pid")
    bench.runner.kill(job.id, "timeout")
    bench.runner.kill(job.id, "stopping")  # the first reason stands
    result = await future
    assert (result.killed, result.signal) == ("timeout", signal.SIGKILL)
    assert not is_alive(pid)


async def test_children_that_ignore_term_after_their_leader_went(bench, is_alive):
    bench.runner._kill_grace = 1.0  # the leader has its turn within it
    job, future = bench.start(f"({IGNORES_TERM}) & echo child $!; echo leader $$; wait")
    child, leader = await bench.pid("child"), await bench.pid("leader")
    await bench.said("pid")  # the child ignores TERM from here on
    bench.runner.kill(job.id, "timeout")
    result = await future
    assert result.signal == signal.SIGTERM
    assert not is_alive(leader)
    assert not is_alive(child)


async def test_a_hook_that_is_stopped(bench, is_alive, gone):
    bench.runner._kill_grace = PATIENCE
    job, future = bench.start("echo pid $$; kill -STOP $$")
    pid = await bench.pid("pid")
    bench.runner.kill(job.id, "timeout")
    result = await future
    assert result.signal == signal.SIGTERM
    await gone(pid)
    assert not is_alive(pid)


async def test_a_stopped_hook_that_ignores_term(bench, is_alive):
    job, future = bench.start("trap '' TERM; echo pid $$; while :; do kill -STOP $$; done")
    pid = await bench.pid("pid")
    bench.runner.kill(job.id, "timeout")
    assert (await future).signal == signal.SIGKILL
    assert not is_alive(pid)


async def test_a_failed_hook_leaves_nothing_in_its_group(bench, is_alive):
    result = await bench.run("sleep 1000 & echo child $!; echo failing; exit 4")
    assert (result.ok, result.exit_code, result.killed) == (False, 4, None)
    assert result.detail.startswith("exited with 4: ")
    assert not is_alive(await bench.pid("child"))


async def test_a_failed_hook_whose_child_ignores_term(bench, is_alive):
    ready = bench.folder / "ready"
    os.mkfifo(ready)
    result = await bench.run(f"({IGNORES_TERM}) > {ready} & echo child $!; read line < {ready}; exit 4")
    assert (result.exit_code, result.killed) == (4, None)
    assert not is_alive(await bench.pid("child"))


async def test_the_childrens_last_words_do_not_replace_the_hooks(bench):
    ready = bench.folder / "ready"
    os.mkfifo(ready)
    chatty = f"trap 'head -c 9000 /dev/zero | tr \"\\0\" x; exit' TERM; echo > {ready}"
    result = await bench.run(f"({chatty}; while :; do sleep 0.01; done) & read x < {ready}; echo why; exit 4")
    assert result.tail == "why\n"


async def test_a_hook_of_its_own_accord_is_faster_than_the_kill(bench):
    job, future = bench.start("exit 0")
    # Without a turn of the loop: it has exited, and the runner has not heard of it.
    os.waitid(os.P_PID, bench.runner._processes[job.id].pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
    bench.runner.kill(job.id, "timeout")
    result = await future
    assert (result.ok, result.killed) == (True, None)


async def test_an_exit_that_was_seen_leaves_its_number_taken(bench):
    job, future = bench.start("exit 3")
    process = bench.runner._processes[job.id]
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
    assert [process._watch.poll().code for _ in range(2)] == [3, 3]
    zombie = Path(f"/proc/{process.pid}")
    assert zombie.exists()  # noqa: ASYNC240 - a signal to its group can hit no other process
    assert (await future).exit_code == 3
    assert not zombie.exists()  # noqa: ASYNC240


async def test_one_result_when_the_kill_races_with_the_exit(bench):
    loop = asyncio.get_running_loop()
    started = []
    for n in range(150):
        job, future = bench.start("exit 0")
        loop.call_later(n % 30 / 5000, bench.runner.kill, job.id, "timeout")
        started.append(future)
        if n % 10 == 9:
            await asyncio.gather(*started)
    results = await asyncio.gather(*started)
    assert len(bench.results) == 150
    for result in results:
        assert result.ok == (result.killed is None)


async def test_killing_what_is_unknown_or_finished(bench):
    bench.runner.kill(999, "timeout")
    job, future = bench.start("exit 0")
    await future
    bench.runner.kill(job.id, "timeout")
    bench.runner.kill_all_now()
    assert len(bench.results) == 1


async def test_closing_while_hooks_run(bench, is_alive):
    bench.start(f"({IGNORES_TERM}) & echo child $!; echo leader $$; trap '' TERM; wait")
    _, last = bench.start("sleep 1000", kind=HookKind.SLEEP)
    leader, child = await bench.pid("leader"), await bench.pid("child")
    await bench.runner.close()
    assert not is_alive(leader)
    assert not is_alive(child)
    assert not bench.runner.running
    assert [r.signal for r in bench.results] == [signal.SIGKILL] * 2
    assert last.done()
    result = await bench.run("true")
    assert result.detail == "could not be started: llmux is stopping"


async def test_a_second_term_does_not_wait(bench, is_alive, gone):
    bench.runner._kill_grace = 1000
    job, future = bench.start(IGNORES_TERM)
    pid = await bench.pid("pid")
    bench.runner.kill(job.id, "stopping")
    bench.runner.kill_all_now()
    await gone(pid)
    assert not is_alive(pid)
    assert (await future).killed == "stopping"


async def test_kill_all_now_while_a_failed_hooks_children_are_ended(bench, is_alive, turns_until):
    bench.runner._kill_grace = 1000
    ready = bench.folder / "ready"
    os.mkfifo(ready)
    _, future = bench.start(f"({IGNORES_TERM}) > {ready} & echo child $!; read x < {ready}; echo pid $$; exit 4")
    child, leader = await bench.pid("child"), await bench.pid("pid")
    await turns_until(lambda: not Path(f"/proc/{leader}").exists())  # reaped: only the child is waited for
    bench.runner.kill_all_now()
    result = await future
    assert (result.exit_code, result.killed) == (4, None)
    assert not is_alive(child)


async def test_what_a_hook_that_has_just_succeeded_left_behind_stays(bench, is_alive, strays, monkeypatch):
    sent = []
    monkeypatch.setattr(process_module, "signal_group", lambda *signals: sent.append(signals) or True)
    _, future = bench.start("sleep 1000 & echo child $!; echo pid $$; until [ -e go ]; do sleep 0.01; done")
    child, leader = await bench.pid("child"), await bench.pid("pid")
    strays.append(child)
    (bench.folder / "go").touch()
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222, the loop shall not hear of it
    bench.runner.kill_all_now()
    assert (await future).ok
    assert is_alive(child)
    assert sent == []


async def test_a_process_that_does_not_die(bench, monkeypatch, turns_until):
    monkeypatch.setattr(process_module, "UNENDING_AFTER", 0.05)
    job, future = bench.start("echo pid $$; exec sleep 1000")
    pid = await bench.pid("pid")
    with monkeypatch.context() as patched:
        patched.setattr(process_module, "signal_group", lambda *_: True)
        bench.runner.kill(job.id, "timeout")
        result = await future
    assert not result.ok
    assert "but its processes do not go away" in result.detail
    os.kill(pid, signal.SIGKILL)
    await turns_until(lambda: not Path(f"/proc/{pid}").exists())  # late, but reaped


async def test_dead_children_that_nobody_reaps_do_not_hold_up_the_result(bench):
    # The new parent of the hook's child never waits for it: for the kernel the group is never empty.
    ready = bench.folder / "ready"
    os.mkfifo(ready)
    parent = f"""exec {sys.executable} -c '
import os, sys, time
child = os.fork()
if child == 0:
    os.execvp("sleep", ["sleep", "1000"])
os.setpgid(0, 0)
open("{ready}", "w").write(f"{{os.getpid()}}\\n")
time.sleep(1000)'"""
    result = await bench.run(f"({parent}) & read parent < {ready}; echo parent $parent; exit 5")
    assert result.exit_code == 5
    assert result.duration < PATIENCE / 2
    os.kill(await bench.pid("parent"), signal.SIGKILL)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_loop_that_is_torn_down_takes_its_hooks_along(tmp_path, is_alive, turns):
    results = []

    async def forgetful() -> int:
        runner = HookRunner()
        job = HookJob(1, "m", HookKind.WAKE, "sleep 1000", tmp_path)
        runner.start(job, results.append)
        for _ in range(turns):
            await asyncio.sleep(0)
        return runner._processes[1].pid

    pid = asyncio.run(forgetful())
    with contextlib.suppress(ChildProcessError):  # reaped already
        os.waitpid(pid, 0)
    assert not is_alive(pid)
    assert [(r.ok, r.killed) for r in results] == [(False, "cancelled")]


def test_a_group_which_may_not_be_signalled_is_told_from_one_that_is_gone(monkeypatch) -> None:
    def refuse(error: type[OSError]):
        def killpg(_group: int, _number: int) -> None:
            raise error

        return killpg

    monkeypatch.setattr(os, "killpg", refuse(PermissionError))
    assert not signal_group(12345, signal.SIGTERM)
    monkeypatch.setattr(os, "killpg", refuse(ProcessLookupError))
    assert signal_group(12345, signal.SIGTERM)
