"""Which of several policies would have served the last hour best, and whether that is more than chance.

Every candidate serves the same requests, in virtual time, with engines fitted to what was measured. What came
lately counts for more, so that a change in the traffic is noticed before the hour is over. A candidate replaces
the policy in force only if it is better by more than chance on the requests that came in both runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmux.core.policy import Policy
from llmux.simulator.paired import Measure, Verdict, beyond, compare, mean, quantile
from llmux.simulator.run import Outcome
from llmux.simulator.statistics import paired_waits

SURE = 0.9  # share of the draws in which a candidate must be better
GAIN = 0.01  # share by which it must be better
# How often what a request says about the present becomes half as much, from the newest to the oldest.
HALVES = 3.0
FEWEST = 40  # requests: fewer say nothing
PERCENT = 100.0

Simulate = Callable[[Policy], Outcome]


@dataclass(frozen=True, slots=True)
class Score:
    """How one candidate would have done: the objective's value, and how sure it is better than the chosen one."""

    name: str
    value: float
    sure: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Which policy is to decide, and why. ``name`` is the one in force where none is better."""

    name: str
    before: str
    scores: tuple[Score, ...]
    requests: int
    reason: str


def measure_of(objective: str, limit: float | None) -> Measure:
    """Return what an objective measures: ``mean``, ``p95`` and so on; with a ``limit``, the share beyond it."""
    if limit is not None:
        return beyond(limit)
    return mean if objective == "mean" else quantile(float(objective.removeprefix("p")) / PERCENT)


def choose(
    makers: Mapping[str, Callable[[], Policy]],
    chosen: str,
    run: Simulate,
    objective: str = "mean",
    limit: float | None = None,
) -> Choice:
    """Run all candidates with ``run`` and say which is to decide. ``makers`` make them anew; ``chosen`` is one."""
    measure = measure_of(objective, limit)
    base = run(makers[chosen]())
    scores: list[Score] = []
    found: dict[str, Verdict] = {}
    count = 0
    for name, make in makers.items():
        outcome = base if name == chosen else run(make())
        before, after = paired_waits(base, outcome)
        weights = _weights(base, outcome)
        count = len(before)
        verdict = found[name] = compare(before, after, measure, weights)
        scores.append(Score(name, verdict.after, verdict.sure))
    better = [
        score
        for score in scores
        if score.name != chosen and score.sure >= SURE and found[score.name].gain >= GAIN and count >= FEWEST
    ]
    best = min(better, key=lambda score: score.value, default=None)
    if best is None:
        mine = next(score.value for score in scores if score.name == chosen)
        why = f"of {len(scores)} candidates none is better than {chosen} by more than chance"
        return Choice(chosen, chosen, tuple(scores), count, f"{why} ({_said(mine, objective, limit)})")
    mine = found[best.name].before
    why = (
        f"on the last {count} requests {best.name} has {_said(best.value, objective, limit)} instead of"
        f" {_said(mine, objective, limit, bare=True)} with {chosen}, better in {best.sure:.0%} of the draws"
    )
    return Choice(best.name, chosen, tuple(scores), count, why)


def _weights(one: Outcome, other: Outcome) -> Sequence[float]:
    """Return how much each request counts that came in both runs, by when it came; in the order of that."""
    times = sorted(a for a, b in zip(one.arrived, other.arrived, strict=True) if a is not None and b is not None)
    if not times:
        return []
    span = (times[-1] - times[0]) or 1.0
    return [math.exp2(HALVES * (time - times[-1]) / span) for time in times]


def _said(value: float, objective: str, limit: float | None, *, bare: bool = False) -> str:
    if limit is not None:
        return f"{1.0 - value:.1%}" + ("" if bare else f" admitted within {limit:g} s")
    return f"{value:.1f} s" if bare else f"a {objective} wait of {value:.1f} s"
