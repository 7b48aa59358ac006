"""The core: events in, effects out.

Theory of operation
===================

``Core.handle(event, now)`` takes one event, changes the state, and returns what is to be done. It does no I/O and
reads no clock; ``next_deadline()`` says when it wants a ``DeadlineReached`` at the latest. Whoever drives it (the
runtime with sockets and processes, a test, the simulator in virtual time) carries the effects out in order and
feeds back what came of them. Because deciding and counting are one step and nothing else touches the state, there
is no window between "is awake" and "is counted", and there are no locks.

Who does what, from the bottom up:

- ``model``        the records: request, model, hook run, switch;
- ``state``        the whole, and the few primitive changes (move a phase, start a hook, admit, reject);
- ``admission``    who gets in, who waits, who is turned away, who would have to leave for whom;
- ``levels``       how deeply models sleep, as far as host memory lets them;
- ``retirement``   how one model leaves the GPU: sleep → verify → stop → alive → what that means;
- ``probing``      adoption at the start, ``alive`` while awake, engines that are lost;
- ``switching``    one switch: drain, sleep, wake, and its three endings;
- ``quiet``        what comes back by itself: the default model, and what is to be kept awake;
- ``deciding``     what to begin while no switch is under way: errands, the overdue, the policy, the idle;
- ``shadows``      what other policies would have decided;
- ``decisions``, ``chronicle``, ``evictions``   what was decided last, and why;
- ``commands``, ``lending``   what operators ask for;
- ``reloading``, ``stopping``   new configurations, the end;
- ``outlook``      how long those who wait will have to;
- ``diagnosis``, ``story``   what is due and not done; what has happened, as a test that can be run.

After every event the core *settles*: while no switch is under way it begins what is due next. At most one switch
is under way at any time, its target never changes, and everything that leaves has drained before the first
sleep hook starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from llmux.core import (
    admission,
    commands,
    deciding,
    lending,
    levels,
    probing,
    quiet,
    reloading,
    retirement,
    stopping,
    switching,
)
from llmux.core.decisions import KEPT
from llmux.core.effects import Effect
from llmux.core.errors import CoreError, InvalidEventError
from llmux.core.events import (
    ActivationRequested,
    ConfigReplaced,
    DeadlineReached,
    EngineLost,
    Event,
    HookFinished,
    LeaseChanged,
    ManualChanged,
    PinChanged,
    RequestAbandoned,
    RequestArrived,
    RequestFinished,
    RequestReturned,
    ResetRequested,
    ShutdownRequested,
    SleepRequested,
    Started,
)
from llmux.core.model import Model, Request
from llmux.core.phases import Phase
from llmux.core.policy import Policy
from llmux.core.snapshot import LiveSnapshot
from llmux.core.spec import HookKind, ModelSpec, Rules
from llmux.core.state import State
from llmux.core.story import Story


class Core:
    """The state machine of llmux.

    ``jitter`` returns numbers in [0, 1); it is the only chance in here, and it is injected. The last ``decisions``
    decisions are kept, none with 0.
    """

    def __init__(
        self,
        models: Iterable[ModelSpec],
        rules: Rules,
        policy: Policy,
        jitter: Callable[[], float] = lambda: 0.5,
        *,
        decisions: int = KEPT,
    ) -> None:
        self.state = State(models, rules, policy, jitter)
        if decisions:
            self.state.decisions = deque(maxlen=decisions)
        self.story = Story()
        self._snapshot = LiveSnapshot(self.state)
        self._handlers: dict[type, Callable[[Any], None]] = {
            RequestArrived: self._request_arrived,
            RequestFinished: self._request_finished,
            RequestAbandoned: self._request_abandoned,
            RequestReturned: self._request_returned,
            HookFinished: self._hook_finished,
            EngineLost: self._engine_lost,
            DeadlineReached: self._deadline_reached,
            Started: self._started,
            ActivationRequested: lambda event: commands.wake(self.state, event),
            SleepRequested: lambda event: commands.sleep(self.state, event),
            ResetRequested: lambda event: commands.reset(self.state, event),
            PinChanged: lambda event: commands.pin(self.state, event),
            LeaseChanged: lambda event: commands.lease(self.state, event),
            ManualChanged: lambda event: commands.manual(self.state, event),
            ConfigReplaced: self._config_replaced,
            ShutdownRequested: lambda _event: stopping.requested(self.state),
        }

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in an event and return what is to be done, in order.

        Raises ``InvalidEventError`` for an event about a request or hook that is not there (nothing has changed
        then), and ``InvalidTransitionError`` for a fault of the core.
        """
        s = self.state
        s.now = max(s.now, now)
        out: list[Effect] = []
        s.out = out
        try:
            self._handlers[event.__class__](event)
            if s.stopping:
                switching.wind_up(s)
            if s.switch is None and (s.queued or s.errands):
                deciding.settle(s, self._snapshot)
            if s.removals and reloading.forget_removed(s):
                self._snapshot.refresh()
            if s.rules.default_model is not None:
                quiet.watch(s)
            if s.stopping:
                stopping.finish(s)
        except CoreError as error:
            self.story.add(s.now, event, out)
            error.story = self.story.tell()
            raise
        self.story.add(s.now, event, out)
        return out

    def next_deadline(self) -> float | None:
        """Return when the core must be handed ``DeadlineReached``, or None. It may be in the past."""
        return self.state.agenda.next()

    # ---- requests

    def _request_arrived(self, event: RequestArrived) -> None:
        admission.arrived(self.state, event)

    def _request(self, request: int) -> Request:
        try:
            return self.state.requests[request]
        except KeyError:
            raise InvalidEventError(f"no request {request}") from None

    def _request_finished(self, event: RequestFinished) -> None:
        request = self._request(event.request)
        if request.admitted is None:
            raise InvalidEventError(f"request {event.request} was not admitted")
        self._left(request)
        request.model.count_service(self.state.now - request.admitted)
        self.state.transitions.answered(request.model.name, self.state.now)

    def _request_abandoned(self, event: RequestAbandoned) -> None:
        request = self._request(event.request)
        if request.admitted is not None:
            self._left(request)
            return
        s = self.state
        s.unqueue(request)
        del s.requests[request.id]
        switching.waiter_left(s, request.model)

    def _left(self, request: Request) -> None:
        """A request in flight has ended."""
        s, model = self.state, request.model
        del s.requests[request.id]
        del model.in_flight[request.id]
        model.last_served = model.last_used = s.now
        self._made_room(model)

    def _made_room(self, model: Model) -> None:
        s = self.state
        if model.queue:
            admission.admit_waiters(s, model)
        if model.in_flight:
            return
        if model.phase is Phase.AWAKE:
            probing.rest(s, model)
        if s.rules.anticipate:
            s.errands = s.foresee = True
        if s.switch is not None:
            switching.go_on(s)
        elif model.removed or model.cleanup_owed:
            s.errands = True

    def _request_returned(self, event: RequestReturned) -> None:
        request = self._request(event.request)
        if request.admitted is None or request.returned:
            raise InvalidEventError(f"request {event.request} cannot be returned")
        s, model = self.state, request.model
        del model.in_flight[request.id]
        request.admitted = None
        request.returned = True
        if model.phase is Phase.AWAKE and model.woken_by_hook and not event.connected:
            probing.never_answered(s, model)
        else:
            probing.suspect(s, model, refused=True)
        block = admission.blocked(s, model)
        if block is not None:
            s.reject(request, *block)
        else:
            admission.enqueue(s, request)
            admission.timed_out(s, model)
        self._made_room(model)

    # ---- engines and hooks

    def _started(self, event: Started) -> None:
        s = self.state
        if s.stopping:
            return
        reloading.take_over(s, event.gone)
        s.recorded = event.holders & s.models.keys()
        s.recorded_levels = dict(event.levels)
        s.recent = {name: rank for rank, name in enumerate(event.recent)}
        for model in s.models.values():
            model.wanted = model.spec.preload
        s.errands = s.started = True
        commands.resume(s, event)
        probing.ask_unknown(s)

    def _engine_lost(self, event: EngineLost) -> None:
        model = self.state.models.get(event.model)
        if model is not None:
            probing.suspect(self.state, model, refused=event.refused)

    def _hook_finished(self, event: HookFinished) -> None:
        s = self.state
        run = s.hooks.pop(event.hook, None)
        if run is None:
            raise InvalidEventError(f"no hook {event.hook}")
        s.agenda.cancel(("hook", run.id))
        model = run.model
        if model.retirement is not None and model.retirement.hook == run.id:
            outcome = retirement.step_ended(s, model, ok=event.ok, detail=event.detail)
            if outcome is not None:
                switching.retired(s, model, outcome)
        elif run.kind is HookKind.WAKE:
            switching.woken(s, model, run.started, ok=event.ok, detail=event.detail)
        elif run.kind is HookKind.SLEEP:
            levels.deepened(s, run, ok=event.ok, detail=event.detail)
            switching.go_on(s)
        elif run.kind is HookKind.PREFETCH:
            model.prefetch = None
            s.errands = True  # it may have kept the model from going deeper
        else:
            model.probe = None
            self._probe_ended(model, event)

    def _probe_ended(self, model: Model, event: HookFinished) -> None:
        s = self.state
        if model.phase is not Phase.UNKNOWN:
            probing.answered(s, model, ok=event.ok, detail=event.detail, last_byte=event.last_byte)
            switching.go_on(s)
        elif not s.stopping:
            probing.first_answer(s, model, ok=event.ok)
            self._serve_adopted()

    def _serve_adopted(self) -> None:
        s = self.state
        for model in s.in_phase(Phase.AWAKE):
            if not model.extra:
                admission.admit_waiters(s, model)
        admission.sweep(s)

    # ---- time

    def _deadline_reached(self, _event: DeadlineReached) -> None:
        s = self.state
        while (key := s.agenda.pop_due(s.now)) is not None:
            if isinstance(key, tuple):
                self._due(*key)
            elif key == "grace":
                stopping.grace_over(s)
            elif key == "drain":
                switching.drain_deadline(s)
            elif key == "quiet":
                s.homeward = s.errands = True
            elif key == "lease":
                lending.end(s)
            else:  # ask
                s.errands = True

    def _due(self, what: str, whom: Any) -> None:
        s = self.state
        if what == "hook":
            s.kill_hook(s.hooks[whom], "timeout")
            return
        model = s.models[whom]
        if what == "timeout":
            admission.timed_out(s, model)
            switching.waiter_left(s, model)
        elif what == "overdue":
            admission.watch(s, model)
        elif what == "probe":
            probing.probe(s, model)
        elif what == "verify":
            retirement.poll(s, model)
        elif what == "pin":
            commands.set_pin(s, model, pinned=False, until=None)
        s.errands = True  # idle, backoffs: the errands look for themselves

    # ---- configuration

    def _config_replaced(self, event: ConfigReplaced) -> None:
        reloading.replaced(self.state, event)
        self._snapshot.refresh()
