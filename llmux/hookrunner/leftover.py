"""Hooks that outlived a llmux that was killed.

Nothing ends the hooks of a llmux that gets KILL. A wake that runs on behind the back of the next one could put a
second engine on the GPU, so their processes are written down, and ended at the next start.
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


def trace_of(pid: int) -> Trace | None:
    """Return the trace of a process that runs; None where there is no ``/proc``, or no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # PID (NAME) STATE PPID …: the start is the 22nd of all
    if fields[0] in b"ZX":
        return None
    return Trace(pid, int(fields[19]), boot)


async def end_leftovers(traces: Iterable[Trace], grace: float = GRACE) -> list[Trace]:
    """End the groups of those that still run: TERM, the grace (seconds), KILL. Return which they were."""
    found = [trace for trace in traces if _runs(trace)]
    for trace in found:
        signal_group(trace.pid, signal.SIGTERM, signal.SIGCONT)
    left = found
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace):
            # Not our children: there is nothing to wait on.
            while left := [trace for trace in left if _runs(trace)]:  # noqa: ASYNC110
                await asyncio.sleep(LOOK)
    for trace in left:
        signal_group(trace.pid, signal.SIGKILL)
    return found


def _runs(trace: Trace) -> bool:
    # Its own group: a hook's shell leads one. Never llmux's own, whatever a damaged file says.
    if trace.pid <= 1 or trace_of(trace.pid) != trace:
        return False
    with contextlib.suppress(OSError):
        return os.getpgid(trace.pid) == trace.pid != os.getpgrp()
    return False
