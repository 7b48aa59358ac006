"""What ``alive`` is asked for: what runs at the start, and whether an engine still is there."""

from __future__ import annotations

from llmux.core import admission, residency
from llmux.core.effects import ModelLost, Ready, Refusal
from llmux.core.model import AWAKE, Lifecycle, Model
from llmux.core.phases import Phase, Trigger
from llmux.core.spec import HookKind
from llmux.core.state import State

# ---- at the start, and for models that a reload brings


def ask_unknown(s: State) -> None:
    """Run the first ``alive`` of every model whose state is unknown, in parallel."""
    for model in s.in_phase(Phase.UNKNOWN):
        if model.probe.hook is None and model.found is None:
            model.woken = model.spec  # what is asked is what is adopted, whatever a reload brings meanwhile
            model.probe.hook = s.run_hook(model, HookKind.ALIVE)


def first_answer(s: State, model: Model, *, ok: bool) -> None:
    """Take in a first ``alive``; with the last of them, say what holds the GPU."""
    model.found = ok
    if all(other.found is not None for other in s.in_phase(Phase.UNKNOWN)):
        adopt(s)
    for awake in s.in_phase(AWAKE):
        if not awake.extra:
            admission.admit_waiters(s, awake)
    admission.sweep(s)


def adopt(s: State) -> None:
    """Adopt what runs. What may not be awake beside it is extra, and is put to sleep at once."""
    rank = len(s.recent)
    # Those that are found alive come first, the most recently used of them first; then those that only the
    # state file suspects.
    found = sorted(s.in_phase(Phase.UNKNOWN), key=lambda m: (not m.found, s.recent.get(m.name, rank), m.order))
    for model in found:
        if model.found:
            s.move(model, Trigger.ADOPT)
        elif model.name in s.recorded:
            s.move(model, Trigger.MISSING)
            model.last_error = "was on the GPU when llmux ended, and is not alive"
        else:
            s.move(model, Trigger.NOT_ALIVE)
            slept = s.recorded_levels.get(model.name)
            model.level = next((level for level in model.spec.levels if level.name == slept), None)
        model.found = None
    s.recorded_levels = {}  # what a reload brings later may have slept elsewhere
    residency.mark_extras(s, found)
    s.record_holders()
    if s.lifecycle is Lifecycle.STARTING:
        s.lifecycle = Lifecycle.READY
        s.out.append(Ready(tuple(model.name for model in found if model.phase is AWAKE)))


# ---- while awake


def probe(s: State, model: Model) -> None:
    """Ask ``alive`` of an awake model, unless it is being asked."""
    if model.probe.hook is None and model.phase is AWAKE:
        model.probe.hook = s.run_hook(model, HookKind.ALIVE)


def suspect(s: State, model: Model | None, *, refused: bool) -> None:
    """Have ``alive`` confirm at once that an engine is gone.

    After a refused connection nothing is admitted until it has spoken. What drains is not put to sleep before:
    whether the engine still is there decides what a failed sleep hook means.
    """
    if model is None or model.phase not in (AWAKE, Phase.DRAINING) or s.stopping:
        return
    if refused or model.phase is Phase.DRAINING:
        model.probe.suspected = True
    if model.probe.hook is None:
        model.probe.hook = s.run_hook(model, HookKind.ALIVE)
    else:
        model.probe.stale = True


def answered(s: State, model: Model, *, ok: bool, detail: str, last_byte: float | None) -> None:
    """Take in what ``alive`` said of a model that was awake when it was asked."""
    probe = model.probe
    stale, probe.stale = probe.stale, False
    if model.phase not in (AWAKE, Phase.DRAINING) or s.stopping:
        return
    detail = detail or "failed"
    if stale:
        # It was asked before the connection failed: ask again.
        probe.hook = s.run_hook(model, HookKind.ALIVE)
    elif ok:
        probe.trust()
        if model.phase is AWAKE:
            admission.admit_waiters(s, model)
            s.schedule_probe(model)
    elif probe.suspected:
        lose(s, model, f"a connection failed, and alive {detail}")
    elif model.phase is AWAKE:
        _missed(s, model, detail, last_byte)


def _missed(s: State, model: Model, detail: str, last_byte: float | None) -> None:
    """Count a probe that failed, unless the engine has just answered a request."""
    if last_byte is None or s.now - last_byte > s.rules.alive_every:
        model.probe.missed += 1
        if model.probe.missed >= s.rules.alive_failures:
            lose(s, model, f"alive failed {model.probe.missed} times in a row: {detail}")
            return
    s.schedule_probe(model)


def lose(s: State, model: Model, error: str) -> None:
    """The engine is gone: nothing is admitted, its cleanup is owed."""
    s.move(model, Trigger.LOSE)
    model.last_error = error
    s.out.append(ModelLost(model.name, error))
    admission.sweep(s)


def never_answered(s: State, model: Model) -> None:
    """Its wake hook succeeded, but its first connection was refused: that is a failed wake."""
    error = "its wake hook succeeded, but the engine refuses connections"
    failures = model.unproven
    assert failures is not None
    lose(s, model, error)
    model.wake_backoff.failures = failures
    wake_failed(s, model, error)
    model.cleanup.owed = True


def wake_failed(s: State, model: Model, error: str) -> None:
    """Count a failed wake, and reject what waited for it."""
    s.back_off(model, HookKind.WAKE, error)
    message = f"model {model.name!r} failed to wake: {error}"
    retry_after = model.wake_backoff.remaining(s.now)
    admission.reject_waiters(s, model, (Refusal.WAKE_FAILED, message, retry_after))
