"""Starting a hook: ``sh -c SCRIPT`` in a folder, in a process group of its own, its output in one pipe.

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
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SHELL = "/bin/sh"


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that runs: its pid, which is its group's id too, and the reading end of its output."""

    pid: int
    output: int


def spawn(script: str, cwd: Path | str, env: Mapping[str, str]) -> Spawned:
    """Start ``script``; the caller reaps the process and closes ``output``, which does not block.

    Raises OSError when the system refuses (no such folder, no memory, no descriptors, a script beyond
    128 KiB), and ValueError when the script or the environment holds what no process can be given (a NUL).
    Nothing is left behind then.
    """
    _keep_exit_statuses()
    output, write = os.pipe()
    try:
        os.set_blocking(output, False)
        with _NoSignalsBlocked():
            process = subprocess.Popen(  # noqa: S603  (running the user's script is what hooks are)
                [SHELL, "-c", script],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                process_group=0,
                # SIGPIPE, which Python ignores, gets its default back: `yes | head -1` must end.
                restore_signals=True,
            )
    except BaseException:
        os.close(output)
        raise
    finally:
        os.close(write)
    # Reaping is ours (see ExitWatch). The Popen object is told that it has nothing left to wait for, or it
    # would complain, and would wait for the pid at some later time, when it may belong to someone else.
    process.returncode = 0
    return Spawned(process.pid, output)


def _keep_exit_statuses() -> None:
    # Whoever starts llmux with SIGCHLD ignored has the kernel throw every exit status away.
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
