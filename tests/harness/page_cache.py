"""Which part of a file is in the kernel's page cache, and how to drop it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

GONE = 0.01  # part of the file that may still be in the page cache when it counts as dropped


def resident(file: Path) -> float:
    """Return which part of a file is in the page cache, 0 to 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    size = file.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with file.open("rb") as opened:
        # Mapped, and not touched.
        where = ctypes.c_void_p(libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, opened.fileno(), 0))
        try:
            if libc.mincore(where, ctypes.c_size_t(size), pages):
                raise OSError(ctypes.get_errno(), "mincore failed")
        finally:
            libc.munmap(where, ctypes.c_size_t(size))
    return sum(page & 1 for page in pages) / len(pages)


def drop(file: Path) -> None:
    """Take a file out of the page cache, which no process may have mapped."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident(file)
    if left > GONE:
        raise SystemExit(f"{left:.0%} of {file} stays in the page cache: does something else use it?")
