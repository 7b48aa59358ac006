"""What operators see: the documents of ``/llmux/status`` and ``/health``, and work that is overdue.

Also a host's report to gateways, which place requests on it: `/llmux/events?report=1s`, `/llmux/status`.
Everything is plain values, taken at one instant; durations are seconds. ``instance`` names this run of the process
and ``seq`` grows with each report: they reveal a report that was overtaken on its way, or is from another process.
``figures`` is pure: simulated hosts use it, too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from llmux.config import Config
from llmux.config.targets import leaves
from llmux.core import admission, commands, levels, residency
from llmux.core.model import Lease, Model, Request
from llmux.core.phases import Phase
from llmux.core.spec import Memory
from llmux.core.state import State
from llmux.core.timers import Timer
from llmux.estimates import costs_of
from llmux.estimates.costs import SwitchCosts
from llmux.observability.decision_log import Evicted
from llmux.runtime import engine_locks, wait_estimate
from llmux.runtime.history import IN_STATUS, brief, decisions, eviction
from llmux.runtime.shadow import Shadow
from llmux.runtime.switcher import Switcher
from llmux.version import __version__

SHOWN = 100  # of the requests which wait for a model, the first
SERVED = 10  # of those in flight, the ones that have been longest
STALL = 5.0  # seconds without a turn of the event loop that are too many


def status(switcher: Switcher) -> dict[str, Any]:
    """Return the whole status. Times are seconds, as numbers."""
    s, now = switcher.core.state, switcher.now()
    switch = s.switch
    config = switcher.config
    counted = switcher.activities.streamed
    riding = switcher.riders.waiting()
    turns = wait_estimate.Turns(s, now)
    return {
        "version": __version__,
        "time": time.time(),
        "uptime": time.monotonic() - switcher.started_at,
        "ready": s.ready and not s.stopping,
        "policy": _policy(switcher),
        "shadows": [_shadow(shadow) for shadow in switcher.shadows],
        "awake": [model.name for model in s.in_phase(Phase.AWAKE)],
        "switch": None
        if switch is None
        else {
            "id": switch.id,
            "from": list(switch.sources),
            "to": switch.target.name if switch.target else None,
            "phase": switch.stage.value,
            "since": now - switch.started,
            "reason": switch.reason,
        },
        "manual": s.manual,
        "lease": None if s.lease is None else lease_document(s, s.lease, now),
        "host_memory": None
        if s.rules.host_memory is None
        else {
            "limit": s.rules.host_memory,
            # A model that goes deeper counts as before.
            "taken": sum(model.level.host_memory for model in s.models.values() if model.level is not None),
        },
        "memory": None if s.rules.capacity is None else _memory(s, s.rules.capacity),
        "models": {
            name: {
                **_model(model, now, counted(name), switcher.decisions.evicted.get(name)),
                **_expectation(switcher, model, now, turns),
                "aliases": list(config.models[name].aliases) if name in config.models else [],
                "riding": riding[name],
            }
            for name, model in s.models.items()
        },
        "switch_costs": [
            {"from": source, "to": target, "seconds": cost.seconds, "samples": cost.samples}
            for (source, target), cost in costs_of(s).pairs.items()
        ],
        "level_costs": [
            {"model": name, "level": level, "hook": hook, "seconds": cost.seconds, "samples": cost.samples}
            for (hook, name, level), cost in costs_of(s).levels.items()
        ],
        "last_eviction": None
        if switcher.decisions.eviction is None
        else eviction(switcher.decisions.eviction, time.time() - now),
        "decisions": decisions(switcher, IN_STATUS),
        "remotes": {} if switcher.remotes is None else switcher.remotes.document(),
        "reload_error": switcher.last_reload_error,
        "controlled_twice": engine_locks.document(switcher.engine_locks),
    }


def _memory(s: State, capacity: Memory) -> dict[str, Any]:
    """Return the memory that models may take of the GPUs, and what holders take; bytes, of all GPUs together."""
    holders = [model for model in s.models.values() if model.holds]
    return {
        "capacity": sum(residency.per_gpu(capacity).values()),
        "taken": {
            model.name: sum(residency.per_gpu(model.running.memory).values())
            for model in holders
            if model.running.memory is not None
        },
    }


def lease_document(s: State, lease: Lease, now: float) -> dict[str, Any]:
    """Return a lease. ``held``: no model holds the GPU any more, the foreign job has it."""
    return {
        "id": lease.id,
        "reason": lease.reason or None,
        "held": commands.lease_held(s),
        "for": now - lease.since,
        "expires_in": None if lease.until is None else max(0.0, lease.until - now),
        "requests": "wait" if lease.waits else "reject",
    }


def _shadow(shadow: Shadow) -> dict[str, Any]:
    agreed = sum(count for (_, agrees), count in shadow.counts.items() if agrees)
    return {
        "policy": shadow.name,
        "asked": sum(shadow.counts.values()),
        "agreed": agreed,
        "dropped": shadow.dropped or None,
    }


def _policy(switcher: Switcher) -> dict[str, Any]:
    """Return the policy as configured; if it chooses among others, ``auto`` says which decides, and why.

    With ``fair`` it has the counter of each key.
    """
    policy = switcher.config.policy
    document: dict[str, Any] = {"use": policy.use, "options": dict(policy.options)}
    if (auto := switcher.auto.document()) is not None:
        document["auto"] = auto
    if switcher.order is not None:
        document["fair"] = {key: round(each, 1) for key, each in switcher.order.fairness.counters().items()}
    return document


def _model(model: Model, now: float, streamed: int, evicted: Evicted | None) -> dict[str, Any]:
    oldest = model.oldest()
    backoff = max(model.wake_backoff.remaining(now), model.sleep_backoff.remaining(now))
    return {
        "phase": model.phase.value,
        **place(model),
        "queued": len(model.queue),
        "in_flight": len(model.in_flight),
        "streamed": streamed,
        "oldest_wait": None if oldest is None else now - oldest.arrived,
        "awake_for": None
        if model.awake_since is None or model.phase is not Phase.AWAKE
        else now - model.awake_since,
        "backoff_until": None if backoff == 0 else time.time() + backoff,
        "last_error": model.last_error or None,
        "pinned": model.pinned,
        "evicted": None if evicted is None else brief(evicted, time.time() - now),
        "pin_expires_in": None
        if model.pin is None or model.pin.until is None
        else max(0.0, model.pin.until - now),
        "pin_reason": (model.pin.reason or None) if model.pin is not None else None,
    }


def _expectation(switcher: Switcher, model: Model, now: float, turns: wait_estimate.Turns) -> dict[str, Any]:
    """Return how long a new request would wait (null: it would be rejected), and which are inside, in order."""
    s = switcher.core.state
    awake = wait_estimate.until_awake(s, model, now, turns) if model.queue else 0.0
    return {
        "expected_wait": wait_estimate.for_a_newcomer(s, model, now, turns),
        "waiting": [
            {
                "position": position,
                "request_id": switcher.request_id(request.id),
                "key": switcher.key_of(request.id) or None,
                "waited": now - request.arrived,
                "expected": awake + wait_estimate.in_queue(model, position),
            }
            for position, request in enumerate(islice(model.queue.values(), SHOWN), 1)
        ],
        "serving": [
            {
                "request_id": switcher.request_id(request.id),
                "key": switcher.key_of(request.id) or None,
                "for": _served_for(request, now),
                "answering": switcher.inside.answering(request.id),
            }
            for request in islice(model.in_flight.values(), SERVED)
        ],
    }


def _served_for(request: Request, now: float) -> float:
    return 0.0 if request.admitted is None else now - request.admitted


def place(model: Model) -> dict[str, Any]:
    """Return what a model takes, awake and asleep; ``level`` is null if unknown, and while awake."""
    return {
        "level": None if model.level is None else model.level.name,
        "host_memory": None if model.level is None else model.level.host_memory,
        "memory": model.running.memory,
    }


def health(switcher: Switcher, stalled: float) -> tuple[bool, dict[str, Any]]:
    """Return whether all is well, and the body that says why. ``stalled`` is the loop's last long stall."""
    s, now = switcher.core.state, switcher.now()
    found = problems(s, now)
    if stalled > STALL:
        found.append(f"the event loop stood still for {stalled:.1f} s")
    body = {
        "status": "failing" if found else "ok",
        "failing": found,
        "notes": notes(s, now),
    }
    return not found, body


