"""Process groups: signalling one, and finding out whether anybody is left in it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


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
    """Whether nobody is left. Its leader must have been reaped already.

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
