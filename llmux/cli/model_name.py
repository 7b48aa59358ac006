"""A model's name on the command line, and its completion by asking the running llmux."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from llmux.cli.exits import CommandError
from llmux.cli.place import DEFAULT_URL, place
from llmux.cli.remote import Remote, speaking

PATIENCE = 1.0  # seconds that a completion may take


def complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the models whose names, or aliases, begin so, with their state; nothing when no llmux answers."""
    given = context.params
    found: dict[str, Any] = {}

    async def ask(remote: Remote) -> None:
        async with asyncio.timeout(PATIENCE):
            found.update(await remote.get("/v1/models"))

    try:
        asyncio.run(speaking(place(given.get("url") or DEFAULT_URL, given.get("key_file")), ask))
        return [(name, state) for name, state in _names(found) if name.startswith(incomplete)]
    except (CommandError, TimeoutError, OSError, LookupError, TypeError, AttributeError):
        return []


def _names(models: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for entry in models["data"]:
        yield str(entry["id"]), str(entry["llmux"]["state"])
        for alias in entry["llmux"]["aliases"]:
            yield str(alias), f"{entry['id']}, {entry['llmux']['state']}"


ModelArgument = Annotated[
    str, typer.Argument(help="The model's name, or an alias.", autocompletion=complete, show_default=False)
]
