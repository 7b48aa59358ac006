"""The status for people: a few lines, and a table of the models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from llmux.cli.seen import SeenLease, SeenModel, SeenStatus, SeenSwitch

NO_FIGURES: Mapping[str, Mapping[str, str]] = {}
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
COLOURS = {"awake": "green", "asleep": "dim", "lost": "red", "faulted": "red"}  # all others: on their way


def view(url: str, status: SeenStatus) -> RenderableType:
    """Return all of it."""
    return Group(*head(url, status), models(status), *_why(status))


def head(url: str, status: SeenStatus) -> Iterator[Text]:
    """Yield what concerns all models, a line each."""
    yield Text(f"llmux {status.version} at {url}, up {spell(status.uptime)}; policy {status.policy.use}", "bold")
    if not status.ready:
        yield Text("not ready: it is still looking at what runs, or stops", "yellow")
    if status.manual:
        yield Text("manual mode: only operators switch", "yellow")
    if status.lease is not None:
        yield Text(_lease(status.lease), "yellow")
    if status.switch is not None:
        yield Text(switch_line(status.switch), "yellow")
    if status.reload_error is not None:
        yield Text(f"the configuration has a mistake, the old one is in force: {status.reload_error}", "red")


def models(status: SeenStatus, figures: Mapping[str, Mapping[str, str]] = NO_FIGURES) -> Table:
    """Return the table of the models; ``figures`` are further columns: by title, then by model."""
    titles = ("phase", "in flight", "waiting", "longest", "expected", "awake for", *figures, "remarks")
    rows = [
        [
            *_row(model),
            *(Text(column.get(name, "")) for column in figures.values()),
            Text("; ".join(_remarks(model))),
        ]
        for name, model in status.models.items()
    ]
    # On a terminal of 80 columns empty ones would take the names' room; where figures come and go they stay.
    filled = [number for number in range(len(titles)) if figures or any(row[number].plain for row in rows)]
    table = Table(Column("model", overflow="fold"))  # a name that is cut off may be another's
    for number in filled:
        words = titles[number] in ("phase", "remarks")
        table.add_column(titles[number], justify="left" if words else "right", overflow="fold")
    for name, row in zip(status.models, rows, strict=True):
        table.add_row(Text(name), *(row[number] for number in filled))
    return table


def switch_line(switch: SeenSwitch) -> str:
    """Return a switch in words."""
    way = f"{' and '.join(switch.sources) or 'nothing'} → {switch.to or 'sleep'}"
    return f"switch {switch.id}: {way}, {switch.phase} for {spell(switch.since)} ({switch.reason})"


def spell(seconds: float) -> str:
    """Return a duration for people."""
    if seconds < 10:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:.1f} days"


def _lease(lease: SeenLease) -> str:
    state = "" if lease.held else ", but something still holds it"
    left = "until it is given back" if lease.expires_in is None else f"for {spell(lease.expires_in)} more"
    requests = "wait" if lease.requests == "wait" else "are refused"
    reason = f": {lease.reason}" if lease.reason else ""
    return f"the GPU is leased to another job {left} (lease {lease.id}){reason}{state}; requests {requests}"


def _row(model: SeenModel) -> list[Text]:
    waits = "" if model.oldest_wait is None else spell(model.oldest_wait)
    expected = "" if model.expected_wait is None or not model.queued else f"≈ {spell(model.expected_wait)}"
    awake = "" if model.awake_for is None else spell(model.awake_for)
    return [
        Text(model.phase, COLOURS.get(model.phase, "yellow")),
        Text(str(model.in_flight or "")),
        Text(str(model.queued or ""), "yellow"),
        Text(waits),
        Text(expected),
        Text(awake),
    ]


def _remarks(model: SeenModel) -> Iterator[str]:
    if model.pinned:
        left = "" if model.pin_expires_in is None else f" for {spell(model.pin_expires_in)} more"
        yield f"pinned{left}{f': {model.pin_reason}' if model.pin_reason else ''}"
    if model.level is not None:
        yield f"level {model.level}"
    if model.backoff_until is not None:
        yield f"left alone for {spell(max(0.0, model.backoff_until - time.time()))}"
    if model.last_error is not None:
        yield model.last_error


def _why(status: SeenStatus) -> Iterator[Text]:
    if status.decisions and status.decisions[-1].switch is None and any(m.queued for m in status.models.values()):
        yield Text(status.decisions[-1].reason)
