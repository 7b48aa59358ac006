"""Standard input, output and error, whatever came of them: closed, full, in an encoding that lacks a letter."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llmux.cli.terminal import complain

FAILURE = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def usable_streams() -> Iterator[None]:
    """Make them usable, and end with an exit code, not a traceback, where nobody takes what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a socket would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path, or "…", that it cannot spell
    try:
        yield
    except BrokenPipeError:  # `llmux schema | head`: the reader has seen enough
        _give_up()
    except OSError as error:
        if error.errno not in FULL:
            raise
        complain(f"cannot write: {error.strerror}")
        _give_up()


def _give_up() -> None:
    # What is still buffered would fail again, aloud, at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(FAILURE)
