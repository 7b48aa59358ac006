"""A host's report, out of its core: what is looked at, and how the figures are made. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmux.core import placement
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.core.state import State
from llmux.fleet.reports import LEASE, ON_GPU, HostReport, ModelReport
from llmux.runtime import wait_estimate


def report_of(
    s: State, now: float, *, host: str, instance: str = "", seq: int = 0, url: str = "", lease: float = LEASE
) -> HostReport:
    """Return the report of a host whose core is in this state at ``now``."""
    waits = wait_estimate.for_newcomers(s, now)
    grouped = any(model.next.companions is not None for model in s.models.values())
    together = s.rules.capacity is not None or grouped
    alike: Sequence[Model] | None = None  # what leaves for any model that holds nothing, if one at a time does
    models: dict[str, ModelReport] = {}
    for name, model in s.models.items():
        cost, evicts = 0.0, None
        if model.phase is not Phase.AWAKE:
            leaving = alike
            if leaving is None or together or model.holds:
                leaving = placement.who_leaves(s, model) or ()
            if not model.holds:
                alike = leaving
            cost = placement.switch_cost(s, leaving, model)
            if together:
                evicts = tuple([each.name for each in leaving if each is not model])
        models[name] = _model(s, model, now, waits[name], cost, evicts)
    ready = s.ready and not s.stopping
    return HostReport(host, instance, seq, url, models, ready=ready, leased=s.lease is not None, lease=lease)


def _model(
    s: State, model: Model, now: float, expected: float | None, cost: float, evicts: tuple[str, ...] | None
) -> ModelReport:
    name, phase = model.name, model.phase
    queued, in_flight = len(model.queue), len(model.in_flight)
    idle = 0.0
    if not queued and not in_flight:
        idle = math.inf if model.last_served is None else now - model.last_served
    awake_for = now - model.awake_since if model.awake_since is not None and phase in ON_GPU else 0.0
    return ModelReport(
        phase,
        queued,
        in_flight,
        expected,
        cost,
        s.costs.sleep_of(name),
        s.costs.wake_of(name),
        model.meter.arrival_rate(now),
        model.meter.service,
        model.spec.max_in_flight,
        awake_for,
        idle,
        evicts,
    )
