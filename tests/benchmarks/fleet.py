"""Routes over fleets of 16 hosts, generated and recorded traffic; the guide's table.

    python -m tests.benchmarks.fleet [--write] [--set development|held-out] [--details] [--seed N]

Reports are 1 s old. Ratios are of ``least_wait`` to the other route: means as geometric means over the scenarios,
``worst`` is the largest ratio of a 99th percentile in any. A scenario begins with every model asleep.

Everything is in virtual time: the figures are the same on any machine under any load, which only delays them. CPU
is measured by ``tests.benchmarks.fleet_placement``.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from llmux.fleet.routes import SHIPPED
from llmux.fleet.simulation import FleetStatistics, Setting, simulate_fleet, statistics_of_fleet
from llmux.plugins import load_policy
from llmux.simulator import CostMatrix, EngineModel, Trace
from llmux.simulator.engine_model import Engines
from llmux.simulator.synthetic import Load, OnOff, Poisson, generate
from tests.benchmarks.report import write_between
from tests.benchmarks.scenarios import matrix, mixed, recorded

GUIDE = Path(__file__).parents[2] / "llmux" / "FLEET.md"
BEGIN, END = "<!-- figures of the routes -->\n", "<!-- so far the figures -->"
SEED = 0  # added to the seeds of generated traffic
FLOOR = 0.05  # seconds: added to both sides, so that a ratio of two tiny waits says nothing
HOSTS = 16
WORK = 188.0  # tokens of decoding that a generated request is, on average
OTHERS = ("affinity", "least_in_flight", "clairvoyant")
COLUMNS = ("least_wait", "gateways", *OTHERS)
FOUR, FEW, MANY = EngineModel(slots=4), EngineModel(slots=2), EngineModel(slots=16)

Scenarios = dict[str, Setting]


def poisson(models: int, skew: float = 1.0) -> Callable[[float], Load]:
    """Return loads of independent arrivals, by their rate."""
    return lambda rate: Poisson(models, rate, skew)


def on_off(models: int) -> Callable[[float], Load]:
    """Return loads in bursts, by their rate."""
    return lambda rate: OnOff(models, rate * 4.0 / models, 60.0, 180.0)


def made(
    load: Callable[[float], Load],
    share: float,
    cost: float,
    seconds: float,
    number: int,
    engine: EngineModel = FOUR,
    policy: str = "adaptive",
) -> Setting:
    """Return generated traffic that is a ``share`` of what 16 engines serve in full batches, without switches."""
    capacity = engine.slots * engine.rate(engine.slots) / WORK * HOSTS
    trace = generate(load(share * capacity), seconds, number + SEED)
    return Setting(trace, HOSTS, CostMatrix(default=cost), Engines(engine), maker(policy), horizon=seconds)


def maker(policy: str) -> Callable[[], object]:
    """Return what makes a policy."""
    return lambda: load_policy(policy, {}, Path())


def real(trace: Trace, cost: str, seconds: float) -> Setting:
    """Return recorded traffic."""
    return Setting(trace, HOSTS, matrix(cost, trace), Engines(MANY), maker("adaptive"), horizon=seconds)


def lmsys(stretch: float, start: float, seconds: float) -> Trace:
    """Return the 24 busiest models of the arena."""
    return recorded("lmsys").busiest(24).stretched(stretch).sliced(start, start + seconds)


def mix(factor: float, start: float, seconds: float) -> Trace:
    """Return 24 models of all three records together."""
    parts = (recorded("lmsys").busiest(18).stretched(4.0 * factor), recorded("azure").stretched(factor))
    parts = (*parts, recorded("servegen").stretched(factor / 4.0))
    return mixed(*(part.sliced(start, start + seconds) for part in parts))


def development() -> Scenarios:
    """Return what the rule was tuned on."""
    return {
        "poisson, 10 s, load 0.3": made(poisson(24), 0.3, 10.0, 350.0, 11),
        "poisson, 3 s, load 0.6": made(poisson(24), 0.6, 3.0, 150.0, 12),
        "poisson, 40 s, load 0.15": made(poisson(24), 0.15, 40.0, 700.0, 13),
        "poisson, 10 s, load 0.9": made(poisson(24), 0.9, 10.0, 150.0, 14),
        "on/off, 10 s, load 0.4": made(on_off(24), 0.4, 10.0, 300.0, 15),
        "on/off, 0.3 s, load 0.6": made(on_off(24), 0.6, 0.3, 120.0, 16),
        "on/off, 120 s, load 0.1": made(on_off(24), 0.1, 120.0, 700.0, 17),
        "6 models, 10 s, load 0.6": made(poisson(6), 0.6, 10.0, 200.0, 21),
        "60 models, 3 s, load 0.3": made(poisson(60), 0.3, 3.0, 300.0, 22),
        "all alike, 3 s, load 0.3": made(poisson(24, 0.0), 0.3, 3.0, 300.0, 25),
        "hosts with fifo, 10 s, load 0.4": made(poisson(24), 0.4, 10.0, 300.0, 24, policy="fifo"),
        "arena, 10 s": real(lmsys(1.5, 0.0, 500.0), "10", 500.0),
        "three records, sizes differ": real(mix(2.0, 0.0, 300.0), "het", 300.0),
        "three records, 40 s": real(mix(3.0, 900.0, 500.0), "40", 500.0),
    }


def held_out() -> Scenarios:
    """Return scenarios of the same kinds that nothing was tuned on: other seeds, costs, loads and slices."""
    return {
        "poisson, 12 s, load 0.35": made(poisson(24), 0.35, 12.0, 300.0, 501),
        "poisson, 5 s, load 0.5": made(poisson(24), 0.5, 5.0, 150.0, 502),
        "poisson, 30 s, load 0.2": made(poisson(24), 0.2, 30.0, 500.0, 503),
        "poisson, 8 s, load 1.1": made(poisson(24), 1.1, 8.0, 120.0, 504),
        "on/off, 15 s, load 0.35": made(on_off(24), 0.35, 15.0, 300.0, 505),
        "on/off, 0.5 s, load 0.5": made(on_off(24), 0.5, 0.5, 120.0, 506),
        "on/off, 90 s, load 0.1": made(on_off(24), 0.1, 90.0, 700.0, 507),
        "8 models, 15 s, load 0.5": made(poisson(8), 0.5, 15.0, 200.0, 508),
        "48 models, 5 s, load 0.3": made(poisson(48), 0.3, 5.0, 250.0, 509),
        "2 slots, 6 s, load 0.4": made(poisson(24, 0.7), 0.4, 6.0, 300.0, 510, FEW),
        "hosts with exhaustive, 10 s, load 0.3": made(poisson(24), 0.3, 10.0, 250.0, 511, policy="exhaustive"),
        "arena, 5 s": real(lmsys(2.5, 250.0, 500.0), "5", 500.0),
        "three records, other sizes": real(mix(1.5, 400.0, 250.0), "het", 250.0),
        "three records, 20 s": real(mix(2.5, 1200.0, 400.0), "20", 400.0),
    }


RUNS: dict[tuple[str, str], tuple[Setting, str]] = {}  # by scenario and column; forked processes find it


def run(key: tuple[str, str]) -> tuple[tuple[str, str], FleetStatistics]:
    """Run a route; each gateway gets one without a past."""
    setting, route = RUNS[key]
    return key, statistics_of_fleet(simulate_fleet(setting, SHIPPED.get(route)))


def run_all(scenarios: Scenarios) -> dict[tuple[str, str], FleetStatistics]:
    """Run every route on every scenario, on all cores."""
    for name, setting in scenarios.items():
        for route in ("least_wait", *OTHERS):
            RUNS[name, route] = setting, route
        RUNS[name, "gateways"] = replace(setting, gateways=4), "least_wait"
    keys = [(name, column) for name in scenarios for column in COLUMNS]
    with multiprocessing.get_context("fork").Pool() as pool:
        return dict(pool.imap_unordered(run, keys))


def ratio(one: FleetStatistics, other: FleetStatistics, what: str) -> float:
    """Return how much longer ``one`` waits than ``other``."""
    return float((getattr(one, what) + FLOOR) / (getattr(other, what) + FLOOR))


def geometric(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(title: str, scenarios: Scenarios, *, details: bool) -> str:
    """Run all, and return a table in Markdown."""
    found = run_all(scenarios)
    results = {column: [found[name, column] for name in scenarios] for column in COLUMNS}
    for name in scenarios if details else ():
        row = [f"{each} {found[name, each].mean_wait:.2f}/{found[name, each].p99_wait:.0f}" for each in COLUMNS]
        more = found[name, "gateways"]
        doubled = f"doubled {more.duplicates:.1%}, by two gateways {more.crossed:.1%}"
        print(f"{name:40} {more.requests:5}  {'  '.join(row)}  {doubled}")
    mine, four = results["least_wait"], results["gateways"]
    lines = [
        f"{title} ({len(scenarios)} scenarios):\n",
        "| least_wait against | mean wait | worst scenario's mean | p99 | worst scenario's p99 |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in OTHERS:
        means = [ratio(a, b, "mean_wait") for a, b in zip(mine, results[name], strict=True)]
        tails = [ratio(a, b, "p99_wait") for a, b in zip(mine, results[name], strict=True)]
        cells = (geometric(means), max(means), geometric(tails), max(tails))
        lines.append(f"| `{name}` | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    gateways = geometric([ratio(a, b, "mean_wait") for a, b in zip(four, mine, strict=True)])
    seconds = [setting.horizon or 0.0 for setting in scenarios.values()]
    wakes = [each.switches_per_hour * span for each, span in zip(four, seconds, strict=True)]
    doubled, crossed = (
        sum(getattr(each, what) * wake for each, wake in zip(four, wakes, strict=True)) / sum(wakes)
        for what in ("duplicates", "crossed")
    )
    lines.append(
        f"\nFour gateways wait {gateways:.2f} times as long as one; {doubled:.1%} of their wakes are doubled,"
        f" {crossed:.1%} because two gateways began them.\n"
    )
    return "\n".join(lines)


def main() -> None:
    """Run, print, and write what the guide shows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the guide")
    parser.add_argument("--set", choices=("development", "held-out"), help="only these")
    parser.add_argument("--details", action="store_true", help="a line for each scenario")
    parser.add_argument("--seed", type=int, default=0, help="other traffic of the same kinds")
    arguments = parser.parse_args()
    global SEED  # noqa: PLW0603 - the forked processes are to find it, too
    SEED = arguments.seed
    began = time.monotonic()
    sets = {"Development": development, "Held-out": held_out}
    tables = []
    for title, make in sets.items():
        if arguments.set in (None, title.lower()):
            tables.append(table(title, make(), details=arguments.details))
            print(tables[-1], flush=True)
    if arguments.write:
        write_between(GUIDE, BEGIN, END, "\n".join(tables))
    spent = sum(os.times()[:4])
    print(f"{time.monotonic() - began:.0f} s, {spent:.0f} s of CPU, load {os.getloadavg()[0]:.0f}")


if __name__ == "__main__":
    main()
