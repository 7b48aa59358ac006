"""What a hook prints: bounded lines for the log, and the tail for its result.

Nothing here knows processes or loops: bytes go in, lines come out.

Reading a pipe from the loop until its last holder has gone.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import struct
import termios
from collections.abc import Callable

LINE_BYTES = 4 * 1024
LOG_BYTES = 64 * 1024
LOG_LINES = 1000
TAIL_BYTES = 2 * 1024
DROPPED = "… further output is dropped"

# Progress bars end their lines with a carriage return.
_END_OF_LINE = re.compile(rb"[\r\n]")
_CONTROL = [char for char in (*range(0x20), *range(0x7F, 0xA0)) if char != ord("\t")]
_ESCAPED = {**{char: f"\\x{char:02x}" for char in _CONTROL}, 0x2028: "\\u2028", 0x2029: "\\u2029"}
_ESCAPED_BUT_NEWLINE = {char: text for char, text in _ESCAPED.items() if char != ord("\n")}


class Output:
    """Takes a hook's bytes; gives lines to ``emit`` and remembers the tail.

    A line is cut at 4 KiB; blank ones are left out. After 64 KiB or 1000 lines in all, one last line says
    that the rest is dropped; the tail stays up to date. Memory is bounded by these numbers.
    """

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._unfinished = b""
        self._bytes_left = LOG_BYTES
        self._lines_left = LOG_LINES
        self._dropping = False
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """Take what was read."""
        self._tail = (self._tail + chunk)[-TAIL_BYTES:] if len(chunk) < TAIL_BYTES else chunk[-TAIL_BYTES:]
        if self._dropping:
            return
        kept = chunk[: self._bytes_left]
        self._bytes_left -= len(kept)
        *lines, self._unfinished = _END_OF_LINE.split(self._unfinished + kept)
        for line in lines:
            self._line(line)
        if len(kept) < len(chunk):
            self.flush()
            self._drop()

    def flush(self) -> None:
        """Give out the last line, which has no newline."""
        line, self._unfinished = self._unfinished, b""
        self._line(line)

    def tail(self) -> str:
        """Return the last 2 KiB, decoded, with newlines; other control characters are escaped."""
        data = self._tail
        if len(data) == TAIL_BYTES:  # it may begin in the middle of a character
            data = data[:4].lstrip(bytes(range(0x80, 0xC0))) + data[4:]
        text = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode(errors="replace")
        return text.translate(_ESCAPED_BUT_NEWLINE)

    def _line(self, line: bytes) -> None:
        if self._dropping or not line.strip():
            return
        if self._lines_left == 0:
            self._drop()
            return
        self._lines_left -= 1
        text = line[:LINE_BYTES].decode(errors="replace").translate(_ESCAPED)
        self._emit(text if len(line) <= LINE_BYTES else text + "…")

    def _drop(self) -> None:
        if not self._dropping:
            self._dropping = True
            self._unfinished = b""
            self._emit(DROPPED)


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
        """Read what is in the pipe at this moment; not what is written meanwhile."""
        if not self.open:
            return
        (there,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, b"\0\0\0\0"))
        while there > 0 and self.open:
            there -= self._read() or there
        if self.open:
            self._read()  # nothing there: this finds out whether the end has come

    def close(self) -> None:
        """Stop reading: a process that still writes gets SIGPIPE."""
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
