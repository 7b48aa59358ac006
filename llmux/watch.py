"""Watching files for changes: by the kernel's events, and by looking every few seconds.

The kernel does not tell of everything: a file that is bind-mounted into a container and replaced on the host
changes without an event.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

LOOK = 5.0  # seconds between two looks
DEBOUNCE = 200  # milliseconds: editors write in several steps


def fingerprint(files: Iterable[Path]) -> tuple[tuple[int, ...] | None, ...]:
    """Return what changes when one of the files does."""
    return tuple(_stat(file) for file in files)


def _stat(file: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)  # noqa: PTH116 - follows links, as opening does
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


async def changes(files: Callable[[], Iterable[Path]], *, look: float = LOOK) -> AsyncIterator[None]:
    """Yield after every change of one of ``files()``; a file that vanishes is waited for."""
    seen = fingerprint(files())
    async for _ in _ticks(files, look):
        now = fingerprint(files())
        if now != seen:
            seen = now
            if None not in now:
                yield


async def _ticks(files: Callable[[], Iterable[Path]], look: float) -> AsyncIterator[None]:
    """Yield when something may have changed, at least every ``look`` seconds."""
    try:
        from watchfiles import awatch  # noqa: PLC0415 - an extra
    except ImportError:
        while True:
            await asyncio.sleep(look)
            yield
    folders = {file.parent for file in files()}
    async for _ in awatch(
        *folders,
        watch_filter=None,
        recursive=False,
        debounce=DEBOUNCE,
        step=50,
        rust_timeout=int(look * 1000),
        yield_on_timeout=True,
    ):
        yield
