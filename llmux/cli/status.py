"""``llmux status``: who holds the GPU, who waits, and what stands in the way."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from llmux.cli.exits import CommandError, Exit
from llmux.cli.place import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption
from llmux.cli.remote import Remote, speak
from llmux.cli.seen import SeenStatus
from llmux.cli.status_view import view
from llmux.cli.terminal import complain, terminal

WatchOption = Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until Ctrl-C.")]
EveryOption = Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")]


def run(
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
    watch: WatchOption = False,
    every: EveryOption = 1.0,
) -> None:
    """Show who holds the GPU, who waits, and what stands in the way."""

    async def act(remote: Remote) -> None:
        if as_json:
            await _as_json(remote, every if watch else None)
        elif watch:
            await _watch(remote, every)
        else:
            terminal().print(await _look(remote))

    speak(url, key_file, act)


async def _look(remote: Remote) -> RenderableType:
    return view(remote.url, remote.read(SeenStatus, await remote.get("/llmux/status")))


async def _watch(remote: Remote, every: float) -> None:
    console = terminal()
    shown = await _look(remote)
    if not console.is_terminal:
        while True:
            console.print(shown)
            await asyncio.sleep(every)
            shown = await _look(remote)
    with Live(shown, console=console, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(every)
            try:
                live.update(await _look(remote), refresh=True)
            except CommandError as error:
                if error.exit is not Exit.UNREACHABLE:
                    raise
                live.update(Text(str(error), "red"), refresh=True)  # it may come back


async def _as_json(remote: Remote, every: float | None) -> None:
    typer.echo(json.dumps(await remote.get("/llmux/status"), indent=None if every else 2))
    while every:
        await asyncio.sleep(every)
        try:
            typer.echo(json.dumps(await remote.get("/llmux/status")))
        except CommandError as error:
            if error.exit is not Exit.UNREACHABLE:
                raise
            complain(str(error))
