"""The state of llmux and its last requests: ``llmux status``, ``llmux top``, ``llmux logs``, ``llmux requests``.

Which models hold the GPU, what they do, what waits, and why; the output of hooks and how they end; the last
requests that have ended.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from llmux.cli.api_models import (
    DecisionStatus,
    FinishedRequest,
    FinishedRequests,
    Gpu,
    Gpus,
    History,
    LeaseStatus,
    ModelStatus,
    RemoteStatus,
    Status,
    SwitchStatus,
)
from llmux.cli.client import Remote, speak
from llmux.cli.options import DEFAULT_URL, JsonOption, KeyFileOption, UrlOption, complete
from llmux.cli.terminal import Column, CommandError, Exit, FittingTable, print_error, terminal

WatchOption = Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until Ctrl-C.")]
EveryOption = Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")]

SHORTEST = 0.1  # seconds between two looks that give a rate
AGAIN = 1.0  # seconds until the next attempt to connect
GIB = 2**30
NO_FIGURES: Mapping[str, Mapping[str, str]] = {}
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
COLOURS = {"awake": "green", "asleep": "dim", "lost": "red", "faulted": "red"}  # all others: in transition


def status(
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
    watch: WatchOption = False,
    every: EveryOption = 1.0,
) -> None:
    """Show which models hold the GPU, what waits, and what stands in the way."""

    async def act(remote: Remote) -> None:
        if as_json:
            await _as_json(remote, every if watch else None)
        elif watch:
            await _watch(remote, every)
        else:
            terminal().print(await _look(remote))

    speak(url, key_file, act)


async def _look(remote: Remote) -> RenderableType:
    return view(remote.url, remote.read(Status, await remote.get("/llmux/status")))


async def _watch(remote: Remote, every: float) -> None:
    from rich.live import Live  # noqa: PLC0415 - only for a terminal that is watched

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
            print_error(str(error))


# ---- for display: a few lines, and a table of the models


def view(url: str, document: Status) -> RenderableType:
    """Return the whole display."""
    return Group(*head(url, document), models(document), *_why(document))


def _policy(document: Status) -> str:
    auto = document.policy.auto
    return document.policy.use if auto is None else f"{document.policy.use} ({auto.chosen} decides)"


def head(url: str, document: Status) -> Iterator[Text]:
    """Yield the lines that concern all models."""
    yield Text(
        f"llmux {document.version} at {url}, up {spell(document.uptime)}; policy {_policy(document)}", "bold"
    )
    if document.policy.auto is not None and document.policy.auto.error is not None:
        yield Text(f"auto could not look back on the last hour: {document.policy.auto.error}", "yellow")
    if not document.ready:
        yield Text("not ready: it is still looking at what runs, or stops", "yellow")
    if document.manual:
        yield Text("manual mode: only operators switch", "yellow")
    if document.lease is not None:
        yield Text(_lease(document.lease), "yellow")
    if document.switch is not None:
        yield Text(switch_line(document.switch, document.decisions), "yellow")
    yield from (_remote(name, one) for name, one in document.remotes.items())
    if document.reload_error is not None:
        yield Text(f"the configuration has an error, the old one is in force: {document.reload_error}", "red")
    for taken in document.controlled_twice[:3]:
        by = f"the llmux with pid {taken.pid} ({taken.config})" if taken.pid else "another llmux"
        yield Text(f"{taken.engine} is controlled by {by}, too: stop one of them", "red")


def _remote(name: str, document: RemoteStatus) -> Text:
    """Return in words what a remote does, or why nothing is sent to it."""
    if document.state == "closed":
        return Text(f"remote {name}: {document.in_flight} in flight", "dim")
    again = "one request may try it" if document.retry_in is None else f"again in {spell(document.retry_in)}"
    why = "it asked for a rest" if document.state == "resting" else document.last_error or "it fails"
    return Text(f"remote {name}: left alone, {again}: {why}", "yellow")


def models(document: Status, figures: Mapping[str, Mapping[str, str]] = NO_FIGURES) -> FittingTable:
    """Return the table of the models; ``figures`` are further columns: by title, then by model."""
    # Columns that are dropped first: those which follow from others, or on which nothing waits.
    columns = [
        Column("model"),
        Column("phase"),
        Column("in flight", right=True),
        Column("waiting", right=True),
        Column("longest", right=True, drop=3),
        Column("expected", right=True, drop=2),
        Column("awake for", right=True, drop=1),
        *(Column(title, right=True, drop=4 - place) for place, title in enumerate(figures)),
    ]
    rows = [
        [
            Text(_called(name, model)),
            *_row(model),
            *(Text(column.get(name, "")) for column in figures.values()),
        ]
        for name, model in document.models.items()
    ]
    # Empty columns would take the names' room; those which appear and disappear stay.
    filled = [number for number in range(len(columns)) if figures or any(row[number].plain for row in rows)]
    return FittingTable(
        [columns[number] for number in filled],
        [[row[number] for number in filled] for row in rows],
        ["; ".join(_remarks(model)) for model in document.models.values()],
        [Text(name) for name in document.models],
    )


def _called(name: str, model: ModelStatus) -> str:
    return f"{name} ({', '.join(model.aliases)})" if model.aliases else name


def switch_line(switch: SwitchStatus, decisions: Sequence[DecisionStatus]) -> str:
    """Return a switch in words; its reason is that of the decision which began it."""
    why = [each.reason.partition(": ")[2] for each in decisions if each.switch == switch.id]
    way = f"{' and '.join(switch.sources) or 'nothing'} → {switch.to or 'asleep'}"
    state = f"{switch.phase} for {spell(switch.since)}"
    return f"switch {switch.id}: {way}, {state}: {(why and why[-1]) or switch.reason}"


def pace(per_second: float) -> str:
    """Format a rate: ``0.25``, ``38.4``, ``5,000``."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"  # noqa: PLR2004


