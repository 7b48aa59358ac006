"""``llmux pin``: keep a model awake."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmux.cli.model_name import ModelArgument
from llmux.cli.place import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption
from llmux.cli.remote import Remote, speak

ForOption = Annotated[
    str | None, typer.Option("--for", metavar="DURATION", help="As 90s, 10m or 2h. Without it: no end.")
]
ReasonOption = Annotated[str | None, typer.Option("--reason", "-r", help="Why; others are told it.")]


def run(
    model: ModelArgument,
    duration: ForOption = None,
    reason: ReasonOption = None,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a model awake, waking it if need be; who cannot be awake beside it is turned away meanwhile."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "pin", {"for": duration, "reason": reason})
        if as_json:
            typer.echo(json.dumps(answer.model_dump()))
        else:
            wakes = "" if answer.switch is None else f"; switch {answer.switch} wakes it"
            typer.echo(f"{answer.model} is pinned{f' for {duration}' if duration else ''}{wakes}")

    speak(url, key_file, act)
