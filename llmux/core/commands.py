"""What operators ask for: wake, sleep, reset, pin, lease, manual mode. Each gets exactly one ``Answer``.

Under a lease the whole GPU belongs to a foreign job: everything drains and goes to sleep, and nothing is woken;
requests wait for its end or are rejected. Once nothing holds the GPU any more the lease is *held*: the foreign job
may begin. It ends when it has expired, or is given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmux.core import admission, residency, switching
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.model import AWAKE, Lease, Model, Pin, Reason, Switch
from llmux.core.phases import Phase, Trigger
from llmux.core.state import State
from llmux.core.timers import Timer

LOOKING = "llmux is still looking at what runs"


class RefusedError(Exception):
    """A command is refused, for this reason; nothing has changed."""

    def __init__(self, reason: str, switch: int | None = None) -> None:
        super().__init__(reason)
        self.switch = switch  # the one that is in the way


def carry_out(s: State, event: Any) -> None:
    """Carry out an operator's command, and answer it."""
    try:
        switch = COMMANDS[event.__class__](s, event)
    except RefusedError as refused:
        answer = fx.Answer(event.ticket, accepted=False, switch=refused.switch, reason=str(refused))
    else:
        answer = fx.Answer(event.ticket, accepted=True, switch=None if switch is None else switch.id)
    s.out.append(answer)


def _wake(s: State, event: ev.ActivationRequested) -> Switch | None:
    model, switch = _target(s, event.model), s.switch
    if s.lease is not None:
        raise RefusedError(admission.leased(s, s.lease)[1])
    if switch is not None:
        if switch.target is not model or switch.error:
            raise _busy(switch)
        switch.requested = True
        switch.cause, switch.reason = Reason.REQUESTED, Reason.REQUESTED.value
    elif model.phase is not AWAKE:
        leaving = residency.who_leaves(s, model)
        if leaving is None:
            raise RefusedError(admission.obstacle(s, model)[1])
        # An operator knows why to try again: the backoff of this model does not hold.
        switching.begin(s, model, leaving, Reason.REQUESTED, requested=True)
    return s.switch


def _sleep(s: State, event: ev.SleepRequested) -> Switch | None:
    model = _target(s, event.model)
    if model.pin is not None:
        raise RefusedError(admission.because(f"model {model.name!r} is pinned", model.pin.reason))
    if s.switch is not None:
        if model not in s.switch.leaving:
            raise _busy(s.switch)
    elif model.phase in (Phase.ASLEEP, Phase.DEEPENING):
        model.put_away = True
    else:
        switching.begin(s, None, (model,), Reason.REQUESTED, requested=True)
    return s.switch


def _reset(s: State, event: ev.ResetRequested) -> None:
    model = _target(s, event.model)
    if s.switch is not None and (model is s.switch.target or model in s.switch.leaving):
        raise _busy(s.switch)
    if model.phase is Phase.LOST and model.in_flight:
        raise RefusedError(f"{len(model.in_flight)} requests of {model.name!r} have not ended yet")
    forget_failures(model)
    if model.phase in (Phase.LOST, Phase.FAULTED):
        s.move(model, Trigger.RESET)
    s.maintenance_due = True
    s.out.append(fx.ModelReset(model.name))


def forget_failures(model: Model) -> None:
    """Clear both backoffs, and the errors that led there."""
    model.wake_backoff.clear()
    model.sleep_backoff.clear()
    model.probe.missed = 0
    model.last_error = ""


def _pin(s: State, event: ev.PinChanged) -> Switch | None:
    model = _target(s, event.model)
    if event.pinned and (rivals := _pinned_rivals(s, model)):
        raise RefusedError(rivals)
    set_pin(s, model, pinned=event.pinned, until=event.until, reason=event.reason)
    if event.pinned and s.switch is None and s.lease is None and model.phase is not AWAKE:
        leaving = None if admission.blocked(s, model) else residency.who_leaves(s, model)
        if leaving is not None:
            switching.begin(s, model, leaving, Reason.PINNED, requested=True)
    return s.switch if s.switch is not None and s.switch.target is model else None


