"""Who gets in, who waits, who is turned away.

Admission and counting are one step: a request is in flight from the ``Admit`` on, in the same transition.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from llmux.core import levels, placement
from llmux.core.costs import NO_LEVELS
from llmux.core.effects import Refusal, Reject, RequestQueued
from llmux.core.errors import InvalidEventError
from llmux.core.events import RequestArrived
from llmux.core.model import ARRIVAL_WINDOW, Lease, Model, Request
from llmux.core.phases import Phase
from llmux.core.state import State

# While a model is in one of these, a switch that concerns it is decided or not yet possible: nothing blocks it.
UNBLOCKED = frozenset({Phase.UNKNOWN, Phase.WAKING, Phase.AWAKE})

Block = tuple[Refusal, str, float | None]

OPEN_END = 60.0  # seconds: of a pin or lease without an end nobody knows when it is worth to come back
RESTART = 5.0  # seconds until another llmux may be there


def arrived(s: State, event: RequestArrived) -> None:
    """Admit, queue or reject a request that has just arrived."""
    if event.request in s.requests:
        raise InvalidEventError(f"request {event.request} arrived twice")
    model = s.models.get(event.model)
    if model is None or model.removed:
        message = f"model {event.model!r} not found"
        s.out.append(Reject(event.request, event.model, Refusal.UNKNOWN_MODEL, message, None, 0.0))
        return
    request = Request(event.request, model, s.now)
    model.count_arrival(s.now)
    s.transitions.arrived(model.name, s.now)
    if model.has_room and not model.queue and s.lease is None and not s.stopping:
        s.requests[event.request] = request
        s.admit(request)
        return
    block = blocked(s, model)
    if block is not None:
        s.reject(request, *block)
    elif len(model.queue) >= model.spec.max_queued:
        message = f"{len(model.queue)} requests already wait for {model.name!r}"
        s.reject(request, Refusal.QUEUE_FULL, message, expected_wait(s, model))
    else:
        s.requests[event.request] = request
        enqueue(s, request)


def enqueue(s: State, request: Request) -> None:
    """Put a request at the place in its queue that its arrival gives it."""
    model = request.model
    last = next(reversed(model.queue.values()), None)
    model.queue[request.id] = request
    s.queued += 1
    if last is not None and last.arrived > request.arrived:
        # Only a returned request can be older than the last one.
        model.queue = OrderedDict(sorted(model.queue.items(), key=lambda item: item[1].arrived))
    watch(s, model)
    s.out.append(RequestQueued(request.id, model.name, len(model.queue)))


def watch(s: State, model: Model) -> None:
    """Keep the deadlines of a queue: its oldest waiter's timeout, and when it is overdue."""
    oldest = model.oldest()
    if oldest is None:
        return
    timeout = s.rules.request_timeout
    if timeout is not None:
        s.agenda.set(("timeout", model.name), oldest.arrived + timeout)
    overdue = oldest.arrived + s.rules.max_wait
    if overdue > s.now:
        s.agenda.set(("overdue", model.name), overdue)


def timed_out(s: State, model: Model) -> None:
    """Turn away the waiters whose time is up."""
    timeout = s.rules.request_timeout
    while timeout is not None and (oldest := model.oldest()) is not None and oldest.arrived + timeout <= s.now:
        s.unqueue(oldest)
        message = f"waited {s.now - oldest.arrived:.3g} s for model {model.name!r}"
        s.reject(oldest, Refusal.WAITED_TOO_LONG, message)
    watch(s, model)


def admit_waiters(s: State, model: Model) -> None:
    """Let waiters in, oldest first, as far as there is room."""
    while model.queue and model.has_room and s.lease is None:
        oldest = next(iter(model.queue.values()))
        s.unqueue(oldest)
        s.admit(oldest)


def reject_waiters(s: State, model: Model, block: Block) -> None:
    """Turn all waiters of a model away."""
    for request in list(model.queue.values()):
        s.unqueue(request)
        s.reject(request, *block)


def sweep(s: State) -> None:
    """Turn away everybody who waits for what cannot be had for now."""
    if s.queued:
        for model in s.models.values():
            if model.queue and (block := blocked(s, model)) is not None:
                reject_waiters(s, model, block)


def immovable(s: State, but: Model) -> dict[str, Model]:
    """Return the holders that may not be put to sleep now for the sake of ``but``."""
    return {
        name: model
        for name, model in s.models.items()
        if model is not but and (model.pinned or (model.holds and model.sleep_backoff.active(s.now)))
    }


class Loss(NamedTuple):
    """What it takes that a model leaves, in seconds."""

    present: int  # requests in flight or waiting
    expected: float  # requests in the next two minutes, one at least
    sleep: float
    wake: float

    @property
    def seconds(self) -> float:
        """Its sleep, and a wake for each request."""
        return self.sleep + self.wake * (self.present + self.expected)


