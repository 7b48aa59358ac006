"""How the policy and its shadows are asked, and what becomes of an answer that is invalid.

A policy cannot break anything: whatever it raises or returns is checked here, reported once for each kind, and
treated as first come, first served. Shadows are asked what they would do, and are not followed; one that fails is
dropped: it is never asked again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from llmux.core.effects import ShadowDropped
from llmux.core.model import Shadow
from llmux.core.phases import Phase
from llmux.core.policy import Decision, Snapshot, Stay, SwitchRecord, SwitchTo, WaitUntil
from llmux.core.state import State

LONGEST = 300  # characters: an answer may be as long as it likes
RAISED = (Exception, SystemExit)  # ``sys.exit()`` in a policy shall not end llmux


def spelled(error: BaseException) -> str:
    """Return the kind of an error and its words, those of one that has none to show left out."""
    try:
        words = str(error)
    except Exception:  # noqa: BLE001 - an error of the user's may raise anything, too
        words = ""
    return f"{type(error).__name__}: {words}"[:LONGEST]


def ask(
    s: State, question: Any, snapshot: Snapshot, choice: Collection[str], *, anticipating: bool = False
) -> tuple[object, str | None]:
    """Ask a policy ``question`` about ``snapshot``; return its decision, and what is wrong with it, or None.

    It may name what is in ``choice``. ``anticipating``: no request waits, so that it may stay.
    """
    try:
        decision = question(snapshot)
        error = _invalid(s, decision, choice, anticipating=anticipating)
    except RAISED as raised:
        decision, error = None, f"raised {spelled(raised)}"
    if error is not None:
        s.overrule(error)
    return decision, error


def _invalid(s: State, decision: object, choice: Collection[str], *, anticipating: bool) -> str | None:
    if isinstance(decision, SwitchTo):
        if decision.model not in choice:
            why = "which is not asleep" if anticipating else "for which nobody waits"
            return f"named {repr(decision.model)[:LONGEST]}, {why}"
    elif isinstance(decision, Stay):
        if not anticipating and all(model.idle for model in s.in_phase(Phase.AWAKE)):
            return "stayed although every awake model is idle"
    elif isinstance(decision, WaitUntil):
        if not decision.time > s.now:
            return f"waits until {decision.time!r}, which is not in the future"
    else:
        return f"answered {repr(decision)[:LONGEST]}, which is no decision"
    return None


def inform(s: State, record: SwitchRecord) -> None:
    """Tell the shadows and the policy of a switch that has ended."""
    for shadow in s.shadows:
        tell = None if shadow.dropped else getattr(shadow.policy, "on_switch_completed", None)
        if tell is not None:
            try:
                tell(record)
            except RAISED as error:
                _drop(s, shadow, error)
    try:
        tell = getattr(s.policy, "on_switch_completed", None)
        if tell is not None:
            tell(record)
    except RAISED as error:
        s.overrule(f"on_switch_completed raised {spelled(error)}")


def ask_shadows(s: State, snapshot: Snapshot, went: str | None) -> None:
    """Ask all shadows; ``went`` is where the policy's answer led, None for staying."""
    for shadow in s.shadows:
        if shadow.dropped:
            continue
        try:
            decision = shadow.policy.decide(snapshot)
            kind, target = _meant(decision, snapshot.waiting)
        except RAISED as error:
            _drop(s, shadow, error)
            continue
        key = kind, target == went
        shadow.counts[key] = shadow.counts.get(key, 0) + 1


def _meant(decision: Decision | object, waiting: Sequence[str]) -> tuple[str, str | None]:
    """Return what kind of answer it is, and where it would have led."""
    if isinstance(decision, SwitchTo) and decision.model in waiting:
        return "switch", decision.model
    if isinstance(decision, Stay):
        return "stay", None
    if isinstance(decision, WaitUntil):
        return "wait", None
    return "nonsense", waiting[0]  # first come, first served would have been used


def _drop(s: State, shadow: Shadow, error: BaseException) -> None:
    shadow.dropped = spelled(error)
    s.out.append(ShadowDropped(shadow.name, shadow.dropped))
