"""The end: nothing new is admitted, what runs may finish within the grace, hooks that only begin are ended."""

from __future__ import annotations

from llmux.core import admission, switching
from llmux.core.effects import CancelRequests, CutReason, Refusal, Stopped
from llmux.core.spec import HookKind
from llmux.core.state import MODEL_TIMERS, State

ENDED = frozenset({HookKind.ALIVE, HookKind.VERIFY, HookKind.WAKE, HookKind.PREFETCH})


def requested(s: State) -> None:
    """Begin to stop."""
    if s.stopping:
        return
    s.stopping = True
    s.errands = True
    for model in s.models.values():
        admission.reject_waiters(s, model, (Refusal.STOPPING, "llmux is stopping", admission.RESTART))
        for timer in MODEL_TIMERS:
            s.agenda.cancel((timer, model.name))
    for run in list(s.hooks.values()):
        if run.kind in ENDED:
            s.kill_hook(run, "stopping")
    s.agenda.cancel("ask")
    s.agenda.cancel("lease")
    s.agenda.set("grace", s.now + s.rules.shutdown_grace)
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
    if s.stopped or busy:
        return
    s.stopped = True
    for key, _ in list(s.agenda):
        s.agenda.cancel(key)
    s.out.append(Stopped())
