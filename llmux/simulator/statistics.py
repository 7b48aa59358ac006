"""The results of a run, in numbers and a picture; whether another is better by more than chance; which to use.

Waits within a run depend on each other: a burst, or a model that stays awake for long, lengthens many of them
together. So consecutive requests form blocks, and blocks are resampled, the same ones for both runs (a paired
block bootstrap): the share of the draws in which one run is better says how sure that is.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmux.simulator.run import Outcome
from llmux.simulator.trace import TraceError

SLO = 30.0  # seconds to the first token


@dataclass(frozen=True, slots=True)
class Statistics:
    """Results of one run. Waits and times in seconds, shares from 0 to 1.

    A wait lasts from arrival to admission; a request which still waits at the end counts with its age.
    """

    mean_wait: float
    p50_wait: float
    p95_wait: float
    p99_wait: float
    max_wait: float
    mean_ttft: float
    p99_ttft: float
    switching: float  # share of time spent on switches: nothing is served
    draining: float  # share of time in which the awake model finished its requests before leaving
    switches: int
    completed: int
    requests: int
    slo: float  # share of requests whose first token came within the objective
    per_hour: float  # requests answered per hour
    awake: float = 1.0  # models that were awake at once, on average
    spilled: int = 0  # requests that a remote served
    spill_cost: float | None = None  # what it charged, if its price is known

    def as_json(self) -> dict[str, float | int]:
        """Return the values by name; those of spill-over only if there was any."""
        found = asdict(self)
        unsaid = ("spill_cost",) if self.spilled else ("spilled", "spill_cost")
        return {name: value for name, value in found.items() if name not in unsaid or value}


def waits_of(outcome: Outcome) -> list[float]:
    """Return how long each request waited, up to the end of the run, in seconds."""
    waits = (wait_of(outcome, index) for index in range(len(outcome.arrived)))
    return [wait for wait in waits if wait is not None]


def _awake(outcome: Outcome) -> float:
    """Return the seconds in which models were awake, summed over models."""
    spans = outcome.residency or [visit for visit in outcome.visits if visit.model]
    return sum(visit.end - visit.start for visit in spans if visit.what != "switch")


def paired_waits(one: Outcome, other: Outcome) -> tuple[list[float], list[float]]:
    """Return the waits in both runs of the requests that came in both, in the order of arrival in ``one``."""
    both = [
        index
        for index, (a, b) in enumerate(zip(one.arrived, other.arrived, strict=True))
        if a is not None and b is not None
    ]
    both.sort(key=lambda index: one.arrived[index] or 0.0)
    return [wait_of(one, index) or 0.0 for index in both], [wait_of(other, index) or 0.0 for index in both]


def wait_of(outcome: Outcome, index: int) -> float | None:
    """Return how long one request waited, up to the end of the run, in seconds; None if it did not come."""
    admitted, arrived = outcome.admitted[index], outcome.arrived[index]
    return None if arrived is None else (outcome.end if admitted is None else admitted) - arrived


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of sorted values; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def statistics_of(outcome: Outcome, slo: float = SLO) -> Statistics:
    """Summarize a run. ``slo`` is the objective for the time to the first token, in seconds."""
    waits = sorted(waits_of(outcome))
    first = sorted(
        (outcome.end if token is None else token) - arrived
        for arrived, token in zip(outcome.arrived, outcome.first_token, strict=True)
        if arrived is not None
    )
    count = len(waits)
    end = outcome.end or 1.0
    within = sum(time <= slo for time in first)
    completed = sum(finished is not None for finished in outcome.finished)
    return Statistics(
        mean_wait=sum(waits) / count if count else 0.0,
        p50_wait=percentile(waits, 0.50),
        p95_wait=percentile(waits, 0.95),
        p99_wait=percentile(waits, 0.99),
        max_wait=waits[-1] if waits else 0.0,
        mean_ttft=sum(first) / count if count else 0.0,
        p99_ttft=percentile(first, 0.99),
        switching=sum(v.end - v.start for v in outcome.visits if v.what == "switch") / end,
        draining=sum(v.end - v.start for v in outcome.visits if v.what == "drain") / end,
        switches=outcome.switches,
        completed=completed,
        requests=count,
        slo=within / count if count else 1.0,
        per_hour=completed / end * 3600.0,
        awake=_awake(outcome) / end,
        spilled=len(outcome.spilled),
        spill_cost=outcome.spill_cost,
    )


CLOSE = 0.05  # policies whose scores differ by less than this share count as equal
UNFAIR = 1.15  # a p99 that is this much worse than the best is mentioned
NEGLIGIBLE = 0.05  # seconds: shorter waits are no reason to choose a policy
TAIL = 0.5  # how much the p99 counts beside the mean, as an exponent
OVERLOAD = 0.9  # share of requests that must be answered for the traffic to fit the GPU
PREFERRED = ("fifo", "adaptive")  # among policies that do about as well: the simplest, then the default
MORE = 0.02  # share: a difference in answers per hour that is mentioned; in closed loops it counts like the waits
NAMED = 3  # policies that the reasons mention


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommendation: the policy's name, and the reasons as sentences."""

    policy: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((f"Use {self.policy}.", *self.reasons))


