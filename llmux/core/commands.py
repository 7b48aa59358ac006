"""What operators ask for: wake, sleep, reset, pin, lease, manual mode. Each gets exactly one ``Answer``.

Under a lease the whole GPU belongs to a foreign job: everything drains and goes to sleep, and nothing is woken;
requests wait for its end or are rejected. Once nothing holds the GPU any more the lease is *held*: the foreign job
may begin. It ends when it has expired, or is given back.
"""

from __future__ import annotations

import math
from dataclasses import replace

from llmux.core import admission, placement, switching
from llmux.core.effects import Answer, LeaseHeld, LeaseSet, ManualSet, ModelReset, PinSet
from llmux.core.events import (
    ActivationRequested,
    LeaseChanged,
    ManualChanged,
    PinChanged,
    ResetRequested,
    SleepRequested,
    Started,
)
from llmux.core.model import Lease, Model, Pin, Reason
from llmux.core.phases import Phase, Trigger
from llmux.core.state import State
from llmux.core.timers import Timer

LOOKING = "llmux is still looking at what runs"


def wake(s: State, event: ActivationRequested) -> None:
    """Wake a model whether or not a request waits for it."""
    model = _target(s, event.model, event.ticket)
    if model is None:
        return
    if s.lease is not None:
        _refuse(s, event.ticket, admission.leased(s, s.lease)[1])
    elif s.switch is not None:
        if s.switch.target is model and not s.switch.error:
            s.switch.requested = True
            s.switch.cause, s.switch.reason = Reason.REQUESTED, Reason.REQUESTED.value
            _accept(s, event.ticket, s.switch.id)
        else:
            _refuse_busy(s, event.ticket)
    elif model.phase is Phase.AWAKE:
        _accept(s, event.ticket, None)
    else:
        leaving = placement.who_leaves(s, model)
        if leaving is None:
            _refuse(s, event.ticket, admission.obstacle(s, model)[1])
            return
        # An operator knows why to try again: the backoff of this model does not hold.
        switching.begin(s, model, leaving, Reason.REQUESTED, requested=True)
        _accept(s, event.ticket, _switch_id(s))


def sleep(s: State, event: SleepRequested) -> None:
    """Put a model to sleep once it has drained."""
    model = _target(s, event.model, event.ticket)
    if model is None:
        return
    if model.pin is not None:
        _refuse(s, event.ticket, admission.because(f"model {model.name!r} is pinned", model.pin.reason))
    elif s.switch is not None:
        if model in s.switch.leaving:
            _accept(s, event.ticket, s.switch.id)
        else:
            _refuse_busy(s, event.ticket)
    elif model.phase in (Phase.ASLEEP, Phase.DEEPENING):
        model.put_away = True
        _accept(s, event.ticket, None)
    else:
        switching.begin(s, None, (model,), Reason.REQUESTED, requested=True)
        _accept(s, event.ticket, _switch_id(s))


def reset(s: State, event: ResetRequested) -> None:
    """Forget a model's failures: the operator has repaired it by hand."""
    model = _target(s, event.model, event.ticket)
    if model is None:
        return
    if s.switch is not None and (model is s.switch.target or model in s.switch.leaving):
        _refuse_busy(s, event.ticket)
        return
    if model.phase is Phase.LOST and model.in_flight:
        _refuse(s, event.ticket, f"{len(model.in_flight)} requests of {model.name!r} have not ended yet")
        return
    forget_failures(model)
    if model.phase in (Phase.LOST, Phase.FAULTED):
        s.move(model, Trigger.RESET)
    s.maintenance_due = True
    s.out.append(ModelReset(model.name))
    _accept(s, event.ticket, None)


def forget_failures(model: Model) -> None:
    """Clear both backoffs, and the errors that led there."""
    model.wake_backoff.clear()
    model.sleep_backoff.clear()
    model.probe.missed = 0
    model.last_error = ""


def pin(s: State, event: PinChanged) -> None:
    """Keep a model awake, or let it go again."""
    model = _target(s, event.model, event.ticket)
    if model is None:
        return
    rivals = _pinned_rivals(s, model) if event.pinned else ""
    if rivals:
        _refuse(s, event.ticket, f"{rivals} pinned and may not be awake with it")
        return
    set_pin(s, model, pinned=event.pinned, until=event.until, reason=event.reason)
    if event.pinned and s.switch is None and s.lease is None and model.phase is not Phase.AWAKE:
        leaving = None if admission.blocked(s, model) else placement.who_leaves(s, model)
        if leaving is not None:
            switching.begin(s, model, leaving, Reason.PINNED, requested=True)
    switch = s.switch.id if s.switch is not None and s.switch.target is model else None
    _accept(s, event.ticket, switch)


def set_pin(s: State, model: Model, *, pinned: bool, until: float | None, reason: str = "") -> None:
    """Set or clear a pin, and reject what it excludes."""
    model.pin = Pin(until, reason) if pinned else None
    s.movable_from = max(math.inf if other.pinned else other.sleep_backoff.until for other in s.models.values())
    if pinned and until is not None:
        s.timers.set((Timer.PIN, model.name), until)
    else:
        s.timers.cancel((Timer.PIN, model.name))
    s.maintenance_due = True
    s.out.append(PinSet(model.name, pinned, until if pinned else None, reason))
    admission.sweep(s)
    switch = s.switch
    if switch is None:
        return
    if pinned and model in switch.leaving and model is not switch.target and s.lease is None:
        switching.call_off(s, switch)
    elif switch.target is not None:
        if switch.target is model and switch.cause is Reason.PINNED:
            switch.requested = pinned
        switching.waiter_left(s, switch.target)


