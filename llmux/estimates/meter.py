"""What is measured per model: how often it is requested, how fast it answers, and which model is requested next.

How fast: a service time alone misleads. It grows with whatever else is served and, where an engine has fewer slots
than llmux admits, with the queue inside the engine. So ``EngineLoad`` measures answers per second by the number of
requests in flight, in powers of two (1, 2-3, 4-7, …); a level that was rarely seen is estimated from the others.
Every event costs the same, however many requests are in flight.

What is next (``Successors``): agents call one model, think about its answer, and call the next. Only the first
arrival after an answer counts as its successor: later ones belong to others. Old observations fade: each counts
``GROWTH`` times as much as the one before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmux.core.policy import Successor
from llmux.core.spec import ARRIVAL_WINDOW

LEVELS = 24  # beyond 2^23 in flight all are alike
FORGET = 64.0  # answers at a level, from which on its old observations fade
TRUST = 3.0  # what the estimate from the other levels is worth, in answers
USUAL = 0.5  # exponent with which a stream slows down as others join it, until it is measured
UNSURE = 0.5  # what that is worth, in answers times the squared logarithm of the distance between levels
_MIDDLES = (1.0, *(1.5 * 2.0**level for level in range(1, LEVELS)))  # in flight, at the middle of each level
SATURATED = 0.9  # share of the highest rate, from which on more in flight add nothing


class EngineLoad:
    """Measurements of one engine; 0 or None until its first answer."""

    __slots__ = ("_answers", "_in_flight", "_rates", "_since", "_streams")

    def __init__(self) -> None:
        self._answers = [0.0] * LEVELS
        self._streams = [0.0] * LEVELS  # seconds in flight, summed over the requests
        self._in_flight = 0
        self._since = 0.0
        self._rates: list[float] | None = None  # answers a second of each stream by level; None: to be computed

    def changed(self, now: float, in_flight: int, *, answered: bool = False) -> None:
        """Record that ``in_flight`` requests are served from now on; ``answered``: because one was answered."""
        if self._in_flight:
            level = self._in_flight.bit_length() - 1
            if level >= LEVELS:
                level = LEVELS - 1
            self._streams[level] += (now - self._since) * self._in_flight
            if answered:
                self._answers[level] += 1.0
                if self._answers[level] > FORGET:
                    self._answers[level] /= 2.0
                    self._streams[level] /= 2.0
            self._rates = None
        self._in_flight, self._since = in_flight, now

    def throughput(self, in_flight: int) -> float:
        """Return the answers a second with so many in flight; 0 until measured."""
        rates = self._reckon() if self._rates is None else self._rates
        return in_flight * rates[min(in_flight.bit_length(), LEVELS) - 1] if rates and in_flight else 0.0

    def drain(self, in_flight: int) -> float:
        """Return the expected seconds until so many have ended if none is added; 0 until measured."""
        rates = self._reckon() if self._rates is None else self._rates
        seconds = 0.0
        for level in range(min(in_flight.bit_length(), LEVELS) if rates else 0):
            low, high = 1 << level, min(in_flight, (2 << level) - 1)
            seconds += (_harmonic(high) - _harmonic(low - 1)) / rates[level]
        return seconds

    def serving(self, waiting: int, limit: int | None) -> float:
        """Return the expected seconds to serve so many requests, at most ``limit`` (None: all) at a time."""
        at_once = waiting if limit is None else min(waiting, limit)
        speed = self.throughput(at_once)
        return self.drain(at_once) + (waiting - at_once) / speed if speed else 0.0

    @property
    def slots(self) -> int | None:
        """From how many in flight on more of them add no answers; None until that was seen."""
        rates = self._reckon() if self._rates is None else self._rates
        seen = [level for level in range(LEVELS) if self._answers[level]] if rates else []
        speeds = [_MIDDLES[level] * rates[level] for level in seen]
        for level, speed in zip(seen[:-1], speeds, strict=False):
            if speed >= SATURATED * max(speeds):
                return 1 << level
        return None

    @property
    def most(self) -> float:
        """The most answers a second that were seen; 0 until measured."""
        rates = self._reckon() if self._rates is None else self._rates
        return max(
            (_MIDDLES[level] * rates[level] for level in range(LEVELS) if self._answers[level])
            if rates
            else (0.0,)
        )

    def _reckon(self) -> list[float]:
        """Return the answers a second of each stream by level: measured, or by a power law where data is scarce.

        An exponent of 0 is an engine with room for more, one of 1 an engine that is full.
        """
        rates: list[float] = []
        self._rates = rates
        answers, streams = sum(self._answers), sum(self._streams)
        if not answers or not streams:
            return rates
        seen = [
            (math.log(_MIDDLES[level]), math.log(count / self._streams[level]), count)
            for level, count in enumerate(self._answers)
            if count and self._streams[level]
        ]
        at = sum(count * place for place, _, count in seen) / answers
        mean = sum(count * speed for _, speed, count in seen) / answers
        spread = sum(count * (place - at) ** 2 for place, _, count in seen) + UNSURE
        common = sum(count * (place - at) * (speed - mean) for place, speed, count in seen)
        slope = min(0.0, max(-1.0, (common - UNSURE * USUAL) / spread))
        for middle, count, seconds in zip(_MIDDLES, self._answers, self._streams, strict=True):
            guess = math.exp(mean + slope * (math.log(middle) - at))
            rates.append((count + TRUST) / (seconds + TRUST / guess))
        return rates


def _harmonic(count: int) -> float:
    """Return 1 + 1/2 + … + 1/count, to within a percent."""
    return math.log(count + 0.5) + 0.5772 if count else 0.0


SERVICE_ALPHA = 0.1
GROWTH = 1.1
ALPHA = 0.3  # of the delays' average
RESCALE = 1e100
FOLLOWERS = 50  # kept for each model: rarer ones are not worth predicting


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
    """Records answers and arrivals, each in O(1)."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, _Row] = defaultdict(_Row)
        self.last: tuple[str, float] | None = None
        """The model whose answer ended last, and when; None once a request has arrived since."""

    def arrived(self, model: str, now: float) -> None:
        """Record an arrival."""
        if self.last is None:
            return
        (before, ended), self.last = self.last, None
        row, delay = self._rows[before], now - ended
        follower = row.followers.get(model)
        if follower is None:
            if len(row.followers) >= FOLLOWERS:  # one that never comes to anything makes room
                del row.followers[min(row.followers, key=lambda name: row.followers[name].weight)]
            follower = row.followers[model] = _Follower(0.0, delay, 0)
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
        """Return which models were requested after this model's answers, by name."""
        row = self._rows.get(model)
        if row is None:
            return {}
        return {
            name: Successor(each.weight / row.total, each.delay, each.seen) for name, each in row.followers.items()
        }