def recommend(results: Mapping[str, Statistics]) -> Advice:
    """Compare at least one policy: the mean wait first, the 99th percentile with half its weight."""
    best_score = min(map(_score, results.values()))
    close = [name for name, each in results.items() if _score(each) <= best_score * (1.0 + CLOSE)]
    chosen = next(
        (name for name in PREFERRED if name in close), min(close, key=lambda name: _score(results[name]))
    )
    mine = results[chosen]
    reasons = [_waits(mine)]
    others = {name: each for name, each in results.items() if name != chosen}
    if mine.mean_wait < NEGLIGIBLE:
        return Advice(chosen, ("The waits are negligible, whatever the policy.", *_warnings(mine)))
    if not others:
        return Advice(chosen, (*reasons, "Nothing else was compared.", *_warnings(mine)))
    if len(close) > 1:
        also = ", ".join(name for name in close if name != chosen)
        reasons.append(f"On this traffic {also} {'do' if len(close) > 2 else 'does'} about as well.")  # noqa: PLR2004
    worse = sorted(
        (name for name in others if name not in close), key=lambda name: (name != "fifo", name != "idle")
    )
    reasons += [_against(name, others[name], mine) for name in worse[:NAMED]]
    reasons += _warnings(mine)
    quickest = max(others, key=lambda name: others[name].per_hour)
    if others[quickest].per_hour > mine.per_hour * (1.0 + MORE):
        reasons.append(
            f"If throughput matters more to you: with {quickest} {others[quickest].per_hour:.0f} requests are"
            f" answered per hour, {_change(others[quickest].per_hour, mine.per_hour)}."
        )
    fairest = min(others, key=lambda name: others[name].p99_wait)
    if mine.p99_wait > others[fairest].p99_wait * UNFAIR:
        reasons.append(
            f"If the slowest requests matter more to you than the average: {fairest} has the shorter p99,"
            f" {others[fairest].p99_wait:.1f} s."
        )
    return Advice(chosen, tuple(reasons))


def _score(each: Statistics) -> float:
    """Return a score, where less is better; waits below a twentieth of a second count as equal."""
    return float(max(each.mean_wait, NEGLIGIBLE) * max(each.p99_wait, NEGLIGIBLE) ** TAIL)


def _waits(mine: Statistics) -> str:
    return f"A request waits {mine.mean_wait:.1f} s on average and {mine.p99_wait:.1f} s at the 99th percentile."


