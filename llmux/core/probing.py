"""What ``alive`` is asked for: who runs at the start, and whether an engine still is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
            model.woken = model.spec  # what is asked is what is adopted, whatever a reload brings meanwhile
            model.probe = s.run_hook(model, HookKind.ALIVE)


def first_answer(s: State, model: Model, *, ok: bool) -> None:
    """Take in a first ``alive``; with the last of them, say who holds the GPU."""
    model.found = ok
    if all(other.found is not None for other in s.in_phase(Phase.UNKNOWN)):
        adopt(s)


def adopt(s: State) -> None:
    """Adopt what runs. What may not be awake beside it is extra, and is put to sleep at once."""
    rank = len(s.recent)
    # Those that are found alive come first, the most recently used of them first; then those that only the
    # state file suspects.
    found = sorted(s.in_phase(Phase.UNKNOWN), key=lambda m: (not m.found, s.recent.get(m.name, rank), m.order))
    for model in found:
        if model.found:
            s.move(model, Phase.AWAKE)
            activated(s, model)
        elif model.name in s.recorded:
            s.move(model, Phase.LOST)
            model.last_error = "was on the GPU when llmux ended, and is not alive"
        else:
            s.move(model, Phase.ASLEEP)
            model.woken = None
            slept = s.recorded_levels.get(model.name)
            model.level = next((level for level in model.spec.levels if level.name == slept), None)
        model.found = None
    s.recorded_levels = {}  # what a reload brings later may have slept elsewhere
    find_extras(s, found)
    adopted = tuple(model.name for model in found if model.phase is Phase.AWAKE)
    s.out.extend(ModelActivated(name, 0, (), None) for name in adopted)
    s.errands = True
    s.record_holders()
    if not s.ready:
        s.ready = True
        s.out.append(Ready(adopted))


def find_extras(s: State, newcomers: Sequence[Model] = ()) -> None:
    """Mark whom there is no room for: a start may find too many, and a reload may leave less room.

    The switch under way has its room. Then come the pinned, those that answer, the most recently used, and at
    last the newcomers in their order, for whom what leaves still is there.
    """
    target, leaving = (s.switch.target, s.switch.leaving) if s.switch else (None, ())
    chosen = [s.switch.spec] if s.switch and s.switch.spec else []

    def choose(models: Iterable[Model]) -> None:
        for model in models:
            was_extra, model.extra = model.extra, not placement.fits([*chosen, model.running], s.rules.capacity)
            if not model.extra:
                chosen.append(model.running)
                if was_extra:
                    admission.admit_waiters(s, model)

    apart = {target, *leaving, *newcomers}
    staying = [m for m in s.models.values() if m.holds and m.phase is not Phase.UNKNOWN and m not in apart]
    choose(sorted(staying, key=lambda m: (not m.pinned, m.phase in (Phase.LOST, Phase.FAULTED), -m.last_used)))
    chosen.extend(model.running for model in leaving if model.holds and model is not target)
    choose(model for model in newcomers if model.holds)


# ---- while awake


def activated(s: State, model: Model) -> None:
    """Start the clocks of a model that has just become awake."""
    model.epoch += 1
    model.awake_since = s.now
    model.admissions = 0
    model.missed = 0
    model.suspected = model.woken_by_hook = False
    model.last_used = s.now
    schedule(s, model)
    rest(s, model)


def schedule(s: State, model: Model) -> None:
    """Set when ``alive`` is asked next."""
    if s.rules.alive_every > 0 and not s.stopping:
        s.agenda.set(("probe", model.name), s.now + s.rules.alive_every)
    else:
        s.agenda.cancel(("probe", model.name))


def rest(s: State, model: Model) -> None:
    """Start the idle clock if the model may sleep after a while without requests."""
    if model.spec.idle_sleep is not None and model.idle and not s.stopping:
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
    detail = detail or "failed"
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
    if last_byte is not None and s.now - last_byte <= s.rules.alive_every:
        schedule(s, model)
        return
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
    s.errands = True
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
    model.wake_backoff.failures = model.unproven_failures
    wake_failed(s, model, error)
    model.cleanup_owed = s.errands = True


def wake_failed(s: State, model: Model, error: str) -> None:
    """Count a failed wake, and turn away who waited for it."""
    model.last_error = error
    seconds = model.wake_backoff.fail(s.now, s.rules.backoff_first, s.rules.backoff_max, s.jitter)
    s.agenda.set(("wake backoff", model.name), model.wake_backoff.until)
    s.out.append(BackoffStarted(model.name, HookKind.WAKE, model.wake_backoff.failures, seconds, error))
    message = f"model {model.name!r} failed to wake: {error}"
    retry_after = model.wake_backoff.remaining(s.now)
    admission.reject_waiters(s, model, (Refusal.WAKE_FAILED, message, retry_after))
