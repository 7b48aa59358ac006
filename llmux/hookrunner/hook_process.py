"""One hook from its start to its result.

::

    start ─┬─ exits with 0 ───────────────────────────▶ result, at once; the group is left alone
           ├─ exits otherwise ─┐
           └─ kill() ──────────┴─▶ TERM to the group ── grace ─▶ KILL ── the group is empty ─▶ result

The exit of the shell counts, never the end of the pipe: a wake hook leaves an engine behind that holds it.
After a failure whatever the hook has started is gone before its result is known, so that a cleanup never
races with a stray engine. Only a process that put itself into another session or group escapes.

Starting it: ``sh -c SCRIPT`` in a folder, in a process group of its own, its output in one pipe.

``subprocess.Popen(process_group=0)`` it is: with neither ``preexec_fn`` nor a change of user, CPython uses
``vfork``, so the size of llmux does not matter. How long starting a hook holds up the event loop
(``python tests/benchmarks/spawn.py``, median / largest of 200 in ms, 2 cores, CPython 3.11):

===============  ================  ================  ================  ================
way              asyncio, 22 MB    asyncio, 523 MB   uvloop, 22 MB     uvloop, 523 MB
===============  ================  ================  ================  ================
posix_spawn      0.10 / 0.20       0.08 / 1.15       0.07 / 0.58       0.07 / 0.39
Popen            0.07 / 0.14       0.07 / 0.39       0.05 / 1.17       0.05 / 0.39
subprocess_exec  0.29 / 0.51       0.29 / 0.62       0.69 / 0.81       4.98 / 5.81
===============  ================  ================  ================  ================

(The largest ones are noise of one run: another had 0.28, 1.09 and 0.51 in the first column.)
``posix_spawn`` is as fast, but cannot change the folder: a second shell would have to, which leaves
``OLDPWD`` in the hook's environment and cannot tell a missing folder from a hook that exits with 2. ``Popen``
closes every descriptor that llmux itself inherited, too. uvloop's own subprocesses ``fork``: 5 ms at 500 MB.

Its exit is awaited without blocking the loop and without reaping it too early.

An exited child that is not reaped keeps its pid, and with it the id of its process group: as long as it
is not reaped, a signal to the group cannot hit anyone else.

Hooks that outlived a llmux which got KILL: nothing ended them. A wake that runs on behind the back of the next
llmux could put a second engine on the GPU, a sleep could take one from under its requests, so their processes are
written down before their scripts begin, and ended at the next start. A hook that was being ended may have lost its
leader already while others of its group ignored TERM: then all that is left of the group is ended. So that is
written down, too, before TERM is sent. Where it was not being ended, a group without its leader is what a wake has
left behind when it was done: the engine, which stays.

Where llmux is process 1, as in a container without an init, it waits for the orphans that it adopts. An engine
whose wake hook has exited is adopted by process 1. Dead, it stays in the process table until that one waits for
it, and a sleep hook that asks ``kill -0`` whether it has gone would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llmux.hookrunner.job import ExitStatus, HookJob, HookResult, Output, PipeReader, describe


def signal_group(group: int, *numbers: signal.Signals) -> bool:
    """Send signals to every member. False: there are members, and llmux may not signal any of them."""
    with contextlib.suppress(ProcessLookupError):
        for number in numbers:
            try:
                os.killpg(group, number)
            except PermissionError:
                return False
    return True


def group_is_empty(group: int, *, look_closely: bool, since: float = math.inf) -> bool:
    """Whether no process is left. Its leader must have been reaped already.

    A dead member that its parent does not reap counts as one for the kernel, for ever where process 1 is no
    init. ``look_closely`` does not count it; this reads all of ``/proc``: milliseconds. What was read for another
    group after ``since`` (``time.monotonic()``; when its end began) may serve for this one.
    """
    # Where llmux is process 1 (a container), the orphans of its hooks are its own children by now.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return look_closely and not _living.has(group, since)


class _LivingGroups:
    """The process groups that have living members.

    One look serves all hooks that are being ended for ten times as long as it took: with thousands of processes
    it takes a tenth of a second.
    """

    def __init__(self) -> None:
        self._groups: frozenset[int] = frozenset()
        self._began = self._until = -math.inf

    def has(self, group: int, since: float) -> bool:
        now = time.monotonic()
        if not since <= self._began <= now <= self._until:
            self._began, self._groups = now, _living_groups()
            ended = time.monotonic()
            self._until = ended + 10 * (ended - now)
        return group in self._groups or not self._groups  # another system: nothing more is known


def _living_groups() -> frozenset[int]:
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal() and (seen := _look(entry.name)) is not None:
                found.add(seen.group)
    return frozenset(found)


_living = _LivingGroups()


GRACE = 5.0  # seconds between TERM and KILL
LOOK = 0.02


class Trace(NamedTuple):
    """What tells a process from a later one with the same number, on the same machine or after a reboot."""

    pid: int
    started: int  # clock ticks since the boot
    boot: str
    ending: bool = False  # it had failed, or was being ended


def trace_of(pid: int) -> Trace | None:
    """Return the trace of a process that runs; None where there is no ``/proc``, or no such process."""
    found = _look(pid)
    boot = _boot()
    return Trace(pid, found.started, boot) if found is not None and boot is not None else None


async def end_leftovers(
    traces: Iterable[Trace],
    grace: float = GRACE,
    on_ending: Callable[[list[Trace]], object] = lambda _found: None,
) -> list[Trace]:
    """End the groups of those that still run: TERM, the grace (seconds), KILL. Return which they were.

    ``on_ending`` is called with them before TERM is sent, which not all of a group may take. Cut short, it ends
    them with KILL at once.
    """
    boot = _boot()
    found = [trace._replace(ending=True) for trace in traces if trace.boot == boot and _runs(trace)]
    on_ending(found)
    for trace in found:
        signal_group(trace.pid, signal.SIGTERM, signal.SIGCONT)
    left = found
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                # Not our children: there is nothing to wait on.
                while left := [trace for trace in left if _members(trace)]:  # noqa: ASYNC110
                    await asyncio.sleep(LOOK)
    finally:
        for trace in left:
            signal_group(trace.pid, signal.SIGKILL)
    return found


class _Stat(NamedTuple):
    group: int
    started: int


def _look(pid: int | str) -> _Stat | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # PID (NAME) STATE PPID PGRP …: the start is the 22nd of all. The name may hold spaces and parentheses.
    fields = stat.rpartition(b")")[2].split()
    # A zombie of which threads are left, the 20th field, still holds memory and ports.
    ended = fields[0] in b"ZX" and int(fields[17]) <= 1
    return None if ended else _Stat(int(fields[2]), int(fields[19]))


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _runs(trace: Trace) -> bool:
    # Its own group: a hook's shell leads one. Never llmux's own, whatever a damaged file says.
    if trace.pid <= 1 or trace.pid == os.getpgrp():
        return False
    if (leader := _look(trace.pid)) is not None:
        return leader == _Stat(trace.pid, trace.started)
    return trace.ending and any(_is_of_a_hook(path) for path in _members(trace))


def _members(trace: Trace) -> list[Path]:
    """Return the members that live. As long as there is one, no new process gets the leader's number."""
    return [
        path
        for path in Path("/proc").iterdir()
        if path.name.isdecimal()
        and (seen := _look(path.name)) is not None
        and seen.group == trace.pid
        and seen.started >= trace.started
    ]


