"""How one model leaves the GPU: sleep, verify, and what follows when they fail.

SLEEP ──ok──▶ VERIFY (if given) ──ok──▶ asleep
  │             │ never passed
  ▼             ▼
STOP (if given, once) ──ok──▶ VERIFY ──▶ …
  │ failed or not given
  ▼
ALIVE ──yes──▶ it runs: awake again, and served
  │ no
  ▼
after an ordinary sleep: faulted.   After a cleanup (engine lost, wake failed): VERIFY decides where
given; with neither verify nor stop, after several tries over a minute it counts as asleep.
"""

from __future__ import annotations

import enum

from llmux.core.effects import (
    BackoffStarted,
    ModelActivated,
    ModelAssumedAsleep,
    ModelFaulted,
    SleepHookFailed,
)
from llmux.core.model import Model, Retirement, Step
from llmux.core.phases import Phase
from llmux.core.spec import HookKind, Level
from llmux.core.state import State

VERIFY_EVERY = 0.5  # seconds
ASSUMED_TRIES = 3
ASSUMED_AFTER = 60.0  # seconds


class Outcome(enum.Enum):
    """How a retirement ended."""

    ASLEEP = enum.auto()
    RUNNING = enum.auto()
    FAULTED = enum.auto()


def begin(s: State, model: Model, *, cleanup: bool, level: Level | None = None, error: str = "") -> None:
    """Start to put a model to sleep at ``level``, if it has any. Nothing of it is in flight."""
    s.move(model, Phase.SLEEPING)
    model.level = level
    s.agenda.cancel(("idle", model.name))
    s.agenda.cancel(("probe", model.name))
    model.retirement = Retirement(cleanup=cleanup, started=s.now, error=error)
    _run(s, model, model.retirement, Step.SLEEP)


def poll(s: State, model: Model) -> None:
    """Run verify again: its pause is over."""
    retirement = model.retirement
    assert retirement is not None
    retirement.hook = s.run_hook(model, HookKind.VERIFY, retirement.verify_until)


def step_ended(s: State, model: Model, *, ok: bool, detail: str) -> Outcome | None:
    """Take in the end of the step that ran; return how the retirement ended, or None while it goes on."""
    retirement = model.retirement
    assert retirement is not None
    retirement.hook = None
    step = retirement.step
    if not ok and step is not Step.ALIVE:
        retirement.error = f"{step.value.value} {detail}" if detail else f"{step.value.value} failed"
    if ok:
        return _after_success(s, model, retirement, step)
    last_resort = step is Step.SLEEP and s.rules.sleep_on_exit and HookKind.STOP in model.running.hooks
    if s.stopping and not last_resort:
        return None  # nothing further is started; the state file says that it may hold the GPU
    return _after_failure(s, model, retirement, step)


def _run(s: State, model: Model, retirement: Retirement, step: Step) -> None:
    retirement.step = step
    deadline = None
    if step is Step.VERIFY:
        retirement.verified = True
        deadline = retirement.verify_until = s.now + model.running.timeouts[HookKind.VERIFY]
    retirement.hook = s.run_hook(model, step.value, deadline)


def _after_success(s: State, model: Model, retirement: Retirement, step: Step) -> Outcome | None:
    if step is Step.ALIVE:
        return _end_running(s, model, retirement)
    if step is Step.SLEEP:
        retirement.slept = True
    if step is not Step.VERIFY and HookKind.VERIFY in model.running.hooks:
        if not s.stopping:
            _run(s, model, retirement, Step.VERIFY)
        return None
    return _end_asleep(s, model, retirement)


def _after_failure(s: State, model: Model, retirement: Retirement, step: Step) -> Outcome | None:
    hooks = model.running.hooks
    if step is Step.VERIFY and s.now + VERIFY_EVERY < retirement.verify_until:
        s.agenda.set(("verify", model.name), s.now + VERIFY_EVERY)
        return None
    if step is Step.SLEEP or (step is Step.VERIFY and not retirement.stopped):
        target = s.switch.target.name if s.switch and s.switch.target else None
        s.out.append(SleepHookFailed(model.name, target, retirement.error))
    if step is Step.ALIVE:
        return _not_alive(s, model, retirement)
    if HookKind.STOP in hooks and not retirement.stopped:
        retirement.stopped = True
        _run(s, model, retirement, Step.STOP)
        return None
    _run(s, model, retirement, Step.ALIVE)
    return None


def _not_alive(s: State, model: Model, retirement: Retirement) -> Outcome | None:
    hooks = model.running.hooks
    if not retirement.cleanup:
        return _end_faulted(s, model, retirement)
    if HookKind.VERIFY in hooks:
        if retirement.verified:
            return _end_faulted(s, model, retirement)
        _run(s, model, retirement, Step.VERIFY)
        retirement.stopped = True  # if this fails as well, there is nothing left to try
        return None
    if HookKind.STOP in hooks:
        return _end_faulted(s, model, retirement)
    if model.failed_cleanups == 0:
        model.first_failed_cleanup = s.now
    model.failed_cleanups += 1
    if model.failed_cleanups >= ASSUMED_TRIES and s.now - model.first_failed_cleanup >= ASSUMED_AFTER:
        s.out.append(ModelAssumedAsleep(model.name, model.failed_cleanups, retirement.error))
        return _end_asleep(s, model, retirement)
    return _end_faulted(s, model, retirement)


def _end_asleep(s: State, model: Model, retirement: Retirement) -> Outcome:
    level = model.level if retirement.slept and not retirement.stopped else None
    if not retirement.cleanup:
        s.costs.record_sleep(model.name, s.now - retirement.started, level.name if level else "")
    s.move(model, Phase.ASLEEP)
    model.retirement = None
    fell_asleep(s, model, level)
    return Outcome.ASLEEP


def fell_asleep(s: State, model: Model, level: Level | None = None) -> None:
    """Forget what belonged to the engine that is gone."""
    model.woken = None
    model.level = level
    model.awake_since = None
    model.sleep_backoff.clear()
    model.failed_cleanups = 0
    model.cleanup_owed = model.faulted_in_cleanup = model.extra = model.suspected = False
    model.missed = 0
    s.record_holders()


def _end_running(s: State, model: Model, retirement: Retirement) -> Outcome:
    s.move(model, Phase.AWAKE)
    model.level = model.retirement = None
    model.last_error = retirement.error
    model.failed_cleanups = 0
    model.cleanup_owed = model.faulted_in_cleanup = model.suspected = False
    model.missed = 0
    model.awake_since = s.now
    s.out.append(ModelActivated(model.name, s.switch.id if s.switch else 0, (), None))
    _back_off(s, model, retirement.error)
    return Outcome.RUNNING


def _end_faulted(s: State, model: Model, retirement: Retirement) -> Outcome:
    s.move(model, Phase.FAULTED)
    # A later try knows no more about the engine than this one did: what was a cleanup stays one.
    model.faulted_in_cleanup = retirement.cleanup
    model.cleanup_owed = False
    model.retirement = None
    model.last_error = retirement.error
    s.out.append(ModelFaulted(model.name, retirement.error))
    _back_off(s, model, retirement.error)
    return Outcome.FAULTED


def _back_off(s: State, model: Model, error: str) -> None:
    seconds = model.sleep_backoff.fail(s.now, s.rules.backoff_first, s.rules.backoff_max, s.jitter)
    s.agenda.set(("sleep backoff", model.name), model.sleep_backoff.until)
    s.out.append(BackoffStarted(model.name, HookKind.SLEEP, model.sleep_backoff.failures, seconds, error))
