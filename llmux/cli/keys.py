"""Keys: ``llmux key`` makes them; ``llmux usage`` and ``llmux activity`` show their usage and last requests."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.text import Text

from llmux.cli.api_models import FinishedRequest, FinishedRequests, Usage, UsageRow
from llmux.cli.client import Remote, speak
from llmux.cli.options import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption, complete
from llmux.cli.status import COLUMNS, row, spell
from llmux.cli.terminal import Column, CommandError, Exit, FittingTable, print_error, terminal
from llmux.config.access import ApiKeyConfig, hash_of, new_key

app = typer.Typer(help="Keys for clients and operators, and their hashes.", no_args_is_help=True)

NameOption = Annotated[str | None, typer.Option("--name", "-n", help="Whose it is; the access log says it.")]
AdminOption = Annotated[bool, typer.Option("--admin", help="For `admin_key`, in place of `api_keys`.")]
KeyJsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: key, hash and name.")]


@app.command()
def new(name: NameOption = None, admin: AdminOption = False, as_json: KeyJsonOption = False) -> None:
    """Make a key; print it, once, and the lines for the configuration, which hold its hash only."""
    _check(name)
    key = new_key()
    _tell_key(key, hash_of(key), name, admin=admin, as_json=as_json, known=False)


@app.command("hash")
def make_hash(name: NameOption = None, admin: AdminOption = False, as_json: KeyJsonOption = False) -> None:
    """Read a key of your own from standard input; print the lines for the configuration."""
    _check(name)
    if sys.stdin.isatty():
        key = typer.prompt("Key", hide_input=True, err=True)
    else:
        key = sys.stdin.readline().rstrip("\r\n")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        _fail("a key is printable ASCII without spaces, at least one character; a header carries it")
    _tell_key(key, hash_of(key), name, admin=admin, as_json=as_json, known=True)


def _check(name: str | None) -> None:
    try:
        ApiKeyConfig(key="k", name=name)  # type: ignore[arg-type]
    except ValueError:
        _fail("--name must be 1 to 256 printable characters")


def _tell_key(key: str, hashed: str, name: str | None, *, admin: bool, as_json: bool, known: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"key": None if known else key, "hash": hashed, "name": name}))
        return
    if not known:
        typer.echo(f"key, shown this once: {key}\n\nfor the configuration:")
    entry = json.dumps(hashed) if name is None else f"{{name: {json.dumps(name)}, key: {json.dumps(hashed)}}}"
    typer.echo(f'admin_key: "{hashed}"' if admin else f"api_keys:\n  - {entry}")


def _fail(message: str) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(Exit.USAGE)


_DROPPED_TOO = {"tokens/s": 4, "in all": 5, "waited": 6}
EVERY = 1.0  # seconds between two looks


def usage(
    by: Annotated[
        str, typer.Option("--by", help="What to split by: key, model, day, hour (UTC); of a gateway also host.")
    ] = "key,model",
    since: Annotated[str, typer.Option("--since", help="As 30d or 12h, or a date as 2026-11-01.")] = "30d",
    key: Annotated[str | None, typer.Option("--key", help="Only this key's, by its name.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Only this model's.", autocompletion=complete)
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each key used: requests, tokens, times and cost by key, model, day or hour, out of the ledger."""
    wanted: Mapping[str, str | None] = {"by": by, "since": since, "key": key, "model": model}

    async def act(remote: Remote) -> None:
        query = _query({name: value for name, value in wanted.items() if value is not None})
        answer = _of_known_key(await remote.get(f"/llmux/usage?{query}"))
        if as_json:
            typer.echo(json.dumps(answer, indent=2))
            return
        if as_csv:
            from llmux.accounts.usage import as_csv as written  # noqa: PLC0415 - brings the configuration along

            typer.echo(written(answer["by"], answer["usage"]), nl=False)
            return
        for host, why in answer.get("missing", {}).items():  # from a gateway
            print_error(f"{host} is missing: {why}")
        _show(remote.read(Usage, answer), answer["usage"])

    speak(url, key_file, act)


def _query(given: Mapping[str, str | int]) -> str:
    return urlencode(given, errors="replace")  # an argument that is not UTF-8 names nothing


