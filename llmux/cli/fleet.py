"""``llmux fleet``: the hosts behind a running gateway."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from llmux.cli.client import Remote, speak
from llmux.cli.options import ForOption, JsonOption, KeyFileOption, ReasonOption, address
from llmux.cli.terminal import Column, CommandError, Exit, FittingTable, terminal
from llmux.normal_path import path_of

LATE = 5.0  # seconds: a report older than this is marked
GATEWAY_URL = "http://127.0.0.1:4000"
_COLOURS = {"ready": "green", "leased": "yellow", "unreachable": "red", "stale": "red"}

GatewayOption = Annotated[
    str, typer.Option("--url", envvar="LLMUX_URL", callback=address, help="Address of the running gateway.")
]
HostArgument = Annotated[str, typer.Argument(help="The host's name in the gateway's configuration.")]

app = typer.Typer(
    no_args_is_help=True, help="The hosts behind a running gateway: look at them, drain one, take it back."
)


@app.command()
def status(url: GatewayOption = GATEWAY_URL, key_file: KeyFileOption = None, as_json: JsonOption = False) -> None:
    """Show the hosts: what is awake where, what waits, and which of them cannot be reached."""

    async def act(remote: Remote) -> None:
        document = await remote.get("/llmux/fleet")
        if as_json:
            typer.echo(json.dumps(document))
        else:
            terminal().print(view(url, document))

    speak(url, key_file, act)


@app.command()
def drain(
    host: HostArgument,
    duration: ForOption = None,
    reason: ReasonOption = None,
    url: GatewayOption = GATEWAY_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send a host nothing new and have all its models sleep, as a lease of its GPU does."""

    async def act(remote: Remote) -> None:
        asked = {"for": duration, "reason": reason}
        body = {name: value for name, value in asked.items() if value is not None}
        answer = await remote.post(_path(host, "drain"), body)
        typer.echo(json.dumps(answer) if as_json else f"{host} drains: it takes nothing new")

    speak(url, key_file, act)


@app.command()
def undrain(
    host: HostArgument,
    url: GatewayOption = GATEWAY_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """End what `drain` began, and nothing else: a lease for another job stays."""

    async def act(remote: Remote) -> None:
        answer = await remote.post(_path(host, "undrain"))
        typer.echo(json.dumps(answer) if as_json else f"{host} takes requests again")

    speak(url, key_file, act)


def _path(host: str, verb: str) -> str:
    path = path_of("/llmux/fleet", host, verb) if host else None
    if path is None:
        raise CommandError(Exit.NO_SUCH_MODEL, f"host {host!r} not found by that name, which can stand in no path")
    return path


def view(url: str, document: dict[str, Any]) -> RenderableType:
    """Return the fleet for display."""
    hosts: dict[str, dict[str, Any]] = document["hosts"]
    ready = sum(host["state"] == "ready" for host in hosts.values())
    waiting = sum(document["queued"].values())
    head = Text(
        f"llmux {document['version']} at {url}: {ready} of {len(hosts)} hosts ready, route {document['route']}"
    )
    lines: list[RenderableType] = [head]
    if waiting:
        lines.append(Text(f"{waiting} wait in the gateway for a host", "yellow"))
    store = document.get("store")  # missing from older gateways
    if store is not None and store["trouble"]:
        alone = store["limits"] is not None and store["limits"]["alone"]
        lines.append(Text(f"the store cannot be used: {store['trouble']}", "red"))
        lines += [Text("limits of keys: each gateway counts its share", "yellow")] if alone else []
    return Group(*lines, Text(), _table(hosts))


def _table(hosts: dict[str, dict[str, Any]]) -> FittingTable:
    columns = [Column("host"), Column("state"), Column("awake"), Column("queued", right=True)]
    columns += [Column("in flight", right=True), Column("wakes/min", right=True, drop=1)]
    remarks = [_remark(host) for host in hosts.values()]
    return FittingTable(columns, [_row(name, host) for name, host in hosts.items()], remarks)


def _remark(host: dict[str, Any]) -> str:
    old = "" if host["age"] is None or host["age"] < LATE else f"its last report is {host['age']:.0f} s old"
    return str(host["trouble"] or old)


def _row(name: str, host: dict[str, Any]) -> list[Text]:
    awake = ", ".join([*host["awake"], *(f"{model} (waking)" for model in host["waking"])]) or "-"
    counts = [str(host[key]) for key in ("queued", "in_flight", "wakes_per_minute")]
    return [Text(name), Text(host["state"], _COLOURS.get(host["state"], "")), *map(Text, [awake, *counts])]
