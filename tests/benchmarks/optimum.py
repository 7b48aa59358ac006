"""How good can a rule be that knows rates and costs, but not the future? Two models, by dynamic programming.

    python -m tests.benchmarks.optimum

Poisson arrivals and exponential answers. The state is which model is awake, how many requests it has and how many
wait for the other; value iteration finds the best time to leave, for the mean wait. ``idle`` is evaluated next to
it. Both are averages over infinite time.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmux.simulator import EngineModel
from llmux.simulator.synthetic import Poisson, generate
from tests.benchmarks.scenarios import ENGINES

Array = np.ndarray[Any, np.dtype[np.float64]]
NODES = 4  # lengths of a drain that stand for all
ROUNDS, LAG = 3000, 10  # of value iteration; after how many a departure is valued anew
CLOSE = 0.002  # how far the bounds of the mean may be apart
STEP = 0.95
CASES = (((0.33, 0.17), 1.0), ((0.33, 0.17), 10.0), ((0.15, 0.15), 10.0), ((0.45, 0.05), 10.0))


@dataclass(frozen=True)
class Pair:
    """Two models on one engine; ``rates`` in requests a second, ``cost`` in seconds."""

    rates: tuple[float, float]
    engine: EngineModel
    cost: float
    work: float  # tokens of an answer, on average
    most: int = 50  # requests of a model, beyond which they are not told apart

    def mean_wait(self, *, idle: bool) -> float:
        """Return the mean wait in seconds, under the best rule or under ``idle``."""
        slots = min(self.engine.slots, self.most - 1)
        count = np.arange(self.most)
        busy = np.minimum(count, slots)
        ends = np.array([n * self.engine.rate(max(n, 1)) / self.work for n in range(slots + 1)])
        spans = [self._spans(n, ends) for n in range(slots + 1)]
        lengths = np.array([sum(span) / len(span) for span in spans])[busy]
        squares = np.array([sum(t * t for t in span) / len(span) for span in spans])[busy]
        comes = {(t, rate): self._comes(rate * t) for span in spans for t in span for rate in set(self.rates)}
        waiting = np.maximum(0, count - slots)[:, None] + count[None, :]
        total = sum(self.rates) + ends.max()
        values: list[Array] = [np.zeros((self.most, self.most)) for _ in self.rates]
        leaving: list[Array] = [*values]
        for turn in range(ROUNDS):
            changes = []
            for home, (own, others) in enumerate((self.rates, self.rates[::-1])):
                value = values[home]
                if turn % LAG == 0:
                    after = np.empty_like(value)
                    for n, span in enumerate(spans):  # while it drains and switches
                        rows = slice(n, n + 1) if n < slots else slice(slots, None)
                        shut_out = np.maximum(0, count - slots)[rows]
                        after[rows] = sum(
                            (comes[t, others] @ (values[1 - home] @ comes[t, own][shut_out].T)).T for t in span
                        ) / len(span)
                    paid = waiting * lengths[:, None] + (own + others) * squares[:, None] / 2
                    leaving[home] = paid + after
                more, fewer = np.vstack([value[1:], value[-1:]]), np.vstack([value[:1], value[:-1]])
                asked = np.hstack([value[:, 1:], value[:, -1:]])
                ending = ends[busy][:, None]
                stay = waiting + own * (more - value) + others * (asked - value) + ending * (fewer - value)
                go = (leaving[home] - value) / np.maximum(lengths, 1.0 / total)[:, None]
                go[:, 0] = np.inf
                if idle:
                    stay[0, 1:], go[1:] = np.inf, np.inf
                changes.append(np.minimum(stay, go))
            low, high = min(each.min() for each in changes), max(each.max() for each in changes)
            reference = values[0][0, 0] + STEP * changes[0][0, 0] / total
            values = [v + STEP * c / total - reference for v, c in zip(values, changes, strict=True)]
            if high - low < CLOSE * abs(high):
                break
        return float((low + high) / 2.0 / sum(self.rates))

    def _spans(self, streams: int, ends: Array) -> list[float]:
        """Return how long it takes until so many have ended and the other is awake: quantiles of a gamma law."""
        if not streams:
            return [self.cost]
        mean, variance = sum(1.0 / ends[1 : streams + 1]), sum(1.0 / ends[1 : streams + 1] ** 2)
        drawn = np.random.default_rng(0).gamma(mean**2 / variance, variance / mean, 4000)
        return [float(t) + self.cost for t in np.sort(drawn).reshape(NODES, -1).mean(1)]

    def _comes(self, mean: float) -> Array:
        """Return the chances to get from so many requests to so many while ``mean`` come."""
        chances = [math.exp(-mean)]
        for n in range(1, self.most):
            chances.append(chances[-1] * mean / n)
        table = np.zeros((self.most, self.most))
        for n in range(self.most):
            table[n, n:] = chances[: self.most - n]
            table[n, -1] += max(0.0, 1.0 - sum(chances[: self.most - n]))
        return table


def main() -> None:
    """Print the best mean wait and that of ``idle``."""
    for name, engine in ENGINES.items():
        jobs = generate(Poisson(2, 0.5), 20000.0, 1).jobs
        work = statistics.fmean(map(engine.work, jobs))
        for rates, cost in CASES:
            pair = Pair(rates, engine, cost, work)
            if sum(rates) * work > 0.8 * engine.slots * engine.rate(engine.slots):
                continue  # its queues grow for ever, or nearly
            best, idle = pair.mean_wait(idle=False), pair.mean_wait(idle=True)
            print(f"{name:24} {rates} {cost:4g} s: best {best:6.2f} s, idle {idle:6.2f} s, {idle / best:.2f}")


if __name__ == "__main__":
    main()
