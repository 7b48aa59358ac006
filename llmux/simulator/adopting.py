"""``use: auto`` in virtual time: what production does in a process beside, done at once between two moments.

The evidence is what llmux itself would have: when requests came and were answered and how large they were, and
what switches cost. Engines are fitted to it, as to a record; how fast they really are is not looked at.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from llmux.core.events import PolicyChosen
from llmux.core.policy import Policy
from llmux.simulator.choosing import FEWEST, choose
from llmux.simulator.cost_matrix import CostMatrix, measured
from llmux.simulator.engine_model import Engines
from llmux.simulator.recorded import Line, Recorded
from llmux.simulator.run import Outcome, Run
from llmux.simulator.trace import Trace

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
        costs = measured(run.core.state.costs)
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
