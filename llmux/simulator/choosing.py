"""Which policy would have served the last hour best, for ``use: auto``, and whether that is more than chance.

Every candidate serves the same requests, in virtual time, with engines fitted to what was measured. Recent
requests count for more, so that a change in the traffic is noticed before the hour is over. A candidate replaces
the policy in force only if it is better by more than chance on the requests that came in both runs.

One replay proves little: a request that comes a moment later may change everything after it, and two replays of an
hour which begin at different times rank the candidates about as differently as two hours do. So each look adds to
the results of earlier ones, by stretches of time (``Memory``): each stretch is seen from many beginnings, and past
hours still count. This is how a mean or a share is compared; a percentile is compared by the last hour alone.

In production this runs in a process of its own (``simulator.look_back``). A simulation does the same at once,
between two moments (``look_back``). It uses only what llmux itself would know: when requests came and were
answered, how large they were, and what switches cost; not how fast the simulated engines really are.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add, mul
from typing import Any

from llmux.core.events import PolicyChosen
from llmux.core.policy import Policy
from llmux.estimates import costs_of
from llmux.simulator.cost_matrix import CostMatrix, measured
from llmux.simulator.engine_model import Engines
from llmux.simulator.recorded import Line, Recorded
from llmux.simulator.run import Outcome, Run
from llmux.simulator.statistics import Measure, Verdict, beyond, compare, mean, paired_waits, quantile, wait_of
from llmux.simulator.trace import Trace

SURE = 0.9  # share of the draws in which a candidate must be better, for a percentile
GAIN = 0.01  # share by which it must be better
# How often the weight of a request halves, from the newest to the oldest.
HALVES = 3.0
# For a mean or a share, which are remembered:
PIECES = 24  # stretches of an hour
KEPT = 4.0  # hours
# Hours after which a stretch counts half, and how likely a candidate must be better: recently, to notice a change,
# with a certainty that chance hardly reaches; and in the long run.
VIEWS = ((0.25, 0.99), (1.0, 0.85))
WORTH = 0.03  # share by which it must be better
LAGS = 3  # stretches in a row whose waits depend on each other
LEAST = 0.3  # of the variance that independent waits would have
FEWEST = 40  # requests: with fewer there is no result
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
    """Which policy is to decide, and why. ``name`` is the one in force if none is better."""

    name: str
    before: str
    scores: tuple[Score, ...]
    requests: int
    reason: str
    memory: Mapping[str, Any] = field(default_factory=dict)  # see ``Memory.as_json``


class Memory:
    """The results of looks: for each stretch of time the average waiting with each candidate.

    ``past`` is how many seconds a look goes back. Times are on a clock that all looks share.
    """

    def __init__(self, names: Iterable[str], past: float) -> None:
        self.names, self.past = tuple(names), past
        self._seen: dict[int, list[float]] = {}  # by stretch: looks, requests, and the sums for each name

    @classmethod
    def of(cls, data: Any, names: Iterable[str], past: float) -> Memory:
        """Return what ``as_json`` wrote; an empty one if that is for other candidates, or unreadable."""
        memory = cls(names, past)
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            if data["names"] == list(memory.names) and data["past"] == past:
                found = {int(key): [float(value) for value in row] for key, row in data["seen"].items()}
                if all(len(row) == len(memory.names) + 2 and row[0] > 0.0 for row in found.values()):
                    memory._seen = found
        return memory

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON value."""
        rows = {str(key): [round(value, 3) for value in row] for key, row in self._seen.items()}
        return {"names": list(self.names), "past": self.past, "seen": rows}

    def add(self, since: float, outcomes: Mapping[str, Outcome], worth: Callable[[float], float]) -> None:
        """Add the results of a look at the time from ``since`` on. ``worth`` gives the weight of a wait."""
        found: dict[int, list[float]] = {}
        runs = [outcomes[name] for name in self.names]
        for index, arrived in enumerate(runs[0].arrived):
            waits = [wait_of(run, index) for run in runs]
            if arrived is not None and None not in waits:
                row = found.setdefault(self._stretch(since + arrived), [1.0, 0.0, *([0.0] * len(runs))])
                row[1] += 1.0
                for place, wait in enumerate(waits, 2):
                    row[place] += worth(wait or 0.0)
        for key, row in found.items():
            self._seen[key] = list(map(add, self._seen.get(key, [0.0] * len(row)), row))
        oldest = max(self._seen, default=0) - KEPT * PIECES
        self._seen = {key: row for key, row in sorted(self._seen.items()) if key >= oldest}

    def _stretch(self, time: float) -> int:
        return math.floor(time / self.past * PIECES)

    def compare(self, before: str, after: str, half: float = VIEWS[-1][0]) -> Verdict:
        """Compare two candidates; a stretch counts half as much as one that is ``half`` hours later."""
        one, other = self.names.index(before) + 2, self.names.index(after) + 2
        newest = max(self._seen)
        weights = [math.exp2((key - newest) / PIECES / half) for key in self._seen]
        rows = [
            [value / row[0] * weight for value in row]
            for row, weight in zip(self._seen.values(), weights, strict=True)
        ]
        count = sum(row[1] for row in rows)
        found = sum(row[one] for row in rows) / count, sum(row[other] for row in rows) / count
        gain = found[0] - found[1]
        rest = [row[one] - row[other] - gain * row[1] for row in rows]
        alone = sum(each * each for each in rest)
        together = alone
        for lag in range(1, LAGS + 1):  # Newey and West, 1987
            together += 2.0 * (1.0 - lag / (LAGS + 1)) * sum(map(mul, rest, rest[lag:]))
        error = math.sqrt(max(together, LEAST * alone)) / count
        if not error:
            return Verdict(*found, 0.5 if not gain else float(gain > 0.0))
        return Verdict(*found, 0.5 * (1.0 + math.erf(gain / error / math.sqrt(2.0))))


