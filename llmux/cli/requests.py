"""``llmux requests``: the last requests that have ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated
from urllib.parse import quote

import typer
from rich.text import Text

from llmux.cli.api_models import SeenRequest, SeenRequests
from llmux.cli.options import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption, complete
from llmux.cli.remote import Remote, speak
from llmux.cli.status import spell
from llmux.cli.tables import Column, FittingTable
from llmux.cli.terminal import terminal

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
            terminal().print(FittingTable(COLUMNS, [_row(one) for one in reversed(found)]))
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


def _row(one: SeenRequest) -> list[Text]:
    speed = "" if one.tokens_per_second is None else f"{one.tokens_per_second:.3g}"
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
