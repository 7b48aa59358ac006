"""``llmux explain``: the last switches and their reasons, from a record or from a running llmux."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from llmux.cli.client import Remote, check_key, connection
from llmux.cli.options import DEFAULT_URL, UrlOption
from llmux.cli.terminal import CommandError, Exit, print_error, terminal
from llmux.errors import LLMuxError
from llmux.observability.decision_log import duration, measured
from llmux.observability.record import RecordedRun, RecordError, read_record


@dataclass(slots=True)
class Explained:
    """One switch. Times are Unix times, durations seconds; what is unknown is None."""

    id: int
    time: float
    source: str
    to: str | None
    by: str | None
    reason: str
    result: str | None = None
    drain: float | None = None
    cost: float | None = None
    error: str | None = None
    details: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return it as JSON values; the contents of the details are in ``/llmux/decisions``."""
        found = asdict(self)
        del found["details"]
        return {"id": found.pop("id"), "time": found.pop("time"), "from": found.pop("source"), **found}

    @property
    def took(self) -> str:
        """What it cost, in words."""
        parts = [
            duration(self.cost) if self.cost else "",
            f"drain {duration(self.drain)}" if self.drain else "",
        ]
        if self.result not in (None, "success"):
            parts.append(f"{self.result}{f': {self.error}' if self.error else ''}")
        return ", ".join(filter(None, parts))


def run(
    file: Annotated[
        Path | None,
        typer.Argument(help="A record (`record: FILE`); - is standard input. Without it: a running llmux."),
    ] = None,
    url: UrlOption = DEFAULT_URL,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            envvar=["LLMUX_API_KEY", "LLMUX_ADMIN_KEY"],
            help="Its key. Better in LLMUX_API_KEY: other users see what stands on a command line.",
            hidden=True,
        ),
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, max=100_000, help="How many switches, the last ones.")] = 10,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="With the policy's own reason, and all the figures.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain the last switches, with their reasons, and what holds now."""
    riding: list[str] = []
    try:
        if file is not None:
            switches, now = _of_record(read_record(file))
        else:
            decisions, history = _ask(url, key, "decisions", "history")
            switches, now = _of_llmux(decisions, history)
            riding = [str(each["reason"]) for each in decisions.get("riding", ())]
    except LLMuxError as error:
        print_error(str(error))
        raise typer.Exit(error.exit if isinstance(error, CommandError) else Exit.USAGE) from None
    switches = switches[-count:]
    if as_json:
        typer.echo(json.dumps({"switches": [each.document() for each in switches], "now": now}, indent=2))
        return
    console = terminal()
    if switches:
        table = Table()
        for title in ("when", "#", "why", "took"):
            table.add_column(title, no_wrap=title in ("when", "#"))
        times = [datetime.fromtimestamp(each.time).astimezone() for each in switches]
        today = {time.date() for time in times} == {datetime.now().astimezone().date()}
        for each, time in zip(switches, times, strict=True):
            why = "\n".join([each.reason, *(f"· {line}" for line in each.details if verbose)])
            when = time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")
            table.add_row(when, str(each.id), why, each.took)
        console.print(table)
    else:
        console.print("no switch yet")
    if now is not None:
        console.print(f"now: {now['reason']}")
        for line in _details(now) if verbose else ():
            console.print(f"  · {line}")
    for line in riding:
        console.print(line)


def _details(decision: Mapping[str, Any]) -> Iterator[str]:
    """Yield the inputs of a decision, a line each; from an older llmux some figures may be missing."""
    if decision["said"] and decision["by"] not in ("core", "auto"):  # for these it is the reason
        yield f"{_BY.get(decision['by'], decision['by'])}: {decision['said']}"
    for each in decision["serving"]:
        yield f"awake: {each['model']}, {each['in_flight']} in flight, {each['queued']} waiting"
    for each in decision["waiting"]:
        oldest, waited, cost = (duration(float(each[name])) for name in ("oldest", "waited", "cost"))
        known = f" ({measured(each['samples'])})" if "samples" in each else ""
        waiting = f"{each['queued']} waiting for {each['model']}: longest {oldest}, {waited} together"
        yield f"{waiting}; a switch there takes {cost}{known}"
    if decision["more"]:
        yield f"{decision['more']} waiting for other models"


_BY = {"overruled": "the policy", "min_active": "the policy"}


def _of_record(runs: list[RecordedRun]) -> tuple[list[Explained], None]:
    switches = []
    try:
        for run in runs:
            offset = float(run.start["time"]) - float(run.start["at"])
            decided = {line["switch"]: line for line in run.decisions if line["switch"] is not None}
            switches += [
                Explained(
                    int(line["id"]),
                    offset + float(line["decided_s"]),
                    ",".join(line["from"]) or "idle",
                    line["to"],
                    str(decided[line["id"]]["by"]) if line["id"] in decided else None,
                    str(line["reason"]),
                    str(line["result"]),
                    float(line["drain_s"]),
                    None if line["cost_s"] is None else float(line["cost_s"]),
                    line["error"],
                    tuple(_details(decided[line["id"]])) if line["id"] in decided else (),
                )
                for line in run.switches
            ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"a line of the record lacks what it should have: {error!r}") from None
    return switches, None


def _of_llmux(
    document: Mapping[str, Any], history: Mapping[str, Any]
) -> tuple[list[Explained], Mapping[str, Any] | None]:
    try:
        decisions = document["decisions"]
        switches = [
            Explained(
                each["switch"],
                float(each["time"]),
                ",".join(each["leaving"]) or "idle",
                each["target"],
                each["by"],
                str(each["reason"]),
                details=tuple(_details(each)),
            )
            for each in decisions
            if each["switch"] is not None
        ]
        last = decisions[-1] if decisions and decisions[-1]["switch"] is None else None
        _complete(switches, history)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        message = f"what answers there is not llmux, or not of this version: {error!r}"
        raise CommandError(Exit.UNREACHABLE, message) from None
    return switches, last


def _complete(switches: list[Explained], history: Mapping[str, Any]) -> None:
    """Add how each switch ended, as far as the last hour shows."""
    known = {each.id: each for each in switches}
    for note in history["notes"]:
        each = known.get(note.get("switch"))
        if each is None:
            continue
        if note["event"] == "switch_ended":
            each.result = str(note["result"])
            each.drain = float(note["drain_secs"])
            each.cost = None if note["cost_secs"] is None else float(note["cost_secs"])
        elif note["event"] == "switch_failed":
            each.error = str(note["error"])


def _ask(url: str, key: str | None, *paths: str) -> list[dict[str, Any]]:
    """Return the answers of the paths: over the control socket if there is one, else over TCP."""
    check_key(key, "--key")
    where = replace(connection(url, None), key=key)

    async def ask() -> list[dict[str, Any]]:
        remote = Remote(where)
        return [await remote.get(f"/llmux/{path}") for path in paths]

    try:
        return asyncio.run(ask())
    except CommandError as error:
        raise CommandError(Exit.UNREACHABLE, str(error)) from None
