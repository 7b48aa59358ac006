"""One run: small traffic whose course can be worked out by hand, and the properties of large traffic."""

import pytest

from llmux.core.policy import Stay, SwitchTo, WaitUntil
from llmux.core.spec import Rules
from llmux.simulator import CostMatrix, EngineModel, Job, Trace, TraceError, simulate, statistics_of
from llmux.simulator.run import Visit
from llmux.simulator.synthetic import Agents, OnOff, Poisson, generate
from tests.policies.views import policy

FIFO = policy("fifo")
TEN = CostMatrix(default=10.0)
# One token a second: a job of n output tokens takes n seconds alone.
SLOW = EngineModel(slots=2, decode=1.0, prefill=1e9, slowdown=0.0)


def run(jobs, which=FIFO, costs=TEN, engine=SLOW, **more):
    return simulate(Trace("t", jobs), which, costs, engine=engine, **more)


def test_the_first_asked_model_is_awake():
    outcome = run([Job(3.0, "b", 0, 5)])
    assert outcome.admitted == [3.0]
    assert outcome.finished == [8.0]
    assert outcome.switches == 0


def test_a_switch_drains_then_costs():
    outcome = run([Job(0.0, "a", 0, 6), Job(1.0, "b", 0, 2)])
    assert outcome.admitted == [0.0, 16.0]
    assert outcome.finished == [6.0, 18.0]
    assert outcome.visits == [
        Visit(0.0, 1.0, "a", "awake"),
        Visit(1.0, 6.0, "a", "drain"),
        Visit(6.0, 16.0, "b", "switch"),
        Visit(16.0, 18.0, "b", "awake"),
    ]


def test_costs_depend_on_the_direction():
    costs = CostMatrix(pairs={("a", "b"): 1.0, ("b", "a"): 7.0})
    outcome = run([Job(0.0, "a", 0, 1), Job(5.0, "b", 0, 1), Job(20.0, "a", 0, 1)], costs=costs)
    assert outcome.admitted == [0.0, 6.0, 27.0]


def test_slots_are_shared_out_in_order():
    outcome = run([Job(0.0, "a", 0, 10), Job(1.0, "a", 0, 2), Job(2.0, "a", 0, 4)])
    assert outcome.admitted == [0.0, 1.0, 3.0]
    assert outcome.finished == [10.0, 3.0, 7.0]


def test_streams_slow_each_other_down():
    engine = EngineModel(slots=2, decode=1.0, prefill=1e9, slowdown=1.0)
    outcome = run([Job(0.0, "a", 0, 3), Job(1.0, "a", 0, 1)], engine=engine)
    # One second alone, then each at half speed until the short one is done, then alone again.
    assert outcome.finished == [4.0, 3.0]


def test_the_first_token_comes_after_the_prompt():
    engine = EngineModel(slots=2, decode=1.0, prefill=10.0, slowdown=1.0)
    outcome = run([Job(0.0, "a", 30, 5), Job(2.0, "a", 0, 3)], engine=engine)
    # 3 s of prompt and one token: two alone, two more at half speed.
    assert outcome.first_token == [pytest.approx(6.0), pytest.approx(4.0)]


def test_successors_follow_their_answers():
    outcome = run([Job(0.0, "a", 0, 2, successor=1, think=3.0), Job(None, "b", 0, 1)])
    assert outcome.arrived == [0.0, 5.0]
    assert outcome.admitted == [0.0, 15.0]


def test_a_horizon_cuts():
    outcome = run([Job(0.0, "a", 0, 50), Job(1.0, "b", 0, 2), Job(70.0, "a", 0, 1)], horizon=20.0)
    assert outcome.end == 20.0
    assert outcome.admitted == [0.0, None, None]
    assert outcome.arrived == [0.0, 1.0, None]
    found = statistics_of(outcome)
    assert (found.requests, found.completed, found.max_wait) == (2, 0, 19.0)
    assert found.draining == pytest.approx(19 / 20)