def spell(seconds: float) -> str:
    """Format a duration."""
    if seconds < 10:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:.1f} days"


def _lease(lease: LeaseStatus) -> str:
    state = "" if lease.held else ", but something still holds it"
    left = "until it is given back" if lease.expires_in is None else f"for {spell(lease.expires_in)} more"
    requests = "wait" if lease.requests == "wait" else "are refused"
    reason = f": {lease.reason}" if lease.reason else ""
    return f"the GPU is leased to another job {left} (lease {lease.id}){reason}{state}; requests {requests}"


def _row(model: ModelStatus) -> list[Text]:
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


def _remarks(model: ModelStatus) -> Iterator[str]:
    if model.pinned:
        left = "" if model.pin_expires_in is None else f" for {spell(model.pin_expires_in)} more"
        yield f"pinned{left}{f': {model.pin_reason}' if model.pin_reason else ''}"
    if model.riding:
        yield f"{model.riding} ride along"
    if model.level is not None:
        yield f"level {model.level}"
    if model.phase == "draining" and model.serving:
        longest = model.serving[0]
        state = "being answered" if longest.answering else "without an answer"
        yield f"waits for {longest.request_id}, {state} for {spell(longest.seconds)}"
    if model.backoff_until is not None:
        yield f"not tried again for {spell(max(0.0, model.backoff_until - time.time()))}"
    if model.last_error is not None:
        yield model.last_error


def _why(document: Status) -> Iterator[Text]:
    if (
        document.decisions
        and document.decisions[-1].switch is None
        and any(m.queued for m in document.models.values())
    ):
        yield Text(document.decisions[-1].reason)


