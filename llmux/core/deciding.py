"""What happens next while no switch is under way: errands, the overdue, the policy, the idle.

In this order: a lease, what must go (removed, extra, cleanups), pins; then the longest overdue waiter, over
policy and ``min_active``; then whoever fits beside what is awake; then the policy; then idle sleep, preload, what
is to be kept awake, and the default model. In manual mode nobody is switched to for those who wait, nothing goes
to sleep because it is idle, and nothing comes back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from llmux.core import admission, chronicle, lending, levels, quiet, shadows, switching
from llmux.core.complaints import LONGEST, RAISED, spelled
from llmux.core.decisions import By
from llmux.core.effects import PolicyDecided
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.core.policy import Decision, Stay, SwitchTo, WaitUntil
from llmux.core.snapshot import LiveSnapshot
from llmux.core.state import State

ASK_AGAIN = 60.0  # seconds: a longer WaitUntil is asked again then
REASON = 200  # characters of a policy's reason that are kept
FALLBACK = "first come, first served"
ANTICIPATED = "it is likely to be asked next"
ROOM = "there is room beside what is awake"
BACK = "its engine is gone"
CAN_LEAVE = (Phase.AWAKE, Phase.LOST, Phase.FAULTED)
CAN_WAKE = (Phase.ASLEEP, Phase.DEEPENING, Phase.LOST, Phase.FAULTED)


def settle(s: State, snapshot: LiveSnapshot) -> None:
    """Begin what is to be done until a switch is under way or nothing is left to do."""
    while s.switch is None and s.ready and not any(s.in_phase(Phase.UNKNOWN)):
        if s.errands:
            admission.sweep(s)
            levels.make_room(s)
            if _errand(s):
                continue
        serve = _serve if s.lease is None and not s.manual else _leave_to_operators
        if not s.stopping and s.queued and serve(s, snapshot):
            continue
        if not s.stopping and s.errands and (_leisure(s) or _anticipate(s, snapshot)):
            continue
        s.errands = False
        lending.look(s)
        return


# ---- without a waiter


def _errand(s: State) -> bool:
    if s.stopping:
        # No backoff holds the last try; what fails it is left as it is.
        leaving = tuple(s.in_phase(*CAN_LEAVE)) if s.rules.sleep_on_exit else ()
        if leaving:
            switching.begin(s, None, leaving, "stopping")
        return bool(leaving)
    if s.lease is not None and _put_away(s, s.models.values(), "lease"):
        return True
    if _put_away(s, filter(_unwanted, s.models.values()), "not wanted"):
        return True
    pinned = [m for m in s.models.values() if m.pinned and m.phase in CAN_WAKE]
    return s.lease is None and any(_wake(s, model, "pinned") for model in pinned)


def _put_away(s: State, models: Iterable[Model], reason: str) -> bool:
    leaving = tuple(m for m in models if _can_leave(s, m))
    if leaving:
        switching.begin(s, None, leaving, reason)
    return bool(leaving)


def _unwanted(model: Model) -> bool:
    # What is removed or gone finishes its answers first, and meanwhile holds up no switch.
    return model.extra or ((model.removed or model.cleanup_owed) and not model.in_flight)


def _can_leave(s: State, model: Model) -> bool:
    return model.phase in CAN_LEAVE and not model.sleep_backoff.active(s.now)


def _wake(s: State, model: Model, reason: str) -> bool:
    if model.wake_backoff.active(s.now) or (model.phase is Phase.FAULTED and model.sleep_backoff.active(s.now)):
        return False
    leaving = admission.who_leaves(s, model)
    if leaving is None:
        return False
    switching.begin(s, model, leaving, reason, requested=True)
    return True


def _leisure(s: State) -> bool:
    if s.lease is not None:
        return False
    idle = [m for m in s.in_phase(Phase.AWAKE) if _idle_for_long(s, m) and not m.pinned]
    if idle and not s.manual and _put_away(s, idle, "idle"):
        return True
    for model in s.models.values():
        if model.wanted:
            # A preload takes what is free at the start, and displaces nobody.
            model.wanted = False
            asleep = model.phase in (Phase.ASLEEP, Phase.DEEPENING, Phase.LOST)
            if asleep and admission.who_leaves(s, model) == () and _wake(s, model, "preload"):
                return True
    return not s.manual and _come_back(s)


def _come_back(s: State) -> bool:
    if any(_wake(s, model, "keep_awake") for model in quiet.keepsakes(s)):
        return True
    homeward, s.homeward = s.homeward, False
    model = quiet.default(s) if homeward else None
    return model is not None and _wake(s, model, "default")


def _idle_for_long(s: State, model: Model) -> bool:
    after = model.spec.idle_sleep
    if after is None or model.spec.keep_awake or not model.idle or model.awake_since is None:
        return False
    return s.now >= max(model.awake_since, model.last_served or -math.inf) + after


def _anticipate(s: State, snapshot: LiveSnapshot) -> bool:
    """Ask the policy, while all is quiet, whom to wake for those who may come."""
    ask = getattr(s.policy, "anticipate", None)
    if ask is None or not (s.foresee and s.rules.anticipate) or s.queued or s.lease is not None or s.manual:
        return False
    s.foresee = False
    awake = list(s.in_phase(Phase.AWAKE))
    if not awake or not all(model.idle for model in awake):
        return False
    snapshot.ask(())
    try:
        decision = ask(snapshot)
        complaint = _complaint(s, decision, [m.name for m in s.in_phase(Phase.ASLEEP)], quiet=True)
    except RAISED as error:
        decision, complaint = None, f"raised {spelled(error)}"
    if complaint is not None:
        s.overrule(complaint)
    elif isinstance(decision, SwitchTo):
        model = s.models[decision.model]
        leaving = admission.who_leaves(s, model) or ()
        settled = all(s.now >= (m.awake_since or 0.0) + s.rules.min_active for m in leaving)
        return settled and not model.removed and _wake(s, model, ANTICIPATED)
    return False


# ---- for those who wait


def _serve(s: State, snapshot: LiveSnapshot) -> bool:
    waiting = chronicle.waiting_models(s)
    if not waiting:
        return False
    for model in waiting:
        arrived = next(iter(model.queue.values())).arrived
        if arrived + s.rules.max_wait <= s.now and (leaving := admission.who_leaves(s, model)) is not None:
            reason = f"a request has waited {s.now - arrived:.3g} s"
            _tell(s, "overdue", model.name, reason)
            chronicle.keep(s, "switch", model.name, "max_wait", reason, waiting)
            switching.begin(s, model, leaving, reason, decided=True)
            return True
    fitting = _that_fits_beside(s, waiting)
    if fitting is not None:
        chronicle.keep(s, "switch", fitting.name, "core", ROOM, waiting)
        switching.begin(s, fitting, (), ROOM, decided=True)
        return True
    choice = _ask(s, snapshot, waiting)
    if s.shadows:
        shadows.ask(s, snapshot, choice[0].name if choice is not None else None)
    if choice is None:
        return False
    model, by, reason = choice
    # A waiter whose model cannot be made room for was turned away when that became so.
    leaving = admission.who_leaves(s, model)
    assert leaving is not None
    free_at = max(
        (m.awake_since + s.rules.min_active for m in leaving if m.awake_since is not None), default=s.now
    )
    if free_at > s.now:
        s.agenda.set("ask", free_at)
        chronicle.keep(s, "wait", model.name, "min_active", reason, waiting, free_at)
        return False
    chronicle.keep(s, "switch", model.name, by, reason, waiting)
    switching.begin(s, model, leaving, FALLBACK if by == "overruled" else reason or "policy", decided=True)
    return True


def _leave_to_operators(s: State, _snapshot: LiveSnapshot) -> bool:
    """Under a lease all wait for its end; in manual mode only whose engine is gone is woken again."""
    waiting = chronicle.waiting_models(s)
    if not waiting:
        return False
    if s.lease is not None:
        chronicle.keep(s, "stay", None, "core", "lease", waiting)
        return False
    for model in waiting:
        if model.phase is Phase.LOST and admission.who_leaves(s, model) == ():
            chronicle.keep(s, "switch", model.name, "core", BACK, waiting)
            switching.begin(s, model, (), BACK, decided=True)
            return True
    chronicle.keep(s, "stay", None, "manual", "", waiting)
    return False


def _that_fits_beside(s: State, waiting: list[Model]) -> Model | None:
    """Return the first for which nobody has to leave what is awake: there is nothing to ask the policy."""
    if not any(s.in_phase(Phase.AWAKE)):
        return None  # which one comes first may matter to the policy
    for model in waiting:
        several = s.rules.capacity is not None or model.next.companions is not None
        if several and admission.who_leaves(s, model) == ():
            return model
    return None


def _ask(s: State, snapshot: LiveSnapshot, waiting: list[Model]) -> tuple[Model, By, str] | None:
    """Ask the policy; return whom to switch to, who says so and why, or None to leave things as they are."""
    snapshot.ask(tuple(model.name for model in waiting))
    decision: Decision | object
    try:
        decision = s.policy.decide(snapshot)
        complaint = _complaint(s, decision, snapshot.waiting)
    except RAISED as error:
        decision, complaint = None, f"raised {spelled(error)}"
    if complaint is not None:
        s.overrule(complaint)
        oldest = waiting[0]
        _tell(s, "switch", oldest.name, f"{FALLBACK}: the policy was overruled")
        return oldest, "overruled", complaint
    reason = getattr(decision, "reason", "")
    said = reason[:REASON] if isinstance(reason, str) else ""
    if isinstance(decision, SwitchTo):
        _tell(s, "switch", decision.model, said)
        return s.models[decision.model], "policy", said
    if isinstance(decision, WaitUntil):
        again = min(decision.time, s.now + ASK_AGAIN)
        s.agenda.set("ask", again)
        _tell(s, "wait", None, said)
        chronicle.keep(s, "wait", None, "policy", said, waiting, again)
    else:
        _tell(s, "stay", None, said)
        chronicle.keep(s, "stay", None, "policy", said, waiting)
    return None


def _complaint(s: State, decision: object, choice: Collection[str], *, quiet: bool = False) -> str | None:
    if isinstance(decision, SwitchTo):
        if decision.model not in choice:
            why = "which is not asleep" if quiet else "for which nobody waits"
            return f"named {repr(decision.model)[:LONGEST]}, {why}"
    elif isinstance(decision, Stay):
        if not quiet and all(model.idle for model in s.in_phase(Phase.AWAKE)):
            return "stayed although every awake model is idle"
    elif isinstance(decision, WaitUntil):
        if not decision.time > s.now:
            return f"waits until {decision.time!r}, which is not in the future"
    else:
        return f"answered {repr(decision)[:LONGEST]}, which is no decision"
    return None


def _tell(s: State, decision: str, model: str | None, reason: str) -> None:
    if s.last_decision != (decision, model):
        s.last_decision = (decision, model)
        s.out.append(PolicyDecided(decision, model, reason))
