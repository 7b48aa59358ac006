"""The best schedule with knowledge of the future: how much could still be gained, and where it is lost.

python -m tests.benchmarks.hindsight [--write]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from llmux.plugins import load_policy
from llmux.simulator import CostMatrix, Trace, simulate
from llmux.simulator.statistics import waits_of
from llmux.simulator.synthetic import OnOff, Poisson, generate
from tests.benchmarks.policies import FLOOR, geometric
from tests.benchmarks.report import write_between
from tests.benchmarks.scenarios import ENGINES
from tests.policies.hindsight import Hindsight, Rules

GUIDE = Path(__file__).parents[2] / "policies" / "README.md"
BEGIN, END = "<!-- begin hindsight -->\n", "<!-- end hindsight -->"
LOADS = {
    "2 models": (Poisson(2, 0.5), 70.0),
    "3 models": (Poisson(3, 0.4), 80.0),
    "3 models, on and off": (OnOff(3, 0.4, 30.0, 60.0), 80.0),
}
COSTS = (0.3, 3.0, 20.0)
SEEDS = (1, 2)
LEAST, MOST = 20, 60  # requests
POLICIES = ("fifo", "idle", "adaptive")
WIDTH = 40  # schedules; twice as many found nothing better in every fifth scenario


def main() -> None:
    """Compare policies with what hindsight would do, and that with what it would do under restrictions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into the guide")
    arguments = parser.parse_args()
    began = time.perf_counter()
    restricted = {
        "the best that leaves only idle engines": Rules(WIDTH, drains=False),
        "the best that goes to the oldest request": Rules(WIDTH, oldest=True),
        "the best that does both": Rules(WIDTH, drains=False, oldest=True),
        "the best that wakes before it is asked": Rules(WIDTH, ahead=True),
    }
    names = [*(f"`{name}`" for name in POLICIES), *restricted]
    ratios: dict[tuple[str, float], list[float]] = {(name, cost): [] for name in names for cost in COSTS}
    count = 0
    for trace in traces():
        for engine in ENGINES.values():
            for cost in COSTS:
                costs = CostMatrix(default=cost)
                found = {
                    f"`{name}`": sum(
                        waits_of(simulate(trace, load_policy(name, {}, Path()), costs, engine=engine))
                    )
                    for name in POLICIES
                }
                best = Hindsight(trace, costs, engine, Rules(WIDTH)).best(min(found.values())).waited
                for name, rules in restricted.items():
                    found[name] = Hindsight(trace, costs, engine, rules).best().waited
                for name, waited in found.items():
                    floor = FLOOR * len(trace.jobs)
                    ratios[name, cost].append((waited + floor) / (best + floor))
                count += 1
    lines = [f"Mean wait in {count} scenarios of {LEAST} to {MOST} requests, the best that can be = 1:", ""]
    lines += ["| | all | " + " | ".join(f"{cost:g} s" for cost in COSTS) + " |", "|---" + "|---:" * 4 + "|"]
    for name in names:
        each = [ratios[name, cost] for cost in COSTS]
        cells = [f"{geometric(values):.2f}" for values in (list(chain(*each)), *each)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        write_between(GUIDE, BEGIN, END, text)
    print(f"{time.perf_counter() - began:.0f} s")


def traces() -> Iterator[Trace]:
    """Yield small traffic."""
    for load, seconds in LOADS.values():
        for seed in SEEDS:
            trace = generate(load, seconds, seed)
            if LEAST <= len(trace.jobs) <= MOST:
                yield trace


if __name__ == "__main__":
    main()