def top(
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    every: Annotated[float, typer.Option("--every", min=0.2, max=60, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print one picture, and end.")] = False,
) -> None:
    """Show what each model does now: answers and tokens a second, queues, the GPUs' memory and load."""

    async def act(remote: Remote) -> None:
        pictures = _pictures(remote, every)
        shown = await anext(pictures)
        console = terminal()
        if once:
            console.print(await anext(pictures))
        elif console.is_terminal:
            from rich.live import Live  # noqa: PLC0415 - only for a terminal

            with Live(shown, console=console, screen=True, auto_refresh=False) as live:
                async for picture in _for_ever(remote, pictures, every):
                    live.update(picture, refresh=True)
        else:
            async for picture in pictures:
                console.print(picture)

    speak(url, key_file, act)


async def _for_ever(
    remote: Remote, pictures: AsyncIterator[RenderableType], every: float
) -> AsyncIterator[RenderableType]:
    """Continue when llmux is unavailable for a while."""
    while True:
        try:
            async for picture in pictures:
                yield picture
        except CommandError as error:
            if error.exit is not Exit.UNREACHABLE:
                raise
            yield Text(str(error), "red")
        await asyncio.sleep(AGAIN)
        pictures = _pictures(remote, every)


async def _pictures(remote: Remote, every: float) -> AsyncIterator[RenderableType]:
    """Yield a display for each status from llmux."""
    gpus: Gpus | None = None
    before: _Counts | None = None
    async with remote.events(f"?every={every}s") as events:
        async for name, fields in events:
            if name == "gpus":
                gpus = remote.read(Gpus, fields)
            if name != "status":
                continue
            status = remote.read(Status, fields)
            now = _Counts.of(status, await remote.text("/metrics"))
            figures = {} if before is None else now.rates(before)
            if before is None or now.time - before.time >= SHORTEST:
                before = now
                yield Group(*head(remote.url, status), *_gpus(gpus), models(status, figures))
    raise CommandError(Exit.UNREACHABLE, f"{remote.url}: llmux stopped, or the connection broke")


@dataclass(frozen=True, slots=True)
class _Counts:
    """What had been answered and streamed by a time, by model."""

    time: float  # monotonic
    answers: Mapping[str, float]
    streamed: Mapping[str, float]

    @classmethod
    def of(cls, status: Status, metrics: str) -> _Counts:
        from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 - only for `top`

        answers: Counter[str] = Counter()
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                if sample.name == "llmux_requests_total":
                    answers[sample.labels["model"]] += sample.value  # type: ignore[assignment] # it is a float
        streamed = {name: float(model.streamed or 0) for name, model in status.models.items()}
        return cls(time.monotonic(), answers, streamed)

    def rates(self, before: _Counts) -> dict[str, dict[str, str]]:
        """Return the columns of what was answered and streamed since ``before``."""
        seconds = max(SHORTEST, self.time - before.time)

        def column(now: Mapping[str, float], then: Mapping[str, float]) -> dict[str, str]:
            more = {name: (count - then.get(name, 0)) / seconds for name, count in now.items()}
            return {name: pace(rate) for name, rate in more.items() if rate > 0}

        return {
            "answers/s": column(self.answers, before.answers),
            "≈ tokens/s": column(self.streamed, before.streamed),
        }


def _gpus(document: Gpus | None) -> Iterator[Text]:
    """Yield a line for each known GPU."""
    for gpu in document.gpus if document is not None else ():
        yield Text(f"GPU {gpu.index} {gpu.name}: {', '.join(_figures(gpu))}")


def _figures(gpu: Gpu) -> Iterator[str]:
    if gpu.memory_used is not None and gpu.memory_total is not None:
        yield f"{gpu.memory_used / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB"
    if gpu.load is not None:
        yield f"{gpu.load:.0%} busy"
    if gpu.temperature is not None:
        yield f"{gpu.temperature:.0f} °C"
    if gpu.power is not None:
        yield f"{gpu.power:.0f} W"


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
            first = await anext(events, None)  # the status: events report everything later
            since = float(first.fields["time"]) if first else 0.0
            await _last(remote, name, count, since, as_json=as_json)
            async for event, fields in events:
                if event in HOOK_EVENTS and name in (None, fields.get("model")):
                    _show(event, fields, name, as_json=as_json)
                elif event == "lost":
                    print_error(f"{fields.get('events')} events are missing: they were not read fast enough")
        raise CommandError(Exit.UNREACHABLE, f"{remote.url}: llmux stopped, or the connection broke")

    speak(url, key_file, act)


async def _name(remote: Remote, model: str) -> str:
    """Return the name of a model that may be given by an alias."""
    status = remote.read(Status, await remote.get("/llmux/status"))
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
        found = remote.read(FinishedRequests, answer).requests
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


def row(one: FinishedRequest) -> list[Text]:
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


def _status(one: FinishedRequest) -> Iterator[str]:
    yield str(one.status)
    if one.error is not None:
        yield one.error
    elif one.status == 499:  # noqa: PLR2004 - as nginx says it
        yield "client left"


def _tokens(one: FinishedRequest) -> str:
    if one.input_tokens is None and one.output_tokens is None:
        return ""
    given, made = ("?" if each is None else str(each) for each in (one.input_tokens, one.output_tokens))
    return f"{given} → {made}"


def _spell(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < MILLISECONDS else spell(seconds)
