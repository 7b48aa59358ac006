"""Following a switch to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.text import Text

from llmux.cli.exits import CommandError, Exit
from llmux.cli.remote import Event, Remote
from llmux.cli.seen import Commanded
from llmux.cli.terminal import terminal
from llmux.config.durations import parse_duration


def _duration(text: str | float) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        parser=_duration,
        metavar="DURATION",
        help="How long to wait for it, as 90s or 10m; then exit code 7. Without it: for ever.",
        show_default=False,
    ),
]


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
    console = terminal(stderr=True)
    if not console.is_terminal:
        yield lambda _text: None
        return
    with console.status(Text(what)) as shown:
        yield lambda text: shown.update(Text(text))