def measure_of(objective: str, limit: float | None) -> Measure:
    """Return the measure of an objective: ``mean``, ``p95`` and so on; with a ``limit``, the share beyond it."""
    if limit is not None:
        return beyond(limit)
    return mean if objective == "mean" else quantile(float(objective.removeprefix("p")) / PERCENT)


def choose(
    makers: Mapping[str, Callable[[], Policy]],
    chosen: str,
    run: Simulate,
    objective: str = "mean",
    limit: float | None = None,
    *,
    memory: Memory | None = None,
    since: float = 0.0,
) -> Choice:
    """Run all candidates with ``run`` and return which is to decide. ``makers`` create them; ``chosen`` is one.

    The results are added to ``memory``; the runs began at ``since``.
    """
    outcomes = {name: run(make()) for name, make in makers.items()}
    base = outcomes[chosen]
    count = min(len(paired_waits(base, other)[0]) for other in outcomes.values())
    if count and (objective == "mean" or limit is not None):
        memory = memory or Memory(makers, max(each or 0.0 for each in base.arrived) + LEAST)
        memory.add(since, outcomes, (lambda wait: wait) if limit is None else (lambda wait: float(wait > limit)))
        views = [({name: memory.compare(chosen, name, half) for name in makers}, sure) for half, sure in VIEWS]
        gain, how = WORTH, "earlier looks included; {:.0%} sure"
    else:
        measure = measure_of(objective, limit)
        verdicts = {
            name: compare(*paired_waits(base, other), measure, _weights(base, other))
            for name, other in outcomes.items()
        }
        views, gain, how = [(verdicts, SURE)], GAIN, "better in {:.0%} of the draws"
    for found, sure in views:
        scores = tuple(Score(name, verdict.after, verdict.sure) for name, verdict in found.items())
        mine = found[chosen].before
        better = [each for each in scores if each.sure >= sure and found[each.name].gain >= gain]
        best = min(better, key=lambda score: score.value, default=None) if count >= FEWEST else None
        if best is not None:
            break
    if best is None:
        why = f"of {len(scores)} candidates none is better than {chosen} by more than chance"
        why = f"{why} ({_figure(mine, objective, limit)})"
    else:
        why = (
            f"on the last {count} requests {best.name} has {_figure(best.value, objective, limit)} instead of"
            f" {_figure(mine, objective, limit, bare=True)} with {chosen}, {how.format(best.sure)}"
        )
    name = chosen if best is None else best.name
    return Choice(name, chosen, scores, count, why, memory.as_json() if memory is not None else {})


