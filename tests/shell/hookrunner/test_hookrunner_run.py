"""Starting hooks, what they see, and how their ends are told."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llmux.core.spec import HookKind
from llmux.hookrunner import HookJob, HookRunner, environment
from llmux.hookrunner import hook_process as spawn_module
from llmux.hookrunner import runner as runner_module
from tests.harness.waiting import PATIENCE


async def test_a_hook_that_succeeds(bench):
    result = await bench.run("echo hello; echo again >&2", model="llama", kind=HookKind.SLEEP)
    assert (result.ok, result.exit_code, result.signal, result.killed) == (True, 0, None, None)
    assert (result.model, result.kind) == ("llama", HookKind.SLEEP)
    assert result.tail == "hello\nagain\n"
    assert result.detail == "exited with 0: hello | again"
    assert 0 < result.duration < PATIENCE
    assert bench.lines == ["hello", "again"]
    assert bench.orphans == []


async def test_a_hook_that_fails(bench):
    result = await bench.run("for n in 1 2 3 4; do echo line $n; done; exit 3")
    assert (result.ok, result.exit_code) == (False, 3)
    assert result.detail == "exited with 3: line 2 | line 3 | line 4"


async def test_a_silent_hook_that_fails(bench):
    assert (await bench.run("exit 1")).detail == "exited with 1"


async def test_a_hook_killed_by_a_signal(bench):
    result = await bench.run("echo out of memory; kill -KILL $$")
    assert (result.ok, result.exit_code, result.signal, result.killed) == (False, None, 9, None)
    assert result.detail == "killed by SIGKILL: out of memory"


async def test_the_environment_is_exact(bench, monkeypatch):
    monkeypatch.setenv("FROM_LLMUX", "inherited")
    monkeypatch.setenv("OVERRIDDEN", "by llmux")
    result = await bench.run(
        "tr '\\0' '\\n' < /proc/self/environ > seen",
        model="llama 3 'q4' \"x\"",
        kind=HookKind.STOP,
        env={"CTX": "8192", "OVERRIDDEN": "by the model", "LLMUX_TO": "never"},
        url="http://127.0.0.1:8001",
        port=8001,
        switch=7,
        sources=("a", "b"),
        target="c",
        level="ram only",
    )
    assert result.ok, result.detail
    seen = set((bench.folder / "seen").read_text().splitlines())
    assert {
        "FROM_LLMUX=inherited",
        "CTX=8192",
        "OVERRIDDEN=by the model",
        "LLMUX_MODEL=llama 3 'q4' \"x\"",
        "LLMUX_HOOK=stop",
        "LLMUX_PORT=8001",
        "LLMUX_URL=http://127.0.0.1:8001",
        "LLMUX_SWITCH_ID=7",
        "LLMUX_FROM=a,b",
        "LLMUX_TO=c",
        "LLMUX_SLEEP_LEVEL=ram only",
    } <= seen
    assert {line.partition("=")[0] for line in seen} <= {*os.environ, "CTX", "PWD", *LLMUX_NAMES}


LLMUX_NAMES = (
    "LLMUX_MODEL",
    "LLMUX_HOOK",
    "LLMUX_PORT",
    "LLMUX_URL",
    "LLMUX_SWITCH_ID",
    "LLMUX_FROM",
    "LLMUX_TO",
    "LLMUX_SLEEP_LEVEL",
)


def test_outside_a_switch_the_variables_are_empty_but_set():
    job = HookJob(1, "m", HookKind.ALIVE, "true", "/")
    seen = environment(job, {"A": "1"})
    assert seen == {
        "A": "1",
        "LLMUX_MODEL": "m",
        "LLMUX_HOOK": "alive",
        **dict.fromkeys(LLMUX_NAMES[2:], ""),
    }


def test_the_keys_of_whoever_operates_llmux_are_kept_back():
    inherited = {"LLMUX_ADMIN_KEY": "root", "LLMUX_API_KEY": "user", "B": "2"}
    seen = environment(HookJob(1, "m", HookKind.WAKE, "true", "/", env={"C": "3"}), inherited)
    assert not seen.keys() & {"LLMUX_ADMIN_KEY", "LLMUX_API_KEY"}
    assert (seen["B"], seen["C"]) == ("2", "3")
    own = {"LLMUX_ADMIN_KEY": "on purpose"}
    assert environment(HookJob(1, "m", HookKind.WAKE, "true", "/", env=own), inherited)["LLMUX_ADMIN_KEY"]


async def test_what_hooks_start_does_not_speak_to_systemd_for_llmux(bench, monkeypatch):
    for name in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"):
        monkeypatch.setenv(name, "of llmux")
    result = await bench.run("env > seen", env={"WATCHDOG_USEC": "its own"})
    assert result.ok, result.detail
    seen = (bench.folder / "seen").read_text().splitlines()
    assert [line for line in seen if line.startswith(("NOTIFY", "WATCHDOG"))] == ["WATCHDOG_USEC=its own"]


def test_variables_that_hold_a_remotes_key_are_kept_back():
    job = HookJob(1, "m", HookKind.WAKE, "true", "/")
    inherited = {"KEY": "sk-12345", "HEADER": "Authorization: Bearer sk-12345", "PIN": "1234", "YEAR": "12345"}
    seen = environment(job, inherited, {"sk-12345", "1234"})
    # What is short could be part of anything: it is only kept back where it is the whole value.
    assert seen.keys() & inherited.keys() == {"YEAR"}


@pytest.mark.parametrize(
    "name", ["a'b", 'a"b', "a b", "a\nb", "$(touch ran)", "`touch ran`", "; touch ran", "-n", "ä", "*"]
)
async def test_a_model_name_never_runs(bench, name):
    result = await bench.run('printf %s "$LLMUX_MODEL" > name', model=name)
    assert result.ok, result.detail
    assert (bench.folder / "name").read_text() == name
    assert not (bench.folder / "ran").exists()


async def test_it_runs_in_its_folder(bench):
    folder = bench.folder / "a folder with 'spaces'"
    folder.mkdir()
    result = await bench.run("pwd", cwd=folder)
    assert result.tail == f"{folder}\n"
    assert (await bench.run("pwd", cwd=str(folder))).tail == f"{folder}\n"


async def test_a_script_of_several_lines(bench):
    result = await bench.run("for n in 1 2\ndo\n  echo \"n is '$n'\"\ndone\n[ $# = 0 ] && echo $0\n")
    assert result.tail == "n is '1'\nn is '2'\n/bin/sh\n"


async def test_a_relative_path_with_arguments(bench):
    script = bench.folder / "hook.sh"
    script.write_text('#!/bin/sh\necho "$1 $LLMUX_MODEL"\n')
    script.chmod(0o755)
    assert (await bench.run("./hook.sh wake")).tail == "wake m\n"


async def test_a_missing_script(bench):
    result = await bench.run("./no-such-hook.sh wake")
    assert (result.ok, result.exit_code) == (False, 127)
    assert "no-such-hook.sh" in result.detail


async def test_a_script_that_is_not_executable(bench):
    (bench.folder / "hook.sh").write_text("#!/bin/sh\n")
    result = await bench.run("./hook.sh wake")
    assert (result.ok, result.exit_code) == (False, 126)
    assert "ermission denied" in result.detail


async def test_a_missing_folder(bench):
    result = await bench.run("true", cwd=bench.folder / "nowhere")
    assert (result.ok, result.exit_code, result.signal) == (False, None, None)
    assert result.detail.startswith("could not be started: ")
    assert "nowhere" in result.detail


@pytest.mark.parametrize(("script", "env"), [("echo \0", {}), ("true", {"A": "\0"}), ("x" * 200_000, {})])
async def test_what_no_process_can_be_given(bench, open_files, script, env):
    before = open_files()
    result = await bench.run(script, env=env)
    assert not result.ok
    assert result.detail.startswith("could not be started: ")
    assert open_files() == before


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.EAGAIN])
async def test_a_system_that_refuses(bench, monkeypatch, open_files, number):
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    before = open_files()
    monkeypatch.setattr(spawn_module.subprocess, "Popen", refuse)
    result = await bench.run("true")
    assert result.detail == f"could not be started: [Errno {number}] {os.strerror(number)}"
    monkeypatch.undo()
    monkeypatch.setattr(spawn_module.os, "pipe", refuse)
    assert not (await bench.run("true")).ok
    monkeypatch.undo()
    assert open_files() == before
    assert (await bench.run("true")).ok


async def test_it_gets_default_signals_and_nothing_else_open(bench):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        result = await bench.run("grep -E 'SigBlk|SigIgn' /proc/self/status; ls -l /proc/self/fd; cat")
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGUSR1}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    masks = dict(line.split(":\t") for line in result.tail.splitlines() if line.startswith("Sig"))
    assert int(masks["SigBlk"], 16) == 0
    assert not int(masks["SigIgn"], 16) & 1 << (signal.SIGPIPE - 1)
    descriptors = [line.split(" -> ") for line in result.tail.splitlines() if " -> " in line]
    names = {left.split()[-1]: right for left, right in descriptors}
    assert names["0"] == "/dev/null"
    assert names["1"] == names["2"]
    assert set(names) == {"0", "1", "2", "3"}  # 3 is the folder that ls reads


async def test_a_broken_pipe_inside_a_hook_ends_its_writer(bench):
    assert (await bench.run("yes | head -n 1")).tail == "y\n"


async def test_two_hundred_at_once(bench, open_files):
    before = open_files()
    started = [bench.start(f"echo n {n}; exit {n % 7}") for n in range(200)]
    assert len(bench.runner.running) == 200
    async with asyncio.timeout(PATIENCE):
        results = [await future for _, future in started]
    assert [r.exit_code for r in results] == [n % 7 for n in range(200)]
    assert [r.tail for r in results] == [f"n {n}\n" for n in range(200)]
    assert [r.id for r in results] == [job.id for job, _ in started]
    assert not bench.runner.running
    assert bench.orphans == []
    assert open_files() == before


async def test_the_same_id_twice_at_once(bench):
    job, future = bench.start("exit 0")
    with pytest.raises(ValueError, match="under way"):
        bench.runner.start(job, print)
    await future
    assert (await bench.run("true", id=job.id)).ok


async def test_run_waits_and_keeps_to_its_timeout(bench):
    assert (await bench.runner.run(bench.job("exit 0"), timeout=20)).ok
    result = await bench.runner.run(bench.job("sleep 1000"), timeout=0.1)
    assert result.killed == "timeout"
    assert re.fullmatch(r"ran past its timeout of \d\.\d s and was ended", result.detail)  # of 0.1 s, late or not


async def test_run_that_is_cancelled_ends_its_hook(bench, gone):
    task = asyncio.ensure_future(bench.runner.run(bench.job("echo pid $$; exec sleep 1000")))
    pid = await bench.pid("pid")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(pid)


async def test_callbacks_that_raise_break_nothing(tmp_path: Path):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))

    def broken(*_args: object) -> None:
        raise ZeroDivisionError

    runner = HookRunner(on_line=broken, on_started=broken)
    runner.start(HookJob(1, "m", HookKind.WAKE, "echo x", tmp_path), broken)
    result = await runner.run(HookJob(2, "m", HookKind.WAKE, "echo y", tmp_path))
    await runner.close()
    assert (result.ok, result.tail) == (True, "y\n")
    assert sorted(set(complaints)) == [
        "on_finished of the hook runner raised",
        "on_line of the hook runner raised",
        "on_started of the hook runner raised",
    ]
    assert not runner.running


def test_the_hook_does_not_see_llmux_terminal():
    # A hook that opens the terminal must not stop llmux's group: it has a group of its own.
    spawned = spawn_module.spawn("exit 0", "/", {})
    spawned.begin()
    try:
        assert os.waitid(os.P_PID, spawned.pid, os.WEXITED | os.WNOWAIT) is not None
        assert os.getpgid(spawned.pid) == spawned.pid
    finally:
        os.waitpid(spawned.pid, 0)
        os.close(spawned.output)
    assert subprocess.run(["true"], check=True).returncode == 0


UNTIL_TOLD = "echo begun; until test -e go; do sleep 0.01; done"


@pytest.fixture
def few(monkeypatch):
    """So few ``alive`` hooks run at once, and none counts as hanging."""
    for name, value in (("AT_ONCE", 4), ("A_TURN", 2), ("HANGING", 600.0)):
        monkeypatch.setattr(runner_module, name, value, raising=False)


@pytest.mark.usefixtures("few")
async def test_few_alive_hooks_run_at_once_and_fewer_begin_in_one_turn_of_the_loop(bench):
    """Of thousands, those that are asked later wait; other hooks never do."""
    turn, begun, loop = 0, [], asyncio.get_running_loop()

    def count() -> None:
        nonlocal turn
        turn += 1
        if len(begun) < 12:
            loop.call_soon(count)

    count()
    bench.runner._on_started = lambda jobs: begun.extend((turn, len(bench.runner.traces())) for _ in jobs)
    futures = [bench.start(UNTIL_TOLD, kind=HookKind.ALIVE)[1] for _ in range(11)]
    assert len(bench.runner.running) == 11
    await bench.until(lambda: bench.lines.count("begun") == 4)
    assert (await bench.run("true", kind=HookKind.WAKE)).ok
    assert bench.lines.count("begun") == len(bench.runner.traces()) == 4
    (bench.folder / "go").touch()
    async with asyncio.timeout(PATIENCE):
        assert all(result.ok for result in await asyncio.gather(*futures))
    turns = [turn for turn, _ in begun]
    assert max(map(turns.count, turns)) <= 3  # two of these, and the wake
    assert max(running for _, running in begun) <= 5


@pytest.mark.usefixtures("few")
async def test_of_other_hooks_few_are_started_in_one_turn_and_told_together_before_their_scripts_begin(bench):
    """Of thousands, none waits for the end of another."""
    turn, told, loop = 0, [], asyncio.get_running_loop()

    def count() -> None:
        nonlocal turn
        turn += 1
        if len(told) < 8:
            loop.call_soon(count)

    def written_down(jobs) -> None:
        assert not any((bench.folder / str(job.id)).exists() for job in jobs)
        assert len(bench.runner.traces()) == sum(len(before) for _, before in told) + len(jobs)
        told.append((turn, [job.id for job in jobs]))

    bench.runner._on_started = written_down
    script = f">$LLMUX_LEVEL; {UNTIL_TOLD}"
    jobs = [bench.start(script, kind=HookKind.SLEEP, env={"LLMUX_LEVEL": str(number)}) for number in range(1, 12)]
    assert [each for _, each in told] == [[1], [2]]  # at once, as one alone
    loop.call_soon(count)
    await bench.until(lambda: bench.lines.count("begun") == 11)
    assert [each for _, each in told] == [[1], [2], [3, 4], [5, 6], [7, 8], [9, 10], [11]]
    turns = [turn for turn, _ in told[2:]]
    assert len(set(turns)) == len(turns)
    (bench.folder / "go").touch()
    async with asyncio.timeout(PATIENCE):
        assert all(result.ok for result in await asyncio.gather(*(future for _, future in jobs)))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("how", ["kill", "close"])
async def test_other_hooks_that_wait_for_their_turn_are_ended_with_those_that_run(bench, how):
    jobs = [bench.start("exec sleep 600", kind=HookKind.SLEEP) for _ in range(5)]
    if how == "kill":
        assert all(bench.runner.kill(job.id, "stopping") for job, _ in jobs)
    else:
        await bench.runner.close()
        assert len(bench.results) == 5
    async with asyncio.timeout(PATIENCE):
        results = await asyncio.gather(*(future for _, future in jobs))
    assert {result.killed for result in results} == {"stopping"}
    assert sum(result.detail == "could not be started: llmux is stopping" for result in results) == 3


@pytest.mark.usefixtures("few")
async def test_alive_hooks_that_hang_do_not_keep_the_others(bench, monkeypatch):
    monkeypatch.setattr(runner_module, "HANGING", 0.02, raising=False)
    hanging = [bench.start("exec sleep 600", kind=HookKind.ALIVE)[1] for _ in range(25)]
    assert (await bench.run("exit 3", kind=HookKind.ALIVE)).exit_code == 3
    assert not any(future.done() for future in hanging)
    assert len(bench.runner.traces()) == 25


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("called", ["while it waits", "while it runs"])
async def test_a_timeout_of_a_hook_that_had_to_wait_counts_from_its_start(bench, monkeypatch, called):
    monkeypatch.setattr(runner_module, "AT_ONCE", 1, raising=False)
    before, _ = bench.start(UNTIL_TOLD, kind=HookKind.ALIVE)
    await bench.until(lambda: "begun" in bench.lines)
    job, ended = bench.start("echo late; exec sleep 600", kind=HookKind.ALIVE)
    timeout = 0.3
    await asyncio.sleep(timeout)
    if called == "while it waits":
        assert not bench.runner.kill(job.id, "timeout")
    (bench.folder / "go").touch()
    await bench.said("late")
    if called == "while it runs":
        assert not bench.runner.kill(job.id, "timeout")
    async with asyncio.timeout(PATIENCE):
        result = await ended
    assert result.killed == "timeout"
    assert result.duration >= timeout - 0.05  # uvloop counts from the beginning of a turn
    assert before.id not in bench.runner.running


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("how", ["kill", "close"])
async def test_alive_hooks_that_wait_are_ended_with_the_others(bench, how):
    jobs = [bench.start(UNTIL_TOLD, kind=HookKind.ALIVE) for _ in range(9)]
    await bench.until(lambda: bench.lines.count("begun") == 4)
    if how == "kill":
        assert all(bench.runner.kill(job.id, "stopping") for job, _ in jobs)
    else:
        await bench.runner.close()
        assert len(bench.results) == 9
    async with asyncio.timeout(PATIENCE):
        results = await asyncio.gather(*(future for _, future in jobs))
    assert {result.killed for result in results} == {"stopping"}
    assert sum(result.detail == "could not be started: llmux is stopping" for result in results) == 5
    assert not bench.runner.running


def test_one_look_at_all_processes_serves_all_hooks_that_end_meanwhile(monkeypatch):
    """With thousands of processes it takes long; but none serves a hook whose end began after it."""
    looks = []

    def look() -> frozenset[int]:
        looks.append(time.monotonic())
        time.sleep(0.05)
        return frozenset({7})

    monkeypatch.setattr(spawn_module, "_living_groups", look)
    living, since = spawn_module._LivingGroups(), time.monotonic()
    assert [living.has(group, since) for group in (7, 8, 9)] == [True, False, False]
    assert len(looks) == 1
    assert not living.has(9, time.monotonic())
    assert len(looks) == 2
