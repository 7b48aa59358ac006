"""Which requests are admitted, which wait, which are rejected.

Admission and counting are one step: a request is in flight from the ``Admit`` on, in the same transition.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from llmux.core import residency
from llmux.core.effects import Refusal, Reject, RequestQueued
from llmux.core.events import RequestArrived
from llmux.core.model import AWAKE, READY, Lease, Model, Request
from llmux.core.phases import InvalidEventError, Phase
from llmux.core.state import FIRST_COME, Block, State
from llmux.core.timers import Timer

# While a model is in one of these, a switch that concerns it is decided or not yet possible: nothing blocks it.
UNBLOCKED = frozenset({Phase.UNKNOWN, Phase.WAKING, Phase.AWAKE})

OPEN_END = 60.0  # seconds: when to come back for a pin or lease that has no end
RESTART = 5.0  # seconds until another llmux may be there
HELD = 10.0  # seconds after which it is asked again for what is held back


def arrived(s: State, event: RequestArrived) -> None:
    """Admit, queue or reject a request that has just arrived."""
    number = event.request
    if number in s.requests:
        raise InvalidEventError(f"request {number} arrived twice")
    model = s.models.get(event.model)
    if model is None or model.removed:
        message = f"model {event.model!r} not found"
        s.out.append(Reject(number, event.model, Refusal.UNKNOWN_MODEL, message, None, 0.0))
        return
    request = Request(number, model, s.now)
    if event.deadline is not None and (late := s.too_late(s, model, event.deadline)) is not None:
        s.reject(request, *late)
    elif event.rides and not s.stopping and not is_open(s, model):
        _ride(s, request, event.rides)
    else:
        _enter(s, request)


def _enter(s: State, request: Request) -> None:
    """Admit, queue or reject a request, which counts as one that has arrived from here on."""
    model = request.model
    model.meter.arrived(s.now)
    if model.phase is AWAKE and is_open(s, model) and (s.turns is FIRST_COME or s.turns.admits(request)):
        s.requests[request.id] = request
        s.admit(request)
        return
    block = blocked(s, model)
    if block is not None:
        s.reject(request, *block)
    elif len(model.queue) >= model.spec.max_queued:
        message = f"{len(model.queue)} requests already wait for {model.name!r}"
        s.reject(request, Refusal.QUEUE_FULL, message, expected_wait(s, model))
    else:
        s.requests[request.id] = request
        enqueue(s, request)


def _ride(s: State, request: Request, seconds: float) -> None:
    """Have a request wait beside the queue, where no rule and no policy looks for what to switch to."""
    model = request.model
    if len(model.riders) >= model.spec.max_queued:
        message = f"{len(model.riders)} requests ride along for {model.name!r} already"
        s.reject(request, Refusal.QUEUE_FULL, message, OPEN_END)
    else:
        model.riders[request.id] = request
        s.timers.set((Timer.RIDE, request), s.now + seconds)


def end_ride(s: State, request: Request, *, enters: bool = True) -> None:
    """Have a request ride along no longer: it enters as if it had just arrived, or is forgotten."""
    s.timers.cancel((Timer.RIDE, request))
    del request.model.riders[request.id]
    if enters:
        request.arrived = s.now
        _enter(s, request)


def end_rides(s: State, models: Iterable[Model]) -> None:
    """Have all that rides along for these models enter."""
    for model in models:
        for request in list(model.riders.values()):
            end_ride(s, request)


def is_open(s: State, model: Model) -> bool:
    """Whether a request for it would be admitted at once."""
    limit = model.spec.max_in_flight  # ``has_room`` in line, as it is asked twice with each request
    full = limit is not None and len(model.in_flight) >= limit
    if model.phase is not AWAKE or full or model.probe.suspected or model.queue or s.lease is not None:
        return False
    return s.lifecycle is READY or not s.stopping


def enqueue(s: State, request: Request) -> None:
    """Put a request at the place in its queue that its arrival gives it."""
    model = request.model
    model.queue[request.id] = request
    s.queued += 1
    s.queues.add(model)
    if request.returned:  # only such a one can be older than those that wait
        model.queue = OrderedDict(sorted(model.queue.items(), key=lambda item: item[1].arrived))
        watch(s, model)
    elif model.watched is None or model.watched.id not in model.queue:
        watch(s, model)
    if s.explain:
        s.out.append(RequestQueued(request.id, model.name, len(model.queue)))


def watch(s: State, model: Model) -> None:
    """Keep the deadlines of a queue: its oldest waiter's timeout, and when it is overdue."""
    oldest = model.watched = model.oldest()
    if oldest is None:
        return
    timeout = s.rules.request_timeout
    if timeout is not None:
        s.timers.set((Timer.TIMEOUT, model.name), oldest.arrived + timeout)
    overdue = s.turns.since(model) + s.rules.max_wait
    if overdue > s.now:
        s.timers.set((Timer.OVERDUE, model.name), overdue)