def _is_of_a_hook(process: Path) -> bool:
    try:
        return b"\0LLMUX_HOOK=" in b"\0" + (process / "environ").read_bytes()
    except OSError:
        return False


def reap_orphans(hooks: Iterable[int]) -> None:
    """Reap dead children that belong to no hook.

    Those in ``hooks`` (pids) are left to their watchers, and those in llmux's own process group to the code
    that started them: an orphan is in the group of its hook, or in one of its own.
    """
    spared = set(hooks)
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        while (info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            pid = info.si_pid
            if pid in spared or os.getpgid(pid) == os.getpgrp():
                return  # the kernel names this one first until it is reaped: the others wait
            os.waitpid(pid, os.WNOHANG)


_SET_CHILD_SUBREAPER, _GET_CHILD_SUBREAPER = 36, 37  # of prctl(2)


@contextlib.contextmanager
def adopting_orphans() -> Iterator[bool]:
    """Adopt, until the block ends, what hooks leave behind, as process 1 does; False where the system cannot.

    What was adopted stays with this process until it ends itself.
    """
    before = ctypes.c_int(0)
    able = sys.platform == "linux" and _prctl(_GET_CHILD_SUBREAPER, ctypes.byref(before))
    able = able and _prctl(_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    try:
        yield able
    finally:
        if able:
            _prctl(_SET_CHILD_SUBREAPER, ctypes.c_ulong(before.value))


def _prctl(option: int, argument: object) -> bool:
    try:
        return bool(ctypes.CDLL(None).prctl(option, argument, 0, 0, 0) == 0)
    except (AttributeError, OSError):  # another C library
        return False


UNENDING_AFTER = 10.0
"""Seconds after KILL when waiting is given up: a process deep in a driver may not die at all."""

FIRST_LOOK, CLOSE_LOOK, LAST_LOOK = 0.002, 0.016, 0.1
"""Seconds between two looks at a group that should become empty: the pause doubles, the looks grow closer."""


class HookProcess:
    """A hook that runs.

    ``kill_grace`` is the time between TERM and KILL in seconds; ``on_ending`` is called before TERM is sent.
    Raises OSError or RuntimeError when the system has nothing left to watch it with; it has been ended then.
    """

    def __init__(
        self,
        job: HookJob,
        spawned: Spawned,
        emit: Callable[[str], None],
        kill_grace: float,
        on_ending: Callable[[HookJob], None] = lambda _job: None,
    ) -> None:
        self.job = job
        self.pid = spawned.pid
        self.begin = spawned.begin
        self._trace = trace_of(self.pid)
        self._on_ending = on_ending
        self._kill_grace = kill_grace
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()  # uvloop's clock counts whole milliseconds, and only once a turn
        self._output = Output(emit)
        self._ended = self._loop.create_future()  # it exited, or is given up
        self._timer: asyncio.TimerHandle | None = None
        self._ending = False  # signals are or have been sent
        self._killed: str | None = None
        self._killed_after = 0.0
        self._given_up = False
        self._over = False
        self.pipe = PipeReader(self._loop, spawned.output, self._output.feed, self._output.flush)
        try:
            self._watch = ExitWatch(self._loop, spawned.pid, self._exited)
        except BaseException:
            self.pipe.close()
            os.close(spawned.gate)
            signal_group(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise

    def trace(self) -> Trace | None:
        """Return what the next llmux recognises it by, None where that cannot be known."""
        return self._trace and self._trace._replace(ending=self._ending)

    def kill(self, reason: str) -> bool:
        """End its group: TERM, the grace, KILL. False, and no effect, when that is under way or it has exited."""
        if self._ending or self._watch.poll() is not None:
            return False
        self._mark(reason)
        self._terminate()
        return True

    def kill_now(self, reason: str) -> None:
        """End its group with KILL, also when ``kill`` is under way."""
        status = self._watch.poll()
        if self._over or (status is not None and status.ok and not self._ending):
            return  # when it has succeeded, what it left behind stays
        if status is None:
            self._mark(reason)
        self._kill()

    def abandon(self) -> None:
        """End it after ``follow`` was cut short: the loop is being torn down, and no hook outlives llmux."""
        self._over = False
        self.kill_now("cancelled")
        self._stop_timer()
        self._given_up = True  # should the loop go on, the exit is still reaped
        self.pipe.close()

    async def follow(self) -> HookResult:
        """Wait for its end, and return the result. The pipe may still be open afterwards."""
        try:
            await self._ended
            self.pipe.drain()
            self._output.flush()
            tail = self._output.tail()
            status = self._watch.poll() or ExitStatus()
            ok = status.ok and self._killed is None
            if not ok:
                await self._end_group()
        finally:
            self._over = True
            self._stop_timer()
            if self._watch.poll() is not None:
                self._watch.reap()
        return HookResult(
            self.job.id,
            self.job.model,
            self.job.kind,
            ok=ok,
            exit_code=status.code,
            signal=status.signal,
            duration=time.monotonic() - self._started,
            killed=self._killed,
            tail=tail,
            detail=describe(status, tail, killed=self._killed, after=self._killed_after, unending=self._given_up),
        )

    def _exited(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
        elif self._given_up:
            self._watch.reap()

    def _mark(self, reason: str) -> None:
        if self._killed is None:
            self._killed = reason
            self._killed_after = time.monotonic() - self._started

    async def _end_group(self) -> None:
        if not self._ending:
            self._terminate()  # before the leader is reaped: the group's id is still its own
        if self._watch.poll() is not None:
            self._watch.reap()
        pause, since = FIRST_LOOK, time.monotonic()
        while not self._given_up and not group_is_empty(self.pid, look_closely=pause >= CLOSE_LOOK, since=since):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_LOOK)

    def _terminate(self) -> None:
        self._ending = True
        self._on_ending(self.job)
        # A stopped process takes TERM only when it continues.
        signal_group(self.pid, signal.SIGTERM, signal.SIGCONT)
        self._timer = self._loop.call_later(self._kill_grace, self._kill)

    def _kill(self) -> None:
        self._ending = True
        self._stop_timer()
        allowed = signal_group(self.pid, signal.SIGKILL)
        self._timer = self._loop.call_later(UNENDING_AFTER if allowed else 0, self._give_up)

    def _give_up(self) -> None:
        self._given_up = True
        if not self._ended.done():
            self._ended.set_result(None)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


SHELL = "/bin/sh"

# Before the script's first line, not above it: the shell's messages name the lines of the script.
_GATE = "read -r _ || exit 75; exec </dev/null; "


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that runs: its pid, which is its group's id too, and the reading end of its output.

    Its script waits for ``begin``: a llmux that is killed before it could write down which process this is leaves
    none behind that wakes an engine unknown to the next one.
    """

    pid: int
    output: int
    gate: int

    def begin(self) -> None:
        """Let the script begin."""
        with contextlib.suppress(BrokenPipeError):  # it has been killed meanwhile
            os.write(self.gate, b"\n")
        os.close(self.gate)


def spawn(script: str, cwd: Path | str, env: Mapping[str, str]) -> Spawned:
    """Start a shell that runs ``script`` once ``begin`` is called, and ends when ``gate`` is closed before that.

    The caller reaps the process, and closes ``output``, which does not block. Raises OSError when the system
    refuses (no such folder, no memory, no descriptors, a script beyond 128 KiB), and ValueError when the script
    or the environment holds what no process can be given (a NUL). Nothing is left behind then.
    """
    _keep_exit_statuses()
    output, write = os.pipe()
    try:
        wait, gate = os.pipe()
    except OSError:
        os.close(output)
        os.close(write)
        raise
    try:
        os.set_blocking(output, False)
        with _NoSignalsBlocked():
            process = subprocess.Popen(  # noqa: S603  (running the user's script is what hooks are)
                [SHELL, "-c", _GATE + script],
                cwd=cwd,
                env=env,
                stdin=wait,
                stdout=write,
                stderr=write,
                process_group=0,
                # SIGPIPE, which Python ignores, gets its default back: `yes | head -1` must end.
                restore_signals=True,
            )
    except BaseException:
        os.close(output)
        os.close(gate)
        raise
    finally:
        os.close(write)
        os.close(wait)
    # Reaping is ours (see ExitWatch). The Popen object is told that it has nothing left to wait for, or it
    # would complain, and would wait for the pid at some later time, when it may belong to someone else.
    process.returncode = 0
    return Spawned(process.pid, output, gate)


def _keep_exit_statuses() -> None:
    # Started with SIGCHLD ignored, it would have the kernel throw every exit status away.
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class _NoSignalsBlocked:
    """While it lasts, no signal is blocked in this thread: a child, and so an engine, inherits the mask."""

    def __enter__(self) -> None:
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        if self._blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def __exit__(self, *_: object) -> None:
        if self._blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)


class ExitWatch:
    """Calls ``on_exit`` from the loop, once, when the child ``pid`` has exited.

    It uses a pidfd; where there is none (an old kernel, a sandbox, another system, no descriptor left) a
    thread of its own waits. Without ``waitid`` (macOS before CPython 3.13) the thread also reaps the child.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, pid: int, on_exit: Callable[[], None]) -> None:
        self.pid = pid
        self._loop = loop
        self._on_exit = on_exit
        self._status: ExitStatus | None = None
        self._reaped = False
        self._pidfd: int | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except (AttributeError, OSError):
            threading.Thread(target=self._wait, name=f"wait for {pid}", daemon=True).start()
        else:
            loop.add_reader(self._pidfd, self._exited)

    def poll(self) -> ExitStatus | None:
        """Return how the child exited, None while it runs. It is not reaped."""
        if self._status is None and hasattr(os, "waitid"):
            try:
                info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                # SIGCHLD is ignored, or someone waits for any child: the status is lost.
                self._reaped = True
                self._status = ExitStatus()
            else:
                if info is not None:
                    exited = info.si_code == os.CLD_EXITED
                    self._status = ExitStatus(code=info.si_status) if exited else ExitStatus(signal=info.si_status)
        return self._status

    def reap(self) -> None:
        """Let the pid go. The child must have exited."""
        if not self._reaped:
            self._reaped = True
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)

    def close(self) -> None:
        """Stop watching."""
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _exited(self) -> None:
        if self.poll() is not None:
            self.close()
            self._on_exit()

    def _wait(self) -> None:
        try:
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            else:
                _, status = os.waitpid(self.pid, 0)
                self._reaped = True
                code = os.waitstatus_to_exitcode(status)
                self._status = ExitStatus(code=code) if code >= 0 else ExitStatus(signal=-code)
        except ChildProcessError:
            self._reaped = True
            self._status = ExitStatus()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the exit is of no use any more
            self._loop.call_soon_threadsafe(self._exited)