def loss(s: State, model: Model) -> Loss:
    """Return what it takes that a model leaves."""
    level = levels.lightest(model)
    return Loss(
        len(model.in_flight) + len(model.queue),
        1.0 + model.arrival_rate(s.now) * ARRIVAL_WINDOW,
        s.costs.sleep_of(model.name, level),
        s.costs.wake_of(model.name, level),
    )


def leaving_cost(s: State, model: Model) -> placement.Cost:
    """Say what it costs to have a model leave: its sleep, and its return for each who is there or to be expected.

    To be expected are as many as came, at its arrival rate, within two minutes, and one in any case. Who is to be
    kept awake costs more than all others.
    """
    taken = loss(s, model)
    return placement.Cost(int(model.spec.keep_awake), int(taken.present > 0), taken.seconds)


def switch_cost(s: State, leaving: Sequence[Model], target: Model) -> float:
    """Return the expected cost of a switch in seconds."""
    sources = [model.name for model in leaving if model is not target]
    stake = levels.at_stake(leaving, target) if s.leveled else NO_LEVELS
    return s.costs.estimate(sources, target.name, stake)


def can_be_had(s: State, target: Model) -> bool:
    """Whether the immovable leave room for ``target``."""
    stay = [model.running for model in immovable(s, target).values()]
    return not stay or placement.fits([target.next, *stay], s.rules.capacity)


def who_leaves(s: State, target: Model) -> tuple[Model, ...] | None:
    """Return the models that make room for ``target``, or None if the immovable are in the way."""
    holders = s.holders()
    # Who is pinned is as good as there: nobody may take its place before it is awake.
    holders.update((name, model.running) for name, model in s.models.items() if model.pinned)
    holders.pop(target.name, None)
    names = placement.leaving(
        target.next,
        holders,
        s.rules.capacity,
        immovable=immovable(s, target),
        cost=lambda name: leaving_cost(s, s.models[name]),
    )
    return None if names is None else tuple(s.models[name] for name in names)


def blocked(s: State, model: Model) -> Block | None:
    """Say why a model's requests cannot even wait, or None."""
    if s.stopping:
        return Refusal.STOPPING, "llmux is stopping", RESTART
    if s.lease is not None and not s.lease.waits:
        return leased(s, s.lease)
    if model.removed:
        return removed(model)
    if model.phase in UNBLOCKED:
        return None
    return _failing(s, model) or (None if can_be_had(s, model) else obstacle(s, model))


def _failing(s: State, model: Model) -> Block | None:
    if model.phase is Phase.FAULTED and model.sleep_backoff.active(s.now):
        message = f"model {model.name!r} could not be put to sleep: {model.last_error}"
        return Refusal.FAULTED, message, model.sleep_backoff.remaining(s.now)
    if model.wake_backoff.active(s.now):
        message = f"model {model.name!r} failed to wake: {model.last_error}"
        return Refusal.BACKING_OFF, message, model.wake_backoff.remaining(s.now)
    return None


def time_left(s: State, until: float | None) -> float:
    """Return how long a pin or lease still lasts, in seconds."""
    return OPEN_END if until is None else max(0.0, until - s.now)


def removed(model: Model) -> Block:
    """Say that a model is no longer configured."""
    message = f"model {model.name!r} not found: it was removed from the configuration"
    return Refusal.UNKNOWN_MODEL, message, None


def leased(s: State, lease: Lease) -> Block:
    """Say that the GPU is lent."""
    return Refusal.LEASED, because("the GPU is leased to another job", lease.reason), time_left(s, lease.until)


def because(what: str, reason: str) -> str:
    """Return what is so, with an operator's reason if there is one."""
    return f"{what}: {reason}" if reason else what


def obstacle(s: State, model: Model) -> Block:
    """Say what is in the way of a model that cannot be had."""
    obstacles = immovable(s, model).values()
    pinned = next((other for other in obstacles if other.pinned), None)
    if pinned is not None:
        left = time_left(s, pinned.pinned_until)
        return Refusal.PINNED, because(f"model {pinned.name!r} is pinned", pinned.pin_reason), left
    worst = max(obstacles, key=lambda other: other.sleep_backoff.until)
    left = worst.sleep_backoff.remaining(s.now)
    refusal = Refusal.FAULTED if worst.phase is Phase.FAULTED else Refusal.SLEEP_FAILED
    return refusal, f"model {worst.name!r} could not be put to sleep: {worst.last_error}", left


def expected_wait(s: State, model: Model) -> float:
    """Estimate when it is worth to come back, in seconds: a switch, a service, or the end of the lease."""
    if s.lease is not None:
        return max(1.0, time_left(s, s.lease.until))
    if model.phase is Phase.AWAKE:
        return max(1.0, model.service)
    return switch_cost(s, [other for other in s.models.values() if other.holds], model)
