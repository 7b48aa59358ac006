"""The output of ``llmux simulate``: policies side by side; or, with ``--exact``, a record beside its replay."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import typer
from rich.console import Console
from rich.table import Column, Table

from llmux.cli import simulate_what_if as what_ifs
from llmux.cli.terminal import terminal
from llmux.config import Config
from llmux.core.spec import HookKind, Rules
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import UNSEEN, EngineModel, Engines, Fit
from llmux.simulator.recorded import Begun, Comparison, Recorded, replay
from llmux.simulator.run import Outcome, Scene
from llmux.simulator.statistics import Statistics, recommend
from llmux.simulator.trace import Trace, TraceError

S = TypeVar("S")
DIFFERENT = 1  # exit code
NARROW = 14  # characters: longer names take more room
ABREAST = 4  # policies in one table: wider tables break on a terminal of 80 columns
ROWS: tuple[tuple[str, Callable[[Statistics], str]], ...] = (
    ("mean wait", lambda each: f"{each.mean_wait:.1f}"),
    ("p50", lambda each: f"{each.p50_wait:.1f}"),
    ("p95", lambda each: f"{each.p95_wait:.1f}"),
    ("p99", lambda each: f"{each.p99_wait:.1f}"),
    ("max", lambda each: f"{each.max_wait:.1f}"),
    ("mean time to first token", lambda each: f"{each.mean_ttft:.1f}"),
    ("p99 time to first token", lambda each: f"{each.p99_ttft:.1f}"),
    ("time switching", lambda each: f"{each.switching:.0%}"),
    ("time draining", lambda each: f"{each.draining:.0%}"),
    ("switches", lambda each: f"{each.switches}"),
    ("completed", lambda each: f"{each.completed}/{each.requests}"),
    ("answered per hour", lambda each: f"{each.per_hour:.0f}"),
    ("within the SLO", lambda each: f"{each.slo:.0%}"),
)
AWAKE = ("models awake", lambda each: f"{each.awake:.1f}")
SPILLED = ("spilled", lambda each: f"{each.spilled}")
SPILL_COST = ("cost of spilling", lambda each: f"{each.spill_cost or 0.0:.4g}")
SHOWN = 5  # switches around the first that differs


def exact(file: Path | None, recorded: Recorded | None, policies: Sequence[str] | None, *, as_json: bool) -> int:
    """Replay, print, and return the exit code. Raises LLMuxError."""
    if file is None or recorded is None:
        raise TraceError("--exact replays a record of llmux (`record: FILE` in its configuration); give one")
    if policies:
        raise TraceError("--exact replays the recorded policy; leave --policy out")
    found = replay(recorded, folder=file.parent)
    if as_json:
        typer.echo(json.dumps(_document(found), indent=2))
    else:
        _print_exact(recorded, found)
    return 0 if found.exact else DIFFERENT


def _document(found: Comparison) -> dict[str, object]:
    difference = None
    if not found.exact:
        difference = {"switch": found.same + 1, **dict(_ways(found, found.same))}
    return {
        "exact": found.exact,
        "recorded": len(found.recorded),
        "replayed": len(found.replayed),
        "same": found.same,
        "seconds_apart": found.apart,
        "first_difference": difference,
        "limits": found.limits,
    }


def _ways(found: Comparison, index: int) -> list[tuple[str, str | None]]:
    return [
        (name, each[index].way if index < len(each) else None)
        for name, each in (("recorded", found.recorded), ("replayed", found.replayed))
    ]


def _print_exact(recorded: Recorded, found: Comparison) -> None:
    console = terminal()
    use = recorded.start["policy"]["use"]
    if found.exact:
        text = (
            f"{recorded.name}: {found.same} of {found.same} switches are the recorded ones under {use},"
            f" at most {found.apart * 1000:.1f} ms apart"
        )
        console.print(text, style="green")
    else:
        text = (
            f"{recorded.name}: the first {found.same} switches are the recorded ones under {use}, then they differ"
        )
        console.print(text, style="red")
        table = Table("switch", "recorded", "at s", "replayed", "at s")
        start = max(0, found.same - 1)
        for index in range(start, min(start + SHOWN, max(len(found.recorded), len(found.replayed)))):
            table.add_row(str(index + 1), *_cells(found.recorded, index), *_cells(found.replayed, index))
        console.print(table)
    for limit in found.limits:
        console.print(f"note: {limit}")


def _cells(switches: Sequence[Begun], index: int) -> tuple[str, str]:
    return (switches[index].way, f"{switches[index].time:.3f}") if index < len(switches) else ("-", "-")


class Given(NamedTuple):
    """Values from a record or a configuration for what the command line leaves open."""

    costs: CostMatrix
    costs_from: str
    rules: Rules
    scene: Scene | None


def _engine(name: str, found: Fit, engine: EngineModel) -> str:
    """Describe what the record shows of an engine, and how uncertain that is."""
    mean = sum(found.alone) / len(found.alone)
    at_once = f"{engine.slots} at once" if engine.slots < UNSEEN else "as many at once as it was given"
    text = f"{name}: {at_once}, slowdown {engine.slowdown:g}, {mean:.2g} s an answer alone"
    if engine.speed != 1.0:
        text += f", {engine.speed:g} times as fast as recorded"
    if found.most == 1:
        return f"{text}; it never served two at once, so how they slow each other down is a guess"
    return f"{text} (fitted to {len(found.alone)} answers, at most {found.most} in flight)"


class Shown(NamedTuple):
    """What the table is about."""

    traffic: Trace
    outcomes: Mapping[str, Outcome]
    results: Mapping[str, Statistics]
    engines: Engines
    fits: Mapping[str, Fit] | None
    slo: float
    plan: Config | None
    given: Given


def show(shown: Shown, verdicts: list[str]) -> None:
    """Print the policies side by side, and the conclusions."""
    console = terminal()
    results = shown.results
    console.print(_of_what(shown))
    for name, each in (shown.fits or {}).items():
        console.print(_engine(name, each, shown.engines.of(name)))
    if shown.plan is not None:
        for line in _of_plan(shown.plan, shown.given, shown.outcomes):
            console.print(line)
    rows = ROWS if shown.plan is None else (*ROWS, AWAKE)
    if any(outcome.spilled for outcome in shown.outcomes.values()):
        rows = (*rows, SPILLED)
        if any(each.spill_cost is not None for each in results.values()):
            rows = (*rows, SPILL_COST)
    side_by_side(console, results, rows, ABREAST if max(map(len, results)) <= NARROW else ABREAST - 1)
    for line in (*_remarks(shown), *(verdicts or [str(recommend(results))])):
        console.print(line)


def side_by_side(
    console: Console, results: Mapping[str, S], rows: Sequence[tuple[str, Callable[[S], str]]], most: int
) -> None:
    """Print tables with a column for each of the results, and at most ``most`` of them."""
    names = list(results)
    for begin in range(0, len(names), most):
        abreast = names[begin : begin + most]
        table = Table("seconds", *(Column(name, justify="right") for name in abreast))
        for title, cell in rows:
            table.add_row(title, *(cell(results[name]) for name in abreast))
        console.print(table)


def _remarks(shown: Shown) -> Iterator[str]:
    """Yield remarks on the table."""
    yield f"SLO: the first token within {shown.slo:g} s of the request's arrival (--slo)"
    for name, outcome in shown.outcomes.items():
        if outcome.adopted:
            steps = ", ".join(f"{policy} from {time / 60.0:.0f} min on" for time, policy in outcome.adopted)
            yield f"{name} adopted: {steps}"
    for alike in _alike(shown.results):
        yield f"{_listed(alike)}: no difference"


def _of_what(shown: Shown) -> str:
    """Return a line about what was simulated."""
    traffic = shown.traffic
    end = max(outcome.end for outcome in shown.outcomes.values())
    load = f"{shown.engines.load(traffic.jobs, end):.0%} of what one engine could serve without switching"
    if traffic.closed_loop:
        load = "some of which wait for the answers to others"
    if shown.fits is not None:
        load = "answers take as long as they were recorded to, longer or shorter with others beside them"
    closed = traffic.closed_loop
    requests = max(each.requests for each in shown.results.values()) if closed else len(traffic.jobs)
    return (
        f"{traffic.name}: {'at most ' if closed else ''}{requests} requests,"
        f" {len(traffic.models)} models, {end:.0f} s, {load}"
    )


def _of_plan(plan: Config, given: Given, outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Yield which parts of a configuration apply here, and which do not."""
    yield f"{plan.file and plan.file.name}: {what_ifs.residency(plan)}; costs: {given.costs_from}"
    useless = [
        name
        for name, model in plan.models.items()
        if HookKind.PREFETCH in model.scripts and name not in given.costs.prefetches
    ]
    if useless:
        yield f"what the prefetch of {', '.join(useless)} saves is not known; add `prefetch:` to a file for --cost"
    if plan.policy.request_timeout is not None:
        yield "request_timeout does not count here: what is rejected would not show in the waits"
    for name, outcome in outcomes.items():
        if outcome.refused:
            yield f"{name}: {outcome.refused} requests were rejected, as their models could not be woken in time"
        if outcome.cut:
            yield f"{name}: {outcome.cut} answers were cut by drain_timeout; they count as not answered"


def _alike(results: Mapping[str, Statistics]) -> list[list[str]]:
    """Return the policies with equal columns, two or more together."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for name, each in results.items():
        columns.setdefault(tuple(show(each) for _, show in ROWS), []).append(name)
    return [names for names in columns.values() if len(names) > 1]


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def tell_overruled(outcomes: Mapping[str, Outcome]) -> None:
    """Name the policies whose figures are affected by invalid decisions."""
    console = terminal(stderr=True, soft_wrap=True)
    for name, outcome in outcomes.items():
        for complaint in outcome.overruled:
            console.print(f"warning: {name} {complaint}; treated as first come, first served", style="yellow")
