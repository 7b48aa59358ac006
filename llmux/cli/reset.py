"""``llmux reset``: a model was mended by hand."""

from __future__ import annotations

import json

import typer

from llmux.cli.model_name import ModelArgument
from llmux.cli.place import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption
from llmux.cli.remote import Remote, speak


def run(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say that you have mended a model: its failures are forgotten; faulted or lost, it counts as asleep."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "reset")
        typer.echo(json.dumps(answer.model_dump()) if as_json else f"{answer.model}: its failures are forgotten")

    speak(url, key_file, act)