HOOK_GRACE = 10.0  # seconds past its timeout: TERM, 5 s, KILL, and the exit
DEADLINE_GRACE = 5.0


def problems(s: State, now: float) -> list[str]:
    """Return what is overdue; empty while all is well."""
    found = [
        f"the {run.kind.value} hook of {run.model.name!r} runs {now - run.deadline:.0f} s past its timeout"
        for run in s.hooks.values()
        if now > run.deadline + HOOK_GRACE
    ]
    deadline = s.timers.next()
    if deadline is not None and now > deadline + DEADLINE_GRACE:
        found.append(f"a deadline passed {now - deadline:.0f} s ago and was not acted on")
    if s.ready and not s.stopping and _stuck(s, now):
        found.append(f"{s.queued} requests wait although nothing is under way")
    return found


def notes(s: State, now: float) -> list[str]:
    """Return what makes requests wait, though all is well."""
    found = []
    if not s.ready:
        found.append("looking at what runs")
    if s.stopping:
        found.append("stopping")
    if s.switch is not None:
        to = s.switch.target.name if s.switch.target else "sleep"
        seconds = now - s.switch.started
        found.append(f"switch {s.switch.id} to {to}: {s.switch.stage.value} for {seconds:.0f} s")
    if s.lease is not None:
        left = "" if s.lease.until is None else f" for {max(0.0, s.lease.until - now):.0f} s more"
        found.append(admission.because(f"the GPU is leased{left}", s.lease.reason))
    if s.manual:
        found.append("manual mode: only an operator switches")
    for model in s.models.values():
        found.extend(_model_notes(model, now))
    return found


