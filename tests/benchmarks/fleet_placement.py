"""What a placement costs: microseconds of CPU for each event of a gateway with many hosts and models.

    python -m tests.benchmarks.fleet_placement [--hosts 1000] [--models 50] [--requests 20000]

Every host has one model awake and some requests; models are asked for as often as Zipf says, so that some are
awake on hundreds of hosts and some nowhere. The best of five rounds counts: whatever else the machine does can
only make a round slower.
"""

from __future__ import annotations

import argparse
import random
import time

from llmux.core.phases import Phase
from llmux.fleet import events as ev
from llmux.fleet.placement import Placement
from llmux.fleet.reports import HostReport, ModelReport
from llmux.fleet.routes import SHIPPED

ROUNDS = 5
LIVE = 4  # requests on a host, on average


def report(dice: random.Random, host: str, seq: int, models: list[str], weights: list[float]) -> HostReport:
    """Return the report of a host with one model awake."""
    (awake,) = dice.choices(models, weights)
    cold = ModelReport(expected_wait=9.0, switch_cost=6.0, sleep=1.0, wake=5.0, service=3.0, slots=8)
    warm = ModelReport(Phase.AWAKE, 0, dice.randrange(9), 0.0, 0.0, 1.0, 5.0, dice.random(), 3.0, 8, 60.0)
    known = dict.fromkeys(models, cold)
    known[awake] = warm
    return HostReport(host, "1", seq, "", known, lease=1e9)


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--route", default="least_wait", choices=list(SHIPPED))
    given = parser.parse_args()
    rounds = [one_round(given.route, given.hosts, given.models, given.requests, seed) for seed in range(ROUNDS)]
    print(f"{given.route}, {given.hosts} hosts, {given.models} models, {given.requests} requests:")
    for name in rounds[0]:
        print(f"  {name:14} {min(each[name] for each in rounds):7.1f} µs")


if __name__ == "__main__":
    main()
