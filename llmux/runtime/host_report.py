"""What a host says of itself to gateways, which place requests on it: `/llmux/events?report=1s`, `/llmux/status`.

All of it is plain values, taken at one instant; durations are seconds. ``instance`` names this run of the process
and ``seq`` grows with each report: one that was overtaken on its way, or that another process has sent, is known
by them. ``figures`` is pure: simulated hosts are looked at by it, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmux.config import Config
from llmux.config.targets import leaves
from llmux.core import levels, residency
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.core.state import State
from llmux.estimates.costs import SwitchCosts
from llmux.runtime import wait_estimate
from llmux.runtime.switcher import Switcher
from llmux.version import __version__

LEASE = 6.0  # seconds for which a report counts


class ModelFigures(NamedTuple):
    """What a host says of one of its models."""

    phase: Phase
    queued: int
    in_flight: int
    expected_wait: float | None  # of a request that came now; None: it would be refused
    switch_cost: float  # of a wake, from where things stand
    evicts: tuple[str, ...]  # what its wake would put to sleep
    sleep: float
    wake: float
    measured: bool  # what a wake takes was measured for this very model, or given in the configuration
    arrival_rate: float  # requests a second
    service: float  # seconds of a mean answer; 0: none was measured
    slots: int | None  # how many it serves at once; None: no limit
    awake_for: float  # 0 while it is not awake
    idle_for: float | None  # since its last request, 0 while it has one; None: it never had one


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
        "models": {
            name: {**each._asdict(), "phase": each.phase.value, "evicts": list(each.evicts)}
            for name, each in figures(s, now).items()
        },
        "names": _names(switcher.config, s),
    }


def figures(s: State, now: float) -> dict[str, ModelFigures]:
    """Return the figures of each model, by its name."""
    waits = wait_estimate.for_newcomers(s, now)
    # Where one model at a time is awake, the same leave for whatever holds nothing.
    alike: Sequence[Model] | None = None
    alone = not sets_may_be_awake(s)
    found = {}
    for name, model in s.models.items():
        if model.removed:
            continue
        leaving: Sequence[Model] = ()
        if model.phase is not Phase.AWAKE:
            usual = alone and not model.holds and model.pin is None
            leaving = alike if usual and alike is not None else residency.who_leaves(s, model) or ()
            if usual:
                alike = leaving
        found[name] = _of_model(s, model, now, waits[name], leaving)
    return found


def sets_may_be_awake(s: State) -> bool:
    """Whether more than one model may be awake at a time, so that what leaves differs from model to model."""
    return s.rules.capacity is not None or any(model.next.companions is not None for model in s.models.values())


def _of_model(
    s: State, model: Model, now: float, expected: float | None, leaving: Sequence[Model]
) -> ModelFigures:
    level = levels.lightest(model)
    awake = model.phase is Phase.AWAKE
    idle: float | None = 0.0
    if model.idle:
        idle = None if model.last_served is None else max(0.0, now - model.last_served)
    return ModelFigures(
        model.phase,
        len(model.queue),
        len(model.in_flight),
        expected,
        0.0 if awake else residency.switch_cost(s, leaving, model),
        tuple([each.name for each in leaving if each is not model]),
        s.costs.sleep_of(model.name, level),
        s.costs.wake_of(model.name, level),
        _knows_wake(s, model.name, level),
        model.meter.arrival_rate(now),
        model.meter.service,
        model.spec.max_in_flight,
        now - model.awake_since if awake and model.awake_since is not None else 0.0,
        idle,
    )


def _knows_wake(s: State, model: str, level: str) -> bool:
    costs = s.costs
    assert isinstance(costs, SwitchCosts)
    measured = ("wake", model, level) in costs.levels if level else model in costs.wakes
    return measured or costs.guesses.get(model, (None, None))[0] is not None


def _names(config: Config, s: State) -> Mapping[str, str]:
    """Return all that clients may ask for, by the model which serves it; of a virtual one, the likeliest."""
    names = {name: model for name, model in {**config.names, **config.variants}.items() if model in s.models}
    for virtual in config.virtual:
        found = [model for model in leaves(config, virtual) if model in s.models]
        if found:
            awake = (model for model in found if s.models[model].phase is Phase.AWAKE)
            names[virtual] = next(awake, found[0])
    return names
