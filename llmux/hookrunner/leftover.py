"""Hooks that outlived a llmux that was killed.

Nothing ends the hooks of a llmux that gets KILL. A wake that runs on behind the back of the next one could put a
second engine on the GPU, a sleep could take one from under its requests, so their processes are written down, and
ended at the next start.

A hook that was being ended may have lost its leader already while others of its group ignored TERM: then all that
is left of the group is ended. Where nobody was ending it, a group without its leader is what a wake has left
behind when it was done: the engine, which stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from llmux.hookrunner.group import signal_group

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
    """Return who lives in the group. As long as there is one, no new process gets the leader's number."""
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
