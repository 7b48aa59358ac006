"""``llmux sleep``: put a model to sleep, and wait until it is."""

from __future__ import annotations

import json

import typer

from llmux.cli.following import TimeoutOption, follow
from llmux.cli.model_name import ModelArgument
from llmux.cli.place import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption
from llmux.cli.remote import Remote, speak


def run(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a model to sleep once its answers have ended; return when it sleeps."""

    async def act(remote: Remote) -> None:
        answer, seconds = await follow(remote, model, "sleep", timeout)
        if as_json:
            typer.echo(json.dumps({**answer.model_dump(), "phase": "asleep", "seconds": seconds}))
        else:
            when = "already" if answer.switch is None else f"after {seconds:.3g} s"
            typer.echo(f"{answer.model} sleeps {when}")

    speak(url, key_file, act)
