"""Shadows: policies that are asked what they would do, and are not followed.

Nothing here changes what is decided. A shadow that fails is dropped: it is never asked again.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmux.core.complaints import RAISED, spelled
from llmux.core.effects import ShadowDropped
from llmux.core.model import Shadow
from llmux.core.policy import Decision, Snapshot, Stay, SwitchRecord, SwitchTo, WaitUntil
from llmux.core.state import State


def ask(s: State, snapshot: Snapshot, went: str | None) -> None:
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


def tell(s: State, record: SwitchRecord) -> None:
    """Let the shadows learn from a switch that has ended."""
    for shadow in s.shadows:
        inform = None if shadow.dropped else getattr(shadow.policy, "on_switch_completed", None)
        if inform is not None:
            try:
                inform(record)
            except RAISED as error:
                _drop(s, shadow, error)


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
