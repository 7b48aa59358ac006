"""What is wrong with a configuration, all of it at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmux.errors import ConfigError

Path = tuple[str | int, ...]
"""A place in the file: mapping keys and list indexes from the top."""

Lines = Mapping[Path, int]
"""Where each place begins, counted from 1."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and what to do about it. ``line`` is None where only the path is known."""

    path: Path
    message: str
    line: int | None = None


class ConfigErrors(ConfigError):  # noqa: N818 (it is several)
    """One or more problems; ``problems`` holds a ConfigError for each, in the order of the file."""

    def __init__(self, problems: Iterable[ConfigError]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.message, path=first.path, file=first.file, line=first.line)
        self.args = ("\n".join(str(problem) for problem in self.problems),)


def dotted(path: Path) -> str:
    """Write a path as people do: ``models.llama.aliases[0]``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if part.isprintable() else repr(part)
            text += f".{shown}" if text else shown
    return text


def line_of(path: Path, lines: Lines) -> int | None:
    """Find the line of ``path``, or of the nearest place above it that is in the file."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return lines.get(())


def raise_all(problems: Iterable[Problem], *, file: str = "", lines: Lines | None = None) -> None:
    """Raise ConfigErrors for ``problems``, sorted by line; do nothing when there are none."""
    located = [
        ConfigError(
            problem.message,
            path=dotted(problem.path),
            file=file,
            line=problem.line if problem.line is not None else line_of(problem.path, lines or {}),
        )
        for problem in problems
    ]
    if located:
        raise ConfigErrors(sorted(located, key=lambda error: error.line or 0))
