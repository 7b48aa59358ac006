"""What a policy has seen for itself of costs, drains, arrivals and services, for policies that want to know.

The snapshot shows averages, and averages can be wrong: old, of another load, or a first guess. What was seen
directly is coarse but true, and bounds them.
"""

from __future__ import annotations

import math
from typing import TypeVar

from llmux.core.policy import ModelView, Snapshot, Stay, SwitchRecord, SwitchTo

UNSEEN_COST = 0.35  # of the estimate: a direction that is thought too dear is never tried, and never measured
UNSEEN_SERVICE = 4.0  # seconds
AGE_LEFT = 0.3  # long answers tend to stay long: what has run for t will run for this times t at least
SAMPLES = 3  # fewer of its own say nothing
RATE_OFF, SERVICE_OFF = 1.5, 1.25  # how far an average may be from what was seen
MEMORY = 100  # answers, after which older ones count half
COST_ALPHA, DRAIN_ALPHA = 0.3, 0.2

Key = TypeVar("Key")


def longest(streams: int) -> float:
    """Return how long the longest of so many services is, in means (of exponential ones, about)."""
    return 0.5 + math.log(1 + streams)


class Memory:
    """What visits have shown. ``watch`` it at every decision, ``left`` and ``learn`` at every switch."""

    def __init__(self) -> None:
        self.costs: dict[tuple[str, str], float] = {}
        self._guesses: dict[str, float] = {}  # costs from here that were never measured
        self._drains: dict[str, float] = {}  # seconds, of one stream
        self._left: dict[str, float] = {}  # when
        self._leaving = ("", 0)  # model, streams in flight
        self._work: dict[str, tuple[float, float]] = {}  # stream-seconds, answers
        self._began = -1.0  # when it was asked first
        self._last = (-1.0, 0.0, 0, 0)  # at the last decision: visit, time, admissions, in flight

    def watch(self, home: ModelView, time: float) -> None:
        """Count what the awake model has worked off since the last decision of this visit."""
        if self._began < 0.0:
            self._began = time
        visit, then, admissions, streams = self._last
        if visit == home.awake_since:
            work, answers = self._work.get(home.name, (0.0, 0.0))
            keep = 0.5 if answers > MEMORY else 1.0
            work = work * keep + (time - then) * (streams + home.in_flight) / 2.0
            answers = answers * keep + home.admissions - admissions + streams - home.in_flight
            self._work[home.name] = work, answers
        self._last = home.awake_since or 0.0, time, home.admissions, home.in_flight

    def left(self, home: ModelView, time: float) -> None:
        """Note that the awake model is about to be left."""
        self._leaving = home.name, home.in_flight
        self._left[home.name] = time

    def learn(self, record: SwitchRecord) -> None:
        """Take in what a direction and its drain took."""
        self._guesses.clear()
        if record.cost is None or record.to is None or len(record.from_models) != 1:
            return
        source = record.from_models[0]
        _average(self.costs, (source, record.to), record.cost, COST_ALPHA)
        name, streams = self._leaving
        if name == source and streams:
            _average(self._drains, name, record.drain / longest(streams), DRAIN_ALPHA)

    def cost(self, home: ModelView, model: ModelView) -> float:
        """Return the seconds of a switch."""
        known = self.costs.get((home.name, model.name))
        if known is None:
            known = self._guesses.get(model.name)
        if known is None:
            known = self._guesses[model.name] = UNSEEN_COST * model.switch_cost
        return known

    def service(self, model: ModelView) -> float:
        """Return the mean seconds of an answer."""
        seconds = model.service_time or UNSEEN_SERVICE
        work, answers = self._work.get(model.name, (0.0, 0.0))
        return _near(seconds, work / answers, SERVICE_OFF) if answers >= SAMPLES else seconds

    def rate(self, home: ModelView, time: float) -> float:
        """Return arrivals per second; all that came since home was left have been admitted or wait."""
        count = home.admissions + home.queued
        seconds = max(time - self._left.get(home.name, self._began), 1.0)
        return _near(home.arrival_rate, count / seconds, RATE_OFF) if count >= SAMPLES else home.arrival_rate

    def drain(self, home: ModelView, time: float) -> float:
        """Return the seconds until what is in flight has ended."""
        if not home.in_flight:
            return 0.0
        one = self._drains.get(home.name, self.service(home))
        age = time - (time if home.oldest_admission is None else home.oldest_admission)
        return max(one * longest(home.in_flight), AGE_LEFT * age)


def foresee(now: Snapshot, seen: Memory) -> Stay | SwitchTo:
    """Return the model that is worth waking before it is asked: less waiting on average, whoever comes next.

    If its request comes after ``delay``, that much of the switch is over; if the awake model is asked again after
    all, its request waits for the whole switch and the one back.
    """
    awake = [now.models[name] for name in now.awake]
    if len(awake) != 1 or (awake[0].last_served or 0.0) <= (awake[0].awake_since or 0.0):
        return Stay("who is awake now has not been asked yet")
    home = awake[0]
    again = home.successors.get(home.name)
    best, most = "", 0.0
    for name, next_one in home.successors.items():
        if name not in now.models or name == home.name or next_one.seen < SAMPLES:
            continue
        there = seen.cost(home, now.models[name])
        back = seen.costs.get((name, home.name), there)
        saved = next_one.share * min(there, next_one.delay) - (again.share * (there + back) if again else 0.0)
        if saved > most:
            best, most = name, saved
    return SwitchTo(best, reason="likely to be asked next") if best else Stay("nobody is likely enough to be next")


def _near(value: float, own: float, factor: float) -> float:
    return min(max(value, own / factor), own * factor)


def _average(averages: dict[Key, float], key: Key, value: float, alpha: float) -> None:
    old = averages.setdefault(key, value)
    averages[key] = old + alpha * (value - old)
