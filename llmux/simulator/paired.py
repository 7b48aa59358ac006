"""Whether one run is better than another by more than chance, on the same requests.

Waits within a run depend on each other: a burst, or a model that stays awake for long, makes many of them longer
together. So consecutive requests are taken together in blocks, and blocks are drawn anew, the same ones for both
(a paired block bootstrap): the share of the draws in which one is better says how sure that is.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

BLOCKS = 20
DRAWS = 200
FEWEST = 2 * BLOCKS  # requests: fewer say nothing

Measure = Callable[[Sequence[float], Sequence[float]], float]
"""What is compared, of values and the weight of each; less is better."""


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted mean; 0 of none."""
    whole = sum(weights)
    return sum(map(float.__mul__, values, weights)) / whole if whole > 0.0 else 0.0


def quantile(share: float) -> Measure:
    """Return what gives the smallest value that has at least ``share`` of the weight at or below it."""

    def measure(values: Sequence[float], weights: Sequence[float]) -> float:
        ordered = sorted(zip(values, weights, strict=True))
        wanted, below = share * sum(weights), 0.0
        for value, weight in ordered:
            below += weight
            if below >= wanted:
                return value
        return ordered[-1][0] if ordered else 0.0

    return measure


def beyond(limit: float) -> Measure:
    """Return what gives the share of the weight of values above ``limit``."""

    def measure(values: Sequence[float], weights: Sequence[float]) -> float:
        whole = sum(weights)
        late = sum(weight for value, weight in zip(values, weights, strict=True) if value > limit)
        return late / whole if whole > 0.0 else 0.0

    return measure


@dataclass(frozen=True, slots=True)
class Verdict:
    """``before`` and ``after`` are the measures; ``sure`` is the share of the draws in which ``after`` is less."""

    before: float
    after: float
    sure: float

    @property
    def gain(self) -> float:
        """By which share ``after`` is less; negative where it is more."""
        return 1.0 - self.after / self.before if self.before > 0.0 else -math.inf if self.after > 0.0 else 0.0


def compare(
    before: Sequence[float],
    after: Sequence[float],
    measure: Measure = mean,
    weights: Sequence[float] | None = None,
    *,
    seed: int = 1,
) -> Verdict:
    """Compare two runs by a value for each of the same requests, in the order of their arrival."""
    count = len(before)
    weights = weights or [1.0] * count
    found = measure(before, weights), measure(after, weights)
    if count < FEWEST:
        return Verdict(*found, 0.5)
    cuts = _cuts(weights)
    blocks = [(before[begin:end], after[begin:end], weights[begin:end]) for begin, end in pairwise(cuts)]
    if measure is mean:
        blocks = [_summed(*block) for block in blocks]  # a mean of means of blocks is the mean of all
    dice = random.Random(seed)  # noqa: S311 - a simulation, no secret
    better = 0.0
    for _ in range(DRAWS):
        drawn = dice.choices(blocks, k=len(blocks))
        one = [value for block in drawn for value in block[0]]
        other = [value for block in drawn for value in block[1]]
        heavy = [value for block in drawn for value in block[2]]
        a, b = measure(one, heavy), measure(other, heavy)
        better += 1.0 if b < a else 0.5 if b == a else 0.0
    return Verdict(*found, better / DRAWS)


Block = tuple[Sequence[float], Sequence[float], Sequence[float]]


def _summed(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> Block:
    return [mean(before, weights)], [mean(after, weights)], [sum(weights)]


def _cuts(weights: Sequence[float]) -> list[int]:
    """Return where blocks of about the same weight begin, and the end."""
    running, total = [], 0.0
    for weight in weights:
        total += weight
        running.append(total)
    cuts = {bisect_left(running, total * number / BLOCKS) for number in range(1, BLOCKS)}
    return sorted({0, len(weights), *cuts})
