"""``llmux logs`` and ``llmux requests``: what hooks print and how they end; the last requests that have ended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from llmux.cli.api_models import History, SeenRequest, SeenRequests, SeenStatus
from llmux.cli.client import Remote, speak
from llmux.cli.command_tree import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption, complete
from llmux.cli.status import pace, spell
from llmux.cli.terminal import Column, CommandError, Exit, FittingTable, complain, terminal

HOOK_EVENTS = ("hook_started", "hook_output", "hook_completed", "hook_failed")


def logs(
    model: Annotated[
        str | None,
        typer.Argument(help="The model's name, or an alias; without it all.", autocompletion=complete),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, live, until Ctrl-C.")] = False,
    count: Annotated[int, typer.Option("-n", min=0, help="How many of the last lines to begin with.")] = 50,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what hooks print, of one model or of all: the last lines, and with -f what they do from now on."""

    async def act(remote: Remote) -> None:
        name = None if model is None else await _name(remote, model)
        if not follow:
            await _last(remote, name, count, math.inf, as_json=as_json)
            return
        async with remote.events() as events:
            first = await anext(events, None)  # the status: what is later is told by the events
            since = float(first.fields["time"]) if first else 0.0
            await _last(remote, name, count, since, as_json=as_json)
            async for event, fields in events:
                if event in HOOK_EVENTS and name in (None, fields.get("model")):
                    _show(event, fields, name, as_json=as_json)
                elif event == "lost":
                    complain(f"{fields.get('events')} events are missing: they were not read fast enough")
        raise CommandError(Exit.UNREACHABLE, f"{remote.url}: llmux stopped, or the connection broke")

    speak(url, key_file, act)


async def _name(remote: Remote, model: str) -> str:
    """Return the name of a model that may be given by an alias."""
    status = remote.read(SeenStatus, await remote.get("/llmux/status"))
    if model in status.models:
        return model
    for entry in (await remote.get("/v1/models")).get("data", ()):
        if model in entry["llmux"]["aliases"]:
            return str(entry["id"])
    known = ", ".join(sorted(status.models))
    raise CommandError(Exit.NO_SUCH_MODEL, f"model {model!r} not found; known: {known}")


async def _last(remote: Remote, model: str | None, count: int, until: float, *, as_json: bool) -> None:
    """Show the last lines up to a time."""
    history = remote.read(History, await remote.get("/llmux/history"))
    if history.output is None:
        hint = "give the admin key in LLMUX_ADMIN_KEY, or its file with --key-file"
        raise CommandError(Exit.NOT_ALLOWED, f"{remote.url}: what hooks print is for operators ({hint})")
    lines = [line for line in history.output if model in (None, line["model"]) and line["time"] <= until]
    for line in lines[len(lines) - count :] if count else ():
        _show("hook_output", line, model, as_json=as_json)


def _show(event: str, fields: dict[str, Any], model: str | None, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"event": event, **fields}))
    else:
        typer.echo(" ".join(_words(event, fields, model)))


def _words(event: str, fields: dict[str, Any], model: str | None) -> Iterator[str]:
    yield datetime.fromtimestamp(fields["time"]).astimezone().strftime("%H:%M:%S")
    yield fields["hook"] if model is not None else f"{fields['model']} {fields['hook']}"
    if event == "hook_output":
        yield f"| {fields['line']}"
    elif event == "hook_started":
        yield "begins"
    elif event == "hook_completed":
        yield f"has succeeded after {fields['duration_secs']:.3g} s"
    else:
        code = fields["exit_code"]
        how = "could not be started" if code is None else f"was killed by signal {-code}" if code < 0 else ""
        yield f"{how or f'has failed with exit code {code}'} after {fields['duration_secs']:.3g} s"


MILLISECONDS = 0.0995  # seconds below which they are shown as such


def requests(
    model: Annotated[
        str | None,
        typer.Argument(help="Only this model's: its name, or an alias.", autocompletion=complete),
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, max=1000, help="How many, the last ones.")] = 200,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the last requests: their model, wait, first byte, tokens, status and id; the newest last."""

    async def act(remote: Remote) -> None:
        query = "" if model is None else f"&model={quote(model, safe='', errors='replace')}"
        answer = await remote.get(f"/llmux/activity?limit={count}{query}")
        if as_json:
            typer.echo(json.dumps(answer, indent=2))
            return
        found = remote.read(SeenRequests, answer).requests
        if found:
            terminal().print(FittingTable(COLUMNS, [row(one) for one in reversed(found)]))
        else:
            typer.echo("no request has ended yet")

    speak(url, key_file, act)


COLUMNS = (
    Column("time"),
    Column("model"),
    Column("status"),
    Column("waited", right=True),
    Column("first byte", right=True, drop=3),
    Column("in all", right=True),
    Column("tokens", right=True, drop=2),
    Column("tokens/s", right=True),
    Column("request id", drop=1),
)


def row(one: SeenRequest) -> list[Text]:
    """Return the cells of a request that has ended."""
    speed = "" if one.tokens_per_second is None else pace(one.tokens_per_second)
    cells = [
        datetime.fromtimestamp(one.time).astimezone().strftime("%H:%M:%S"),
        one.model or "",
        " ".join(_status(one)),
        _spell(one.waited),
        _spell(one.first_byte),
        _spell(one.duration),
        _tokens(one),
        speed,
        one.request_id,
    ]
    return [Text(cell, "red" if one.status >= 400 or one.error else "") for cell in cells]  # noqa: PLR2004


def _status(one: SeenRequest) -> Iterator[str]:
    yield str(one.status)
    if one.error is not None:
        yield one.error
    elif one.status == 499:  # noqa: PLR2004 - as nginx says it
        yield "client left"


def _tokens(one: SeenRequest) -> str:
    if one.input_tokens is None and one.output_tokens is None:
        return ""
    given, made = ("?" if each is None else str(each) for each in (one.input_tokens, one.output_tokens))
    return f"{given} → {made}"


def _spell(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < MILLISECONDS else spell(seconds)
