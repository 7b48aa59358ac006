"""Which model is asked after which: what follows the end of a model's answer, and how soon.

Agents ask one model, think about its answer, and ask the next. Only the first arrival after an answer counts as
its successor: later ones belong to others. Old observations fade: each counts ``GROWTH`` times as much as the one
before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

GROWTH = 1.1
ALPHA = 0.3  # of the delays' average
RESCALE = 1e100


class Successor(NamedTuple):
    """A model that was asked after another one's answer."""

    share: float  # of those answers, 0 to 1; recent ones count more
    delay: float  # seconds from the end of the answer to the arrival, on average
    seen: int  # how often


@dataclass(slots=True)
class _Follower:
    weight: float
    delay: float
    seen: int


@dataclass(slots=True)
class _Row:
    followers: dict[str, _Follower] = field(default_factory=dict)
    gain: float = 1.0
    total: float = 0.0


class Successors:
    """Takes in answers and arrivals, each in O(1)."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, _Row] = defaultdict(_Row)
        self._last: tuple[str, float] | None = None

    def answered(self, model: str, now: float) -> None:
        """Take note that an answer has ended."""
        self._last = model, now

    def arrived(self, model: str, now: float) -> None:
        """Take note of an arrival."""
        if self._last is None:
            return
        (before, ended), self._last = self._last, None
        row, delay = self._rows[before], now - ended
        follower = row.followers.get(model) or row.followers.setdefault(model, _Follower(0.0, delay, 0))
        follower.weight += row.gain
        follower.delay += ALPHA * (delay - follower.delay)
        follower.seen += 1
        row.total += row.gain
        row.gain *= GROWTH
        if row.gain > RESCALE:
            for each in row.followers.values():
                each.weight /= row.gain
            row.total /= row.gain
            row.gain = 1.0

    def after(self, model: str) -> Mapping[str, Successor]:
        """Return what followed this model's answers, by name."""
        row = self._rows.get(model)
        if row is None:
            return {}
        return {
            name: Successor(each.weight / row.total, each.delay, each.seen) for name, each in row.followers.items()
        }
