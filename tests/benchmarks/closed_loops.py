"""Every shipped policy in closed loops: ``python -m tests.benchmarks.closed_loops [--write]``.

Users wait for each answer, think, and ask again. In a closed loop throughput matters as much as the waits.
Ratios to ``fifo`` are geometric means over the scenarios. ``--write`` updates the guide's table.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llmux.plugins import known_policies, load_policy
from llmux.simulator import CostMatrix, EngineModel, Statistics, simulate, statistics_of
from llmux.simulator.engine_model import Engines
from llmux.simulator.synthetic import Closed, with_closed
from tests.benchmarks.report import write_between

HORIZON = 2400.0  # seconds
GUIDE = Path(__file__).parents[2] / "policies" / "README.md"
BEGIN, END = "<!-- begin closed -->\n", "<!-- end closed -->\n"
FLOOR = 0.05  # seconds: added to both sides, so that a ratio of two tiny waits says nothing


class Loop(NamedTuple):
    """One scenario."""

    load: Closed
    cost: float
    engine: EngineModel
    seed: int


def loops() -> Iterator[Loop]:
    """Yield the scenarios: few and many users, quick and slow, cheap and dear switches, two kinds of engine."""
    engines = EngineModel(), EngineModel(slots=64, decode=40.0, slowdown=0.1)
    grid = itertools.product((4, 12, 30), (5.0, 30.0), (2, 4), (1.0, 10.0, 40.0), engines)
    for number, (users, think, models, cost, engine) in enumerate(grid):
        stay = (0.0, 0.5)[number // 2 % 2]  # agents alternate, people stay for a while
        yield Loop(Closed(users, think, models, stay), cost, engine, 300 + number)


def run(loop: Loop, name: str) -> Statistics:
    """Run one scenario under one policy."""
    trace = with_closed(None, loop.load, HORIZON, loop.seed, Engines(loop.engine))
    policy = load_policy(name, {}, Path())
    return statistics_of(simulate(trace, policy, CostMatrix(loop.cost), engine=loop.engine, horizon=HORIZON))


def ratio(mine: Sequence[float], base: Sequence[float], floor: float = FLOOR) -> float:
    """Return the geometric mean of the ratios."""
    return math.exp(sum(math.log((a + floor) / (b + floor)) for a, b in zip(mine, base, strict=True)) / len(mine))


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    names = [name for name in known_policies() if name != "auto"]  # which looks back no sooner than after an hour
    scenarios = list(loops())
    results = {name: [run(loop, name) for loop in scenarios] for name in names}
    base = results["fifo"]
    lines = [
        "| policy | mean wait | p99 | answers per hour | fewest, in any one |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, mine in results.items():
        rates = [one.per_hour / other.per_hour for one, other in zip(mine, base, strict=True)]
        mean = ratio([each.mean_wait for each in mine], [each.mean_wait for each in base])
        p99 = ratio([each.p99_wait for each in mine], [each.p99_wait for each in base])
        answers = ratio([each.per_hour for each in mine], [each.per_hour for each in base], 0.0)
        lines.append(f"| `{name}` | {mean:.2f} | {p99:.2f} | {answers:.2f} | {min(rates):.2f} |")
    text = f"{len(scenarios)} closed loops, fifo = 1:\n\n" + "\n".join(lines) + "\n"
    print(text)
    if write:
        write_between(GUIDE, BEGIN, END, text)


if __name__ == "__main__":
    main()
