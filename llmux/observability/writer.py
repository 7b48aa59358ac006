"""Writes log lines from a thread of its own.

Whoever reads llmux's log may stop doing so (a paused terminal, a full pipe), and a write that blocks would
stop the event loop, hence every request. So lines wait in a bounded queue; what does not fit is counted and
dropped.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from typing import TextIO

_CLOSE_WAITS = 2.0  # seconds for the last lines at exit


class ThreadedHandler(logging.Handler):
    """Formats where it is called, writes in a thread."""

    def __init__(self, stream: TextIO, *, limit: int = 10_000) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(limit)
        self._dropped = 0
        self._closed = False
        self._thread = threading.Thread(target=self._write_all, name="llmux-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's line."""
        try:
            self._lines.put_nowait(self.format(record) + "\n")
        except queue.Full:
            self._dropped += 1
        except Exception:  # noqa: BLE001  # as every handler of the standard library does
            self.handleError(record)

    def flush(self) -> None:
        """Wait for what is queued, a little."""
        reached = threading.Event()
        with contextlib.suppress(queue.Full):
            self._lines.put(reached, timeout=_CLOSE_WAITS)
            if self._thread.is_alive():
                reached.wait(_CLOSE_WAITS)

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=_CLOSE_WAITS)
            self._thread.join(_CLOSE_WAITS)
        super().close()

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            if line is None:
                return
            if isinstance(line, threading.Event):
                line.set()
                continue
            if self._dropped:
                count, self._dropped = self._dropped, 0
                line += self._about_dropped(count)
            with contextlib.suppress(OSError, ValueError):  # the reader has gone: there is nowhere to report it
                self._stream.write(line)
                self._stream.flush()

    def _about_dropped(self, count: int) -> str:
        fields = {"msg": f"log_lines_dropped count={count}", "levelname": "WARNING", "levelno": logging.WARNING}
        return self.format(logging.makeLogRecord(fields)) + "\n"
