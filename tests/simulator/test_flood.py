"""One key that floods, and five that do not: what these wait with fairness, without, and alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmux.core.spec import Rules
from llmux.estimates.fairness import Fairness, FairOrder
from llmux.plugins import load_policy
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import EngineModel, Engines
from llmux.simulator.run import Run, Scene
from llmux.simulator.trace import Job, Trace

HOUR = 3600.0
ENGINES = Engines(EngineModel(slots=4, decode=100.0, prefill=4000.0, slowdown=0.1))
SWITCH = 15.0  # seconds
LANES, EACH = 64, 60  # requests that the flood always has under way, and that each of them sends one by one


def traffic(seed: int, flood: tuple[str, ...]) -> tuple[Trace, list[str]]:
    """Return an hour in which five keys ask one of two models every 40 s, and a flood; and the key of each job."""
    dice, jobs, keys = random.Random(seed), [], []
    for number in range(5):
        time = dice.expovariate(1 / 40)
        while time < HOUR:
            jobs.append(Job(time, dice.choice("ab"), 200, dice.randint(50, 150)))
            keys.append(f"key {number}")
            time += dice.expovariate(1 / 40)
    for _ in range(LANES if flood else 0):
        for number in range(EACH):
            arrival, after = (None, len(jobs) + 1) if number else (dice.random() * 60, len(jobs) + 1)
            after = after if number < EACH - 1 else None
            jobs.append(Job(arrival, dice.choice(flood), 200, dice.randint(50, 150), successor=after))
            keys.append("flood")
    return Trace("flood", jobs), keys


def wait(seed: int, policy: str, flood: tuple[str, ...] = (), *, fair: bool = False) -> float:
    """Return the mean seconds that the requests of the five wait."""
    trace, keys = traffic(seed, flood)
    rules = Rules(alive_every=0.0, max_wait=600.0)
    scene = Scene.of(trace, ENGINES)
    run = Run(trace, load_policy(policy, {}, Path()), CostMatrix(SWITCH), ENGINES, rules, HOUR, scene)
    if fair:
        jobs = trace.jobs
        run.handle = FairOrder(Fairness()).attach(
            run.core, keys.__getitem__, lambda job: (jobs[job].prompt_tokens, jobs[job].output_tokens)
        )
    found = run.go(None)
    waits = [
        (HOUR if found.admitted[job] is None else found.admitted[job]) - arrived
        for job, arrived in enumerate(found.arrived)
        if arrived is not None and keys[job] != "flood"
    ]
    return sum(waits) / len(waits)


@pytest.mark.parametrize("policy", ["adaptive", "fifo"])
@pytest.mark.parametrize("flood", [("a", "b"), ("a",)], ids="".join)
def test_five_keys_hardly_notice_a_flood(policy, flood):
    seeds = (1, 2)
    alone, fair, plain = (
        sum(wait(seed, policy, models, fair=fairly) for seed in seeds) / len(seeds)
        for models, fairly in (((), False), (flood, True), (flood, False))
    )
    print(f"{policy}, flood for {flood}: {alone:.1f} s alone, {fair:.1f} s fair, {plain:.1f} s without")  # noqa: T201
    assert fair <= 1.3 * alone
    assert plain > 1.3 * alone
    assert plain > fair
