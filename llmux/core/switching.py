"""How a switch runs: drain what leaves, put it to sleep in parallel, wake the target.

Its plan is fixed when it begins. It ends in one of these ways:

- success: the target is awake (or, without a target, what was to leave is asleep);
- abandoned: its last waiter left. Before the first sleep hook what leaves is reopened at once; later the hooks
  under way finish first. A wake under way is finished, and is a success even if nobody waits any more;
- failure: something would not sleep, or the wake failed and was cleaned up after.

While something leaves, the target's prefetch hook may run. Nothing depends on it: the wake does not wait for its
end, its failure changes nothing, and it is ended with the switch at the latest.
"""

from __future__ import annotations

from llmux.core import admission, chronicle, evictions, levels, probing, retirement, shadows
from llmux.core.complaints import RAISED, spelled
from llmux.core.effects import (
    SWITCH_OVER,
    CancelRequests,
    CutReason,
    ModelActivated,
    Refusal,
    SwitchDrained,
    SwitchEnded,
    SwitchFailed,
    SwitchStarted,
)
from llmux.core.model import Model, Stage, Switch
from llmux.core.phases import Phase
from llmux.core.policy import SwitchRecord
from llmux.core.retirement import Outcome
from llmux.core.spec import HookKind
from llmux.core.state import State


def begin(
    s: State,
    target: Model | None,
    leaving: tuple[Model, ...],
    reason: str,
    *,
    requested: bool = False,
    decided: bool = False,
) -> None:
    """Begin a switch. None is under way. ``decided``: it was for those who wait, and is in the chronicle."""
    assert s.switch is None
    if target is not None and target.phase is Phase.FAULTED:
        leaving = (*leaving, target)  # it has to be slept before it can be woken
    spec = target.next if target is not None else None
    switch = Switch(s.next_switch_id(), target, spec, leaving, reason, requested, s.now)
    chronicle.begun(s, switch, decided=decided)
    evictions.note(s, switch)
    s.switch = switch
    s.last_decision = None
    s.agenda.cancel("ask")
    name = target.name if target else None
    s.out.append(SwitchStarted(switch.id, switch.sources, name, reason))
    for model in leaving:
        if model.phase is Phase.AWAKE:
            probing.pause(s, model)
            s.move(model, Phase.DRAINING)
    admission.sweep(s)  # whoever waits for what leaves for a pinned model
    levels.make_room(s, leaving)
    _prefetch(s, switch)
    # While stopping, the grace is the only deadline of the answers under way.
    if s.rules.drain_timeout is not None and not s.stopping and any(model.in_flight for model in leaving):
        s.agenda.set("drain", s.now + s.rules.drain_timeout)
        if s.rules.drain_timeout == 0:
            drain_deadline(s)
    go_on(s)


def _prefetch(s: State, switch: Switch) -> None:
    """Start the target's prefetch beside the drain and the sleep. The wake does not wait for it.

    Only of a model that is asleep, so that it runs beside no other hook of its own.
    """
    target = switch.target
    if target is None or target.phase is not Phase.ASLEEP or target.prefetch is not None:
        return
    if switch.leaving and HookKind.PREFETCH in target.spec.hooks:
        target.prefetch = s.run_hook(target, HookKind.PREFETCH)


def _end_prefetch(s: State, switch: Switch) -> None:
    target = switch.target
    if target is not None and target.prefetch is not None:
        s.kill_hook(s.hooks[target.prefetch], SWITCH_OVER)


def go_on(s: State) -> None:
    """Start the sleep hooks once everything that leaves has drained."""
    switch = s.switch
    if switch is None or switch.stage is not Stage.DRAINING:
        return
    if any(model.in_flight or (model.suspected and not s.stopping) for model in switch.leaving):
        return
    if levels.awaited(s, switch):
        return
    s.agenda.cancel("drain")
    switch.drained = s.now
    if not switch.leaving:
        _wake(s, switch)
        return
    switch.stage = Stage.SLEEPING
    name = switch.target.name if switch.target else None
    s.out.append(SwitchDrained(switch.id, switch.sources, name, s.now - switch.started))
    depths = levels.for_sleep(s, switch.leaving)
    for model in switch.leaving:
        cleanup = model.phase is Phase.LOST or model.faulted_in_cleanup
        switch.measurable = switch.measurable and model.phase is Phase.DRAINING and model not in depths
        probing.deactivated(s, model)
        retirement.begin(s, model, cleanup=cleanup, level=depths.get(model))


def drain_deadline(s: State) -> None:
    """The drain has taken long enough: end what still runs. The sleep hooks wait for the end."""
    switch = s.switch
    assert switch is not None
    s.agenda.cancel("drain")
    for model in switch.leaving:
        if model.in_flight:
            estimate = admission.switch_cost(s, switch.leaving, switch.target) if switch.target else None
            requests = tuple(model.in_flight)
            s.out.append(CancelRequests(requests, model.name, CutReason.DRAIN_DEADLINE, estimate))


def waiter_left(s: State, model: Model) -> None:
    """A waiter of ``model`` is gone: call the switch to it off if it was the last and nothing runs yet."""
    switch = s.switch
    if switch is not None and switch.target is model and not switch.requested and not model.queue:
        call_off(s, switch)


def call_off(s: State, switch: Switch) -> None:
    """End a switch if it is still draining, and reopen what was to leave."""
    if switch.stage is not Stage.DRAINING:
        return
    _end(s, switch, "abandoned")
    for model in switch.leaving:
        if model.phase is Phase.DRAINING:
            _reopen(s, model)