def _against(name: str, other: Statistics, mine: Statistics) -> str:
    change = _change(mine.mean_wait, other.mean_wait), _change(mine.p99_wait, other.p99_wait)
    if other.draining > mine.draining + 0.03:
        why = f"{name} spends {other.draining:.0%} of the time draining, this {mine.draining:.0%}"
    elif other.switching > mine.switching + 0.03:
        why = f"{name} spends {other.switching:.0%} of the time switching, this {mine.switching:.0%}"
    elif other.p99_wait > mine.p99_wait * UNFAIR:
        why = f"with {name} some models keep the others waiting too long"
    else:
        why = "it chooses better which model to serve next"
    if abs(mine.per_hour - other.per_hour) > MORE * other.per_hour:
        return (
            f"Against {name}: mean {change[0]}, p99 {change[1]}, answers per hour"
            f" {_change(mine.per_hour, other.per_hour)}; {why}."
        )
    return f"Against {name}: mean {change[0]}, p99 {change[1]}; {why}."


def _change(mine: float, other: float) -> str:
    if other <= 0.0:
        return "as before" if mine <= 0.0 else "longer"
    return f"{mine / other - 1.0:+.0%}"


def _warnings(mine: Statistics) -> list[str]:
    warnings = []
    if mine.requests and mine.completed < OVERLOAD * mine.requests:
        warnings.append(
            f"Only {mine.completed} of {mine.requests} requests were answered by the end: this is more traffic"
            " than the GPU can serve with these switch costs, and no policy can change that."
        )
    elif mine.switching > 0.5:  # noqa: PLR2004 - half of the time
        warnings.append(
            f"Switching takes {mine.switching:.0%} of the time: cheaper switches (a faster wake, weights kept in"
            " RAM) would gain more than any policy."
        )
    return warnings


BLOCKS = 20
DRAWS = 200
FEWEST = 2 * BLOCKS  # requests: with fewer there is no result