def test_max_wait_holds_over_the_policy():
    class Never:
        def decide(self, now):
            return WaitUntil(now.time + 30.0)

    outcome = run([Job(0.0, "a", 0, 500), Job(1.0, "b", 0, 1)], Never(), rules=Rules(max_wait=40.0))
    assert outcome.visits[1].start == 41.0


def test_a_policy_is_asked_and_told_as_in_production():
    class Spy:
        def __init__(self):
            self.seen, self.told = [], []

        def decide(self, now):
            self.seen.append((now.time, now.awake, now.waiting))
            return SwitchTo(now.waiting[0])

        def on_switch_completed(self, record):
            self.told.append((record.from_models, record.to, record.cost))

    spy = Spy()
    run([Job(0.0, "a", 0, 1), Job(4.0, "b", 0, 1)], spy)
    assert spy.seen == [(4.0, ("a",), ("b",))]
    assert spy.told == [(("a",), "b", 10.0)]


def test_progress_is_told():
    times = []
    simulate(generate(Poisson(), 2000.0, 1), FIFO, TEN, progress=times.append)
    assert times == sorted(times)
    assert len(times) > 3


def test_nothing_arrives():
    with pytest.raises(TraceError, match="nothing arrives"):
        run([])


def test_a_cost_is_missing():
    with pytest.raises(TraceError, match="no cost is given"):
        run([Job(0.0, "a", 0, 1), Job(0.0, "b", 0, 1)], costs=CostMatrix())


@pytest.mark.parametrize("load", [Poisson(4, 0.6), OnOff(4), Agents(3, background=0.1)])
@pytest.mark.parametrize("name", ["fifo", "adaptive"])
def test_everything_is_answered_in_order_and_again_the_same(load, name):
    trace = generate(load, 600.0, 5)
    outcome = simulate(trace, policy(name), TEN)
    for job, arrived, admitted, first, finished in zip(
        trace.jobs, outcome.arrived, outcome.admitted, outcome.first_token, outcome.finished, strict=True
    ):
        assert arrived is not None
        assert job.arrival in (None, arrived)
        assert arrived <= admitted <= first <= finished + 1e-6
    again = simulate(trace, policy(name), TEN)
    assert again.finished == outcome.finished
    assert again.visits == outcome.visits


def test_nothing_is_served_while_a_switch_is_paid_for():
    trace = generate(Poisson(3, 0.5), 900.0, 2)
    outcome = simulate(trace, policy("idle"), TEN)
    switches = [visit for visit in outcome.visits if visit.what == "switch"]
    assert switches
    assert all(visit.end - visit.start == pytest.approx(10.0) for visit in switches)
    for admitted, finished in zip(outcome.admitted, outcome.finished, strict=True):
        assert not any(admitted < visit.end - 1e-6 and finished > visit.start + 1e-6 for visit in switches)


def test_work_is_conserved():
    trace = generate(Poisson(1, 0.5), 900.0, 2)
    engine = EngineModel(slots=1)
    outcome = simulate(trace, FIFO, TEN, engine=engine)
    served = [end - begin for begin, end in zip(outcome.admitted, outcome.finished, strict=True)]
    assert served == pytest.approx([engine.work(job) / 60.0 for job in trace.jobs])


def test_a_policy_that_stays_put_is_overruled_only_when_idle():
    class Lazy:
        def decide(self, _now):
            return Stay()

    outcome = run([Job(0.0, "a", 0, 9), Job(1.0, "b", 0, 1)], Lazy())
    assert outcome.admitted[1] == 19.0


def test_what_has_no_known_service_loses_its_patience_too():
    jobs = [Job(0.0, "a", 0, 600), Job(1.0, "b", 0, 60, patience=2.0)]
    outcome = simulate(Trace("", jobs), policy("idle"), CostMatrix(default=1.0))
    assert outcome.arrived == [0.0, None]
