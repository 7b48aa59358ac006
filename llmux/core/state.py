"""The state of the core, the few ways to change it that all its parts share, and what belongs to each phase."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping

from llmux.core import effects as fx
from llmux.core.effects import Effect
from llmux.core.model import AWAKE, ENDING, READY, Cleanup, HookRun, Lease, Lifecycle, Model, Request, Switch
from llmux.core.phases import HOLDING, PHASES, Phase, Trigger, following
from llmux.core.policy import Policy
from llmux.core.spec import Estimates, HookKind, ModelSpec, Rules
from llmux.core.timers import Timer, Timers

Block = tuple[fx.Refusal, str, float | None]
"""Why requests are rejected, in words, and in how many seconds they may come back."""

KNOWN_TO_HOLD = HOLDING - {Phase.UNKNOWN}


class Turns:
    """Whose turn it is: here that of what came first. What is fair in another way overrides it."""

    def admits(self, _request: Request) -> bool:
        """Say whether a request that has just arrived is let in where there is room."""
        return True

    def pick(self, model: Model) -> Request | None:
        """Return which of a model's waiters is let in next; None: all are held back."""
        return next(iter(model.queue.values()))

    def since(self, model: Model) -> float:
        """Return when the waiter came of those of a model that ``max_wait`` goes by."""
        return next(iter(model.queue.values())).arrived


FIRST_COME = Turns()


