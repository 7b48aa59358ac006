"""The commands that operate a running llmux: switch, wake, sleep, pin, unpin, reset, manual."""

from __future__ import annotations

import asyncio
import enum
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from llmux.cli.api_models import Commanded, SeenStatus
from llmux.cli.options import (
    DEFAULT_URL,
    ForOption,
    JsonOption,
    KeyFileOption,
    ModelArgument,
    OptionalModelArgument,
    ReasonOption,
    TimeoutOption,
    UrlOption,
)
from llmux.cli.remote import Event, Remote, speak
from llmux.cli.terminal import CommandError, Exit, terminal


class Mode(enum.StrEnum):
    """Whether only operators switch."""

    ON = "on"
    OFF = "off"


def switch(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Wake a model whether or not requests wait for it; return when it is awake."""

    async def act(remote: Remote) -> None:
        answer, seconds = await follow(remote, model, "wake", timeout)
        if as_json:
            typer.echo(json.dumps({**asdict(answer), "phase": "awake", "seconds": seconds}))
        else:
            when = "already" if answer.switch is None else f"after {seconds:.3g} s"
            typer.echo(f"{answer.model} is awake {when}")

    speak(url, key_file, act)


def wake(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have a model woken, whether or not requests wait for it; return at once (switch waits)."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "wake")
        if as_json:
            typer.echo(json.dumps(asdict(answer)))
        elif answer.switch is None:
            typer.echo(f"{answer.model} is awake already")
        else:
            typer.echo(f"switch {answer.switch} wakes {answer.model}")

    speak(url, key_file, act)


def sleep(
    model: OptionalModelArgument = None,
    every: Annotated[bool, typer.Option("--all", help="All that are awake, one after the other.")] = False,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a model to sleep once its answers have ended; return when it sleeps. With --all, every one."""
    if (model is None) is not every:
        raise typer.BadParameter("say which model, or --all")

    async def act(remote: Remote) -> None:
        names = [model] if model is not None else await _awake(remote)
        ends = [(await follow(remote, name, "sleep", timeout)) for name in names]
        if as_json:
            found = [{**asdict(answer), "phase": "asleep", "seconds": seconds} for answer, seconds in ends]
            typer.echo(json.dumps(found if every else found[0]))
            return
        for answer, seconds in ends:
            when = "already" if answer.switch is None else f"after {seconds:.3g} s"
            typer.echo(f"{answer.model} sleeps {when}")
        if not ends:
            typer.echo("no model is awake")

    speak(url, key_file, act)


async def _awake(remote: Remote) -> list[str]:
    return remote.read(SeenStatus, await remote.get("/llmux/status")).awake


def pin(
    model: ModelArgument,
    duration: ForOption = None,
    reason: ReasonOption = None,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a model awake, waking it if need be; models that cannot be awake beside it get 503 meanwhile."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "pin", {"for": duration, "reason": reason})
        if as_json:
            typer.echo(json.dumps(asdict(answer)))
        else:
            wakes = "" if answer.switch is None else f"; switch {answer.switch} wakes it"
            typer.echo(f"{answer.model} is pinned{f' for {duration}' if duration else ''}{wakes}")

    speak(url, key_file, act)


def unpin(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the pin of a model."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "unpin")
        typer.echo(json.dumps(asdict(answer)) if as_json else f"unpinned {answer.model}")

    speak(url, key_file, act)


def reset(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report a model as repaired: its failures are forgotten; faulted or lost, it counts as asleep."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "reset")
        typer.echo(json.dumps(asdict(answer)) if as_json else f"{answer.model}: its failures are forgotten")

    speak(url, key_file, act)


def manual(
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


# ---- following a switch to its end


async def follow(remote: Remote, model: str, verb: str, within: float | None) -> tuple[Commanded, float]:
    """Have something done with a model, and wait for the end of the switch that does it.

    Returns the answer, and the seconds that the switch took. Raises CommandError when it fails or is called off,
    or takes longer than ``within`` seconds from when llmux has accepted it.
    """
    async with remote.events() as events:
        await anext(events, None)  # the status: from here on nothing is missed
        answer = await remote.command(model, verb)
        if answer.switch is None:
            return answer, 0.0
        try:
            with _told(f"switch {answer.switch} is under way") as tell:
                async with asyncio.timeout(within):
                    ended = await _end(remote, events, answer.switch, tell)
        except TimeoutError:
            raise CommandError(Exit.TIMED_OUT, f"not within {within:.3g} s; it goes on by itself") from None
    return answer, float(ended["duration_secs"])


async def _end(
    remote: Remote, events: AsyncIterator[Event], switch: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    error = ""
    async for name, fields in events:
        if fields.get("switch") != switch:
            continue
        if name == "switch_drained":
            tell(f"switch {switch}: {fields['from']} has drained and goes to sleep")
        elif name == "switch_failed":
            error = str(fields["error"])
        elif name == "switch_ended":
            if fields["result"] == "success":
                return fields
            raise CommandError(Exit.FAILED, error or "it was called off")
    raise CommandError(Exit.UNREACHABLE, f"{remote.url}: llmux stopped, or the connection broke, before the end")


@contextmanager
def _told(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is waited for."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    from rich.text import Text  # noqa: PLC0415 - only for a terminal

    console = terminal(stderr=True)
    with console.status(Text(what)) as shown:
        yield lambda text: shown.update(Text(text))
