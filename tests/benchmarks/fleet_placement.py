"""The cost of a placement: microseconds of CPU for each event of a gateway with many hosts and models.

    python -m tests.benchmarks.fleet_placement [--hosts 1000] [--models 50] [--requests 20000] [--write]

Every host has one model awake and some requests; the models' popularity follows Zipf's law, so that some are awake
on hundreds of hosts and some on none. The best of five rounds counts: other load on the machine can only make a
round slower.

``--write`` also simulates two large fleets, and writes the figures into the guide: two to three minutes on a quiet
machine. Unlike the routes' own figures (``tests.benchmarks.fleet``) these depend on the machine and its load.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import time
from pathlib import Path

from llmux.core.phases import Phase
from llmux.core.policy import Policy
from llmux.fleet import events as ev
from llmux.fleet.fleet_view import HostReport, ModelReport
from llmux.fleet.placement import Placement
from llmux.fleet.routes import SHIPPED
from llmux.fleet.simulation import Setting, simulate_fleet
from llmux.plugins import load_policy
from llmux.simulator import CostMatrix, EngineModel
from llmux.simulator.engine_model import Engines
from llmux.simulator.synthetic import Poisson, generate
from tests.benchmarks.report import write_between

GUIDE = Path(__file__).parents[2] / "llmux" / "FLEET.md"
BEGIN, END = "<!-- figures of the placement -->\n", "<!-- so far those of the placement -->"
# Hosts, models, requests a second, seconds, gateways.
LARGE = [(64, 50, 100.0, 2000.0, 4), (10_000, 10, 500.0, 60.0, 1)]
ROUNDS = 5
LIVE = 4  # requests on a host, on average


def report(dice: random.Random, host: str, seq: int, models: list[str], weights: list[float]) -> HostReport:
    """Return the report of a host with one model awake."""
    (awake,) = dice.choices(models, weights)
    cold = ModelReport(expected_wait=9.0, switch_cost=6.0, sleep=1.0, wake=5.0, service=3.0, slots=8)
    warm = ModelReport(Phase.AWAKE, 0, dice.randrange(9), 0.0, 0.0, 1.0, 5.0, dice.random(), 3.0, 8, 60.0)
    known = dict.fromkeys(models, cold)
    known[awake] = warm
    return HostReport(host, "1", seq, known, lease=1e9)


def one_round(route: str, hosts: int, count: int, requests: int, seed: int) -> dict[str, float]:
    """Return the microseconds of each kind of event."""
    dice = random.Random(seed)
    models = [f"m{number}" for number in range(count)]
    weights = [1.0 / (number + 1) for number in range(count)]
    placement = Placement(SHIPPED[route](), dice.random)
    reports = [ev.HostReported(report(dice, f"gpu{n}", 1, models, weights)) for n in range(hosts)]
    newer = [ev.HostReported(report(dice, f"gpu{n}", 2, models, weights)) for n in range(hosts)]
    for each in reports:
        placement.handle(each, 0.0)
    arrivals = [ev.RequestArrived(n + 1, *dice.choices(models, weights)) for n in range(requests)]
    spent = {"arrival": 0.0, "begin and end": 0.0}
    clock = time.process_time
    live = LIVE * hosts
    for number, arrival in enumerate(arrivals):
        now = 1.0 + number * 1e-4
        began = clock()
        placement.handle(arrival, now)
        placed = clock()
        placement.handle(ev.AnswerBegan(arrival.request), now)
        if number >= live:
            placement.handle(ev.RequestEnded(arrivals[number - live].request), now)
        ended = clock()
        spent["arrival"] += placed - began
        spent["begin and end"] += ended - placed
    began = clock()
    for each in newer:
        placement.handle(each, 10.0)
    found = {name: seconds / requests * 1e6 for name, seconds in spent.items()}
    return {**found, "report": (clock() - began) / hosts * 1e6}


def simulated(hosts: int, models: int, rate: float, seconds: float, gateways: int) -> str:
    """Simulate a large fleet; say what it took."""
    trace = generate(Poisson(models, rate, 1.0), seconds, 1)
    engines = Engines(EngineModel())

    def adaptive() -> Policy:
        return load_policy("adaptive", {}, Path())

    costs = CostMatrix(default=10.0)
    setting = Setting(trace, hosts, costs, engines, adaptive, gateways=gateways, horizon=seconds)
    began = time.process_time()
    outcome = simulate_fleet(setting, SHIPPED["least_wait"])
    requests = sum(arrived is not None for arrived in outcome.requests.arrived)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    by = "four gateways" if gateways == 4 else "one gateway"
    return (
        f"{hosts:,} hosts with {models} models, {by} and {requests:,} requests in {seconds:,.0f} s takes"
        f" {time.process_time() - began:.0f} s of CPU and {mib:.0f} MB"
    )


def write(cost: dict[str, float]) -> None:
    """Write the guide's figures."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        large = [pool.apply(simulated, each) for each in LARGE]
    arrival, ends, report_ = (f"{cost[name]:.0f} µs" for name in ("arrival", "begin and end", "report"))
    text = f"""A placement among 1,000 hosts with 50 models takes {arrival} of CPU, its begin and end {ends},
a host's report {report_} (the best of five rounds). A simulation of {large[0]};
one of {large[1]}.
Measured by `python -m tests.benchmarks.fleet_placement --write`, at a load of {os.getloadavg()[0]:.0f}.
"""
    write_between(GUIDE, BEGIN, END, text)
    print(text)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--route", default="least_wait", choices=list(SHIPPED))
    parser.add_argument("--write", action="store_true", help="simulate large fleets, too, and write the guide")
    given = parser.parse_args()
    rounds = [one_round(given.route, given.hosts, given.models, given.requests, seed) for seed in range(ROUNDS)]
    cost = {name: min(each[name] for each in rounds) for name in rounds[0]}
    print(f"{given.route}, {given.hosts} hosts, {given.models} models, {given.requests} requests:")
    for name, value in cost.items():
        print(f"  {name:14} {value:7.1f} µs")
    if given.write:
        write(cost)


if __name__ == "__main__":
    main()
