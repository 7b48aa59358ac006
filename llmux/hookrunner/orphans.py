"""Burying what hooks leave behind, where llmux is process 1, as in a container without an init.

An engine whose wake hook has exited is adopted by process 1. Dead, it stays in the process table until that
one waits for it, and a sleep hook that asks ``kill -0`` whether it has gone would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable


def reap_orphans(hooks: Iterable[int]) -> None:
    """Reap dead children that belong to nobody.

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
