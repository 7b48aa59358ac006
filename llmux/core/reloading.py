"""A new configuration, with nothing dropped.

A model keeps the definition under which it was woken until it is asleep again; its limits, the rules and the
policy apply at once. A switch under way keeps its plan.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmux.core import admission, commands, levels, probing, quiet, switching
from llmux.core.effects import ModelRemoved
from llmux.core.events import ConfigReplaced
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.core.spec import ModelSpec
from llmux.core.state import MODEL_TIMERS, State


def replaced(s: State, event: ConfigReplaced) -> None:
    """Take over new models, rules and policy."""
    if event.rules.manual != s.rules.manual:
        commands.set_manual(s, manual=event.rules.manual)
    s.rules = event.rules
    s.costs.guesses = event.first_guesses
    s.shadows = event.shadows
    if event.policy is not s.policy:
        s.policy = event.policy
        s.overruled.clear()
        s.last_decision = None
    s.leveled = s.leveled or any(spec.levels for spec in event.models)
    names = [spec.name for spec in event.models]
    for name, model in list(s.models.items()):
        if name not in names and not model.removed:
            _remove(s, model)
    for order, spec in enumerate(event.models):
        model = s.models.get(spec.name) or Model(spec)
        model.order = order
        if spec != model.spec:
            model.spec = spec
            commands.forget_failures(model)
            levels.redefined(model)
        model.removed = False
        s.models[spec.name] = model
    s.models = dict(sorted(s.models.items(), key=lambda item: (item[1].removed, item[1].order)))
    if s.started and not s.stopping:
        probing.ask_unknown(s)
    if s.lease is not None:
        s.lease.told = False  # what that finds may hold the GPU
    for model in s.models.values():
        _apply(s, model)
    probing.find_extras(s)
    admission.sweep(s)
    _call_off_if_unwanted(s)
    quiet.forget(s)
    s.errands = True


def _remove(s: State, model: Model) -> None:
    model.removed = s.removals = True
    model.wanted = False
    if model.pinned:
        commands.set_pin(s, model, pinned=False, until=None)
    admission.reject_waiters(s, model, admission.removed(model))


def _apply(s: State, model: Model) -> None:
    s.agenda.cancel(("timeout", model.name))
    admission.timed_out(s, model)
    if model.phase is Phase.AWAKE:
        admission.admit_waiters(s, model)
        probing.schedule(s, model)
        s.agenda.cancel(("idle", model.name))
        probing.rest(s, model)


def _call_off_if_unwanted(s: State) -> None:
    switch = s.switch
    if switch is not None and switch.target is not None:
        if switch.target.removed:
            switch.requested = False
        switching.waiter_left(s, switch.target)


def take_over(s: State, specs: Iterable[ModelSpec]) -> None:
    """Take in models that were removed while llmux did not run, and may hold the GPU."""
    for spec in specs:
        if spec.name not in s.models:
            model = s.models[spec.name] = Model(spec)
            model.order = len(s.models)
            model.removed = s.removals = True
            s.leveled = s.leveled or bool(spec.levels)


def forget_removed(s: State) -> bool:
    """Drop the removed models that are off the GPU and run no hook; return whether there were any."""
    gone = [
        m
        for m in s.models.values()
        if m.removed and m.phase is Phase.ASLEEP and not m.in_flight and m.prefetch is None
    ]
    if s.switch is not None:
        gone = [m for m in gone if m is not s.switch.target and m not in s.switch.leaving]
    gone = [model for model in gone if not levels.clear_out(s, model)]
    for model in gone:
        del s.models[model.name]
        for key in MODEL_TIMERS:
            s.agenda.cancel((key, model.name))
        s.out.append(ModelRemoved(model.name))
    s.removals = any(model.removed for model in s.models.values())
    return bool(gone)
