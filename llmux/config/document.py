"""The contents of a configuration file: its values, the line of each, and what was wrong with the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llmux.config.problems import Path, Problem

MAX_VALUES = 100_000
"""Keys and values of a document, counting what its aliases stand for as often as they do."""
MAX_DEPTH = 100
EMPTY = "is empty; it needs at least `models:`"


class Document:
    """The contents of a file. ``problems`` are those found while reading; ``data`` is then incomplete.

    ``repeated`` are those of ``problems`` that are about a key which is there twice.
    ``lines`` may be a function that finds them: it is called when they are first needed.
    """

    __slots__ = ("_lines", "data", "problems", "repeated")

    def __init__(
        self,
        data: Any = None,
        problems: Iterable[Problem] = (),
        lines: Callable[[], dict[Path, int]] | dict[Path, int] | None = None,
    ) -> None:
        self.data = data
        self.problems = list(problems)
        self.repeated: list[Problem] = []
        self._lines = {} if lines is None else lines

    @property
    def lines(self) -> dict[Path, int]:
        """The line of each value, from 1, by its path."""
        if not isinstance(self._lines, dict):
            self._lines = self._lines()
        return self._lines


def failed(message: str, *, line: int | None = None) -> Document:
    """Return the document of a file that cannot be read."""
    return Document(problems=[Problem((), message, line)])
