"""What was decided, and why: in words, with the figures that it was decided on. Data, no rules.

A decision that is only repeated (the policy is asked at every event) stays one record, whose ``times`` grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

KEPT = 200
FIGURES = 8  # models whose waiters are told of one by one
SHOWN = 3  # those of them that are named in words
MINUTE = 60.0

Kind = Literal["stay", "switch", "wait"]
By = Literal["policy", "overruled", "max_wait", "min_active", "core", "manual"]

ERRANDS = {
    "requested": "an operator asked for it",
    "pinned": "it is pinned",
    "keep_awake": "it is to be kept awake, and there is room",
    "default": "all has been quiet, and it is the default model",
    "preload": "it is to be awake from the start (preload)",
    "lease": "the GPU is lent to another job",
    "idle": "nobody has asked for it for as long as idle_sleep says",
    "not wanted": "it was removed, or is one more than may be awake, or its engine is gone",
    "stopping": "llmux stops, and on_exit says sleep",
}


class Serving(NamedTuple):
    """A model that is awake."""

    model: str
    in_flight: int
    queued: int


class Waiting(NamedTuple):
    """A model that is not awake and has waiters. Times in seconds."""

    model: str
    queued: int
    oldest: float  # how long the first of them has waited
    waited: float  # how long all of them have waited together
    cost: float  # expected cost of a switch to it


@dataclass(slots=True)
class DecisionRecord:
    """One decision. Times are on the core's clock, in seconds."""

    id: int  # 1, 2, …
    time: float  # when it was made first
    kind: Kind
    target: str | None  # where to; None for stay and for going to sleep
    by: By  # who made it; ``min_active`` holds back what the policy wants
    said: str  # the policy's own reason, its fault, or the errand
    serving: tuple[Serving, ...]
    waiting: tuple[Waiting, ...]  # oldest waiter first; at most FIGURES
    more: int = 0  # waiters of further models
    until: float | None = None  # when it ends by itself, for ``wait``
    last: float = 0.0  # when it was made last
    times: int = 1
    switch: int | None = None  # the switch that it led to
    leaving: tuple[str, ...] = ()  # who made room in that switch

    @property
    def reason(self) -> str:
        """What was done and why, in words with figures."""
        return "; ".join(filter(None, (f"{self._deed()}: {self._why()}".removesuffix(": "), *self._figures())))

    def _deed(self) -> str:
        here = " and ".join(each.model for each in self.serving)
        if self.kind == "switch":
            if self.target is None:
                return f"puts {' and '.join(self.leaving)} to sleep"
            return (
                f"goes from {' and '.join(self.leaving)} to {self.target}"
                if self.leaving
                else f"wakes {self.target}"
            )
        busy = sum(each.in_flight for each in self.serving)
        stays = f"stays with {here}{f' ({busy} in flight)' if busy else ''}" if here else "wakes nobody yet"
        if self.until is None:
            return stays
        left = duration(self.until - self.last)
        if self.by == "min_active":
            return f"{stays} for {left} more, then goes to {self.target}"
        return f"{stays}, and thinks again in {left} at the latest"

    def _why(self) -> str:
        if self.by == "overruled":
            return f"the oldest waiter is there; the policy cannot be followed, it {self.said}"
        if self.by == "max_wait":
            return f"{self.said}, which is as long as max_wait allows"
        if self.by == "manual":
            return "manual mode, only an operator switches"
        if self.by == "min_active":
            return f"{self.said}, but min_active is not over" if self.said else "min_active is not over"
        return ERRANDS.get(self.said, self.said) if self.by == "core" else self.said

    def _figures(self) -> Iterator[str]:
        for each in self.waiting[:SHOWN]:
            have = "has" if each.queued == 1 else "have"
            waited, cost = duration(each.waited), duration(each.cost)
            yield f"{each.queued} waiting for {each.model} {have} cost {waited} of waiting, a switch costs {cost}"
        others = self.more + sum(each.queued for each in self.waiting[SHOWN:])
        if others:
            yield f"{others} more waiting for other models"


def duration(seconds: float) -> str:
    """Return seconds for people: ``0.25 s``, ``14 s``, ``3 min``."""
    if seconds < 2 * MINUTE:
        return f"{seconds:.2g} s" if seconds < MINUTE / 6 else f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.3g} min"
