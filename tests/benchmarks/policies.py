"""``make policies``: every shipped policy on every scenario; the source of the guide's table and picture.

    python -m tests.benchmarks.policies [--write] [--only NAME]... [--details NAME]

Ratios to ``fifo`` and to ``idle`` are geometric means over the scenarios; ``worst`` is the largest ratio of a 99th
percentile in any of them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmux.core.policy import Policy
from llmux.plugins import known_policies, load_policy
from llmux.simulator import Statistics, simulate, statistics_of
from llmux.simulator.run import Misjudged
from tests.benchmarks.report import write_between
from tests.benchmarks.scenarios import Scenario, development, held_out, other_engines

GUIDE = Path(__file__).parents[2] / "policies" / "README.md"
PICTURE = GUIDE.with_name("waits.png")
BEGIN, END = "<!-- begin figures -->\n", "<!-- end figures -->"
FLOOR = 0.05  # seconds: added to both sides, so that a ratio of two tiny waits says nothing
HEADER = "| policy | mean | p95 | p99 | worst p99 | mean, vs idle | p99, vs idle | switching | draining |"

Results = list[Statistics]
Make = Callable[[], Policy]


@dataclass(frozen=True)
class Row:
    """One policy over some scenarios, as ratios."""

    name: str
    mean: float
    p95: float
    p99: float
    worst: float
    mean_idle: float
    p99_idle: float
    switching: float
    draining: float

    def markdown(self) -> str:
        """Return the row of the guide's table."""
        ratios = (self.mean, self.p95, self.p99, self.worst, self.mean_idle, self.p99_idle)
        shares = (self.switching, self.draining)
        cells = [f"`{self.name}`", *(f"{x:.2f}" for x in ratios), *(f"{x:.0%}" for x in shares)]
        return f"| {' | '.join(cells)} |"


def run(scenarios: Iterable[Scenario], make: Make) -> Results:
    """Run one policy on each scenario; each gets a policy without a past."""
    return [
        statistics_of(simulate(s.trace, make(), s.costs, engine=s.engine, horizon=s.horizon)) for s in scenarios
    ]


def ratio(these: Statistics, those: Statistics, what: str) -> float:
    """Return how much longer ``these`` wait than ``those``."""
    return float((getattr(these, what) + FLOOR) / (getattr(those, what) + FLOOR))