class State:
    """Everything the core knows. Only ``Core.handle`` and what it calls change it."""

    def __init__(
        self,
        models: Iterable[ModelSpec],
        rules: Rules,
        policy: Policy,
        estimates: Estimates,
        jitter: Callable[[], float],
    ) -> None:
        self.now = 0.0
        self.out: list[Effect] = []
        self.lifecycle = Lifecycle.CREATED
        self.rules = rules
        self.policy = policy
        self.jitter = jitter
        self.estimates, self.costs = estimates, estimates.costs
        self.models = {
            spec.name: Model(spec, estimates.meter(spec.name), order) for order, spec in enumerate(models)
        }
        self.requests: dict[int, Request] = {}
        self.hooks: dict[int, HookRun] = {}
        self.timers = Timers()
        self.switch: Switch | None = None
        self.lease: Lease | None = None
        self.manual = rules.manual  # operators alone switch
        # Counted and kept, as every event asks for them.
        self.queued = 0  # over all models
        self.queues: set[Model] = set()  # those that have waiters
        self.by_phase: dict[tuple[Phase, ...], list[Model]] = {}  # what was asked for; empty once one has moved
        self.has_levels = any(model.spec.levels for model in self.models.values())
        self.free_from = -math.inf  # no model is pinned, or in a backoff, from then on
        self.removals = False  # a removed model has not been forgotten yet
        # What is looked at once the event has been taken in.
        self.maintenance_due = False  # something may have to be done that no waiter asks for
        self.answer_ended = False  # the policy may be asked which model is likely to be next
        self.opened: list[Model] = []  # models that admit again
        self.is_idle = False  # nothing is served or waits, and there is a default model
        self.default_due = False  # that is so for long enough
        # What was found at the start.
        self.recorded: frozenset[str] = frozenset()
        self.recorded_levels: dict[str, str] = {}
        self.recent: dict[str, int] = {}  # rank of last use before the start, 0 is the most recent
        # What the policies were asked and have said.
        self.policy_errors: set[str] = set()  # kinds that this policy was already reported for
        self.last_decision: tuple[str, str | None] | None = None  # that was told, since the last switch began
        self.explain = True  # whether queued requests, phases and decisions are told
        self.figures: Callable[[State], object] = lambda _: ()  # what a decision is told with
        self.turns = FIRST_COME
        self.too_late: Callable[[State, Model, float], Block | None] = lambda *_: None  # says what is
        self.last_told: tuple[fx.Kind, str | None, fx.By] | None = None  # of these; None: a switch came of it
        self.hook_ids, self.switch_ids = itertools.count(1), itertools.count(1)

    # ---- the lifecycle

    @property
    def started(self) -> bool:
        """Whether ``Started`` has come."""
        return self.lifecycle is not Lifecycle.CREATED

    @property
    def stopping(self) -> bool:
        """Whether it is stopping, or has."""
        return self.lifecycle in ENDING

    @property
    def ready(self) -> bool:
        """Whether every model's first ``alive`` had ended at some time."""
        return self.lifecycle is READY or (self.stopping and not self.in_phase(Phase.UNKNOWN))

    # ---- phases

    def move(self, model: Model, trigger: Trigger) -> None:
        """Bring the model into the phase that the table says follows, and do what belongs to entering it."""
        source = model.phase
        target, why = following(PHASES, model.name, source, trigger)
        if source is AWAKE:
            self.stop_clocks(model)
        model.phase = target
        self.by_phase.clear()
        self.maintenance_due = True
        if self.explain:
            self.out.append(fx.PhaseChanged(model.name, source, target, why))
        enter = _ON_ENTER.get(target)
        if enter is not None:
            enter(self, model, trigger)

    def record_holders(self) -> None:
        """Have the holders written down if they changed."""
        holders = frozenset([name for name, model in self.models.items() if model.phase in KNOWN_TO_HOLD])
        if holders != self.recorded:
            self.recorded = holders
            self.out.append(fx.RecordHolders(holders))

    def in_phase(self, *phases: Phase) -> list[Model]:
        """Return the models in one of these phases, in the order of the configuration; not to be changed."""
        found = self.by_phase.get(phases)
        if found is None:
            found = self.by_phase[phases] = [model for model in self.models.values() if model.phase in phases]
        return found

    # ---- clocks of a model that is awake

    def schedule_probe(self, model: Model) -> None:
        """Set when ``alive`` is asked next."""
        probes = self.rules.alive_every > 0 and not self.stopping
        self.timers.set((Timer.PROBE, model.name), self.now + self.rules.alive_every if probes else None)

    def start_idle_clock(self, model: Model) -> None:
        """Start it if the model may sleep after a while without requests."""
        if model.idle_after is not None and model.idle and not self.stopping:
            self.timers.set((Timer.IDLE, model.name), self.now + model.idle_after)

    def stop_clocks(self, model: Model) -> None:
        """Ask ``alive`` no more, nor count idle time."""
        self.timers.cancel((Timer.IDLE, model.name))
        self.timers.cancel((Timer.PROBE, model.name))

    def back_off(self, model: Model, kind: HookKind, error: str) -> None:
        """Leave a model alone for a while whose wake or sleep has failed."""
        backoff, timer = model.sleep_backoff, Timer.SLEEP_BACKOFF
        if kind is HookKind.WAKE:
            backoff, timer = model.wake_backoff, Timer.WAKE_BACKOFF
        model.last_error = error
        seconds = backoff.fail(self.now, self.rules.backoff_first, self.rules.backoff_max, self.jitter)
        self.free_from = max(self.free_from, backoff.until)
        self.timers.set((timer, model.name), backoff.until)
        self.out.append(fx.BackoffStarted(model.name, kind, backoff.failures, seconds, error))

    # ---- hooks

    def run_hook(self, model: Model, kind: HookKind, deadline: float | None = None) -> int:
        """Start a hook and return its id. It is ended at ``deadline``, by default after its timeout."""
        hook = next(self.hook_ids)
        if deadline is None:
            deadline = self.now + model.running.timeouts[kind]
        self.hooks[hook] = HookRun(hook, model, kind, self.now, deadline)
        self.timers.set((Timer.HOOK, hook), deadline)
        level = model.deepening or model.level if kind is not HookKind.ALIVE else None
        name = level.name if level else ""
        switch, definition = self.switch, model.running.definition
        if switch is not None and (model is switch.target or model in switch.leaving):
            effect = fx.RunHook(
                hook, model.name, kind, definition, switch.id, switch.sources, switch.to or "", name
            )
        else:
            effect = fx.RunHook(hook, model.name, kind, definition, level=name)
        self.out.append(effect)
        return hook

    def kill_hook(self, run: HookRun, reason: str) -> None:
        """End a hook, once."""
        if not run.killed:
            run.killed = True
            self.out.append(fx.KillHook(run.id, reason))

    # ---- requests

    def admit(self, request: Request) -> None:
        """Let a request, which is in no queue, through to its engine: it counts from here on."""
        model, now = request.model, self.now
        request.admitted = now
        model.in_flight[request.id] = request
        model.admissions += 1
        model.meter.changed(now, len(model.in_flight))
        definition = (model.woken or model.spec).definition
        waited = now - request.arrived
        self.out.append(fx.Admit(request.id, model.name, definition, model.epoch, request.returned, waited))

    def unqueue(self, request: Request) -> None:
        """Take a request out of its queue."""
        del request.model.queue[request.id]
        self.queued -= 1
        if not request.model.queue:
            self.queues.discard(request.model)
            if request.model.riders:  # there may be room: what waited may have been held back
                self.opened.append(request.model)

    def reject(
        self, request: Request, refusal: fx.Refusal, message: str, retry_after: float | None = None
    ) -> None:
        """Reject a request that is in no queue."""
        self.requests.pop(request.id, None)
        waited = self.now - request.arrived
        self.out.append(fx.Reject(request.id, request.model.name, refusal, message, retry_after, waited))


