"""Tables that fit a terminal: columns are left out before a name or a phase is broken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

REMARKS = 24  # cells that a column of sentences takes at least; else they stand below the table
_BORDER = 3  # cells between two columns


class Column(NamedTuple):
    """One column. ``drop``: which are left out first where there is no room, from 1 on; 0: never."""

    title: str
    right: bool = False
    drop: int = 0


class FittingTable:
    """A table of short texts, and perhaps a sentence for each row, as wide as the terminal at most.

    ``remarks`` are as many as rows; where the sentences have no room beside the others they follow below, each
    after the row's first cell.
    """

    def __init__(
        self, columns: Sequence[Column], rows: Sequence[Sequence[Text]], remarks: Sequence[str] = ()
    ) -> None:
        self._columns = columns
        self._rows = rows
        self._remarks = remarks

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the table, and the remarks that have no room in it."""
        del console
        shown, left = self.fit(options.max_width)
        beside = any(self._remarks) and left >= REMARKS
        table = Table()
        for number in shown:
            column = self._columns[number]
            # Only a first cell that alone is too wide for the terminal is broken.
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
        """Return the columns that are shown, and the cells that are left beside them; below 0: too few."""
        widths = [
            max([len(column.title), *(row[number].cell_len for row in self._rows)])
            for number, column in enumerate(self._columns)
        ]
        shown = list(range(len(self._columns)))

        def left() -> int:
            return width - 1 - sum(widths[number] + _BORDER for number in shown)

        for number in sorted(shown, key=lambda number: self._columns[number].drop):
            if left() >= 0:
                break
            if self._columns[number].drop:
                shown.remove(number)
        return shown, left() - _BORDER