def wind_up(s: State) -> None:
    """While stopping: end a switch whose sleep and stop hooks have ended. Nothing further of it is begun."""
    switch = s.switch
    if switch is None or switch.stage not in (Stage.SLEEPING, Stage.CLEANUP):
        return
    if not any(model.retirement and model.retirement.hook for model in s.models.values()):
        _end(s, switch, "abandoned")


def _reopen(s: State, model: Model) -> None:
    s.move(model, Phase.AWAKE)
    probing.schedule(s, model)
    admission.admit_waiters(s, model)
    probing.rest(s, model)


def retired(s: State, model: Model, outcome: Outcome) -> None:
    """One of those that leave has ended its retirement."""
    switch = s.switch
    assert switch is not None
    if outcome is Outcome.RUNNING:
        probing.schedule(s, model)
        probing.rest(s, model)
    if switch.stage is Stage.CLEANUP:
        _cleaned_up(s, switch, model, outcome)
        return
    if outcome is Outcome.ASLEEP:
        model.put_away = switch.target is None and switch.requested
    else:
        switch.error = f"{model.name}: {model.last_error}"
    if outcome is Outcome.RUNNING:
        admission.admit_waiters(s, model)
    if not any(other.retirement is not None for other in switch.leaving):
        _all_retired(s, switch)


def _all_retired(s: State, switch: Switch) -> None:
    target = switch.target
    if switch.error:
        _fail(s, switch)
    elif target is None:
        _end(s, switch, "success")
    elif s.stopping or s.lease is not None or not (target.queue or switch.requested):
        _end(s, switch, "abandoned")
    else:
        _wake(s, switch)


def _wake(s: State, switch: Switch) -> None:
    target = switch.target
    assert target is not None
    switch.stage = Stage.WAKING
    switch.measurable = switch.measurable and target.level is None
    target.woken = switch.spec
    target.sleep_backoff.clear()  # of a try to put it deeper
    s.move(target, Phase.WAKING)
    s.record_holders()
    s.run_hook(target, HookKind.WAKE)


def woken(s: State, model: Model, started: float, *, ok: bool, detail: str) -> None:
    """Take in the end of a wake hook."""
    switch = s.switch
    assert switch is not None
    if ok:
        s.move(model, Phase.AWAKE)
        s.costs.record_wake(model.name, s.now - started, model.level.name if model.level else "")
        model.level = None
        model.unproven_failures = model.wake_backoff.failures
        model.wake_backoff.clear()
        model.cleanup_owed = model.wanted = model.put_away = False
        model.last_error = ""
        probing.activated(s, model)
        model.woken_by_hook = True
        s.out.append(ModelActivated(model.name, switch.id, switch.sources, s.now - switch.started))
        _end(s, switch, "success")
        admission.admit_waiters(s, model)
        return
    if s.stopping:
        # Engines are left as they are; the state file says that this one may hold the GPU.
        s.move(model, Phase.LOST)
        _end(s, switch, "abandoned")
        return
    switch.error = f"wake {detail}"
    switch.stage = Stage.CLEANUP
    _end_prefetch(s, switch)
    probing.wake_failed(s, model, detail)
    if model.in_flight:
        # It was lost with answers still running: they end before anything is done to it.
        model.level = None
        s.move(model, Phase.LOST)
        model.cleanup_owed = True
        _fail(s, switch)
        return
    retirement.begin(s, model, cleanup=True, level=levels.for_sleep(s, [model]).get(model), error=detail)


def _cleaned_up(s: State, switch: Switch, model: Model, outcome: Outcome) -> None:
    if outcome is Outcome.RUNNING:
        # Its wake failed, and so did its sleep, but it answers: it is served.
        model.wake_backoff.clear()
    _fail(s, switch)
    if model.phase is Phase.AWAKE:
        probing.activated(s, model)
        admission.admit_waiters(s, model)


def _fail(s: State, switch: Switch) -> None:
    name = switch.target.name if switch.target else None
    s.out.append(SwitchFailed(switch.id, switch.sources, name, switch.error))
    target = switch.target
    _end(s, switch, "failure")
    if target is not None and switch.stage is Stage.SLEEPING and target.phase is not Phase.AWAKE:
        message = f"model {target.name!r} cannot be woken: {switch.error}"
        retry_after = max((m.sleep_backoff.remaining(s.now) for m in switch.leaving), default=0.0)
        admission.reject_waiters(s, target, (Refusal.SLEEP_FAILED, message, retry_after))


def _end(s: State, switch: Switch, result: str) -> None:
    s.switch = None
    s.agenda.cancel("drain")
    _end_prefetch(s, switch)
    s.errands = True
    probing.find_extras(s)  # a reload in its course may have left room for less
    drained = switch.drained if switch.stage is not Stage.DRAINING else s.now
    cost = s.now - drained if result == "success" else None
    estimate = None
    if cost is not None and switch.target is not None and switch.measurable:
        estimate = s.costs.record(switch.sources, switch.target.name, cost)
    name = switch.target.name if switch.target else None
    duration, drain = s.now - switch.started, drained - switch.started
    s.out.append(SwitchEnded(switch.id, switch.sources, name, result, duration, drain, cost, estimate))
    record = SwitchRecord(switch.id, switch.sources, name, result, drain, cost, s.now)
    if s.shadows:
        shadows.tell(s, record)
    try:
        inform = getattr(s.policy, "on_switch_completed", None)
        if inform is not None:
            inform(record)
    except RAISED as error:
        s.overrule(f"on_switch_completed raised {spelled(error)}")
