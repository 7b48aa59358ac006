"""Which policy would have served the last hour best, for ``use: auto``, and whether that is more than chance.

Every candidate serves the same requests, in virtual time, with engines fitted to what was measured. What came
lately counts for more, so that a change in the traffic is noticed before the hour is over. A candidate replaces
the policy in force only if it is better by more than chance on the requests that came in both runs.

Production looks back in a process of its own, ``python -m llmux.simulator.look_back``: a question on standard
input, the answer on standard output, at the lowest priority and within limits of its own; see
``llmux.runtime.policy_chooser`` for what it is asked. A simulation does the same at once, between two moments
(``look_back``): the evidence is what llmux itself would have, when requests came and were answered and how large
they were, and what switches cost; how fast the engines really are is not looked at.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmux.core.events import PolicyChosen
from llmux.core.policy import Policy
from llmux.errors import LLMuxError
from llmux.estimates import costs_of
from llmux.estimates.costs import SwitchCosts
from llmux.observability.state_file import load_costs
from llmux.plugins import load_policy
from llmux.simulator.configured import HookSeconds, simulate_specs
from llmux.simulator.cost_matrix import CostMatrix, measured
from llmux.simulator.engine_model import Engines
from llmux.simulator.recorded import Line, Recorded
from llmux.simulator.run import Outcome, Run
from llmux.simulator.statistics import Measure, Verdict, beyond, compare, mean, paired_waits, quantile
from llmux.simulator.trace import Trace

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


BYTES = 4  # of a token, about
MILLISECONDS = 1000.0

Again = Callable[[Trace, Policy, CostMatrix, Engines, frozenset[str]], Outcome]
"""Runs a trace under the rules of the run that is under way, with other engines and costs, and so many awake."""


def look_back(run: Run, policy: Any, again: Again) -> None:
    """Have ``run`` look back as often as ``policy``, an ``Auto``, says, and adopt what it finds."""
    every, hour = policy.options.every, policy.options.past

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
            )
        if choice is not None and choice.name != choice.before:
            run.outcome.adopted.append((run.time, choice.name))
            run.feed(PolicyChosen(choice.name, choice.reason))
        heapq.heappush(run.looks, (run.time + every, 0))

    run.look = look
    heapq.heappush(run.looks, (max(hour, every), 0))


def evidence(run: Run, hour: float) -> Recorded:
    """Return what is known of the last ``hour`` seconds as a record has it."""
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


NICE = 19
CPU = 100  # seconds
WRITTEN = 1 << 20  # bytes


def main() -> int:
    """Answer one question."""
    with contextlib.suppress(OSError):
        os.nice(NICE)
    for kind, most in ((resource.RLIMIT_CPU, CPU), (resource.RLIMIT_FSIZE, WRITTEN), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    try:
        choice = answer(json.load(sys.stdin.buffer))
    except LLMuxError as error:
        print(error)  # noqa: T201 - this is what its output is for
        return 1
    json.dump(None if choice is None else asdict(choice), sys.stdout)
    return 0


def answer(question: Mapping[str, Any]) -> Choice | None:
    """Return which policy is to decide; None where there is too little to say."""
    start = {"models": question["models"], "rules": question["rules"]}
    requests = sorted(question["requests"], key=lambda line: float(line["arrival_s"]))
    recorded = Recorded("the last hour", start, requests, [], [], [], [], 0, 0)
    known = SwitchCosts()
    load_costs(known, question["costs"])
    costs = measured(known)
    if len(requests) < FEWEST or (costs.default is None and not costs.wakes):
        return None
    policy: Any = load_policy(question["use"], question["options"], Path(question["folder"]))
    fits = recorded.fits()
    trace = recorded.fitted_trace(fits)
    engines = Engines(own={name: each.engine for name, each in fits.items()})
    guesses = {name: (guess[0], guess[1]) for name, guess in question["guesses"].items()}
    rules = replace(recorded.rules, anticipate=bool(question["anticipate"]))
    specs = recorded.exact_specs()

    def run(candidate: Policy) -> Outcome:
        return simulate_specs(trace, specs, rules, candidate, HookSeconds(costs, guesses), engines)

    return choose(policy.makers, question["chosen"], run, policy.options.objective, policy.limit)


if __name__ == "__main__":
    sys.exit(main())
