"""The whole GPU, lent to a foreign job.

Under a lease everything drains and goes to sleep, and nothing is woken; requests wait for its end or are turned
away. Once nothing holds the GPU any more the lease is *held*: the foreign job may begin. It ends when it has
expired, or is given back.
"""

from __future__ import annotations

from dataclasses import replace

from llmux.core import admission, switching
from llmux.core.effects import LeaseHeld, LeaseSet
from llmux.core.events import LeaseChanged
from llmux.core.model import Lease
from llmux.core.state import State


def grant(s: State, event: LeaseChanged) -> None:
    """Begin a lease, or renew the one that is there: what is not said stays as it was."""
    lease = s.lease or Lease(None, waits=s.rules.lease_waits, id=event.id, since=s.now)
    lease.until = event.until
    lease.reason = event.reason or lease.reason
    if event.waits is not None:
        lease.waits = event.waits
    _begin(s, lease)


def resume(s: State, lease: Lease) -> None:
    """Go on with a lease that the last llmux had granted."""
    _begin(s, replace(lease, told=False))


def _begin(s: State, lease: Lease) -> None:
    s.lease = lease
    if lease.until is not None:
        s.agenda.set("lease", lease.until)
    else:
        s.agenda.cancel("lease")
    s.errands = True
    s.out.append(LeaseSet(True, lease.until, lease.reason, lease.waits))
    if not lease.waits:
        for model in s.models.values():
            admission.reject_waiters(s, model, admission.leased(s, lease))
    if s.switch is not None and s.switch.target is not None:
        s.switch.requested = False
        switching.call_off(s, s.switch)


def end(s: State) -> None:
    """Take the GPU back."""
    s.lease = None
    s.agenda.cancel("lease")
    s.errands = True
    s.out.append(LeaseSet(False, None))
    for model in s.models.values():
        admission.admit_waiters(s, model)
    if s.switch is not None and s.switch.reason == "lease":
        switching.call_off(s, s.switch)


def held(s: State) -> bool:
    """Whether there is a lease and nothing holds the GPU: the foreign job has it."""
    return s.lease is not None and not any(model.holds for model in s.models.values())


def look(s: State) -> None:
    """Say, once, that the foreign job may begin."""
    if s.lease is not None and not s.lease.told and held(s):
        s.lease.told = True
        s.out.append(LeaseHeld(s.now - s.lease.since))
