"""Waiting for the exit of one child without blocking the loop and without reaping it too early.

An exited child that nobody has reaped keeps its pid, and with it the id of its process group: as long as it
is not reaped, a signal to the group cannot hit anyone else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable

from llmux.hookrunner.job import ExitStatus


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
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is interested any more
            self._loop.call_soon_threadsafe(self._exited)
