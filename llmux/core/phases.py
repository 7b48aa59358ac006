"""The phases of a model and the transitions between them, as data.

``TRANSITIONS`` is the only place that says what may follow what; ``mermaid()`` draws it for DESIGN.md.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

KEPT = 5000
"""Moves that are remembered: an hour of a switch every six seconds."""


class Phase(enum.StrEnum):
    """Where a model stands between the request queue and the GPU."""

    UNKNOWN = "unknown"  # until its first alive has ended
    ASLEEP = "asleep"
    WAKING = "waking"
    AWAKE = "awake"
    DRAINING = "draining"
    DEEPENING = "deepening"  # asleep, and its sleep hook runs again: host memory is short
    SLEEPING = "sleeping"  # sleep, stop, verify, and the cleanup after a failure
    LOST = "lost"  # the engine is gone, cleanup is owed
    FAULTED = "faulted"  # a sleep failed: nobody knows who owns the GPU


class Move(NamedTuple):
    """A model came from one phase into another."""

    id: int  # 1, 2, …; grows by one with each move, of whatever model
    time: float  # on the core's clock, in seconds
    model: str
    source: Phase
    target: Phase


# In these phases a model holds the GPU, as far as anybody can know.
HOLDING = frozenset(
    {Phase.UNKNOWN, Phase.WAKING, Phase.AWAKE, Phase.DRAINING, Phase.SLEEPING, Phase.LOST, Phase.FAULTED}
)

# from → {to: why}
TRANSITIONS: Mapping[Phase, Mapping[Phase, str]] = {
    Phase.UNKNOWN: {
        Phase.AWAKE: "alive: adopted",
        Phase.ASLEEP: "not alive",
        Phase.LOST: "not alive, but the state file says it may hold the GPU",
    },
    Phase.ASLEEP: {Phase.WAKING: "wake hook starts", Phase.DEEPENING: "host memory is short: deeper"},
    Phase.DEEPENING: {Phase.ASLEEP: "sleep hook ended"},
    Phase.WAKING: {
        Phase.AWAKE: "wake succeeded",
        Phase.SLEEPING: "wake failed: cleanup",
        Phase.LOST: "wake ended, cleanup has to wait",
    },
    Phase.AWAKE: {Phase.DRAINING: "has to leave", Phase.LOST: "engine gone"},
    Phase.DRAINING: {
        Phase.SLEEPING: "drained: sleep hook starts",
        Phase.AWAKE: "called off: reopened",
        Phase.LOST: "engine gone",
    },
    Phase.SLEEPING: {
        Phase.ASLEEP: "sleep (or stop) succeeded, verify passed",
        Phase.AWAKE: "sleep failed, engine still runs",
        Phase.FAULTED: "sleep failed, nobody knows",
    },
    Phase.LOST: {
        Phase.WAKING: "its own request",
        Phase.SLEEPING: "cleanup",
        Phase.ASLEEP: "reset",
    },
    Phase.FAULTED: {Phase.SLEEPING: "next try", Phase.ASLEEP: "reset"},
}


def mermaid() -> str:
    """Return the transition table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> UNKNOWN"]
    lines += [
        f"    {source.name} --> {target.name}: {why}"
        for source, targets in TRANSITIONS.items()
        for target, why in targets.items()
    ]
    return "\n".join(lines) + "\n"
