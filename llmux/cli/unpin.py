"""``llmux unpin``: let a model go again."""

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
    """End the pin of a model."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "unpin")
        typer.echo(json.dumps(answer.model_dump()) if as_json else f"{answer.model} is not pinned")

    speak(url, key_file, act)
