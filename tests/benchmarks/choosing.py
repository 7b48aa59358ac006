"""``use: auto`` next to its own candidates, each fixed: ``python -m tests.benchmarks.choosing [--write]``.

Three hours of generated traffic, without the first, in which ``auto`` has no evidence yet; and traffic that
changes its nature at half time, all of which counts. ``--write`` updates the guide's table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llmux.core.policy import Policy
from llmux.plugins import load_policy
from llmux.simulator import CostMatrix, EngineModel, Job, Outcome, Trace, simulate
from llmux.simulator.engine_model import Engines
from llmux.simulator.synthetic import Closed, OnOff, Poisson, generate, with_closed
from tests.benchmarks.report import write_between

HOUR = 3600.0
HORIZON = 3.0 * HOUR
GUIDE = Path(__file__).parents[2] / "policies" / "README.md"
BEGIN, END = "<!-- begin auto -->\n", "<!-- end auto -->\n"
ENGINES = {
    "16 slots, slowdown 0.03": EngineModel(),
    "64 slots, slowdown 0.1": EngineModel(slots=64, decode=40.0, slowdown=0.1),
    "4 slots, slowdown 0.3": EngineModel(slots=4, decode=90.0, slowdown=0.3),
}
COSTS = {"16 slots, slowdown 0.03": 10.0, "64 slots, slowdown 0.1": 3.0, "4 slots, slowdown 0.3": 40.0}


class Case(NamedTuple):
    """One comparison; what arrives before ``start`` does not count."""

    name: str
    trace: Trace
    engine: EngineModel
    cost: float
    start: float = HOUR
    horizon: float = HORIZON


def cases() -> Iterator[Case]:
    """Yield all of them."""
    for label, engine in ENGINES.items():
        traffic = {
            "Poisson, 4 models": generate(Poisson(4, 0.4, 1.0), HORIZON, 31),
            "Poisson, 3 alike": generate(Poisson(3, 0.25, 0.0), HORIZON, 32),
            "bursts, 4 models": generate(OnOff(4, 0.4, 60.0, 180.0), HORIZON, 33),
            "12 users, think 30 s": with_closed(None, Closed(12, 30.0, 3), HORIZON, 34, Engines(engine)),
        }
        for name, trace in traffic.items():
            yield Case(f"{name}; {label}, {COSTS[label]:g} s", trace, engine, COSTS[label])
    for seed in (41, 51):
        half = 2.0 * HOUR
        engine = ENGINES["64 slots, slowdown 0.1"]
        trace = half_and_half(half, seed)
        yield Case(f"changes at half time, seed {seed}", trace, engine, 10.0, 0.0, 2.0 * half)


def half_and_half(half: float, seed: int) -> Trace:
    """Return traffic of four models, and after ``half`` seconds of one that is always busy and three rare ones."""
    before = generate(Poisson(4, 0.5), half, seed).jobs
    busy = generate(Poisson(1, 1.5), half, seed + 1).jobs
    rare = generate(Poisson(1, 0.05), half, seed + 2).jobs
    after = [Job(half + (job.arrival or 0.0), "m0", 100, 60) for job in busy]
    after += [Job(half + (job.arrival or 0.0), f"m{1 + number % 3}", 200, 60) for number, job in enumerate(rare)]
    return Trace("half and half", [*before, *after])


def mean_wait(case: Case, policy: Policy) -> tuple[float, Outcome]:
    """Run a case and return the mean wait of what counts."""
    outcome = simulate(case.trace, policy, CostMatrix(case.cost), engine=case.engine, horizon=case.horizon)
    waits = [
        (outcome.end if admitted is None else admitted) - arrived
        for arrived, admitted in zip(outcome.arrived, outcome.admitted, strict=True)
        if arrived is not None and arrived >= case.start
    ]
    return sum(waits) / len(waits), outcome


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    lines = [
        "| traffic; engine, cost of a switch | best fixed | its mean | `adaptive` | `auto` | of the best |",
        "|---|---|---:|---:|---:|---:|",
    ]
    ratios = []
    for case in cases():
        auto = load_policy("auto", {}, Path())
        fixed = {name: mean_wait(case, make())[0] for name, make in auto.makers.items()}  # type: ignore[attr-defined]
        chosen, outcome = mean_wait(case, auto)
        best = min(fixed, key=fixed.__getitem__)
        if case.start:
            ratios.append(chosen / fixed[best])
        lines.append(
            f"| {case.name} | `{best}` | {fixed[best]:.1f} s | {fixed['adaptive']:.1f} s | {chosen:.1f} s"
            f" | {chosen / fixed[best]:.3f} |"
        )
        print(lines[-1], [(round(time / 60), name) for time, name in outcome.adopted], flush=True)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    lines.append(
        f"| geometric mean and worst of the first {len(ratios)} | | | | | {mean:.3f}, {max(ratios):.3f} |"
    )
    print(lines[-1])
    if write:
        write_between(GUIDE, BEGIN, END, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
