"""The scenarios on which policies are compared: a trace, a matrix of switch costs, a horizon.

The shipped policies were tuned on ``development``; ``held_out`` has other seeds, slices, rates and mixes.
``other_engines`` has engines and costs of all kinds: ``first`` seeds that were used for tuning, and others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from llmux.simulator import CostMatrix, EngineModel, Trace
from llmux.simulator.synthetic import Agents, Load, OnOff, Poisson, generate
from llmux.simulator.trace import read_trace

TRACES = Path(__file__).parent / "traces"
HORIZON = 2400.0  # seconds
# Sleeps and wakes of models from half a second to 36 s, asymmetric.
SLEEPS = (1.0, 6.0, 0.5, 12.0, 2.0, 0.5, 4.0, 1.0)
WAKES = (2.0, 24.0, 5.0, 9.0, 1.5, 12.0, 3.0, 18.0)
COSTS = ("2", "10", "40", "het")
ENGINE_COSTS = (0.3, 1.0, 3.0, 10.0, 40.0, 120.0)
# Engines of all kinds: few slots, many, and streams that slow each other down.
ENGINES = {
    "4 slots": EngineModel(slots=4),
    "16 slots": EngineModel(),
    "64 slots, slowdown 0.1": EngineModel(slots=64, decode=40.0, slowdown=0.1),
    "16 slots, slowdown 0.3": EngineModel(slots=16, decode=30.0, slowdown=0.3),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One comparison. ``real`` tells recorded traffic from generated."""

    name: str
    trace: Trace
    costs: CostMatrix
    real: bool
    horizon: float = HORIZON
    engine: EngineModel = field(default_factory=EngineModel)


def matrix(kind: str, trace: Trace) -> CostMatrix:
    """Return uniform costs in seconds, or for ``het`` models of different sizes."""
    if kind != "het":
        return CostMatrix(default=float(kind))
    models = sorted(trace.models)
    return CostMatrix(
        sleeps={model: SLEEPS[i % len(SLEEPS)] for i, model in enumerate(models)},
        wakes={model: WAKES[i % len(WAKES)] for i, model in enumerate(models)},
    )


@cache
def recorded(name: str) -> Trace:
    """Read one of the traces in ``traces/``."""
    return read_trace(next(TRACES.glob(f"{name}*.csv.gz")))


def piece(name: str, stretch: float = 1.0, start: float = 0.0, top: int | None = None) -> Trace:
    """Return a horizon's worth of a recorded trace from ``start`` (stretched seconds) on."""
    trace = recorded(name)
    if top is not None:
        trace = trace.busiest(top)
    trace = trace.stretched(stretch).sliced(start, start + HORIZON)
    return replace(trace, name=f"{name} x{stretch:g} @{start:g}" + (f" top {top}" if top else ""))


def mixed(*traces: Trace) -> Trace:
    """Merge open-loop traces; their models stay apart."""
    jobs = [
        replace(job, model=f"{number}/{job.model}") for number, trace in enumerate(traces) for job in trace.jobs
    ]
    return Trace(" + ".join(trace.name for trace in traces), jobs)


def _synthetic(loads: dict[str, Load], seeds: tuple[int, ...]) -> Iterator[Scenario]:
    for name, load in loads.items():
        for number, kind in enumerate(COSTS):
            seed = seeds[number % len(seeds)]
            trace = generate(load, HORIZON, seed)
            yield Scenario(f"{name}, {kind} s", trace, matrix(kind, trace), real=False)


def _real(traces: list[Trace]) -> Iterator[Scenario]:
    for trace in traces:
        for kind in COSTS:
            yield Scenario(f"{trace.name}, {kind} s", trace, matrix(kind, trace), real=True)


