"""Writing for people: names, paths and messages are printed as they are."""

from __future__ import annotations

from rich.console import Console


def terminal(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Return a console that reads neither markup nor emoji out of a text: ``trace.csv:100:`` would hold one."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)


def complain(message: str) -> None:
    """Tell people on stderr."""
    terminal(stderr=True, soft_wrap=True).print(message, style="red")
