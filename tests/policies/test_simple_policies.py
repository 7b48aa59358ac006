"""The policies that a rule of a sentence or two describes."""

import pytest

from llmux.core.policy import Stay, SwitchTo, WaitUntil
from llmux.plugins import known_policies
from tests.policies.views import Model, ask

IDLE = Model("a", awake_since=0.0)
BUSY = Model("a", in_flight=2, awake_since=0.0)
GATED = Model("a", [4.0], in_flight=16, awake_since=5.0)  # one who waited at the wake still waits


def goes_to(decision, model):
    return isinstance(decision, SwitchTo) and decision.model == model


class TestIdle:
    def test_stays_while_busy(self):
        assert isinstance(ask("idle", 500.0, BUSY, Model("b", [1.0])), Stay)

    def test_leaves_when_idle_for_the_oldest(self):
        assert goes_to(ask("idle", 10.0, IDLE, Model("b", [5.0]), Model("c", [4.0])), "c")


class TestExhaustive:
    def test_stays_while_busy_until_somebody_is_stale(self):
        decision = ask("exhaustive", 30.0, BUSY, Model("b", [10.0]))
        assert isinstance(decision, WaitUntil)
        assert decision.time == 70.0

    def test_the_bound_grows_with_the_cost(self):
        decision = ask("exhaustive", 30.0, BUSY, Model("b", [10.0], switch_cost=40.0))
        assert decision.time == 170.0

    def test_leaves_for_the_stale(self):
        assert goes_to(ask("exhaustive", 70.0, BUSY, Model("b", [10.0])), "b")

    def test_not_before_those_behind_the_gate_are_served(self):
        assert isinstance(ask("exhaustive", 100.0, GATED, Model("b", [1.0])), WaitUntil)
        assert goes_to(ask("exhaustive", 100.0, GATED, Model("b", [1.0]), gate=False), "b")

    @pytest.mark.parametrize(("route", "model"), [("oldest", "b"), ("longest", "c")])
    def test_its_route_when_idle(self, route, model):
        assert goes_to(
            ask("exhaustive", 10.0, IDLE, Model("b", [1.0]), Model("c", [2.0, 3.0]), route=route), model
        )


class TestTimeSlice:
    def test_the_longest_queue_when_idle(self):
        assert goes_to(ask("timeslice", 10.0, IDLE, Model("b", [1.0]), Model("c", [2.0, 3.0])), "c")

    def test_a_model_has_its_time(self):
        home = Model("a", awake_since=8.0)
        assert ask("timeslice", 10.0, home, Model("b", [9.0])).time == 13.0

    def test_whoever_has_waited_too_long_comes_first(self):
        busy = Model("a", in_flight=2, awake_since=0.0)
        assert ask("timeslice", 10.0, busy, Model("b", [9.0])).time == 24.0
        assert goes_to(ask("timeslice", 24.0, busy, Model("b", [9.0]), Model("c", [10.0, 10.0])), "b")

    def test_not_before_those_behind_the_gate(self):
        assert isinstance(ask("timeslice", 50.0, GATED, Model("b", [1.0])), Stay)


class TestCostAware:
    def test_a_visit_lasts_as_long_as_the_switch_costs(self):
        home = Model("a", in_flight=1, awake_since=9.0)
        decision = ask("cost_aware", 10.0, home, Model("b", [8.0] * 9))
        assert isinstance(decision, WaitUntil)
        assert decision.time == 19.0

    def test_a_queue_that_is_long_enough(self):
        assert goes_to(ask("cost_aware", 20.0, BUSY, Model("b", [19.5] * 5)), "b")

    def test_a_queue_that_has_gathered(self):
        assert ask("cost_aware", 20.0, BUSY, Model("b", [19.5])).time == 21.5
        assert goes_to(ask("cost_aware", 21.5, BUSY, Model("b", [19.5])), "b")

    def test_whoever_has_waited_too_long(self):
        home = Model("a", in_flight=1, awake_since=19.0)
        assert goes_to(ask("cost_aware", 20.0, home, Model("b", [5.0])), "b")


class TestAmortized:
    def test_a_visit_pays_for_the_next_switch(self):
        home = Model("a", in_flight=1, awake_since=9.0)
        assert ask("amortized", 10.0, home, Model("b", [9.0]), alpha=2.0).time == 29.0

    def test_then_the_greatest_need(self):
        b, c = Model("b", [10.0]), Model("c", [11.0, 12.0, 13.0])
        assert goes_to(ask("amortized", 20.0, BUSY, b, c), "c")

    def test_whoever_has_waited_too_long(self):
        home = Model("a", in_flight=1, awake_since=99.0)
        assert goes_to(ask("amortized", 100.0, home, Model("b", [40.0]), Model("c", [41.0] * 9)), "b")


class TestKLimited:
    def test_a_visit_has_its_share(self):
        home = Model("a", in_flight=2, awake_since=0.0, admissions=7)
        assert isinstance(ask("k_limited", 10.0, home, Model("b", [1.0]), k=8), Stay)

    def test_and_no_more(self):
        home = Model("a", [9.0], in_flight=2, awake_since=0.0, admissions=8)
        assert goes_to(ask("k_limited", 10.0, home, Model("b", [1.0]), k=8), "b")

    def test_leaves_when_idle(self):
        assert goes_to(ask("k_limited", 10.0, IDLE, Model("b", [5.0]), Model("c", [4.0])), "c")


class TestPriority:
    def test_the_most_important_when_idle(self):
        decision = ask("priority", 10.0, IDLE, Model("b", [5.0]), Model("c", [9.0]), priorities={"c": 3})
        assert goes_to(decision, "c")

    def test_waiting_makes_up_for_importance(self):
        decision = ask("priority", 100.0, IDLE, Model("b", [5.0]), Model("c", [99.0]), priorities={"c": 3})
        assert goes_to(decision, "b")

    def test_an_important_model_is_left_late(self):
        busy, waiter = Model("a", in_flight=1, awake_since=0.0), Model("b", [10.0])
        decision = ask("priority", 20.0, busy, waiter, priorities={"a": 3})
        assert isinstance(decision, WaitUntil)
        assert decision.time == pytest.approx(70.0, abs=0.1)
        assert goes_to(ask("priority", 71.0, busy, waiter, priorities={"a": 3}), "b")

    def test_priorities_of_the_command_line(self):
        decision = ask("priority", 10.0, IDLE, Model("b", [5.0]), Model("c", [9.0]), priorities="c=3 b=1")
        assert goes_to(decision, "c")


@pytest.mark.parametrize("name", ["amortized", "cost_aware", "exhaustive", "priority", "timeslice"])
def test_nobody_behind_the_gate_is_left(name):
    assert not isinstance(ask(name, 25.0, GATED, Model("b", [24.0])), SwitchTo)


@pytest.mark.parametrize("name", known_policies())
def test_nobody_awake(name):
    assert isinstance(ask(name, 60.0, Model("b", [5.0])), SwitchTo)
