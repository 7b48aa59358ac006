"""What ``alive`` is asked for: who runs at the start, and whether an engine still is there."""

from __future__ import annotations

from llmux.core import admission, placement
from llmux.core.effects import BackoffStarted, ModelActivated, ModelDeactivated, ModelLost, Ready, Refusal
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.core.spec import HookKind
from llmux.core.state import State


# ---- at the start, and for models that a reload brings


def ask_unknown(s: State) -> None:
    """Run the first ``alive`` of every model whose state is unknown, in parallel."""
    for model in s.in_phase(Phase.UNKNOWN):
        if model.probe is None and model.found is None:
            model.probe = s.run_hook(model, HookKind.ALIVE)


def first_answer(s: State, model: Model, *, ok: bool) -> None:
    """Take in a first ``alive``; with the last of them, say who holds the GPU."""
    model.found = ok
    if all(other.found is not None for other in s.in_phase(Phase.UNKNOWN)):
        adopt(s)


def adopt(s: State) -> None:
    """Adopt what runs. What may not be awake beside it is extra, and is put to sleep at once."""
    unknown = list(s.in_phase(Phase.UNKNOWN))
    chosen = [model.running for model in s.models.values() if model.holds and model.phase is not Phase.UNKNOWN]
    rank = len(s.recent)
    adopted = []
    # Those that are found alive come first, the most recently used of them first; then those that only the
    # state file suspects.
    for model in sorted(unknown, key=lambda m: (not m.found, s.recent.get(m.name, rank), m.order)):
        if model.found:
            s.move(model, Phase.AWAKE)
            adopted.append(model.name)
        elif model.name in s.recorded:
            s.move(model, Phase.LOST)
            model.last_error = "was on the GPU when llmux ended, and is not alive"
        else:
            s.move(model, Phase.ASLEEP)
            model.found = None
            continue
        model.found = None
        model.woken = model.spec
        if placement.fits([*chosen, model.spec], s.rules.capacity):
            chosen.append(model.spec)
        else:
            model.extra = s.errands = True
        if model.phase is Phase.AWAKE:
            activated(s, model)
            s.out.append(ModelActivated(model.name, 0, (), None))
    s.record_holders()
    if not s.ready:
        s.ready = True
        s.out.append(Ready(tuple(adopted)))


# ---- while awake


def activated(s: State, model: Model) -> None:
    """Start the clocks of a model that has just become awake."""
    model.epoch += 1
    model.awake_since = s.now
    model.missed = 0
    model.suspected = model.woken_by_hook = False
    model.last_used = s.now
    schedule(s, model)
    rest(s, model)


def schedule(s: State, model: Model) -> None:
    """Set when ``alive`` is asked next."""
    if s.rules.alive_every > 0:
        s.agenda.set(("probe", model.name), s.now + s.rules.alive_every)
    else:
        s.agenda.cancel(("probe", model.name))


def rest(s: State, model: Model) -> None:
    """Start the idle clock if the model may sleep after a while without requests."""
    if model.spec.idle_sleep is not None and model.idle:
        s.agenda.set(("idle", model.name), s.now + model.spec.idle_sleep)


def probe(s: State, model: Model) -> None:
    """Ask ``alive`` of an awake model, unless it is being asked."""
    if model.probe is None and model.phase is Phase.AWAKE:
        model.probe = s.run_hook(model, HookKind.ALIVE)


def suspect(s: State, model: Model, *, refused: bool) -> None:
    """Have ``alive`` confirm at once that an engine is gone.

    After a refused connection nobody is admitted until it has spoken. What drains is not put to sleep before:
    whether the engine still is there decides what a failed sleep hook means.
    """
    if model.phase not in (Phase.AWAKE, Phase.DRAINING) or s.stopping:
        return
    if refused or model.phase is Phase.DRAINING:
        model.suspected = True
    if model.probe is None:
        model.probe = s.run_hook(model, HookKind.ALIVE)
    else:
        model.stale_probe = True


def answered(s: State, model: Model, *, ok: bool, detail: str, last_byte: float | None) -> None:
    """Take in what ``alive`` said of a model that was awake when it was asked."""
    stale, model.stale_probe = model.stale_probe, False
    if model.phase not in (Phase.AWAKE, Phase.DRAINING) or s.stopping:
        return
    if stale:
        # It was asked before the connection failed: ask again.
        model.probe = s.run_hook(model, HookKind.ALIVE)
        return
    if ok:
        model.missed = 0
        model.suspected = False
        if model.phase is Phase.AWAKE:
            admission.admit_waiters(s, model)
            schedule(s, model)
        return
    if model.suspected:
        lose(s, model, f"a connection failed, and alive {detail}")
        return
    if model.phase is Phase.DRAINING:
        return
    every = s.rules.alive_every
    if last_byte is None or s.now - last_byte > every:
        model.missed += 1
    if model.missed >= s.rules.alive_failures:
        lose(s, model, f"alive failed {model.missed} times in a row: {detail}")
    else:
        schedule(s, model)


def lose(s: State, model: Model, error: str) -> None:
    """The engine is gone: nobody is admitted, its cleanup is owed."""
    deactivated(s, model)
    s.move(model, Phase.LOST)
    model.suspected = False
    model.last_error = error
    s.out.append(ModelLost(model.name, error))
    admission.sweep(s)


def pause(s: State, model: Model) -> None:
    """Stop asking ``alive``, and the idle clock."""
    s.agenda.cancel(("idle", model.name))
    s.agenda.cancel(("probe", model.name))


def deactivated(s: State, model: Model) -> None:
    """Stop the clocks of a model that is awake no longer."""
    pause(s, model)
    if model.awake_since is not None:
        s.out.append(ModelDeactivated(model.name, s.now - model.awake_since))
    model.awake_since = None


def never_answered(s: State, model: Model) -> None:
    """Its wake hook succeeded, but its first connection was refused: that is a failed wake."""
    error = "its wake hook succeeded, but the engine refuses connections"
    lose(s, model, error)
    wake_failed(s, model, error)
    model.cleanup_owed = s.errands = True


def wake_failed(s: State, model: Model, error: str) -> None:
    """Count a failed wake, and turn away who waited for it."""
    model.last_error = error
    seconds = model.wake_backoff.fail(s.now, s.rules.backoff_first, s.rules.backoff_max, s.jitter)
    s.agenda.set(("backoff", model.name), model.wake_backoff.until)
    s.out.append(BackoffStarted(model.name, HookKind.WAKE, model.wake_backoff.failures, seconds, error))
    message = f"model {model.name!r} failed to wake: {error}"
    retry_after = model.wake_backoff.remaining(s.now)
    admission.reject_waiters(s, model, (Refusal.WAKE_FAILED, message, retry_after))
