"""How a switch runs: drain what leaves, put it to sleep in parallel, wake the target.

Its plan is fixed when it begins, and ``phases.STAGES`` says what follows what. It ends in one of these ways:

- success: the target is awake (or, without a target, what was to leave is asleep);
- abandoned: its last waiter left. Before the first sleep hook what leaves is reopened at once; later the hooks
  under way finish first. A wake under way is finished, and is a success even if no request waits any more;
- failure: something would not sleep, or the wake failed and was cleaned up after.

While something leaves, the target's prefetch hook may run. Nothing depends on it: the wake does not wait for its
end, its failure changes nothing, and it is ended with the switch at the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmux.core import admission, health_checks, levels, policy_calls, residency, teardown
from llmux.core import effects as fx
from llmux.core.model import AWAKE, HookRun, Model, Reason, Switch
from llmux.core.phases import STAGES, Phase, Stage, Step, Trigger, Turn, following
from llmux.core.policy import SwitchRecord
from llmux.core.spec import HookKind
from llmux.core.state import State
from llmux.core.timers import Timer


def begin(
    s: State,
    target: Model | None,
    leaving: tuple[Model, ...],
    cause: Reason,
    *,
    words: str = "",
    requested: bool = False,
    by: fx.By = "core",
    said: str | None = None,
) -> None:
    """Begin a switch. None is under way. ``words`` say why in the place of ``cause``.

    ``by`` and ``said`` are what decided it, and the reason that was given, where that is not the same.
    """
    assert s.switch is None
    if target is not None and target.phase is Phase.FAULTED:
        leaving = (*leaving, target)  # it has to be slept before it can be woken
    spec = target.next if target is not None else None
    reason = words or cause.value
    switch = Switch(next(s.switch_ids), target, spec, leaving, cause, reason, requested, s.now)
    s.switch = switch
    s.last_decision = s.last_told = None
    if s.explain:
        why = reason if said is None else said
        s.out.append(fx.Decided("switch", switch.to, by, why, None, s.figures(s), switch.id, switch.sources))
    s.timers.cancel(Timer.ASK)
    s.out.append(fx.SwitchStarted(switch.id, switch.sources, switch.to, reason))
    for model in leaving:
        if model.phase is AWAKE:
            s.move(model, Trigger.DRAIN)
    admission.sweep(s)  # whatever waits for what leaves for a pinned model
    levels.make_room(s, leaving)
    _prefetch(s, switch)
    # While stopping, the grace is the only deadline of the answers under way.
    if s.rules.drain_timeout is not None and not s.stopping and any(model.in_flight for model in leaving):
        s.timers.set(Timer.DRAIN, s.now + s.rules.drain_timeout)
        if s.rules.drain_timeout == 0:
            drain_deadline(s)
    go_on(s)


def move(s: State, switch: Switch, turn: Turn) -> None:
    """Bring the switch into the stage that the table says follows, and do what belongs to entering it."""
    if switch.stage is Stage.DRAINING:
        switch.drained = s.now
        s.timers.cancel(Timer.DRAIN)
    switch.stage, _ = following(STAGES, f"switch {switch.id}", switch.stage, turn)
    _ON_ENTER[switch.stage](s, switch)


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
        s.kill_hook(s.hooks[target.prefetch], fx.SWITCH_OVER)


# ---- what moves it


def go_on(s: State) -> None:
    """Start the sleep hooks once everything that leaves has drained."""
    switch = s.switch
    if switch is None or switch.stage is not Stage.DRAINING:
        return
    for model in switch.leaving:
        if model.in_flight or (model.probe.suspected and not s.stopping):
            return
    if s.has_levels and levels.awaited(s, switch):
        return
    move(s, switch, Turn.DRAINED if switch.leaving else Turn.FREE)


def drain_deadline(s: State) -> None:
    """The drain has taken long enough: end what still runs. The sleep hooks wait for the end."""
    switch = s.switch
    assert switch is not None
    s.timers.cancel(Timer.DRAIN)
    for model in switch.leaving:
        if model.in_flight:
            estimate = residency.switch_cost(s, switch.leaving, switch.target) if switch.target else None
            requests = tuple(model.in_flight)
            s.out.append(fx.CancelRequests(requests, model.name, fx.CutReason.DRAIN_DEADLINE, estimate))


def waiter_left(s: State, model: Model) -> None:
    """A waiter of ``model`` is gone: call the switch to it off if it was the last and nothing runs yet."""
    switch = s.switch
    if switch is not None and switch.target is model and not switch.requested and not model.queue:
        call_off(s, switch)


def call_off(s: State, switch: Switch) -> None:
    """End a switch if it is still draining, and reopen what was to leave."""
    if switch.stage is Stage.DRAINING:
        move(s, switch, Turn.CALLED_OFF)
        for model in switch.leaving:
            if model.phase is Phase.DRAINING:
                s.move(model, Trigger.REOPEN)
        admission.open_doors(s)


def wind_up(s: State) -> None:
    """While stopping: end a switch whose sleep and stop hooks have ended. Nothing further of it is begun."""
    switch = s.switch
    if switch is None or switch.stage not in (Stage.SLEEPING, Stage.CLEANUP):
        return
    if not any(model.teardown and model.teardown.hook for model in s.models.values()):
        move(s, switch, Turn.STOPPING)


def torn_down(s: State, model: Model, outcome: Step) -> None:
    """One of those that leave has ended its teardown."""
    switch = s.switch
    assert switch is not None
    if switch.stage is Stage.CLEANUP:
        if outcome is Step.RUNNING:
            # Its wake failed, and so did its sleep, but it answers: it is served.
            model.wake_backoff.clear()
        move(s, switch, Turn.CLEANED_UP)
        return
    if outcome is Step.ASLEEP:
        model.put_away = switch.target is None and switch.requested
    else:
        switch.error = f"{model.name}: {model.last_error}"
    if any(other.teardown is not None for other in switch.leaving):
        return
    turn = _after_sleep(s, switch)
    move(s, switch, turn)
    if turn is Turn.WOULD_NOT_SLEEP and switch.target is not None and switch.target.phase is not AWAKE:
        message = f"model {switch.target.name!r} cannot be woken: {switch.error}"
        retry_after = max(m.sleep_backoff.remaining(s.now) for m in switch.leaving)
        admission.reject_waiters(s, switch.target, (fx.Refusal.SLEEP_FAILED, message, retry_after))


def _after_sleep(s: State, switch: Switch) -> Turn:
    """Say what it means that all teardowns have ended."""
    if switch.error:
        return Turn.WOULD_NOT_SLEEP
    if switch.target is None:
        return Turn.PUT_AWAY
    wanted = switch.target.queue or switch.requested
    return Turn.SLEPT if wanted and s.lease is None and not s.stopping else Turn.NOT_WANTED


def woken(s: State, run: HookRun, *, ok: bool, detail: str) -> None:
    """Take in the end of a wake hook."""
    switch, model = s.switch, run.model
    assert switch is not None
    if ok:
        level, failures = model.level, model.wake_backoff.failures
        s.costs.record_wake(model.name, s.now - run.started, level.name if level else "")
        model.wake_backoff.clear()
        model.preload_due = model.put_away = False
        model.last_error = ""
        s.move(model, Trigger.WOKEN)
        model.unproven = failures
        move(s, switch, Turn.WOKEN)
    elif s.stopping:
        # Engines are left as they are; the state file says that this one may hold the GPU.
        s.move(model, Trigger.ABANDON)
        move(s, switch, Turn.STOPPING)
    else:
        switch.error = f"wake {detail}"
        move(s, switch, Turn.WOULD_NOT_WAKE)
        health_checks.wake_failed(s, model, detail)
        _clean_up(s, switch, model, detail)


def _clean_up(s: State, switch: Switch, model: Model, detail: str) -> None:
    """Clean up after a wake that failed; answers that still run, of an engine that was lost, end first."""
    if model.in_flight:
        s.move(model, Trigger.ABANDON)
        model.cleanup.owed = True
        move(s, switch, Turn.CLEANED_UP)
    else:
        level = levels.for_sleep(s, [model]).get(model)
        teardown.begin(s, model, cleanup=True, level=level, error=detail)


# ---- what belongs to entering a stage


def _enter_sleeping(s: State, switch: Switch) -> None:
    s.out.append(fx.SwitchDrained(switch.id, switch.sources, switch.to, s.now - switch.started))
    depths = levels.for_sleep(s, switch.leaving)
    for model in switch.leaving:
        cleanup = model.phase is Phase.LOST or model.cleanup.again
        switch.measurable = switch.measurable and model.phase is Phase.DRAINING and model not in depths
        teardown.begin(s, model, cleanup=cleanup, level=depths.get(model))


def _enter_waking(s: State, switch: Switch) -> None:
    target = switch.target
    assert target is not None
    switch.measurable = switch.measurable and target.level is None
    s.move(target, Trigger.WAKE)


def _end(s: State, switch: Switch) -> None:
    """Say how it ended, and what it cost, to all that learn from it."""
    if switch.stage is Stage.FAILURE:
        s.out.append(fx.SwitchFailed(switch.id, switch.sources, switch.to, switch.error))
    s.switch = None
    _end_prefetch(s, switch)
    s.maintenance_due = True
    if switch.outdated or any(model.extra for model in s.models.values()):
        residency.mark_extras(s)  # a reload in its course may have left room for less
    drained = s.now if switch.drained is None else switch.drained
    cost = s.now - drained if switch.stage is Stage.SUCCESS else None
    estimate = None
    if cost is not None and switch.target is not None and switch.measurable:
        estimate = s.costs.record(switch.sources, switch.target.name, cost)
    result, duration, drain = switch.stage.value, s.now - switch.started, drained - switch.started
    s.out.append(fx.SwitchEnded(switch.id, switch.sources, switch.to, result, duration, drain, cost, estimate))
    policy_calls.inform(s, SwitchRecord(switch.id, switch.sources, switch.to, result, drain, cost, s.now))


_ON_ENTER: Mapping[Stage, Callable[[State, Switch], None]] = {
    Stage.SLEEPING: _enter_sleeping,
    Stage.WAKING: _enter_waking,
    Stage.CLEANUP: _end_prefetch,
    Stage.SUCCESS: _end,
    Stage.ABANDONED: _end,
    Stage.FAILURE: _end,
}