def _model_notes(model: Model, now: float) -> list[str]:
    name, found = model.name, []
    if model.queue:
        found.append(f"{len(model.queue)} wait for {name!r}")
    if model.phase is Phase.DRAINING and model.in_flight:
        longest = max(_served_for(request, now) for request in model.in_flight.values())
        found.append(f"{len(model.in_flight)} in flight at {name!r}, the longest for {longest:.0f} s")
    if model.pin is not None:
        found.append(admission.because(f"{name!r} is pinned", model.pin.reason))
    pause = max(model.wake_backoff.remaining(now), model.sleep_backoff.remaining(now))
    if pause > 0:
        found.append(f"{name!r} is left alone for {pause:.0f} s: {model.last_error}")
    if model.phase in (Phase.FAULTED, Phase.LOST):
        found.append(f"{name!r} is {model.phase.value}: {model.last_error}")
    return found


def _stuck(s: State, now: float) -> bool:
    if not s.queued or s.switch is not None or s.lease is not None or s.manual or s.hooks:
        return False
    return (
        not any(
            model.in_flight
            or model.pinned
            or model.wake_backoff.active(now)
            or model.sleep_backoff.active(now)
            or (model.awake_since is not None and now < model.awake_since + s.rules.min_active)
            for model in s.models.values()
        )
        and Timer.ASK not in s.timers
    )


# ---- what a host reports to gateways

LEASE = 6.0  # seconds for which a report counts


class ModelFigures(NamedTuple):
    """What a host says of one of its models."""

    phase: Phase
    queued: int
    in_flight: int
    expected_wait: float | None  # of a new request; None: it would be refused
    switch_cost: float  # of a wake, from the present state
    evicts: tuple[str, ...]  # what its wake would put to sleep
    sleep: float
    wake: float
    measured: bool  # the wake's cost was measured for this very model, or given in the configuration
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
        "names": (names := _names(switcher.config, s)),
        "virtual": [name for name in switcher.config.virtual if name in names],
        "unlisted": sorted(switcher.config.unlisted),
    }


def figures(s: State, now: float) -> dict[str, ModelFigures]:
    """Return the figures of each model, by its name."""
    turns = wait_estimate.Turns(s, now)
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
        found[name] = _of_model(s, model, now, wait_estimate.for_a_newcomer(s, model, now, turns), leaving)
    return found


def sets_may_be_awake(s: State) -> bool:
    """Whether more than one model may be awake at a time, so that evictions differ from model to model."""
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
    """Return the names that clients may use, by the model which serves them; for a virtual one, the likeliest."""
    names = {name: model for name, model in {**config.names, **config.variants}.items() if model in s.models}
    for virtual in config.virtual:
        found = [model for model in leaves(config, virtual) if model in s.models]
        if found:
            awake = (model for model in found if s.models[model].phase is Phase.AWAKE)
            names[virtual] = next(awake, found[0])
    return names