def lease(s: State, event: LeaseChanged) -> None:
    """Lend the whole GPU, renew the lease, or take the GPU back."""
    complaint = _not_now(s) or _not_theirs(s.lease, event)
    if complaint:
        _refuse(s, event.ticket, complaint)
        return
    if event.leased:
        _grant(s, event)
        leaving = tuple(s.in_phase(Phase.AWAKE, Phase.LOST, Phase.FAULTED))
        if s.switch is None and leaving:
            switching.begin(s, None, leaving, Reason.LEASE)
    else:
        end_lease(s)
    _accept(s, event.ticket, _switch_id(s))


def _not_theirs(current: Lease | None, event: LeaseChanged) -> str:
    if current is None:
        return "" if event.leased and not event.renew else "the GPU is not leased"
    if event.id == current.id or not (event.leased or event.id):
        return ""
    return admission.because("the GPU is leased to another job", current.reason)


def _grant(s: State, event: LeaseChanged) -> None:
    """Begin a lease, or renew the one that is there: what is not said stays as it was."""
    lease = s.lease or Lease(None, waits=s.rules.lease_waits, id=event.id, since=s.now)
    lease.until = event.until
    lease.reason = event.reason or lease.reason
    if event.waits is not None:
        lease.waits = event.waits
    _begin_lease(s, lease)


def _begin_lease(s: State, lease: Lease) -> None:
    s.lease = lease
    if lease.until is not None:
        s.timers.set(Timer.LEASE, lease.until)
    else:
        s.timers.cancel(Timer.LEASE)
    s.maintenance_due = True
    s.out.append(LeaseSet(True, lease.until, lease.reason, lease.waits))
    if not lease.waits:
        for model in s.models.values():
            admission.reject_waiters(s, model, admission.leased(s, lease))
    if s.switch is not None and s.switch.target is not None:
        s.switch.requested = False
        switching.call_off(s, s.switch)


def end_lease(s: State) -> None:
    """Take the GPU back."""
    s.lease = None
    s.timers.cancel(Timer.LEASE)
    s.maintenance_due = True
    s.out.append(LeaseSet(False, None))
    for model in s.models.values():
        admission.admit_waiters(s, model)
    if s.switch is not None and s.switch.cause is Reason.LEASE:
        switching.call_off(s, s.switch)


def lease_held(s: State) -> bool:
    """Whether there is a lease and nothing holds the GPU: the foreign job has it."""
    return s.lease is not None and not any(model.holds for model in s.models.values())


def tell_lease_held(s: State) -> None:
    """Say, once, that the foreign job may begin."""
    if s.lease is not None and not s.lease.told and lease_held(s):
        s.lease.told = True
        s.out.append(LeaseHeld(s.now - s.lease.since))


def manual(s: State, event: ManualChanged) -> None:
    """Leave all switching to operators, or to the policy again."""
    complaint = _not_now(s)
    if complaint:
        _refuse(s, event.ticket, complaint)
        return
    set_manual(s, manual=event.manual)
    _accept(s, event.ticket, _switch_id(s))


def set_manual(s: State, *, manual: bool) -> None:
    """Begin or end the manual mode. A switch under way goes on."""
    if s.manual != manual:
        s.manual = manual
        s.maintenance_due = True
        s.out.append(ManualSet(manual))


def resume(s: State, event: Started) -> None:
    """Go on with what operators had asked of the last llmux, as far as it still holds and can be."""
    if event.manual is not None:
        set_manual(s, manual=event.manual)
    for name, kept in event.pins.items():
        model = s.models.get(name)
        if model is None or model.removed or (kept.until is not None and kept.until <= s.now):
            continue
        rivals = _pinned_rivals(s, model)  # the configuration may have changed
        reason = f"{rivals} pinned and may not be awake with it" if rivals else kept.reason
        set_pin(s, model, pinned=not rivals, until=kept.until, reason=reason)
    if event.lease is not None and (event.lease.until is None or event.lease.until > s.now):
        _begin_lease(s, replace(event.lease, told=False))


def _pinned_rivals(s: State, model: Model) -> str:
    """Name the pinned models that leave no room for one more pinned, if they do."""
    pinned = [other for other in s.models.values() if other.pinned and other is not model]
    if not pinned or placement.fits([model.spec, *(other.running for other in pinned)], s.rules.capacity):
        return ""
    names = ", ".join(repr(other.name) for other in pinned)
    return f"model {names} is" if len(pinned) == 1 else f"models {names} are"


def _target(s: State, name: str, ticket: int) -> Model | None:
    model = s.models.get(name)
    if model is None or model.removed:
        _refuse(s, ticket, f"model {name!r} not found")
    elif s.stopping:
        _refuse(s, ticket, "llmux is stopping")
    elif not s.ready or any(s.in_phase(Phase.UNKNOWN)):
        _refuse(s, ticket, LOOKING)
    else:
        return model
    return None


def _not_now(s: State) -> str:
    if s.stopping:
        return "llmux is stopping"
    return "" if s.started else LOOKING


def _switch_id(s: State) -> int | None:
    return s.switch.id if s.switch is not None else None


def _accept(s: State, ticket: int, switch: int | None) -> None:
    s.out.append(Answer(ticket, accepted=True, switch=switch))


def _refuse(s: State, ticket: int, reason: str) -> None:
    s.out.append(Answer(ticket, accepted=False, reason=reason))


def _refuse_busy(s: State, ticket: int) -> None:
    switch = s.switch
    assert switch is not None
    to = f"to {switch.target.name!r}" if switch.target else "to sleep"
    reason = f"switch {switch.id} {to} is under way"
    s.out.append(Answer(ticket, accepted=False, switch=switch.id, reason=reason))
