"""Switch costs: an exponential moving average per direction, and of each half.

A cost is measured in seconds from the end of the drain to ready. A direction that was never seen is estimated
from its halves: the slowest sleep (with its verify) of the models that leave, plus the wake of the target. A half
that was never seen is taken from the first guess in the configuration, else from the mean of its kind, else from
``DEFAULT_WAKE`` and ``DEFAULT_SLEEP``.

The last ``PAIRS`` measured directions are kept: with hundreds of models, almost every switch is a new direction.
For a model that sleeps at several levels the halves are kept per level, and directions are estimated from them:
waking out of host memory and waking from a disk have nothing in common.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llmux.core.spec import NO_LEVELS

ALPHA = 0.3
DEFAULT_WAKE = 10.0
DEFAULT_SLEEP = 2.0
PAIRS = 1000  # directions kept: each save writes all of them


@dataclass(slots=True)
class Average:
    """An exponential moving average; the first sample counts whole."""

    seconds: float
    samples: int


class SwitchCosts:
    """What switches cost, measured and estimated. Pairs are (from, to); from is None on a cold start."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str | None, str], Average] = {}
        self.wakes: dict[str, Average] = {}
        self.sleeps: dict[str, Average] = {}
        self.levels: dict[tuple[str, str, str], Average] = {}  # (wake or sleep, model, level)
        self.guesses: Mapping[str, tuple[float | None, float | None]] = {}

    def record(self, sources: Collection[str], target: str, seconds: float) -> float | None:
        """Record a whole switch and return the new estimate; a switch with several sources has no pair: None."""
        if len(sources) > 1:
            return None
        pair = (next(iter(sources), None), target)
        if (known := self.pairs.pop(pair, None)) is not None:
            self.pairs[pair] = known  # the last one that was measured
        elif len(self.pairs) >= PAIRS:
            del self.pairs[next(iter(self.pairs))]
        return _add(self.pairs, pair, seconds)

    def record_wake(self, model: str, seconds: float, level: str = "") -> None:
        """Record how long a wake out of that level took."""
        self._record("wake", self.wakes, model, seconds, level)

    def record_sleep(self, model: str, seconds: float, level: str = "") -> None:
        """Record how long a sleep to that level took, including its verify."""
        self._record("sleep", self.sleeps, model, seconds, level)

    def _record(self, half: str, known: dict[str, Average], model: str, seconds: float, level: str) -> None:
        if level:
            _add(self.levels, (half, model, level), seconds)
        else:
            _add(known, model, seconds)

    def measured(self, source: str | None, target: str) -> float | None:
        """Return the average of a direction, or None if it was never seen."""
        average = self.pairs.get((source, target))
        return average.seconds if average else None

    def estimate(self, sources: Collection[str], target: str, levels: Mapping[str, str] = NO_LEVELS) -> float:
        """Return the expected cost of a switch in seconds, >= 0. With ``levels`` (by model), from the halves."""
        if len(sources) <= 1 and not levels:
            average = self.pairs.get((next(iter(sources), None), target))
            if average is not None:
                return average.seconds
        slowest = max((self.sleep_of(name, levels.get(name, "")) for name in sources), default=0.0)
        return slowest + self.wake_of(target, levels.get(target, ""))

    def wake_of(self, model: str, level: str = "") -> float:
        """Return the expected seconds of a wake out of that level."""
        return self._half("wake", self.wakes, model, level, 0, DEFAULT_WAKE)

    def sleep_of(self, model: str, level: str = "") -> float:
        """Return the expected seconds of a sleep to that level, including its verify."""
        return self._half("sleep", self.sleeps, model, level, 1, DEFAULT_SLEEP)

    def _half(
        self, half: str, known: Mapping[str, Average], model: str, level: str, guessed: int, default: float
    ) -> float:
        own = self.levels.get((half, model, level)) if level else known.get(model)
        if own is not None:
            return own.seconds
        guess = self.guesses.get(model, (None, None))[guessed]
        if guess is not None:
            return guess
        alike: Collection[Average] = ()
        if level:
            alike = [each for (kind, _, name), each in self.levels.items() if (kind, name) == (half, level)]
        if not alike:
            alike = (known[model],) if model in known else known.values()
        return sum(each.seconds for each in alike) / len(alike) if alike else default


def _add(averages: dict[Any, Average], key: object, seconds: float) -> float:
    average = averages.setdefault(key, Average(seconds, 0))
    average.seconds += ALPHA * (seconds - average.seconds)
    average.samples += 1
    return average.seconds
