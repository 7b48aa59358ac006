"""Output for people, and the exit codes: names, paths and messages are printed as they are.

Standard input, output and error may be closed, full, or in an encoding that lacks a letter; `usable_streams`
handles that. Tables fit the terminal: columns are left out before a name or a phase is broken. Only code that
draws tables needs rich: `terminal` imports it.
"""

from __future__ import annotations

import enum
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import typer

from llmux.errors import LLMuxError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text


class Exit(enum.IntEnum):
    """How a command ended."""

    DONE = 0
    UNREACHABLE = 1
    USAGE = 2
    NOT_ALLOWED = 3
    NO_SUCH_MODEL = 4
    REFUSED = 5
    FAILED = 6
    TIMED_OUT = 7
    INTERRUPTED = 130
    TERMINATED = 143


MEANINGS: dict[Exit, str] = {
    Exit.DONE: "done",
    Exit.UNREACHABLE: "no llmux of this version answers there",
    Exit.USAGE: "the command line, or a value in it, is invalid",
    Exit.NOT_ALLOWED: "the key is missing or wrong, or llmux has no `admin_key` and lets in no command from here",
    Exit.NO_SUCH_MODEL: "no model, host, key or request of that name",
    Exit.REFUSED: "cannot be now: another switch is under way, another model pinned, or the GPU leased",
    Exit.FAILED: "it was tried and failed: the model did not wake, or would not sleep",
    Exit.TIMED_OUT: "not within `--timeout`; a switch goes on by itself, a lease is given back",
    Exit.INTERRUPTED: "Ctrl-C",
    Exit.TERMINATED: "TERM",
}


class CommandError(LLMuxError):
    """A command cannot do what was asked; ``exit`` is its exit code."""

    def __init__(self, exit_code: Exit, message: str) -> None:
        super().__init__(message)
        self.exit = exit_code


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def terminal(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Return a console without markup and emoji: ``trace.csv:100:`` would contain one."""
    from rich.console import Console  # noqa: PLC0415 - as long to import as all else that a short command needs

    return Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)


def say(text: str, colour: str | None = None, *, stderr: bool = False) -> None:
    """Print a text, in colour if the stream is a terminal and NO_COLOR is not set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    typer.secho(text, fg=colour, err=stderr, color=False if plain else None)


def print_error(message: str) -> None:
    """Print an error message on stderr."""
    say(message, "red", stderr=True)


def fail(error: object) -> NoReturn:
    """Print an error message on stderr, and end the command: what it was given is invalid."""
    print_error(str(error))
    raise typer.Exit(Exit.USAGE) from None


@contextmanager
def usable_streams() -> Iterator[None]:
    """Make them usable; if output cannot be written, end with an exit code, not a traceback."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a socket would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path, or "…", that it cannot encode
    try:
        yield
    except BrokenPipeError:  # `llmux schema | head`: the reader is done
        _give_up()
    except OSError as error:
        if error.errno not in FULL:
            raise
        print_error(f"cannot write: {error.strerror}")
        _give_up()


def _give_up() -> None:
    # What is still buffered would fail again, with a traceback, at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


REMARKS = 24  # minimum width, in cells, of a column of sentences; without it they go below the table
_BORDER = 3  # cells between two columns


class Column(NamedTuple):
    """One column. ``drop``: the order in which columns are left out if room is short, from 1; 0: never."""

    title: str
    right: bool = False
    drop: int = 0


class FittingTable:
    """A table of short texts, and optionally a sentence for each row, as wide as the terminal at most.

    There are as many ``remarks`` as rows; sentences for which there is no room beside the others follow below,
    each after the row's first cell. ``short`` are first cells that replace those of the rows before a column is
    left out.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[Text]],
        remarks: Sequence[str] = (),
        short: Sequence[Text] = (),
    ) -> None:
        self._columns = columns
        self._rows = rows
        self._remarks = remarks
        self._short = short

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the table, and the remarks for which it has no room."""
        from rich.table import Table  # noqa: PLC0415 - as above
        from rich.text import Text  # noqa: PLC0415

        del console
        shown, left = self.fit(options.max_width)
        beside = any(self._remarks) and left >= REMARKS
        table = Table()
        for number in shown:
            column = self._columns[number]
            # Only a first cell that by itself is too wide for the terminal is broken.
            table.add_column(
                column.title,
                justify="right" if column.right else "left",
                no_wrap=left >= 0 or number != shown[0],
                overflow="fold",
            )
        if beside:
            table.add_column("remarks", overflow="fold")
        for place, row in enumerate(self._rows):
            table.add_row(*(row[number] for number in shown), *([Text(self._remarks[place])] if beside else []))
        yield table
        if not beside:
            for row, remark in zip(self._rows, self._remarks, strict=False):
                if remark:
                    yield Text(f"{row[0].plain}: {remark}")

    def fit(self, width: int) -> tuple[list[int], int]:
        """Return the columns to show, and the cells left beside them; below 0: too few."""
        shown = list(range(len(self._columns)))
        if self._short and self._left(shown, width) < 0:
            rows = zip(self._short, self._rows, strict=True)
            self._rows, self._short = [[short, *row[1:]] for short, row in rows], ()
        for number in sorted(shown, key=lambda number: self._columns[number].drop):
            if self._left(shown, width) >= 0:
                break
            if self._columns[number].drop:
                shown.remove(number)
        return shown, self._left(shown, width) - _BORDER

    def _left(self, shown: Sequence[int], width: int) -> int:
        taken = [
            max([len(self._columns[number].title), *(row[number].cell_len for row in self._rows)])
            for number in shown
        ]
        return width - 1 - sum(cells + _BORDER for cells in taken)
