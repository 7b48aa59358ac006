"""``llmux release``: give back a leased GPU."""

from __future__ import annotations

import json
from typing import Annotated
from urllib.parse import quote

import typer

from llmux.cli.exits import CommandError, Exit
from llmux.cli.place import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption
from llmux.cli.remote import Remote, speak

LEASE = "/llmux/lease"


def run(
    lease: Annotated[
        str | None, typer.Argument(metavar="ID", help="The lease, as `llmux lease` printed it. Without it: any.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give the leased GPU back."""

    async def act(remote: Remote) -> None:
        if lease == "":
            raise CommandError(Exit.USAGE, "the lease's ID is empty; leave it out to end any lease")
        answer = await give_back(remote, lease)
        typer.echo(json.dumps(answer) if as_json else "the GPU is llmux's again")

    speak(url, key_file, act)


async def give_back(remote: Remote, lease: str | None) -> dict[str, object]:
    """End a lease, or any."""
    return await remote.delete(LEASE if lease is None else f"{LEASE}?id={quote(lease, safe='', errors='replace')}")
