"""What would exact knowledge of the present be worth? ``adaptive``, given what it otherwise estimates.

    python -m tests.benchmarks.known_present [--write]

It is given the remaining time of each answer in flight, and so that of a drain, and the overall rate of requests
of each model. No policy can know the former: this is an upper bound for better estimates. Other weights trade the
mean for the 99th percentile. The remainder is due to requests that have not arrived yet.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

from llmux.core.policy import ModelView
from llmux.plugins import load_policy
from llmux.simulator import Statistics, simulate, statistics_of
from llmux.simulator.run import Run
from policies.adaptive import Adaptive, Memory
from tests.benchmarks.policies import geometric, ratio, run
from tests.benchmarks.report import write_between
from tests.benchmarks.scenarios import Scenario, other_engines

GUIDE = Path(__file__).parents[2] / "policies" / "README.md"
BEGIN, END = "<!-- begin told -->\n", "<!-- end told -->"
SEEDS = (0, 1000)  # of the generated traffic; the guide's held-out scenarios have others
WEIGHTS: tuple[dict[str, float], ...] = ({}, {"patience": 6, "price": 8}, {"patience": 6, "price": 8, "tour": 1})


class Told(Memory):
    """A memory that asks the simulation instead of estimating."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Run | None = None
        self.rates: dict[str, float] = {}

    def begin(self, run: Run) -> None:
        """Take the run that it is asked in. How often a closed loop asks depends on the policy: it is not told."""
        closed = any(job.arrival is None for job in run.jobs)
        asked = Counter(job.model for job in run.jobs if not closed)
        self.run, self.rates = run, {name: count / run.until for name, count in asked.items()}

    def drain(self, home: ModelView, time: float) -> float:
        """Return the seconds until what is in flight has ended, to the moment."""
        assert self.run is not None
        serving, jobs = self.run.serving[home.name], self.run.jobs
        made, seconds = serving.made + (time - serving.time) * serving.speed, 0.0
        ends = {job: end for end, job in serving.streams}
        # Those that have just been admitted begin once the core has decided.
        flying = self.run.core.state.models[home.name].in_flight
        lasts = sorted(ends.get(job, made + serving.engine.work(jobs[job])) for job in flying)
        for ended, end in enumerate(lasts):
            seconds += max(0.0, end - made) / serving.rates[len(lasts) - ended]
            made = max(made, end)
        return seconds

    def rate(self, home: ModelView, time: float) -> float:
        """Return arrivals per second, on average over the whole run."""
        return self.rates.get(home.name) or super().rate(home, time)


def told(options: dict[str, float], scenario: Scenario) -> Statistics:
    """Run ``adaptive`` with these options, told all that."""
    memory, policy = Told(), Adaptive(Adaptive.Options.model_validate(options))
    policy._seen, policy.on_switch_completed = memory, memory.learn
    s = scenario
    outcome = simulate(s.trace, policy, s.costs, engine=s.engine, horizon=s.horizon, prepare=memory.begin)
    return statistics_of(outcome)


def main() -> None:
    """Print the table, and write it into the guide."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into the guide")
    arguments = parser.parse_args()
    began = time.perf_counter()
    scenarios = [scenario for seed in SEEDS for scenario in other_engines(seed)]

    def shipped(name: str, options: dict[str, Any]) -> list[Statistics]:
        return run(scenarios, lambda: load_policy(name, options, Path()))

    idle, fifo = shipped("idle", {}), shipped("fifo", {})
    lines = [f"{len(scenarios)} scenarios on engines of all kinds, idle = 1:", ""]
    lines += [
        "| `adaptive` | mean | p99 | told: mean | told: p99 | fifo = 1: mean | p99 |",
        "|---" + "|---:" * 6 + "|",
    ]
    for options in WEIGHTS:
        plain, knowing = shipped("adaptive", options), [told(options, scenario) for scenario in scenarios]
        cells = [
            geometric([ratio(a, b, what) for a, b in zip(these, those, strict=True)])
            for these, those in ((plain, idle), (knowing, idle), (plain, fifo))
            for what in ("mean_wait", "p99_wait")
        ]
        said = ", ".join(f"{key}={value:g}" for key, value in options.items()) or "as shipped"
        lines.append(f"| {said} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        write_between(GUIDE, BEGIN, END, text)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