Measure = Callable[[Sequence[float], Sequence[float]], float]
"""What is compared, of values and the weight of each; less is better."""


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted mean; 0 of none."""
    whole = sum(weights)
    return sum(map(float.__mul__, values, weights)) / whole if whole > 0.0 else 0.0


def quantile(share: float) -> Measure:
    """Return the measure that gives the smallest value with at least ``share`` of the weight at or below it."""

    def measure(values: Sequence[float], weights: Sequence[float]) -> float:
        ordered = sorted(zip(values, weights, strict=True))
        wanted, below = share * sum(weights), 0.0
        for value, weight in ordered:
            below += weight
            if below >= wanted:
                return value
        return ordered[-1][0] if ordered else 0.0

    return measure


def beyond(limit: float) -> Measure:
    """Return the measure that gives the share of the weight of values above ``limit``."""

    def measure(values: Sequence[float], weights: Sequence[float]) -> float:
        whole = sum(weights)
        late = sum(weight for value, weight in zip(values, weights, strict=True) if value > limit)
        return late / whole if whole > 0.0 else 0.0

    return measure


@dataclass(frozen=True, slots=True)
class Verdict:
    """``before`` and ``after`` are the measures; ``sure`` is the share of the draws in which ``after`` is less."""

    before: float
    after: float
    sure: float

    @property
    def gain(self) -> float:
        """The share by which ``after`` is less; negative if it is more."""
        return 1.0 - self.after / self.before if self.before > 0.0 else -math.inf if self.after > 0.0 else 0.0


def compare(
    before: Sequence[float],
    after: Sequence[float],
    measure: Measure = mean,
    weights: Sequence[float] | None = None,
    *,
    seed: int = 1,
) -> Verdict:
    """Compare two runs by one value for each of the same requests, in order of arrival."""
    count = len(before)
    weights = weights or [1.0] * count
    found = measure(before, weights), measure(after, weights)
    if count < FEWEST:
        return Verdict(*found, 0.5)
    cuts = _cuts(weights)
    blocks = [(before[begin:end], after[begin:end], weights[begin:end]) for begin, end in pairwise(cuts)]
    if measure is mean:
        blocks = [_summed(*block) for block in blocks]  # a mean of means of blocks is the mean of all
    dice = random.Random(seed)  # noqa: S311 - a simulation, no secret
    better = 0.0
    for _ in range(DRAWS):
        drawn = dice.choices(blocks, k=len(blocks))
        one = [value for block in drawn for value in block[0]]
        other = [value for block in drawn for value in block[1]]
        heavy = [value for block in drawn for value in block[2]]
        a, b = measure(one, heavy), measure(other, heavy)
        better += 1.0 if b < a else 0.5 if b == a else 0.0
    return Verdict(*found, better / DRAWS)


Block = tuple[Sequence[float], Sequence[float], Sequence[float]]


def _summed(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> Block:
    return [mean(before, weights)], [mean(after, weights)], [sum(weights)]


def _cuts(weights: Sequence[float]) -> list[int]:
    """Return the beginnings of blocks of about the same weight, and the end."""
    running, total = [], 0.0
    for weight in weights:
        total += weight
        running.append(total)
    cuts = {bisect_left(running, total * number / BLOCKS) for number in range(1, BLOCKS)}
    return sorted({0, len(weights), *cuts})


# ---- a picture of runs: how long requests waited, when each model had the GPU

DRAIN_ALPHA = 0.45
PALETTE = 20  # colours; more models share them
SWITCH_COLOUR = "#333333"


def plot(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Draw the waits as cumulative distributions, and a strip per policy of which model was awake.

    Raises:
        TraceError: matplotlib is not installed, or the file cannot be written.

    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise TraceError("--plot needs matplotlib: pip install 'llmux[plot]'") from None
    row = 1.0 if any(outcome.residency for outcome in outcomes.values()) else 0.6  # inches
    figure: Any = Figure(figsize=(10, 4 + row * len(outcomes)), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=[4, 1 + row * len(outcomes)])
    _distributions(upper, outcomes)
    _strips(lower, outcomes)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {error}") from None


def _distributions(axes: Any, outcomes: Mapping[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        waits = sorted(waits_of(outcome))
        axes.plot(
            waits, [(rank + 1) / len(waits) for rank in range(len(waits))], label=name, drawstyle="steps-post"
        )
    axes.set_xlabel("wait, seconds")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.01)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _strips(axes: Any, outcomes: Mapping[str, Outcome]) -> None:
    from matplotlib import colormaps  # noqa: PLC0415 - an extra
    from matplotlib.patches import Patch  # noqa: PLC0415

    models = sorted({model for outcome in outcomes.values() for model in outcome.trace.models})
    palette = colormaps["tab20"]
    colours = {model: palette(number % PALETTE) for number, model in enumerate(models)}
    for row, outcome in enumerate(outcomes.values()):
        if outcome.residency:
            _several(axes, row, outcome, models, colours)
            continue
        for what, alpha in (("awake", 1.0), ("drain", DRAIN_ALPHA), ("switch", 1.0)):
            spans = [visit for visit in outcome.visits if visit.what == what and visit.model]
            axes.broken_barh(
                [(visit.start, visit.end - visit.start) for visit in spans],
                (row - 0.4, 0.8),
                facecolors=[SWITCH_COLOUR if what == "switch" else colours[visit.model] for visit in spans],
                alpha=alpha,
            )
    axes.set_yticks(range(len(outcomes)), list(outcomes))
    axes.invert_yaxis()
    several = any(outcome.residency for outcome in outcomes.values())
    axes.set_xlabel(
        "seconds; a line for each model, dark: waking" if several else "seconds; pale: draining, dark: switching"
    )
    axes.set_xlim(0, max(outcome.end for outcome in outcomes.values()))
    handles = [Patch(color=colours[model], label=model) for model in models[:12]]
    axes.legend(handles=handles, ncols=6, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.35))


def _several(axes: Any, row: int, outcome: Outcome, models: Sequence[str], colours: Mapping[str, Any]) -> None:
    """Draw a line for each model: when it was awake, which others were, and when it was being woken."""
    height = 0.84 / len(models)
    for place, model in enumerate(models):
        spans = [visit for visit in outcome.residency if visit.model == model]
        axes.broken_barh(
            [(visit.start, visit.end - visit.start) for visit in spans],
            (row - 0.42 + place * height, height * 0.9),
            facecolors=[SWITCH_COLOUR if visit.what == "switch" else colours[model] for visit in spans],
        )
