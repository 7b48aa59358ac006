"""How much of request bodies is held, and where: in memory, or beyond 1 MiB in an unlinked temporary file."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import IO

from llmux.errors import UnavailableError
from llmux.extract.model_field import SLICE

_MIB = 1024 * 1024
_RETRY_AFTER = 5.0


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits of bodies: ``max_body`` bytes each and ``max_buffered`` bytes for all together.

    ``idle_timeout`` is in seconds: how long a client may send nothing while its body is not complete.
    """

    max_body: int = 256 * _MIB
    max_buffered: int = 1024 * _MIB
    idle_timeout: float = 60.0


class BodyBudget:
    """The bytes that all bodies hold together, in memory or in files. One for all requests.

    Bytes count as they arrive, not as announced: a client that announces much and sends nothing takes
    nothing from the others.
    """

    def __init__(self, max_buffered: int) -> None:
        self.max_buffered = max_buffered
        self.held = 0

    def take(self, size: int) -> None:
        """Count ``size`` bytes more; when they are too many, UnavailableError ``bodies_full``."""
        if self.held + size > self.max_buffered:
            raise UnavailableError(
                f"the bodies of waiting requests already take {self.held} bytes of {self.max_buffered}",
                code="bodies_full",
                retry_after=_RETRY_AFTER,
            )
        self.held += size

    def give_back(self, size: int) -> None:
        """Count ``size`` bytes less."""
        self.held -= size


MEMORY = 1024 * 1024
"""Bytes: a body of more goes to a file."""


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
