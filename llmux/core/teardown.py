"""How one model leaves the GPU: sleep, verify, and what follows when they fail.

``phases.STEPS`` is the machine: a step is a hook, its end is a finding, and the table names the next step or what
has come of it: asleep, running (it answers: awake again, and served) or faulted (it is not known what holds the
GPU). A cleanup (of an engine that is lost, or never came) differs in this: where it does not answer either,
``verify`` decides if there is one; with neither verify nor stop, after several tries over a minute it counts as
asleep.
"""

from __future__ import annotations

from llmux.core.effects import ModelAssumedAsleep, SleepHookFailed
from llmux.core.model import Model, Teardown
from llmux.core.phases import STEPS, Finding, Stage, Step, Trigger, following
from llmux.core.spec import HookKind, Level
from llmux.core.state import State
from llmux.core.timers import Timer

VERIFY_EVERY = 0.5  # seconds
ASSUMED_TRIES = 3
ASSUMED_AFTER = 60.0  # seconds

HOOKS = {
    Step.SLEEP: HookKind.SLEEP,
    Step.VERIFY: HookKind.VERIFY,
    Step.STOP: HookKind.STOP,
    Step.ALIVE: HookKind.ALIVE,
}


def begin(s: State, model: Model, *, cleanup: bool, level: Level | None = None, error: str = "") -> None:
    """Start to put a model to sleep at ``level``, if it has any. Nothing of it is in flight."""
    s.move(model, Trigger.SLEEP)
    model.level = level
    model.teardown = Teardown(cleanup=cleanup, started=s.now, error=error)
    _enter(s, model, model.teardown, Step.SLEEP)


def poll(s: State, model: Model) -> None:
    """Run verify again: its pause is over."""
    teardown = model.teardown
    assert teardown is not None
    teardown.hook = s.run_hook(model, HookKind.VERIFY, teardown.verify_until)


def step_ended(s: State, model: Model, *, ok: bool, detail: str) -> Step | None:
    """Take in the end of the step that ran; return how the teardown ended, or None while it goes on."""
    teardown = model.teardown
    assert teardown is not None
    teardown.hook = None
    step = teardown.step
    if not ok and step is not Step.ALIVE:
        teardown.error = f"{step.value} {detail}" if detail else f"{step.value} failed"
    if not _goes_on(s, model, step, ok=ok):
        return None
    finding = _finding(s, model, teardown, ok=ok)
    untold = step is Step.SLEEP or (step is Step.VERIFY and teardown.slept and Step.STOP not in teardown.tried)
    if not ok and untold and finding is not Finding.NOT_YET:
        s.out.append(SleepHookFailed(model.name, s.switch.to if s.switch else None, teardown.error))
    if step is Step.SLEEP:
        teardown.slept = ok
    return _enter(s, model, teardown, following(STEPS, model.name, step, finding)[0])


def _goes_on(s: State, model: Model, step: Step, *, ok: bool) -> bool:
    """While stopping nothing further is started but a last ``stop``; the state file says what may hold the GPU."""
    if not s.stopping:
        return True
    hooks = model.running.hooks
    if ok:
        return step in (Step.VERIFY, Step.ALIVE) or HookKind.VERIFY not in hooks
    return step is Step.SLEEP and s.rules.sleep_on_exit and HookKind.STOP in hooks


def _finding(s: State, model: Model, teardown: Teardown, *, ok: bool) -> Finding:
    """Say what the end of a step shows."""
    step, hooks = teardown.step, model.running.hooks
    if ok:
        proven = step in (Step.VERIFY, Step.ALIVE) or HookKind.VERIFY not in hooks
        return Finding.OK if proven else Finding.OK_UNVERIFIED
    if step is Step.ALIVE:
        return _dead(s, model, teardown)
    if step is Step.VERIFY and s.now + VERIFY_EVERY < teardown.verify_until:
        return Finding.NOT_YET
    stoppable = HookKind.STOP in hooks and Step.STOP not in teardown.tried
    return Finding.FAILED_STOPPABLE if stoppable else Finding.FAILED


def _dead(s: State, model: Model, teardown: Teardown) -> Finding:
    """Say what it means that it does not answer, of an engine that would not sleep."""
    hooks, cleanup = model.running.hooks, model.cleanup
    if teardown.cleanup and HookKind.VERIFY in hooks and Step.VERIFY not in teardown.tried:
        return Finding.DEAD_UNVERIFIED
    if not teardown.cleanup or HookKind.VERIFY in hooks or HookKind.STOP in hooks:
        return Finding.DEAD
    if cleanup.failures == 0:
        cleanup.since = s.now
    cleanup.failures += 1
    if cleanup.failures < ASSUMED_TRIES or s.now - cleanup.since < ASSUMED_AFTER:
        return Finding.DEAD
    s.out.append(ModelAssumedAsleep(model.name, cleanup.failures, teardown.error))
    return Finding.DEAD_ASSUMED


def _enter(s: State, model: Model, teardown: Teardown, step: Step) -> Step | None:
    """Do what belongs to a step as it is entered; return it if it is the last one."""
    again, teardown.step = step is teardown.step and step in teardown.tried, step
    if again:
        s.timers.set((Timer.VERIFY, model.name), s.now + VERIFY_EVERY)
    elif step in HOOKS:
        teardown.tried.add(step)
        deadline = None
        if step is Step.VERIFY:
            deadline = teardown.verify_until = s.now + model.running.timeouts[HookKind.VERIFY]
        teardown.hook = s.run_hook(model, HOOKS[step], deadline)
    else:
        _end(s, model, teardown, step)
        return step
    return None


def _end(s: State, model: Model, teardown: Teardown, outcome: Step) -> None:
    level = model.level if teardown.slept and Step.STOP not in teardown.tried else None
    if outcome is Step.ASLEEP:
        if not teardown.cleanup:
            s.costs.record_sleep(model.name, s.now - teardown.started, level.name if level else "")
        s.move(model, Trigger.SLEPT)
        model.level = level
    elif outcome is Step.FAULTED:
        s.move(model, Trigger.UNCLEAR)
    else:
        failed_wake = s.switch is not None and s.switch.stage is Stage.CLEANUP
        s.move(model, Trigger.ANSWERS if failed_wake else Trigger.STILL_RUNS)
    model.teardown = None
    if outcome is not Step.ASLEEP:
        s.back_off(model, HookKind.SLEEP, teardown.error)