def set_pin(s: State, model: Model, *, pinned: bool, until: float | None, reason: str = "") -> None:
    """Set or clear a pin, and reject what it excludes."""
    model.pin = Pin(until, reason) if pinned else None
    s.free_from = max(
        math.inf if other.pinned else max(other.wake_backoff.until, other.sleep_backoff.until)
        for other in s.models.values()
    )
    until = until if pinned else None
    s.timers.set((Timer.PIN, model.name), until)
    s.maintenance_due = True
    s.out.append(fx.PinSet(model.name, pinned, until, reason))
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


def _lease(s: State, event: ev.LeaseChanged) -> Switch | None:
    _looked(s)
    if s.lease is None:
        if event.renew or not event.leased:
            raise RefusedError("the GPU is not leased")
    elif event.id != s.lease.id and (event.leased or event.id):
        raise RefusedError(admission.because("the GPU is leased to another job", s.lease.reason))
    if event.leased:
        _grant(s, event)
        leaving = tuple(s.in_phase(AWAKE, Phase.LOST, Phase.FAULTED))
        if s.switch is None and leaving:
            switching.begin(s, None, leaving, Reason.LEASE)
    else:
        end_lease(s)
    return s.switch


def _grant(s: State, event: ev.LeaseChanged) -> None:
    """Begin a lease, or renew the one that is there: what is not said stays as it was."""
    lease = s.lease or Lease(None, waits=s.rules.lease_waits, id=event.id, since=s.now)
    lease.until = event.until
    lease.reason = event.reason or lease.reason
    if event.waits is not None:
        lease.waits = event.waits
    _begin_lease(s, lease)


def _begin_lease(s: State, lease: Lease) -> None:
    s.lease = lease
    s.timers.set(Timer.LEASE, lease.until)
    s.maintenance_due = True
    s.out.append(fx.LeaseSet(True, lease.until, lease.reason, lease.waits))
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
    s.out.append(fx.LeaseSet(False, None))
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
        s.out.append(fx.LeaseHeld(s.now - s.lease.since))


def _manual(s: State, event: ev.ManualChanged) -> Switch | None:
    _looked(s)
    set_manual(s, manual=event.manual)
    return s.switch


def set_manual(s: State, *, manual: bool) -> None:
    """Begin or end the manual mode. A switch under way goes on."""
    if s.manual != manual:
        s.manual = manual
        s.maintenance_due = True
        s.out.append(fx.ManualSet(manual))


def resume(s: State, event: ev.Started) -> None:
    """Go on with what operators had asked of the last llmux, as far as it still holds and can be."""
    if event.manual is not None:
        set_manual(s, manual=event.manual)
    for name, kept in event.pins.items():
        model = s.models.get(name)
        if model is None or model.removed or (kept.until is not None and kept.until <= s.now):
            continue
        rivals = _pinned_rivals(s, model)  # the configuration may have changed
        set_pin(s, model, pinned=not rivals, until=kept.until, reason=rivals or kept.reason)
    if event.lease is not None and (event.lease.until is None or event.lease.until > s.now):
        _begin_lease(s, replace(event.lease, told=False))


def _pinned_rivals(s: State, model: Model) -> str:
    """Say which pinned models leave no room for one more pinned, if they do."""
    pinned = [other for other in s.models.values() if other.pinned and other is not model]
    if not pinned or residency.fits([model.spec, *(other.running for other in pinned)], s.rules.capacity):
        return ""
    names = ", ".join(repr(other.name) for other in pinned)
    are = f"model {names} is" if len(pinned) == 1 else f"models {names} are"
    return f"{are} pinned and may not be awake with it"


def _target(s: State, name: str) -> Model:
    model = s.models.get(name)
    if model is None or model.removed:
        raise RefusedError(f"model {name!r} not found")
    _looked(s)
    if not s.ready or s.in_phase(Phase.UNKNOWN):
        raise RefusedError(LOOKING)
    return model


def _looked(s: State) -> None:
    if s.stopping:
        raise RefusedError("llmux is stopping")
    if not s.started:
        raise RefusedError(LOOKING)


def _busy(switch: Switch) -> RefusedError:
    to = f"to {switch.target.name!r}" if switch.target else "to sleep"
    return RefusedError(f"switch {switch.id} {to} is under way", switch.id)


COMMANDS: Mapping[type, Callable[[State, Any], Switch | None]] = {
    ev.ActivationRequested: _wake,
    ev.SleepRequested: _sleep,
    ev.ResetRequested: _reset,
    ev.PinChanged: _pin,
    ev.LeaseChanged: _lease,
    ev.ManualChanged: _manual,
}