def _of_known_key(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an answer. Raises CommandError if it says that the key does not exist."""
    unknown = answer.get("unknown_key")
    if unknown is not None:
        near = "".join(f"; did you mean {name!r}?" for name in unknown["near"])
        raise CommandError(Exit.NO_SUCH_MODEL, f"no key has the name {unknown['name']!r}{near}")
    return answer


def _show(usage: Usage, rows: list[dict[str, Any]]) -> None:
    if usage.lost:
        print_error(f"{usage.lost} requests are missing: the ledger could not be written")
    if not usage.usage:
        typer.echo("no request has ended since then")
        return
    lines = [[row[name] or "" for name in usage.by] for row in rows]
    cells = [line + _cells(use) for line, use in zip(lines, usage.usage, strict=True)]
    if usage.by:
        cells += [["total", *[""] * (len(usage.by) - 1), *_cells(each)] for each in usage.total]
    columns = [*(Column(name) for name in usage.by), *FIGURES]
    terminal().print(FittingTable(columns, [[Text(cell) for cell in line] for line in cells]))


FIGURES = (
    Column("requests", right=True),
    Column("failed", right=True, drop=2),
    Column("input", right=True),
    Column("cached", right=True, drop=1),
    Column("output", right=True),
    Column("waited", right=True, drop=3),
    Column("served", right=True, drop=5),
    Column("cost", right=True, drop=6),
)


def _cells(use: UsageRow) -> list[str]:
    about = "~" if use.estimated else ""
    return [
        str(use.requests),
        str(use.failed or ""),
        f"{about}{use.input_tokens}",
        str(use.cached_tokens or ""),
        f"{about}{use.output_tokens}",
        spell(use.waited_seconds),
        spell(use.service_seconds),
        "" if use.cost is None else f"{use.cost:.4f} {use.currency}",
    ]


def activity(
    model: Annotated[
        str | None,
        typer.Argument(help="Only this model's: its name, or an alias.", autocompletion=complete),
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Only this key's, by its name.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, live, until Ctrl-C.")] = False,
    count: Annotated[int, typer.Option("-n", min=1, max=1000, help="How many, the last ones.")] = 20,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the last requests with the key that sent each, and with -f those that end from now on."""
    wanted = {name: value for name, value in (("model", model), ("key", key)) if value is not None}

    async def act(remote: Remote) -> None:
        answer = _of_known_key(await remote.get(f"/llmux/activity?{_query({'limit': count, **wanted})}"))
        found = remote.read(FinishedRequests, answer).requests
        if not follow:
            if as_json:
                typer.echo(json.dumps(answer, indent=2))
            elif found:
                terminal().print(_table(found[::-1]))
            else:
                typer.echo("no request has ended yet")
            return
        last = 0
        while True:
            new = [one for one in answer["requests"] if one["id"] > last]
            for document in reversed(new):
                _tell(
                    remote.read(FinishedRequests, {"requests": [document]}).requests[0], document, as_json=as_json
                )
            last = max([last, *(one["id"] for one in new)])
            await asyncio.sleep(EVERY)
            answer = await remote.get(f"/llmux/activity?{_query({'limit': 1000, **wanted})}")
            if answer["requests"] and answer["requests"][0]["id"] < last:
                last = 0  # another llmux has taken its place, and counts from 0

    speak(url, key_file, act)


def _table(found: list[FinishedRequest]) -> FittingTable:
    """Return a table that breaks no name: other columns are left out first."""
    columns = [each._replace(drop=_DROPPED_TOO.get(each.title, each.drop)) for each in COLUMNS]
    rows = [row(one) for one in found]
    if any(one.key for one in found):  # without keys there is nothing to show
        columns.insert(1, Column("key"))
        for one, cells in zip(found, rows, strict=True):
            cells.insert(1, Text(one.key or "", cells[0].style))
    if any(one.cost is not None for one in found):
        columns.insert(-1, Column("cost", right=True, drop=2))
        for one, cells in zip(found, rows, strict=True):
            cost = "" if one.cost is None else f"{one.cost:.6f} {one.currency}"
            cells.insert(-1, Text(cost, cells[0].style))
    return FittingTable(columns, rows)


def _tell(one: FinishedRequest, document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(document))
        return
    time, model, status, waited, _, took, tokens, speed, ident = (cell.plain for cell in row(one))
    said = [time, one.key or "", model, status, f"waited {waited}", f"took {took}"]
    said += [f"{tokens} tokens"] if tokens else []
    said += [f"{speed}/s"] if speed else []
    typer.echo("  ".join(part for part in (*said, ident) if part))