class Meter(EngineLoad):
    """Measurements of one model; see ``llmux.core.spec.Meter``."""

    __slots__ = ("_arrivals", "_name", "_seen", "_successors", "service")

    def __init__(self, name: str, successors: Successors) -> None:
        super().__init__()
        self._name = name
        self._successors = successors
        self._arrivals = 0.0  # sum of an exponential average
        self._seen = 0.0
        self.service = 0.0

    def arrived(self, now: float) -> None:
        """Record an arrival."""
        self._arrivals = self._arrivals * math.exp((self._seen - now) / ARRIVAL_WINDOW) + 1.0
        self._seen = now
        if self._successors.last is not None:
            self._successors.arrived(self._name, now)

    def answered(self, now: float, in_flight: int, took: float) -> None:
        """Record that a request, served for ``took`` seconds, was answered, and how many are in flight now."""
        self.changed(now, in_flight, answered=True)
        self.service = self.service + SERVICE_ALPHA * (took - self.service) if self.service else took
        self._successors.last = self._name, now

    def arrival_rate(self, now: float) -> float:
        """Return the arrivals per second, averaged over about ``ARRIVAL_WINDOW`` seconds."""
        return self._arrivals * math.exp((self._seen - now) / ARRIVAL_WINDOW) / ARRIVAL_WINDOW

    @property
    def successors(self) -> Mapping[str, Successor]:
        """Which models were requested after this model's answers, by name."""
        return self._successors.after(self._name)
