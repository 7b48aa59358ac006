"""What was measured on real engines under several policies, beside what the simulator makes of the records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmux.plugins import load_policy
from llmux.simulator import simulate
from llmux.simulator.engine_model import Engines
from llmux.simulator.recorded import Recorded, read_recorded
from llmux.simulator.statistics import percentile, statistics_of

RECORDS = Path(__file__).parent / "records"
POLICIES = ("fifo", "idle", "exhaustive", "timeslice", "amortized")
LOADS = {"calm": (1.5, 45.0), "overload": (8.0, 12.0)}  # requests a second, seconds


@dataclass(frozen=True)
class Truth:
    """Waits under one policy, in seconds: as measured, and as simulated from a record."""

    load: str
    source: str  # the policy of the record from which it was simulated
    policy: str
    measured: tuple[float, float]  # mean, 95th percentile
    simulated: tuple[float, float]

    @property
    def ratios(self) -> tuple[float, float]:
        """Simulated over measured."""
        return self.simulated[0] / self.measured[0], self.simulated[1] / self.measured[1]


def records(load: str) -> dict[str, Recorded]:
    """Read the records of one load by their policies."""
    paths = {policy: RECORDS / f"{load}-{policy}.jsonl.gz" for policy in POLICIES}
    return {policy: read_recorded(path) for policy, path in paths.items()}


def measured(record: Recorded) -> tuple[float, float]:
    """Return the mean and the 95th percentile of the waits that a record has."""
    waits = sorted(float(line["wait_s"]) for line in record.requests)
    return sum(waits) / len(waits), percentile(waits, 0.95)


def simulated(record: Recorded, policy: str) -> tuple[float, float]:
    """Return what the simulator makes of a record under a policy."""
    fits = record.fits()
    costs = record.costs
    assert costs is not None
    outcome = simulate(
        record.fitted_trace(fits),
        load_policy(policy, {}, Path()),
        costs,
        engine=Engines(own={name: each.engine for name, each in fits.items()}),
        rules=record.rules,
        scene=record.scene(),
    )
    found = statistics_of(outcome)
    return found.mean_wait, found.p95_wait