# ---- what belongs to entering a phase. Leaving AWAKE, whatever for, stops its clocks.


def _enter_awake(s: State, model: Model, trigger: Trigger) -> None:
    """Start its clocks, and let in what waits; after a drain that was called off it only goes on."""
    if trigger is not Trigger.REOPEN:
        model.level = None
        model.awake_since = s.now
        model.probe.trust()
        model.cleanup = Cleanup()
        if trigger is not Trigger.STILL_RUNS:  # another engine
            model.epoch += 1
            model.admissions = 0
            model.unproven = None
            model.last_used = s.now
        switch = s.switch.id if s.switch is not None else 0
        if s.switch is not None and trigger is Trigger.WOKEN:
            notice = fx.ModelActivated(model.name, switch, s.switch.sources, s.now - s.switch.started)
        else:
            notice = fx.ModelActivated(model.name, switch if trigger is not Trigger.ADOPT else 0, (), None)
        s.out.append(notice)
    s.schedule_probe(model)
    s.start_idle_clock(model)
    if trigger is not Trigger.ADOPT:  # which of these may stay is seen once all are there
        s.opened.append(model)


def _enter_waking(s: State, model: Model, _trigger: Trigger) -> None:
    assert s.switch is not None
    model.woken, model.keep = s.switch.spec, None
    model.sleep_backoff.clear()  # of a try to put it deeper
    s.record_holders()
    s.run_hook(model, HookKind.WAKE)


def _enter_lost(s: State, model: Model, _trigger: Trigger) -> None:
    _no_longer_awake(s, model)
    model.level = None
    model.probe.suspected = False


def _enter_faulted(s: State, model: Model, _trigger: Trigger) -> None:
    teardown = model.teardown
    assert teardown is not None
    model.cleanup.owed = False
    # A later try knows no more about the engine than this one did: what was a cleanup stays one.
    model.cleanup.again = teardown.cleanup
    s.out.append(fx.ModelFaulted(model.name, teardown.error))


def _enter_asleep(s: State, model: Model, trigger: Trigger) -> None:
    """Forget what belonged to the engine that is gone."""
    if trigger is Trigger.DEEPENED:
        return
    model.woken = model.level = model.awake_since = None
    model.extra = False
    model.sleep_backoff.clear()
    model.cleanup = Cleanup()
    model.probe.trust()
    if trigger is not Trigger.NOT_ALIVE:  # at the start all are written down at once
        s.record_holders()


def _no_longer_awake(s: State, model: Model) -> None:
    if model.awake_since is not None:
        s.out.append(fx.ModelDeactivated(model.name, s.now - model.awake_since))
        model.awake_since = None


_ON_ENTER: Mapping[Phase, Callable[[State, Model, Trigger], object]] = {
    AWAKE: _enter_awake,
    Phase.WAKING: _enter_waking,
    Phase.DEEPENING: lambda s, model, _: s.run_hook(model, HookKind.SLEEP),
    Phase.SLEEPING: lambda s, model, _: _no_longer_awake(s, model),
    Phase.LOST: _enter_lost,
    Phase.FAULTED: _enter_faulted,
    Phase.ASLEEP: _enter_asleep,
}
