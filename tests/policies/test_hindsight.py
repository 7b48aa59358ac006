"""The bound is one: what it says is possible is done by the production core, and no policy does better."""

import pytest

from llmux.simulator import CostMatrix, EngineModel, Trace, simulate
from llmux.simulator.statistics import waits_of
from llmux.simulator.synthetic import Agents, OnOff, Poisson, generate
from llmux.simulator.trace import Job, TraceError
from tests.policies.hindsight import Hindsight, Rules, Scripted
from tests.policies.views import policy

TRACES = [
    generate(Poisson(2, 0.5), 50.0, 1),
    generate(Poisson(3, 0.4), 50.0, 2),
    generate(OnOff(2, 0.6, 20, 20), 60.0, 3),
]
ENGINES = [EngineModel(slots=2), EngineModel(slots=16, decode=30.0, slowdown=0.3)]
COSTS = [
    CostMatrix(default=0.3),
    CostMatrix(sleeps={"m0": 1.0, "m1": 4.0, "m2": 0.5}, wakes={"m0": 9.0, "m1": 2.0, "m2": 3.0}),
]


@pytest.fixture(params=[(t, e, c) for t in TRACES for e in ENGINES for c in COSTS], ids=str)
def scenario(request):
    return request.param


def waited(scenario, which):
    trace, engine, costs = scenario
    return sum(waits_of(simulate(trace, which, costs, engine=engine)))


@pytest.mark.parametrize("rules", [Rules(), Rules(drains=False), Rules(oldest=True), Rules(width=3)], ids=str)
def test_the_core_does_what_hindsight_says(scenario, rules):
    trace, engine, costs = scenario
    best = Hindsight(trace, costs, engine, rules).best()
    assert sum(count for _, count in best.visits) == len(trace.jobs)
    assert waited(scenario, Scripted(best)) == pytest.approx(best.waited)


def test_no_policy_waits_less(scenario):
    trace, engine, costs = scenario
    best = Hindsight(trace, costs, engine).best()
    assert best.exact
    assert all(best.waited <= waited(scenario, policy(name)) + 1e-6 for name in ("fifo", "idle", "adaptive"))


def test_a_restriction_costs_and_a_liberty_does_not(scenario):
    trace, engine, costs = scenario
    best = Hindsight(trace, costs, engine).best().waited
    for rules in (Rules(drains=False), Rules(oldest=True), Rules(width=3)):
        assert Hindsight(trace, costs, engine, rules).best().waited >= best
    assert Hindsight(trace, costs, engine, Rules(ahead=True)).best().waited <= best


def test_one_that_can_be_reckoned_by_hand():
    jobs = [Job(0.0, "a", 0, 10), Job(1.0, "b", 0, 1), Job(2.0, "a", 0, 10)]
    engine, costs = EngineModel(slots=1, decode=1.0), CostMatrix(default=5.0)
    best = Hindsight(Trace("three", jobs), costs, engine).best()
    assert best.visits == (("a", 2), ("b", 1))
    assert best.waited == pytest.approx(8.0 + 24.0)  # leaving between the two: 14 and 19
    jobs[1] = Job(1.0, "b", 0, 1)
    eager = Hindsight(Trace("dear", [*jobs, Job(3.0, "b", 0, 1)]), CostMatrix(default=0.1), engine).best()
    assert eager.visits == (("a", 1), ("b", 2), ("a", 1))


def test_what_is_known_already_is_the_bound():
    trace, engine, costs = TRACES[0], ENGINES[0], COSTS[0]
    best = Hindsight(trace, costs, engine).best()
    assert Hindsight(trace, costs, engine).best(best.waited).visits == best.visits
    with pytest.raises(TraceError, match="as good as that"):
        Hindsight(trace, costs, engine).best(best.waited * 0.9)


def test_a_closed_loop_has_none():
    with pytest.raises(TraceError, match="closed loop"):
        Hindsight(generate(Agents(), 60.0, 1), COSTS[0], ENGINES[0])