def _weights(one: Outcome, other: Outcome) -> Sequence[float]:
    """Return the weight of each request that came in both runs, by its arrival and in that order."""
    times = sorted(a for a, b in zip(one.arrived, other.arrived, strict=True) if a is not None and b is not None)
    if not times:
        return []
    span = (times[-1] - times[0]) or 1.0
    return [math.exp2(HALVES * (time - times[-1]) / span) for time in times]


def _figure(value: float, objective: str, limit: float | None, *, bare: bool = False) -> str:
    if limit is not None:
        return f"{1.0 - value:.1%}" + ("" if bare else f" admitted within {limit:g} s")
    return f"{value:.1f} s" if bare else f"a {objective} wait of {value:.1f} s"


BYTES = 4  # per token, about
MILLISECONDS = 1000.0

Again = Callable[[Trace, Policy, CostMatrix, Engines, frozenset[str]], Outcome]
"""Runs a trace under the rules of the run that is under way, with other engines and costs, and so many awake."""


def look_back(run: Run, policy: Any, again: Again) -> None:
    """Let ``run`` look back as often as ``policy``, an ``Auto``, requires, and adopt the result."""
    every, hour = policy.options.every, policy.options.past
    memory = Memory(policy.makers, hour)

    def look() -> None:
        choice = None
        recorded = evidence(run, hour)
        costs = measured(costs_of(run.core.state))
        if len(recorded.requests) >= FEWEST and costs.default is not None:
            fits = recorded.fits()
            trace = recorded.fitted_trace(fits)
            engines = Engines(own={name: each.engine for name, each in fits.items()})
            first = frozenset(trace.models[:1])
            choice = choose(
                policy.makers,
                policy.chosen,
                lambda candidate: again(trace, candidate, costs, engines, first),
                policy.options.objective,
                policy.limit,
                memory=memory,
                since=max(0.0, run.time - hour),
            )
        if choice is not None and choice.name != choice.before:
            run.outcome.adopted.append((run.time, choice.name))
            run.feed(PolicyChosen(choice.name, choice.reason))
        heapq.heappush(run.looks, (run.time + every, 0))

    run.look = look
    heapq.heappush(run.looks, (max(hour, every), 0))


def evidence(run: Run, hour: float) -> Recorded:
    """Return what is known of the last ``hour`` seconds in the form of a record."""
    outcome, now = run.outcome, run.time
    begin = max(0.0, now - hour)
    first_token: list[float | None] = list(outcome.first_token)
    for serving in run.serving.values():
        serving.place_first_tokens(now, first_token)
    requests: list[Line] = []
    for index, arrived in enumerate(outcome.arrived):
        job = run.jobs[index]
        if arrived is None or arrived < begin or job.service is not None:
            continue
        admitted, finished, first = outcome.admitted[index], outcome.finished[index], first_token[index]
        known = job.alone is None
        requests.append(
            {
                "model": job.model,
                "arrival_s": arrived - begin,
                "wait_s": (now if admitted is None else admitted) - arrived,
                "service_s": None if admitted is None or finished is None else finished - admitted,
                "first_byte_s": None if first is None else first - arrived,
                "prompt_bytes": job.prompt_tokens * BYTES if known else 0,
                "answer_bytes": job.output_tokens * BYTES if known else int((job.alone or 0.0) * MILLISECONDS),
                "outcome": "answered",
            }
        )
    requests.sort(key=lambda line: line["arrival_s"])
    models = [{"name": spec.name, "max_in_flight": spec.max_in_flight} for spec in run.specs]
    return Recorded("the last hour", {"models": models}, requests, [], [], [], [], 0, 0)
