"""What is measured of each model: how often it is asked, how fast it answers, and what is asked after it.

Agents ask one model, think about its answer, and ask the next. Only the first arrival after an answer counts as
its successor: later ones belong to others. Old observations fade: each counts ``GROWTH`` times as much as the one
before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmux.core.estimates import ARRIVAL_WINDOW
from llmux.core.policy import Successor
from llmux.estimates.engine_load import EngineLoad

SERVICE_ALPHA = 0.1
GROWTH = 1.1
ALPHA = 0.3  # of the delays' average
RESCALE = 1e100


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
        self.last: tuple[str, float] | None = None
        """The model whose answer has ended last, and when; None once something has arrived since."""

    def arrived(self, model: str, now: float) -> None:
        """Take note of an arrival."""
        if self.last is None:
            return
        (before, ended), self.last = self.last, None
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


class Meter(EngineLoad):
    """What is measured of one model; see ``llmux.core.estimates.Meter``."""

    __slots__ = ("_arrivals", "_name", "_seen", "_successors", "service")

    def __init__(self, name: str, successors: Successors) -> None:
        super().__init__()
        self._name = name
        self._successors = successors
        self._arrivals = 0.0  # an exponential average's sum
        self._seen = 0.0
        self.service = 0.0

    def arrived(self, now: float) -> None:
        """Take in an arrival."""
        self._arrivals = self._arrivals * math.exp((self._seen - now) / ARRIVAL_WINDOW) + 1.0
        self._seen = now
        self._successors.arrived(self._name, now)

    def answered(self, now: float, in_flight: int, took: float) -> None:
        """Take in that one that was served for ``took`` seconds has been answered, and how many are served now."""
        self.changed(now, in_flight, answered=True)
        self.service = self.service + SERVICE_ALPHA * (took - self.service) if self.service else took
        self._successors.last = self._name, now

    def arrival_rate(self, now: float) -> float:
        """Return the arrivals per second, averaged over about ``ARRIVAL_WINDOW`` seconds."""
        return self._arrivals * math.exp((self._seen - now) / ARRIVAL_WINDOW) / ARRIVAL_WINDOW

    @property
    def successors(self) -> Mapping[str, Successor]:
        """What was asked next after this model's answers, by name."""
        return self._successors.after(self._name)
