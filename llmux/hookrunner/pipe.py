"""Reading a pipe from the loop until its last holder has gone."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
from collections.abc import Callable

CHUNK = 64 * 1024  # bytes per turn of the loop: what a pipe holds


class PipeReader:
    """Reads ``fd`` (which must not block), gives what comes to ``feed``, and closes it at its end.

    ``on_end`` is called once, from the loop or from ``drain``, when the last writer has gone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        feed: Callable[[bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._feed = feed
        self._on_end = on_end
        self.open = True
        loop.add_reader(fd, self._read)

    def drain(self) -> None:
        """Read what is in the pipe at this moment; not what somebody writes meanwhile."""
        if not self.open:
            return
        (there,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, b"\0\0\0\0"))
        while there > 0 and self.open:
            there -= self._read() or there
        if self.open:
            self._read()  # nothing there: this finds out whether the end has come

    def close(self) -> None:
        """Stop reading: who still writes gets SIGPIPE."""
        if self.open:
            self.open = False
            self._loop.remove_reader(self._fd)
            os.close(self._fd)

    def _read(self) -> int:
        if not self.open:
            return 0
        try:
            chunk = os.read(self._fd, CHUNK)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            chunk = b""
        if chunk:
            self._feed(chunk)
        else:
            self.close()
            self._on_end()
        return len(chunk)
