"""Writing for people: names, paths and messages are printed as they are.

Standard input, output and error may be closed, full, or in an encoding that lacks a letter; `usable_streams`
copes with that. Only what draws tables takes rich: `console` imports it.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

FAILURE = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def terminal(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Return a console that reads neither markup nor emoji out of a text: ``trace.csv:100:`` would hold one."""
    from rich.console import Console  # noqa: PLC0415 - as long to import as all else that a short command needs

    return Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)


def say(text: str, colour: str | None = None, *, stderr: bool = False) -> None:
    """Print a text, coloured where the stream is a terminal and NO_COLOR is not set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    typer.secho(text, fg=colour, err=stderr, color=False if plain else None)


def complain(message: str) -> None:
    """Print an error message on stderr."""
    say(message, "red", stderr=True)


@contextmanager
def usable_streams() -> Iterator[None]:
    """Make them usable, and end with an exit code, not a traceback, where the output cannot be written."""
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
    # What is still buffered would fail again, with a traceback, at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(FAILURE)
