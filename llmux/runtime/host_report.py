"""What a host says of itself to gateways, which place requests on it: `/llmux/events?report=1s`, `/llmux/status`.

All of it is plain values, taken at one instant; durations are seconds. ``instance`` names this run of the process
and ``seq`` grows with each report: one that was overtaken on its way, or that another process has sent, is known
by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmux.config import Config
from llmux.config.targets import leaves
from llmux.core import levels, placement
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.core.state import State
from llmux.estimates.costs import SwitchCosts
from llmux.runtime import wait_estimate
from llmux.runtime.switcher import Switcher
from llmux.version import __version__

LEASE = 6.0  # seconds for which a report counts


def host_report(switcher: Switcher) -> dict[str, Any]:
    """Return the report of this moment. Each has a number of its own."""
    s, now = switcher.core.state, switcher.now()
    switcher.reports += 1
    return {
        "version": __version__,
        "instance": switcher.instance,
        "seq": switcher.reports,
        "lease": LEASE,
        "ready": s.ready and not s.stopping,
        "leased": s.lease is not None and not s.lease.waits,
        "free_in": wait_estimate.rest_of_switch(s, now),
        "models": {name: _model(s, model, now) for name, model in s.models.items() if not model.removed},
        "names": _names(switcher.config, s),
    }


def _model(s: State, model: Model, now: float) -> dict[str, Any]:
    level = levels.lightest(model)
    awake = model.phase is Phase.AWAKE
    leaving = () if awake else placement.who_leaves(s, model) or ()
    return {
        "phase": model.phase.value,
        "queued": len(model.queue),
        "in_flight": len(model.in_flight),
        "expected_wait": wait_estimate.for_a_newcomer(s, model, now),
        "switch_cost": 0.0 if awake else placement.switch_cost(s, leaving, model),
        "evicts": [each.name for each in leaving if each is not model],
        "sleep": s.costs.sleep_of(model.name, level),
        "wake": s.costs.wake_of(model.name, level),
        "measured": _knows_wake(s, model.name, level),
        "arrival_rate": model.meter.arrival_rate(now),
        "service": model.meter.service,
        "slots": model.spec.max_in_flight,
        "awake_for": now - model.awake_since if awake and model.awake_since is not None else 0.0,
        "idle_for": _idle_for(model, now),
    }


def _knows_wake(s: State, model: str, level: str) -> bool:
    """Whether what a wake takes was measured for this very model, or given in the configuration."""
    costs = s.costs
    assert isinstance(costs, SwitchCosts)
    measured = ("wake", model, level) in costs.levels if level else model in costs.wakes
    return measured or costs.guesses.get(model, (None, None))[0] is not None


def _idle_for(model: Model, now: float) -> float | None:
    """Return the seconds since its last request, 0 while it has one; None: it never had one."""
    if not model.idle:
        return 0.0
    return None if model.last_served is None else max(0.0, now - model.last_served)


def _names(config: Config, s: State) -> Mapping[str, str]:
    """Return all that clients may ask for, by the model which serves it; of a virtual one, the likeliest."""
    names = {name: model for name, model in {**config.names, **config.variants}.items() if model in s.models}
    for virtual in config.virtual:
        found = [model for model in leaves(config, virtual) if model in s.models]
        if found:
            awake = (model for model in found if s.models[model].phase is Phase.AWAKE)
            names[virtual] = next(awake, found[0])
    return names
