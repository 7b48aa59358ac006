"""The bytes of one body: in memory while they are few, else in a file without a name."""

from __future__ import annotations

import os
import tempfile
from typing import IO

from llmux.errors import UnavailableError
from llmux.extract.field import SLICE
from llmux.extract.limits import BodyBudget

MEMORY = 1024 * 1024
"""Bytes: a body of more goes to a file."""

_RETRY_AFTER = 5.0


class Store:
    """Takes a body's bytes in order and gives them back by position.

    The file is written and read directly in the event loop, a slice at a time: through the page cache 64 KiB
    take 5 us (at most 0.5 ms in 256 MiB of them), less than a thread's hand-over. It has no name, so that it
    goes with the process, whatever ends that.
    """

    def __init__(self, budget: BodyBudget) -> None:
        self.size = 0
        self.closed = False
        self._budget = budget
        self._memory: bytes | bytearray = b""
        self._file: IO[bytes] | None = None

    @property
    def spooled(self) -> bool:
        """Whether the bytes are in a file."""
        return self._file is not None

    def add(self, data: bytes) -> None:
        """Append ``data``, at most ``SLICE`` bytes. UnavailableError when the budget or the disk is full."""
        self._budget.take(len(data))
        self.size += len(data)
        if self._file is not None:
            self._write(self._file, data)
        elif self.size > MEMORY:
            self._spool(data)
        elif not self._memory:
            self._memory = data  # most bodies arrive in one piece, which is not copied
        else:
            if isinstance(self._memory, bytes):
                self._memory = bytearray(self._memory)
            self._memory += data

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` up to ``end``. ValueError after ``close``."""
        if self.closed:
            raise ValueError("the body is closed")
        if self._file is None:
            return bytes(self._memory[start:end])
        data = os.pread(self._file.fileno(), end - start, start)
        if len(data) != end - start:
            raise OSError(f"the spooled body is short: {len(data)} of {end - start} bytes at {start}")
        return data

    def close(self) -> None:
        """Drop the bytes and give their share of the budget back. May be called again."""
        if self.closed:
            return
        self.closed = True
        self._budget.give_back(self.size)
        self._memory = b""
        if self._file is not None:
            self._file.close()

    def _spool(self, data: bytes) -> None:
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (close() closes it)
        except OSError as error:
            raise _disk_full(error) from error
        for start in range(0, len(self._memory), SLICE):
            self._write(self._file, bytes(self._memory[start : start + SLICE]))
        self._memory = b""
        self._write(self._file, data)

    @staticmethod
    def _write(file: IO[bytes], data: bytes) -> None:
        try:
            while (written := file.write(data)) < len(data):
                data = data[written:]
        except OSError as error:
            raise _disk_full(error) from error


def _disk_full(error: OSError) -> UnavailableError:
    return UnavailableError(
        f"the body cannot be kept in a temporary file: {error.strerror}",
        code="bodies_full",
        retry_after=_RETRY_AFTER,
    )
