"""Process groups: signalling one, and finding out whether a process is left in it.

Hooks that outlived a llmux that was killed.

Nothing ends the hooks of a llmux that gets KILL. A wake that runs on behind the back of the next one could put a
second engine on the GPU, a sleep could take one from under its requests, so their processes are written down, and
ended at the next start.

A hook that was being ended may have lost its leader already while others of its group ignored TERM: then all that
is left of the group is ended. Where it was not being ended, a group without its leader is what a wake has left
behind when it was done: the engine, which stays.

Burying what hooks leave behind, where llmux is process 1, as in a container without an init.

An engine whose wake hook has exited is adopted by process 1. Dead, it stays in the process table until that
one waits for it, and a sleep hook that asks ``kill -0`` whether it has gone would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


def signal_group(group: int, *numbers: signal.Signals) -> bool:
    """Send signals to every member. False: there are members, and llmux may not signal any of them."""
    with contextlib.suppress(ProcessLookupError):
        for number in numbers:
            try:
                os.killpg(group, number)
            except PermissionError:
                return False
    return True


def group_is_empty(group: int, *, look_closely: bool) -> bool:
    """Whether no process is left. Its leader must have been reaped already.

    A dead member that its parent does not reap counts as one for the kernel, for ever where process 1 is no
    init. ``look_closely`` does not count it; this reads all of ``/proc``: milliseconds.
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
    return look_closely and not _has_living_members(group)


def _has_living_members(group: int) -> bool:
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        return True  # another system: nothing more is known
    for entry in proc.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                # PID (NAME) STATE PPID PGRP …; the name may hold spaces and parentheses.
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                if int(fields[2]) == group and fields[0] not in b"ZX":
                    return True
    return False


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


async def end_leftovers(traces: Iterable[Trace], grace: float = GRACE) -> list[Trace]:
    """End the groups of those that still run: TERM, the grace (seconds), KILL. Return which they were.

    Cut short, it ends them with KILL at once.
    """
    boot = _boot()
    found = [trace for trace in traces if trace.boot == boot and _runs(trace)]
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


class _Seen(NamedTuple):
    group: int
    started: int


def _look(process: int | Path) -> _Seen | None:
    path = process if isinstance(process, Path) else Path(f"/proc/{process}")
    try:
        stat = (path / "stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # PID (NAME) STATE PPID PGRP …: the start is the 22nd of all
    return None if fields[0] in b"ZX" else _Seen(int(fields[2]), int(fields[19]))


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
        return leader == _Seen(trace.pid, trace.started)
    return trace.ending and any(_is_of_a_hook(path) for path in _members(trace))


def _members(trace: Trace) -> list[Path]:
    """Return the members that live. As long as there is one, no new process gets the leader's number."""
    return [
        path
        for path in Path("/proc").iterdir()
        if path.name.isdecimal()
        and (seen := _look(path)) is not None
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
