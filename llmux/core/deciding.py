"""What happens next while no switch is under way: a ladder of rules; the first that applies begins a switch.

``LADDER`` is the order; the documentation's list is made from it, by the names and docstrings of the rules. A rule
that something waits for is looked at after every event, the others only when something may have changed for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from llmux.core import admission, commands, levels, policy_calls, residency, switching
from llmux.core.effects import By, Decided, Kind, PolicyDecided
from llmux.core.model import AWAKE, Model, Reason
from llmux.core.phases import Phase
from llmux.core.policy import SwitchTo, WaitUntil
from llmux.core.policy_calls import LiveSnapshot
from llmux.core.state import State
from llmux.core.timers import Timer

ASK_AGAIN = 60.0  # seconds: a longer WaitUntil is asked again then
LONGEST_REASON = 200  # characters of a policy's reason that are kept
FALLBACK = "first come, first served"
CAN_LEAVE = (AWAKE, Phase.LOST, Phase.FAULTED)
CAN_WAKE = (Phase.ASLEEP, Phase.DEEPENING, Phase.LOST, Phase.FAULTED)
AWAY = (Phase.ASLEEP, Phase.DEEPENING, Phase.LOST)


class Moment(NamedTuple):
    """What the rules look at beside the state."""

    snapshot: LiveSnapshot
    waiting: list[Model]  # models that are not awake and have waiters, the oldest waiter's first


class Rule(NamedTuple):
    """One rung: begin a switch if it is time for it, and say whether one was begun."""

    apply: Callable[[State, Moment], bool]
    for_waiters: bool = False  # asked whenever something waits
    always: bool = False  # asked under a lease and in manual mode, too


def settle(s: State, snapshot: LiveSnapshot) -> None:
    """Begin what is due until a switch is under way or nothing is left to do."""
    while s.switch is None and s.ready and not s.in_phase(Phase.UNKNOWN):
        if s.maintenance_due:
            admission.sweep(s)
            levels.make_room(s)
        moment = Moment(snapshot, residency.waiting_models(s) if s.queued else [])
        by_itself = not s.manual and s.lease is None
        for apply, for_waiters, always in STOPPING if s.stopping else LADDER:
            due = moment.waiting if for_waiters else s.maintenance_due
            if due and (by_itself or always) and apply(s, moment):
                break
        else:
            s.maintenance_due = False
            commands.tell_lease_held(s)
            return


# ---- what must be


def _sleep_on_exit(s: State, _: Moment) -> bool:
    """While llmux stops, all is put to sleep if ``on_exit`` says so."""
    # No backoff holds the last try; what fails it is left as it is.
    leaving = tuple(s.in_phase(*CAN_LEAVE)) if s.rules.sleep_on_exit else ()
    if leaving:
        switching.begin(s, None, leaving, Reason.STOPPING)
    return bool(leaving)


def _lease(s: State, _: Moment) -> bool:
    """Under a lease, all that may hold the GPU is put to sleep."""
    return s.lease is not None and _put_away(s, s.models.values(), Reason.LEASE)


def _unwanted(s: State, _: Moment) -> bool:
    """What was removed, exceeds what may be awake, or needs a cleanup is put to sleep."""
    # What is removed or gone finishes its answers first, and meanwhile holds up no switch.
    found = [
        model
        for model in s.models.values()
        if model.extra or ((model.removed or model.cleanup.owed) and not model.in_flight)
    ]
    return bool(found) and _put_away(s, found, Reason.UNWANTED)


def _pinned(s: State, _: Moment) -> bool:
    """A pinned model is woken."""
    pinned = [model for model in s.in_phase(*CAN_WAKE) if model.pinned]
    return s.lease is None and any(_wake(s, model, Reason.PINNED) for model in pinned)


# ---- for what waits


def _operators(s: State, m: Moment) -> bool:
    """Under a lease requests wait for its end; in manual mode only what was lost is woken for them."""
    if s.lease is not None:
        _tell(s, "stay", None, "core", "lease")
    elif s.manual:
        for model in m.waiting:
            if model.phase is Phase.LOST and _fits(s, model):
                switching.begin(s, model, (), Reason.BACK)
                return True
        _tell(s, "stay", None, "manual", "")
    return False


def _overdue(s: State, m: Moment) -> bool:
    """The longest waiter goes first once it has waited for ``max_wait``, over policy and ``min_active``."""
    for model in m.waiting:
        arrived = s.turns.since(model)
        if arrived + s.rules.max_wait <= s.now and (leaving := residency.who_leaves(s, model)) is not None:
            words = f"a request has waited {s.now - arrived:.3g} s"
            _announce(s, "overdue", model.name, words)
            switching.begin(s, model, leaving, Reason.OVERDUE, words=words, by="max_wait")
            return True
    return False


def _room(s: State, m: Moment) -> bool:
    """What fits beside what is awake is woken without asking the policy."""
    # While nothing is awake, which one comes first may matter to the policy.
    if not s.in_phase(AWAKE):
        return False
    for model in m.waiting:
        several = s.rules.capacity is not None or model.next.companions is not None
        if several and _fits(s, model):
            switching.begin(s, model, (), Reason.ROOM)
            return True
    return False


def _policy(s: State, m: Moment) -> bool:
    """The policy decides, held back by ``min_active``."""
    choice = _ask_policy(s, m)
    if choice is None:
        return False
    model, by, said = choice
    leaving = residency.who_leaves(s, model)
    # The waiters of a model that cannot be made room for were rejected when that became so.
    assert leaving is not None
    free_at = _free_at(s, leaving)
    if free_at > s.now:
        s.timers.set(Timer.ASK, free_at)
        _tell(s, "wait", model.name, "min_active", said, free_at)
        return False
    words = FALLBACK if by == "overruled" else said
    switching.begin(s, model, leaving, Reason.POLICY, words=words, by=by, said=said)
    return True


def _free_at(s: State, leaving: Iterable[Model]) -> float:
    """Return when ``min_active`` is over for all of them."""
    since = [model.awake_since for model in leaving if model.awake_since is not None]
    return max(since) + s.rules.min_active if since else s.now


def _ask_policy(s: State, m: Moment) -> tuple[Model, By, str] | None:
    """Ask the policy; return what to switch to, what says so and why, or None to leave things as they are."""
    m.snapshot.ask(tuple([model.name for model in m.waiting]))
    decision, error = policy_calls.ask(s, s.policy.decide, m.snapshot, m.snapshot.waiting)
    if error is not None:
        _announce(s, "switch", m.waiting[0].name, f"{FALLBACK}: the policy was overruled")
        return m.waiting[0], "overruled", error
    reason = getattr(decision, "reason", "")
    said = reason[:LONGEST_REASON] if isinstance(reason, str) else ""
    if isinstance(decision, SwitchTo):
        _announce(s, "switch", decision.model, said)
        return s.models[decision.model], "policy", said
    kind: Kind = "stay"
    again = None
    if isinstance(decision, WaitUntil):
        kind, again = "wait", min(decision.time, s.now + ASK_AGAIN)
        s.timers.set(Timer.ASK, again)
    _announce(s, kind, None, said)
    _tell(s, kind, None, "policy", said, again)
    return None


# ---- what no request waits for


def _idle(s: State, _: Moment) -> bool:
    """What has been idle for ``idle_sleep``, or as long as a request said, is put to sleep."""
    idle = [model for model in s.in_phase(AWAKE) if _idle_for_long(s, model)]
    return bool(idle) and _put_away(s, idle, Reason.IDLE)


def _idle_for_long(s: State, model: Model) -> bool:
    after = model.idle_after
    if after is None or model.spec.keep_awake or model.pinned or not model.idle or model.awake_since is None:
        return False
    return s.now >= max(model.awake_since, model.last_served or -math.inf) + after


def _preload(s: State, _: Moment) -> bool:
    """At the start, a model with ``preload`` is woken if it displaces nothing."""
    for model in s.models.values() if s.lease is None else ():
        if model.preload_due:
            model.preload_due = False
            if model.phase in AWAY and _fits(s, model) and _wake(s, model, Reason.PRELOAD):
                return True
    return False


def _keep_awake(s: State, _: Moment) -> bool:
    """A model with ``keep_awake`` comes back as soon as it fits."""
    away = [model for model in s.in_phase(*AWAY) if model.spec.keep_awake and _free_to_wake(model)]
    return any(_fits(s, model) and _wake(s, model, Reason.KEEP_AWAKE) for model in away)


def _fits(s: State, model: Model) -> bool:
    return residency.who_leaves(s, model) == ()


def _default(s: State, _: Moment) -> bool:
    """After ``default_after`` seconds without requests the default model comes back."""
    model = s.models.get(s.rules.default_model or "")
    if s.requests or not s.default_due:
        return False
    s.default_due = False  # once in each such time
    if model is None or model.phase not in AWAY or not _free_to_wake(model):
        return False
    leaving = residency.who_leaves(s, model)
    displaces = leaving is None or any(other.spec.keep_awake for other in leaving)
    return not displaces and _wake(s, model, Reason.DEFAULT)


def _free_to_wake(model: Model) -> bool:
    return not (model.removed or model.put_away)


def _anticipate(s: State, m: Moment) -> bool:
    """Where ``anticipate`` is set, the policy may wake a model before it is asked."""
    ask = getattr(s.policy, "anticipate", None)
    if ask is None or not (s.answer_ended and s.rules.anticipate) or s.queued:
        return False
    s.answer_ended = False
    awake = s.in_phase(AWAKE)
    if not awake or not all(model.idle for model in awake):
        return False
    m.snapshot.ask(())
    asleep = [model.name for model in s.in_phase(Phase.ASLEEP)]
    decision, error = policy_calls.ask(s, ask, m.snapshot, asleep, anticipating=True)
    if error is not None or not isinstance(decision, SwitchTo):
        return False
    model = s.models[decision.model]
    settled = _free_at(s, residency.who_leaves(s, model) or ()) <= s.now
    return settled and not model.removed and _wake(s, model, Reason.ANTICIPATED)


LADDER = (
    Rule(_lease, always=True),
    Rule(_unwanted, always=True),
    Rule(_pinned, always=True),
    Rule(_operators, for_waiters=True, always=True),
    Rule(_overdue, for_waiters=True),
    Rule(_room, for_waiters=True),
    Rule(_policy, for_waiters=True),
    Rule(_idle),
    Rule(_preload, always=True),
    Rule(_keep_awake),
    Rule(_default),
    Rule(_anticipate),
)
STOPPING = (Rule(_sleep_on_exit, always=True),)


# ---- what the rules share


def _put_away(s: State, models: Iterable[Model], reason: Reason) -> bool:
    leaving = tuple([m for m in models if m.phase in CAN_LEAVE and not m.sleep_backoff.active(s.now)])
    if leaving:
        switching.begin(s, None, leaving, reason)
    return bool(leaving)


def _wake(s: State, model: Model, reason: Reason) -> bool:
    if model.wake_backoff.active(s.now) or (model.phase is Phase.FAULTED and model.sleep_backoff.active(s.now)):
        return False
    leaving = residency.who_leaves(s, model)
    if leaving is None:
        return False
    switching.begin(s, model, leaving, reason, requested=True)
    return True


def _announce(s: State, decision: str, model: str | None, reason: str) -> None:
    if s.last_decision != (decision, model):
        s.last_decision = (decision, model)
        s.out.append(PolicyDecided(decision, model, reason))


def _tell(s: State, kind: Kind, target: str | None, by: By, said: str, until: float | None = None) -> None:
    """Tell a decision that begins no switch, with figures unless it is the last one once more."""
    told = (kind, target, by)
    if s.explain:
        figures = None if told == s.last_told else s.figures(s)
        s.last_told = told
        s.out.append(Decided(kind, target, by, said, until, figures))


# ---- when the default model is due


def watch_idle(s: State) -> None:
    """See whether all has become idle, or no longer is. Called after every event while there is a default model.

    Idle is: the last request has ended, however it ended; and so it is at the start. The default model is woken
    once in each such time, so that its own idle sleep is not undone, nor a wake that fails repeated for ever.
    """
    is_idle = not s.requests and s.ready and not s.stopping
    if is_idle != s.is_idle:
        s.is_idle, s.default_due = is_idle, False
        s.timers.set(Timer.DEFAULT, s.now + s.rules.default_after if is_idle else None)
