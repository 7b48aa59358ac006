"""What a policy has seen for itself bounds the averages that it is shown."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from llmux.policies.adaptive import MEMORY, Memory, longest

from llmux.core.policy import SwitchRecord


@dataclass
class View:
    name: str = "a"
    queued: int = 0
    in_flight: int = 0
    awake_since: float | None = 0.0
    admissions: int = 0
    oldest_admission: float | None = None
    arrival_rate: float = 0.0
    service_time: float = 0.0
    switch_cost: float = 10.0


RECORD = SwitchRecord(1, ("a",), "b", "success", drain=6.0, cost=4.0, ended=50.0)


@pytest.fixture
def memory() -> Memory:
    return Memory()


def test_a_cost_is_a_cautious_guess_until_it_was_paid(memory) -> None:
    a, b = View("a"), View("b")
    assert memory.cost(a, b) == pytest.approx(3.5)
    assert memory.cost(a, View("b", switch_cost=99.0)) == pytest.approx(3.5)
    memory.learn(RECORD)
    assert memory.cost(a, b) == 4.0
    memory.learn(replace(RECORD, cost=14.0))
    assert memory.cost(a, b) == 7.0


@pytest.mark.parametrize("change", [{"cost": None}, {"to": None}, {"from_models": ("a", "c")}])
def test_what_is_no_direction_teaches_no_cost(memory, change) -> None:
    memory.learn(replace(RECORD, **change))
    assert memory.costs == {}


def test_services_seen_bound_their_average(memory) -> None:
    assert memory.service(View(service_time=0.0)) == 4.0
    assert memory.service(View(service_time=30.0)) == 30.0
    memory.watch(View(admissions=4, in_flight=4), 10.0)
    memory.watch(View(admissions=4, in_flight=0), 14.0)  # 4 answers in 4 s, two at a time on average
    assert memory.service(View(service_time=30.0)) == 2.5
    assert memory.service(View(service_time=0.1)) == 1.6


def test_a_new_visit_is_not_taken_for_the_last(memory) -> None:
    memory.watch(View(admissions=9, in_flight=2), 10.0)
    memory.watch(View(admissions=1, in_flight=1, awake_since=20.0), 30.0)
    assert memory.service(View(service_time=30.0)) == 30.0


def test_old_services_are_forgotten(memory) -> None:
    memory.watch(View(), 0.0)
    memory.watch(View(admissions=MEMORY + 1), 1.0)
    memory.watch(View(admissions=2 * MEMORY, in_flight=2), 101.0)
    assert memory._work["a"] == (100.0, (MEMORY + 1) / 2 + MEMORY - 1 - 2)


def test_arrivals_seen_bound_their_average(memory) -> None:
    memory.watch(View(), 0.0)
    assert memory.rate(View(admissions=2, arrival_rate=5.0), 10.0) == 5.0
    assert memory.rate(View(admissions=3, queued=7, arrival_rate=5.0), 10.0) == 1.5
    memory.left(View(), 90.0)
    assert memory.rate(View(admissions=10, arrival_rate=0.1), 100.0) == pytest.approx(1 / 1.5)


def test_drains_seen_count_for_more_than_services(memory) -> None:
    assert memory.drain(View(in_flight=0), 10.0) == 0.0
    busy = View(in_flight=3, service_time=2.0, oldest_admission=9.0)
    assert memory.drain(busy, 10.0) == pytest.approx(2.0 * longest(3))
    memory.left(busy, 10.0)
    memory.learn(RECORD)
    assert memory.drain(busy, 10.0) == pytest.approx(6.0)


def test_what_has_run_for_long_runs_on(memory) -> None:
    assert memory.drain(View(in_flight=1, service_time=2.0, oldest_admission=0.0), 100.0) == 100.0
    assert memory.drain(View(in_flight=1, service_time=2.0), 100.0) == pytest.approx(2.0 * longest(1))


@pytest.mark.parametrize("left", [View("c", in_flight=3), View("a", in_flight=0)])
def test_a_drain_of_nothing_or_of_another_teaches_nothing(memory, left) -> None:
    memory.left(left, 10.0)
    memory.learn(RECORD)
    assert memory._drains == {}