def timed_out(s: State, model: Model) -> None:
    """Reject the waiters whose time is up."""
    timeout = s.rules.request_timeout
    while timeout is not None and (oldest := model.oldest()) is not None and oldest.arrived + timeout <= s.now:
        s.unqueue(oldest)
        message = f"waited {s.now - oldest.arrived:.3g} s for model {model.name!r}"
        s.reject(oldest, Refusal.WAITED_TOO_LONG, message)
    watch(s, model)


def open_doors(s: State) -> None:
    """Let in what waits for models that have begun to admit in this step."""
    fair = s.turns is not FIRST_COME  # what else waits may have its turn now
    opened, s.opened = sorted({*s.opened, *s.queues}, key=lambda m: m.order) if fair else s.opened, []
    for model in opened:
        admit_waiters(s, model)


def admit_waiters(s: State, model: Model) -> None:
    """Let waiters in, one after the other, as far as there is room; then what rides along."""
    while model.queue and model.has_room and s.lease is None:
        if (request := s.turns.pick(model)) is None:
            s.timers.set(Timer.HELD, s.now + HELD)
            break
        s.unqueue(request)
        s.admit(request)
    while model.riders and is_open(s, model):
        end_ride(s, next(iter(model.riders.values())))


def reject_waiters(s: State, model: Model, block: Block) -> None:
    """Reject all that waits for a model."""
    for request in list(model.queue.values()):
        s.unqueue(request)
        s.reject(request, *block)


def sweep(s: State) -> None:
    """Reject all that waits for what cannot be had for now."""
    if s.queued:
        for model in s.models.values():
            if model.queue and (block := blocked(s, model)) is not None:
                reject_waiters(s, model, block)


def blocked(s: State, model: Model) -> Block | None:
    """Say why a model's requests cannot even wait, or None."""
    if s.now >= s.free_from and s.lease is None and s.lifecycle is READY and not model.removed:
        return None
    if s.lifecycle is not READY and s.stopping:
        return Refusal.STOPPING, "llmux is stopping", RESTART
    if s.lease is not None and not s.lease.waits:
        return leased(s, s.lease)
    if model.removed:
        return removed(model)
    return None if model.phase in UNBLOCKED else _unavailable(s, model)


def _unavailable(s: State, model: Model) -> Block | None:
    if model.phase is Phase.FAULTED and model.sleep_backoff.active(s.now):
        return Refusal.FAULTED, *_would_not_sleep(s, model)
    if model.wake_backoff.active(s.now):
        message = f"model {model.name!r} failed to wake: {model.last_error}"
        return Refusal.BACKING_OFF, message, model.wake_backoff.remaining(s.now)
    return None if residency.can_be_had(s, model) else obstacle(s, model)


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
    obstacles = residency.immovable(s, model).values()
    for other in obstacles:
        if other.pin is not None:
            left = time_left(s, other.pin.until)
            return Refusal.PINNED, because(f"model {other.name!r} is pinned", other.pin.reason), left
    worst = max(obstacles, key=lambda other: other.sleep_backoff.until)
    return Refusal.FAULTED if worst.phase is Phase.FAULTED else Refusal.SLEEP_FAILED, *_would_not_sleep(s, worst)


def _would_not_sleep(s: State, model: Model) -> tuple[str, float]:
    words = f"model {model.name!r} could not be put to sleep: {model.last_error}"
    return words, model.sleep_backoff.remaining(s.now)


def expected_wait(s: State, model: Model) -> float:
    """Estimate when it is worth to come back, in seconds: a switch, a service, or the end of the lease."""
    if s.lease is not None:
        return max(1.0, time_left(s, s.lease.until))
    if model.phase is AWAKE:
        return max(1.0, model.meter.service)
    return residency.switch_cost(s, [other for other in s.models.values() if other.holds], model)
