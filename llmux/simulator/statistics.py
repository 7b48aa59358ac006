"""What came of a run, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from llmux.simulator.run import Outcome

SLO = 30.0  # seconds to the first token


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one run. Waits and times in seconds, shares from 0 to 1.

    A wait lasts from arrival to admission; a request which still waits at the end counts with its age.
    """

    mean_wait: float
    p50_wait: float
    p95_wait: float
    p99_wait: float
    max_wait: float
    mean_ttft: float
    p99_ttft: float
    switching: float  # share of time in which switches were paid for: nothing is served
    draining: float  # share of time in which the awake model finished what it had before leaving
    switches: int
    completed: int
    requests: int
    slo: float  # share of requests whose first token came within the objective

    def as_json(self) -> dict[str, float | int]:
        """Return the values by name."""
        return asdict(self)


def waits_of(outcome: Outcome) -> list[float]:
    """Return how long each request waited, or has waited at the end, in seconds."""
    return [
        (outcome.end if admitted is None else admitted) - arrived
        for arrived, admitted in zip(outcome.arrived, outcome.admitted, strict=True)
        if arrived is not None
    ]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of sorted values; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def statistics_of(outcome: Outcome, slo: float = SLO) -> Statistics:
    """Sum a run up. ``slo`` is the objective for the time to the first token, in seconds."""
    waits = sorted(waits_of(outcome))
    first = sorted(
        (outcome.end if token is None else token) - arrived
        for arrived, token in zip(outcome.arrived, outcome.first_token, strict=True)
        if arrived is not None
    )
    count = len(waits)
    end = outcome.end or 1.0
    within = sum(time <= slo for time in first)
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
        completed=sum(finished is not None for finished in outcome.finished),
        requests=count,
        slo=within / count if count else 1.0,
    )