def development() -> list[Scenario]:
    """Return the scenarios that the policies were tuned on."""
    loads: dict[str, Load] = {
        "poisson 2": Poisson(2, 0.5, 1.0),
        "poisson 4": Poisson(4, 0.5, 1.0),
        "poisson 8": Poisson(8, 0.4, 1.0),
        "skewed": Poisson(4, 0.8, 2.0),
        "on/off 4": OnOff(4, 0.5, 60, 180),
        "on/off 6, long": OnOff(6, 0.3, 120, 360),
        "agents": Agents(3, 1.0, 0.1, 3),
    }
    traces = [
        piece("azure", 8),
        piece("azure", 8, 4800),
        piece("azure", 16, 9600),
        piece("lmsys", 8, top=8),
        piece("lmsys", 8),
        piece("servegen"),
        mixed(piece("servegen", 2), piece("azure", 24)),
    ]
    loads_b: dict[str, Load] = {
        "poisson 2 b": Poisson(2, 0.8, 0.5),
        "poisson 3": Poisson(3, 0.4, 1.0),
        "poisson 4 b": Poisson(4, 0.7, 1.0),
        "poisson 8 b": Poisson(8, 0.6, 1.5),
        "on/off 4 b": OnOff(4, 0.8, 40, 200),
        "on/off 8": OnOff(8, 0.3, 60, 240),
        "agents b": Agents(4, 3.0, 0.15, 4),
    }
    traces += [
        piece("azure", 8, 2400),
        piece("azure", 8, 9600),
        piece("azure", 12, 12000),
        piece("lmsys", 8, top=4),
        piece("lmsys", 12, 600, top=16),
        piece("servegen", 1, 2400),
        piece("servegen", 1.5, 7200),
        mixed(piece("lmsys", 10, top=3), piece("azure", 20, 4800)),
    ]
    return [*_synthetic(loads, (1, 2)), *_synthetic(loads_b, (101, 102, 103)), *_real(traces)]


def held_out() -> list[Scenario]:
    """Return scenarios of the same kinds that nothing was tuned on: other seeds, rates, slices and mixes."""
    loads: dict[str, Load] = {
        "poisson 2 c": Poisson(2, 0.6, 1.0),
        "poisson 4 c": Poisson(4, 0.45, 0.5),
        "poisson 5": Poisson(5, 0.5, 1.5),
        "poisson 8 c": Poisson(8, 0.5, 1.0),
        "skewed c": Poisson(4, 0.7, 2.5),
        "on/off 3": OnOff(3, 0.6, 90, 200),
        "on/off 8 c": OnOff(8, 0.4, 50, 300),
        "agents c": Agents(2, 2.0, 0.2, 3),
    }
    traces = [
        piece("azure", 8, 7200),
        piece("azure", 6, 3000),
        piece("azure", 10, 14000),
        piece("lmsys", 10, top=6),
        piece("lmsys", 7, top=12),
        piece("servegen", 1, 4800),
        piece("servegen", 0.8, 1500),
        mixed(piece("servegen", 3, 6000), piece("lmsys", 12, 600, top=3)),
    ]
    return [*_synthetic(loads, (201, 202, 203, 204)), *_real(traces)]


def other_engines(first: int) -> list[Scenario]:
    """Return generated traffic over engines and costs of all kinds, with seeds from ``first`` on."""
    loads: dict[str, Load] = {
        "poisson 2": Poisson(2, 0.5),
        "poisson 4": Poisson(4, 0.5),
        "poisson 8": Poisson(8, 0.4),
        "skewed": Poisson(4, 0.6, 2.0),
        "on/off 4": OnOff(4, 0.5),
        "agents": Agents(3, 1.0, 0.1, 3),
    }
    found = []
    for place, (name, load) in enumerate(loads.items()):
        for number, cost in enumerate(ENGINE_COSTS):
            trace = generate(load, HORIZON, first + len(loads) * place + number)
            found += [
                Scenario(f"{name}, {cost:g} s, {kind}", trace, CostMatrix(default=cost), real=False, engine=engine)
                for kind, engine in ENGINES.items()
            ]
    return found
