"""``llmux manual``: begin and end the manual mode."""

from __future__ import annotations

import enum
import json
from typing import Annotated

import typer

from llmux.cli.place import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption
from llmux.cli.remote import Remote, speak


class Mode(enum.StrEnum):
    """Who switches."""

    ON = "on"
    OFF = "off"


def run(
    mode: Annotated[Mode, typer.Argument(help="on: only operators switch. off: the policy does.")],
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Leave all switching to operators, or to the policy again."""

    async def act(remote: Remote) -> None:
        ask = remote.post if mode is Mode.ON else remote.delete
        answer = await ask("/llmux/manual")
        if as_json:
            typer.echo(json.dumps(answer))
        else:
            typer.echo("only operators switch" if mode is Mode.ON else "the policy switches")

    speak(url, key_file, act)
