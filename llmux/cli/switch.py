"""``llmux switch``: go to a model now, and wait until it answers."""

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
    """Wake a model whether or not anybody waits for it; return when it is awake."""

    async def act(remote: Remote) -> None:
        answer, seconds = await follow(remote, model, "wake", timeout)
        if as_json:
            typer.echo(json.dumps({**answer.model_dump(), "phase": "awake", "seconds": seconds}))
        else:
            when = "already" if answer.switch is None else f"after {seconds:.3g} s"
            typer.echo(f"{answer.model} is awake {when}")

    speak(url, key_file, act)