def geometric(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def row(name: str, these: Results, fifo: Results, idle: Results) -> Row:
    """Compare one policy's results with those of ``fifo`` and ``idle``."""

    def mean(what: str, those: Results) -> float:
        return geometric([ratio(a, b, what) for a, b in zip(these, those, strict=True)])

    return Row(
        name,
        mean("mean_wait", fifo),
        mean("p95_wait", fifo),
        mean("p99_wait", fifo),
        max(ratio(a, b, "p99_wait") for a, b in zip(these, fifo, strict=True)),
        mean("mean_wait", idle),
        mean("p99_wait", idle),
        sum(a.switching for a in these) / len(these),
        sum(a.draining for a in these) / len(these),
    )


def compare(scenarios: list[Scenario], policies: dict[str, Make]) -> tuple[list[Row], dict[str, Results]]:
    """Run all policies on all scenarios."""
    results = {name: run(scenarios, maker(name)) for name in ("fifo", "idle")}
    for name, make in policies.items():
        if name not in results:
            results[name] = run(scenarios, make)
    rows = [row(name, results[name], results["fifo"], results["idle"]) for name in policies]
    return rows, results


def maker(name: str, wrong: float = 1.0) -> Make:
    """Return what makes a shipped policy, which is shown estimates that are wrong by a factor."""

    def make() -> Policy:
        policy = load_policy(name, {}, Path())
        return policy if wrong == 1.0 else Misjudged(policy, wrong)

    return make


def shipped() -> list[str]:
    """Return the policies that choose when to switch; ``auto`` chooses one of them."""
    return [name for name in known_policies() if name != "auto"]


def table(title: str, rows: Iterable[Row]) -> str:
    """Return a table in Markdown."""
    rule = "|---" + "|---:" * (HEADER.count("|") - 2) + "|"
    return "\n".join([f"{title}\n", HEADER, rule, *(each.markdown() for each in rows), ""])


def draw(rows: Sequence[Row], results: dict[str, Results]) -> None:
    """Draw each policy at its mean and 99th percentile against fifo's, with its scenarios around it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure: Any = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for each in rows:
        pairs = list(zip(results[each.name], results["fifo"], strict=True))
        means = [ratio(a, b, "mean_wait") for a, b in pairs]
        tails = [ratio(a, b, "p99_wait") for a, b in pairs]
        colour = axes.scatter(means, tails, s=6, alpha=0.25).get_facecolor()[0][:3]
        axes.scatter([each.mean], [each.p99], s=90, color=[colour], edgecolors="black", label=each.name, zorder=3)
    axes.axhline(1.0, color="grey", linewidth=0.5)
    axes.axvline(1.0, color="grey", linewidth=0.5)
    axes.set(xlim=(0.4, 1.6), ylim=(0.5, 2.0), xscale="log", yscale="log")
    axes.set_xlabel("mean wait, fifo = 1")
    axes.set_ylabel("99th percentile of the waits, fifo = 1")
    ticks = [0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_formatter(lambda *_: "")
    axes.set(xlim=(0.4, 1.6), ylim=(0.5, 2.0))
    axes.legend(title="down and left is better", fontsize="small")
    figure.savefig(PICTURE, dpi=100)


def main() -> None:
    """Run, print, and write what the guide shows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables and the picture into the guide")
    parser.add_argument("--only", action="append", metavar="NAME", help="only these policies")
    parser.add_argument("--details", metavar="NAME", help="one policy, scenario by scenario")
    arguments = parser.parse_args()
    began = time.perf_counter()
    policies = {name: maker(name) for name in arguments.only or shipped()}
    if arguments.details:
        policies = {arguments.details: maker(arguments.details)}
    elif not arguments.only:
        policies |= {"adaptive, all x 3": maker("adaptive", 3.0), "adaptive, all / 3": maker("adaptive", 1 / 3)}
    tables = []
    sets = {
        "Development scenarios": development(),
        "Other engines, development": other_engines(0),
        "Other engines, held-out": other_engines(5000),
        "Held-out scenarios": held_out(),
    }
    for title, scenarios in sets.items():
        rows, results = compare(scenarios, policies)
        real = sum(s.real for s in scenarios)
        tables.append(table(f"{title} ({len(scenarios) - real} generated, {real} recorded), fifo = 1:", rows))
        print(tables[-1])
        if arguments.details:
            details(scenarios, results[arguments.details], results)
    if arguments.write:
        draw([each for each in rows if "," not in each.name], results)
        write_between(GUIDE, BEGIN, END, "\n".join(tables))
    print(f"{time.perf_counter() - began:.0f} s")


def details(scenarios: Sequence[Scenario], these: Results, results: dict[str, Results]) -> None:
    """Print one policy's results for each scenario, the worst p99 last."""
    lines = [
        (ratio(this, fifo, "p99_wait"), scenario.name, this, fifo, idle)
        for scenario, this, fifo, idle in zip(scenarios, these, results["fifo"], results["idle"], strict=True)
    ]
    for worst, name, this, fifo, idle in sorted(lines, key=lambda line: line[0]):
        print(
            f"{name:44} fifo {fifo.mean_wait:6.1f} {fifo.p99_wait:6.1f}"
            f"  idle {ratio(idle, fifo, 'mean_wait'):.2f} {ratio(idle, fifo, 'p99_wait'):.2f}"
            f"  this {ratio(this, fifo, 'mean_wait'):.2f} {ratio(this, fifo, 'p95_wait'):.2f} {worst:.2f}"
            f"  switching {this.switching:.0%} draining {this.draining:.0%}"
        )


if __name__ == "__main__":
    main()
