"""The start, new configurations, and the end.

A reload drops nothing: a model keeps the definition under which it was woken until it is asleep again; its limits,
the rules and the policy apply at once. A switch under way keeps its plan. At the end nothing new is admitted, what
runs may finish within the grace, and hooks that only begin something are ended.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmux.core import admission, commands, health_checks, levels, residency, switching
from llmux.core.effects import CancelRequests, CutReason, ModelRemoved, Refusal, Stopped
from llmux.core.events import ConfigReplaced, Started
from llmux.core.model import AWAKE, Lifecycle, Model
from llmux.core.phases import Phase
from llmux.core.spec import HookKind, ModelSpec
from llmux.core.state import FIRST_COME, State
from llmux.core.timers import Timer

ENDED_WITH_LLMUX = frozenset({HookKind.ALIVE, HookKind.VERIFY, HookKind.WAKE, HookKind.PREFETCH})

# ---- the start


def started(s: State, event: Started) -> None:
    """Look at what runs, and go on with what operators had asked for."""
    if s.stopping:
        return
    s.lifecycle = Lifecycle.STARTING
    s.maintenance_due = True
    for spec in event.gone:  # removed while llmux did not run, and may hold the GPU
        if spec.name not in s.models:
            s.models[spec.name] = Model(spec, s.estimates.meter(spec.name), len(s.models) + 1, removed=True)
            s.removals = True
            s.has_levels = s.has_levels or bool(spec.levels)
    s.by_phase.clear()
    s.recorded = event.holders & s.models.keys()
    s.recorded_levels = dict(event.levels)
    s.recent = {name: rank for rank, name in enumerate(event.recent)}
    for model in s.models.values():
        model.preload_due = model.spec.preload
    commands.resume(s, event)
    health_checks.ask_unknown(s)
    if not s.models:  # all is elsewhere
        health_checks.adopt(s)


# ---- a new configuration


def replaced(s: State, event: ConfigReplaced) -> None:
    """Take over new models, rules and policy."""
    if event.rules.manual != s.rules.manual:
        commands.set_manual(s, manual=event.rules.manual)
    s.rules = event.rules
    s.maintenance_due = True
    s.costs.guesses = event.first_guesses
    s.turns = event.turns or FIRST_COME
    if event.policy is not s.policy:
        s.policy = event.policy
        s.policy_errors.clear()
        s.last_decision = None
    _replace_models(s, event.models)
    if s.started and not s.stopping:
        health_checks.ask_unknown(s)
    if s.lease is not None:
        s.lease.told = False  # what that finds may hold the GPU
    for model in s.models.values():
        _apply(s, model)
    residency.mark_extras(s)
    if s.switch is not None:
        s.switch.outdated = True
    if s.opened:
        admission.open_doors(s)
    admission.sweep(s)
    _call_off_if_unwanted(s)
    s.is_idle = s.default_due = False  # that begins anew
    s.timers.cancel(Timer.DEFAULT)


def _replace_models(s: State, specs: Iterable[ModelSpec]) -> None:
    specs = list(specs)
    s.has_levels = s.has_levels or any(spec.levels for spec in specs)
    names = {spec.name for spec in specs}
    for name, model in list(s.models.items()):
        if name not in names and not model.removed:
            _remove(s, model)
    for order, spec in enumerate(specs):
        model = s.models.get(spec.name) or Model(spec, s.estimates.meter(spec.name))
        model.order = order
        if spec != model.spec:
            model.spec = spec
            commands.forget_failures(model)
            levels.redefined(model)
        model.removed = False
        s.models[spec.name] = model
    s.models = dict(sorted(s.models.items(), key=lambda item: (item[1].removed, item[1].order)))
    s.by_phase.clear()


def _remove(s: State, model: Model) -> None:
    model.removed = s.removals = True
    model.preload_due = False
    if model.pinned:
        commands.set_pin(s, model, pinned=False, until=None)
    admission.reject_waiters(s, model, admission.removed(model))
    admission.end_rides(s, [model])


def _apply(s: State, model: Model) -> None:
    s.timers.cancel((Timer.TIMEOUT, model.name))
    admission.timed_out(s, model)
    if model.phase is AWAKE:
        admission.admit_waiters(s, model)
        s.stop_clocks(model)
        s.schedule_probe(model)
        s.start_idle_clock(model)


def _call_off_if_unwanted(s: State) -> None:
    switch = s.switch
    if switch is not None and switch.target is not None:
        if switch.target.removed:
            switch.requested = False
        switching.waiter_left(s, switch.target)


def forget_removed(s: State) -> bool:
    """Drop the removed models that are off the GPU and run no hook; return whether there were any."""
    busy = {s.switch.target, *s.switch.leaving} if s.switch is not None else set()
    gone = [
        m
        for m in s.models.values()
        if m.removed and m.phase is Phase.ASLEEP and not m.in_flight and m.prefetch is None and m not in busy
    ]
    gone = [model for model in gone if not levels.clear_out(s, model)]
    for model in gone:
        del s.models[model.name]
        s.timers.cancel_all(model.name)
        s.out.append(ModelRemoved(model.name))
    s.by_phase.clear()
    s.removals = any(model.removed for model in s.models.values())
    return bool(gone)


# ---- the end


def stop(s: State) -> None:
    """Begin to stop."""
    if s.stopping:
        return
    s.lifecycle = Lifecycle.STOPPING
    s.maintenance_due = True
    for model in s.models.values():
        admission.reject_waiters(s, model, (Refusal.STOPPING, "llmux is stopping", admission.RESTART))
        s.timers.cancel_all(model.name)
    admission.end_rides(s, s.models.values())
    for run in list(s.hooks.values()):
        if run.kind in ENDED_WITH_LLMUX:
            s.kill_hook(run, "stopping")
    s.timers.cancel(Timer.ASK)
    s.timers.cancel(Timer.LEASE)
    s.timers.set(Timer.GRACE, s.now + s.rules.shutdown_grace)
    if s.switch is not None:
        switching.call_off(s, s.switch)


def grace_over(s: State) -> None:
    """End what still runs."""
    for model in s.models.values():
        if model.in_flight:
            s.out.append(CancelRequests(tuple(model.in_flight), model.name, CutReason.STOPPING))


def finish(s: State) -> None:
    """Say that llmux may exit, once nothing is in flight, no hook runs and nothing is left to be done."""
    busy = s.hooks or any(model.in_flight for model in s.models.values())
    if s.lifecycle is Lifecycle.STOPPING and not busy:
        s.lifecycle = Lifecycle.STOPPED
        s.timers.clear()
        s.out.append(Stopped())
