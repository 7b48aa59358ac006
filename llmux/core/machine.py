"""The core: events in, effects out.

Theory of operation
===================

``Core.handle(event, now)`` takes one event, changes the state, and returns what must be done. It does no I/O and
reads no clock; ``next_deadline()`` says when it wants a ``DeadlineReached`` at the latest. Whatever drives it (the
runtime with sockets and processes, a test, the simulator in virtual time) carries the effects out in order and
feeds back what came of them. Because deciding and counting are one step and nothing else touches the state, there
is no window between "is awake" and "is counted", and there are no locks. The core keeps no memory for display:
what has happened is in the effects, and a ``Timeline`` of them is kept by the driver; the figures with which a
decision is shown are looked up by an injected function, ``State.figures``, and what switches and answers take is
measured by injected ``Estimates``.

Three machines are written down as tables in ``phases``: the phase of each model, the stage of the switch under
way, the step of a teardown. A call site names a trigger; the table says what follows, and the one function that
moves does what belongs to entering and leaving.

Each event is taken in like this:

1. its handler changes the state;
2. what waits for models that have opened is let in (``admission.open_doors``);
3. while no switch is under way, the ladder of rules in ``deciding`` begins what is due next;
4. removed models are forgotten, the idle clock of the default model is watched, and llmux stops when it may.

The parts, from the bottom up:

- ``spec``, ``events``, ``effects``, ``phases``, ``policy``   the vocabulary, and the tables;
- ``model``, ``timers``, ``estimates``   the records, what is due when, and what is measured elsewhere;
- ``state``          the whole, and the few primitive changes (move a phase, start a hook, admit, reject);
- ``levels``         how deeply models sleep, as far as host memory lets them;
- ``residency``      what may be awake together, what has to leave for what, and what that costs;
- ``admission``      what is admitted, what waits or rides along, what is rejected;
- ``teardown``       how one model leaves the GPU: sleep → verify → stop → alive → what that means;
- ``health_checks``  adoption at the start, ``alive`` while awake, engines that are lost;
- ``policy_calls``   what policies see, how they are asked, and what becomes of invalid answers;
- ``switching``      one switch: drain, sleep, wake, and its three endings;
- ``commands``       what operators ask for, leases among it;
- ``deciding``       what is begun while no switch is under way;
- ``lifecycle``      the start, new configurations, the end.

At most one switch is under way at any time, its target never changes, and everything that leaves has drained
before the first sleep hook starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmux.core import admission, commands, deciding, health_checks, levels, lifecycle, switching, teardown
from llmux.core import events as ev
from llmux.core.effects import Effect
from llmux.core.model import AWAKE, READY, Model, Request
from llmux.core.phases import InvalidEventError, Phase
from llmux.core.policy import Policy
from llmux.core.policy_calls import LiveSnapshot, adopt
from llmux.core.spec import Estimates, HookKind, ModelSpec, Rules
from llmux.core.state import FIRST_COME, State
from llmux.core.timers import Timer


class Core:
    """The state machine of llmux.

    ``estimates`` measures; ``jitter`` returns numbers in [0, 1), and is the only chance in here. With ``explain``
    queued requests, phases and decisions are told.
    """

    def __init__(
        self,
        models: Iterable[ModelSpec],
        rules: Rules,
        policy: Policy,
        estimates: Estimates,
        jitter: Callable[[], float] = lambda: 0.5,
        *,
        explain: bool = True,
    ) -> None:
        self.state = State(models, rules, policy, estimates, jitter)
        self.state.explain = explain
        self.next_deadline: Callable[[], float | None] = self.state.timers.next
        """Returns when the core must be handed ``DeadlineReached``, or None. It may be in the past."""
        self._snapshot = LiveSnapshot(self.state)

    def handle(self, event: ev.Event, now: float) -> list[Effect]:
        """Take in an event and return what must be done, in order.

        Raises ``InvalidEventError`` for an event about a request or hook that is not there (nothing has changed
        then), and ``InvalidTransitionError`` for a fault of the core.
        """
        s = self.state
        if now > s.now:  # noqa: PLR1730 - with each event, and a call costs twice as much
            s.now = now
        out: list[Effect] = []
        s.out = out
        kind = event.__class__
        _HANDLERS[kind](s, event)
        if kind is ev.ConfigReplaced or kind is ev.Started:
            self._snapshot.refresh()
        if s.opened or s.turns is not FIRST_COME:
            admission.open_doors(s)
        stopping = s.lifecycle is not READY and s.stopping
        if stopping:
            switching.wind_up(s)
        if s.switch is None and (s.queued or s.maintenance_due):
            deciding.settle(s, self._snapshot)
        if s.removals and lifecycle.forget_removed(s):
            self._snapshot.refresh()
        if s.rules.default_model is not None:
            deciding.watch_idle(s)
        if stopping:
            lifecycle.finish(s)
        return out


# ---- requests


def _request(s: State, request: int) -> Request:
    try:
        return s.requests[request]
    except KeyError:
        raise InvalidEventError(f"no request {request}") from None


def _request_finished(s: State, event: ev.RequestFinished) -> None:
    request = _request(s, event.request)
    model, admitted = request.model, request.admitted
    if admitted is None:
        raise InvalidEventError(f"request {event.request} was not admitted")
    if event.keep is not None:
        model.keep = event.keep
    del model.in_flight[request.id]
    model.meter.answered(s.now, len(model.in_flight), s.now - admitted)
    _left(s, request)


def _request_abandoned(s: State, event: ev.RequestAbandoned) -> None:
    for model in s.models.values() if event.request not in s.requests else ():
        if (rider := model.riders.get(event.request)) is not None:
            admission.end_ride(s, rider, enters=False)
            return
    request = _request(s, event.request)
    if request.admitted is not None:
        _no_longer_served(s, request)
        _left(s, request)
        return
    s.unqueue(request)
    del s.requests[request.id]
    switching.waiter_left(s, request.model)


def _no_longer_served(s: State, request: Request) -> None:
    model = request.model
    del model.in_flight[request.id]
    model.meter.changed(s.now, len(model.in_flight))


def _left(s: State, request: Request) -> None:
    """A request that was in flight has ended."""
    model = request.model
    del s.requests[request.id]
    model.last_served = model.last_used = s.now
    if model.queue or model.riders:
        admission.admit_waiters(s, model)
    if not model.in_flight:
        _fell_idle(s, model)


def _fell_idle(s: State, model: Model) -> None:
    if model.phase is AWAKE and model.idle_after is not None:
        s.start_idle_clock(model)
    if s.rules.anticipate:
        s.maintenance_due = s.answer_ended = True
    if s.switch is not None:
        switching.go_on(s)
    elif model.removed or model.cleanup.owed:
        s.maintenance_due = True


def _request_returned(s: State, event: ev.RequestReturned) -> None:
    request = _request(s, event.request)
    if request.admitted is None or request.returned:
        raise InvalidEventError(f"request {event.request} cannot be returned")
    model = request.model
    _no_longer_served(s, request)
    request.admitted = None
    request.returned = True
    if model.phase is Phase.AWAKE and model.unproven is not None and not event.connected:
        health_checks.never_answered(s, model)
    else:
        health_checks.suspect(s, model, refused=True)
    block = admission.blocked(s, model)
    if block is not None:
        s.reject(request, *block)
    else:
        admission.enqueue(s, request)
        admission.timed_out(s, model)
    if model.queue:
        admission.admit_waiters(s, model)
    if not model.in_flight:
        _fell_idle(s, model)


# ---- engines and hooks


def _hook_finished(s: State, event: ev.HookFinished) -> None:
    run = s.hooks.pop(event.hook, None)
    if run is None:
        raise InvalidEventError(f"no hook {event.hook}")
    s.timers.cancel((Timer.HOOK, run.id))
    model = run.model
    if model.teardown is not None and model.teardown.hook == run.id:
        outcome = teardown.step_ended(s, model, ok=event.ok, detail=event.detail)
        if outcome is not None:
            switching.torn_down(s, model, outcome)
    elif run.kind is HookKind.WAKE:
        switching.woken(s, run, ok=event.ok, detail=event.detail)
    elif run.kind is HookKind.SLEEP:
        levels.deepened(s, run, ok=event.ok, detail=event.detail)
        switching.go_on(s)
    elif run.kind is HookKind.PREFETCH:
        model.prefetch = None
        s.maintenance_due = True  # it may have kept the model from going deeper
    else:
        model.probe.hook = None
        _probe_ended(s, model, event)


def _probe_ended(s: State, model: Model, event: ev.HookFinished) -> None:
    if model.phase is not Phase.UNKNOWN:
        health_checks.answered(s, model, ok=event.ok, detail=event.detail, last_byte=event.last_byte)
        switching.go_on(s)
    elif not s.stopping:
        health_checks.first_answer(s, model, ok=event.ok)


# ---- time


def _deadline_reached(s: State, _event: ev.DeadlineReached) -> None:
    while (key := s.timers.pop_due(s.now)) is not None:
        timer, subject = key if isinstance(key, tuple) else (key, None)
        if (act := _TIMERS.get(timer)) is not None:
            act(s, subject)
        s.maintenance_due = s.maintenance_due or timer not in _NO_MAINTENANCE


def _waiter_timed_out(s: State, name: str) -> None:
    model = s.models[name]
    admission.timed_out(s, model)
    switching.waiter_left(s, model)


# For the others the rules look for themselves whether it is time.
_TIMERS: Mapping[object, Callable[[State, Any], None]] = {
    Timer.DRAIN: lambda s, _: switching.drain_deadline(s),
    Timer.LEASE: lambda s, _: commands.end_lease(s),
    Timer.GRACE: lambda s, _: lifecycle.grace_over(s),
    Timer.DEFAULT: lambda s, _: setattr(s, "default_due", True),
    Timer.HOOK: lambda s, hook: s.kill_hook(s.hooks[hook], "timeout"),
    Timer.TIMEOUT: _waiter_timed_out,
    Timer.OVERDUE: lambda s, name: admission.watch(s, s.models[name]),
    Timer.RIDE: admission.end_ride,
    Timer.PROBE: lambda s, name: health_checks.probe(s, s.models[name]),
    Timer.VERIFY: lambda s, name: teardown.poll(s, s.models[name]),
    Timer.PIN: lambda s, name: commands.set_pin(s, s.models[name], pinned=False, until=None),
}

_NO_MAINTENANCE = frozenset({Timer.HOOK, Timer.DRAIN, Timer.GRACE})  # what comes of these does

_HANDLERS: Mapping[type, Callable[[State, Any], None]] = {
    ev.RequestArrived: admission.arrived,
    ev.RequestFinished: _request_finished,
    ev.RequestAbandoned: _request_abandoned,
    ev.RequestReturned: _request_returned,
    ev.RidesEnded: lambda s, _: admission.end_rides(s, s.models.values()),
    ev.EngineLost: lambda s, event: health_checks.suspect(s, s.models.get(event.model), refused=event.refused),
    ev.HookFinished: _hook_finished,
    ev.DeadlineReached: _deadline_reached,
    ev.Started: lifecycle.started,
    **dict.fromkeys(commands.COMMANDS, commands.carry_out),
    ev.ConfigReplaced: lifecycle.replaced,
    ev.PolicyChosen: adopt,
    ev.ShutdownRequested: lambda s, _: lifecycle.stop(s),
}
