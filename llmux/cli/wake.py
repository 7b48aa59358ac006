"""``llmux wake``: ask for a model to be woken, and do not wait."""

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
    """Have a model woken, whether or not anybody waits for it; return at once (switch waits)."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "wake")
        if as_json:
            typer.echo(json.dumps(answer.model_dump()))
        elif answer.switch is None:
            typer.echo(f"{answer.model} is awake already")
        else:
            typer.echo(f"switch {answer.switch} wakes {answer.model}")

    speak(url, key_file, act)
