"""The snapshot: what a policy sees, live."""

from __future__ import annotations

import pytest
from playbook import ANY, given, models

from llmux.core import events as ev
from llmux.core.policy import WaitUntil
from llmux.core.spec import Rules


class Looks:
    """Waits, and keeps what it is shown."""

    def decide(self, now):
        self.now = now
        return WaitUntil(now.time + 1e6)


@pytest.fixture
def policy():
    return Looks()


def test_what_a_policy_sees(policy) -> None:
    guesses = {"a": (None, 3.0), "b": (5.0, None), "c": (6.0, None)}
    play = given(models("a", "b", "c", max_in_flight=4), awake=["a"], policy=policy, first_guesses=guesses)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "c"))
    play.feed(3.0, ev.RequestArrived(3, "b"))
    play.feed(4.0, ev.RequestArrived(4, "c"))
    play.feed(7.0, ev.RequestFinished(1))
    now = policy.now
    assert now.time == 7.0
    assert now.awake == ("a",)
    assert now.waiting == ("c", "b")
    assert list(now.models) == ["a", "b", "c"]
    a, c = now.models["a"], now.models["c"]
    assert (a.name, a.awake, a.queued, a.in_flight, a.limit) == ("a", True, 0, 0, 4)
    assert (a.awake_since, a.last_served, a.oldest_arrival, a.service_time) == (0.0, 7.0, None, 6.0)
    assert (c.name, c.awake, c.queued, c.in_flight) == ("c", False, 2, 0)
    assert (c.awake_since, c.last_served, c.oldest_arrival, c.service_time) == (None, None, 2.0, 0.0)
    assert list(c.arrivals()) == [2.0, 4.0]
    assert c.switch_cost == 9.0


def test_what_a_visit_has_served(policy) -> None:
    play = given(models("a", "b"), awake=["a"], policy=policy)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "a"))
    play.feed(3.0, ev.RequestArrived(3, "b"))
    a, b = policy.now.models["a"], policy.now.models["b"]
    assert (a.admissions, a.oldest_admission) == (2, 1.0)
    assert (b.admissions, b.oldest_admission) == (0, None)
    play.feed(4.0, ev.RequestFinished(1))
    assert (a.admissions, a.oldest_admission) == (2, 2.0)
    play.feed(5.0, ev.RequestFinished(2))
    assert (a.admissions, a.oldest_admission) == (2, None)


def test_snapshot_is_live_and_follows_a_reload(policy) -> None:
    play = given(models("a", "b"), awake=["a"], policy=policy)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(1.0, ev.RequestArrived(2, "b"))
    view = policy.now.models["a"]
    play.feed(2.0, ev.RequestArrived(3, "a"))
    assert view.in_flight == 2
    play.feed(3.0, ev.ConfigReplaced(models("a", "c"), Rules(), ANY))
    assert list(policy.now.models) == ["a", "c"]
    with pytest.raises(TypeError):
        policy.now.models["x"] = view


class AsksOfAll:
    """Waits, and keeps what a switch to each would cost."""

    def decide(self, now):
        self.costs = {name: model.switch_cost for name, model in now.models.items()}
        return WaitUntil(now.time + 1e6)


def test_a_policy_may_ask_what_a_switch_to_each_costs() -> None:
    policy = AsksOfAll()
    guesses = {"a": (1.0, 3.0), "b": (5.0, None), "c": (6.0, None)}
    play = given(models("a", "b", "c"), awake=["a"], policy=policy, first_guesses=guesses)
    play.feed(1.0, ev.RequestArrived(1, "b"))
    assert policy.costs == {"a": 1.0, "b": 8.0, "c": 9.0}
    play.feed(2.0, ev.SleepRequested("a", 1))
    (sleep,) = play.ledger.hooks
    play.feed(4.0, ev.HookFinished(sleep, ok=True))
    assert policy.costs == {"a": 1.0, "b": 5.0, "c": 6.0}  # it has been asked anew, and nothing leaves


def test_arrival_rate_is_an_average_over_two_minutes(policy) -> None:
    play = given(models("a", "b"), awake=["a"], policy=policy)
    play.feed(0.0, ev.RequestArrived(1, "b"))
    b = policy.now.models["b"]
    for second in range(1, 720):
        play.feed(float(second), ev.RequestArrived(1 + second, "b"))
    assert b.arrival_rate == pytest.approx(1.0, rel=0.01)
    play.feed(840.0, ev.DeadlineReached())
    assert b.arrival_rate == pytest.approx(0.37, rel=0.02)


def test_service_time_is_an_exponential_average(policy) -> None:
    play = given(models("a", "b"), awake=["a"], policy=policy)
    play.feed(0.0, ev.RequestArrived(1, "a"))
    play.feed(10.0, ev.RequestFinished(1))
    play.feed(10.0, ev.RequestArrived(2, "a"))
    play.feed(30.0, ev.RequestFinished(2))
    play.feed(30.0, ev.RequestArrived(3, "b"))
    assert policy.now.models["a"].service_time == pytest.approx(11.0)


def test_with_capacity_the_cost_is_that_of_the_cheapest_to_leave(policy) -> None:
    guesses = {"a": (1.0, 9.0), "b": (1.0, 2.0), "c": (6.0, None)}
    specs = models("a", "b", "c", memory=4)
    play = given(specs, awake=["a", "b"], capacity=8, policy=policy, first_guesses=guesses)
    play.feed(1.0, ev.RequestArrived(1, "c"))
    assert policy.now.models["c"].switch_cost == 8.0


def test_cost_of_a_model_that_a_pin_excludes_is_that_of_its_wake(policy) -> None:
    play = given(models("a", "b", "c"), awake=["a"], policy=policy, first_guesses={"b": (5.0, None)})
    play.feed(1.0, ev.RequestArrived(1, "b"))
    play.feed(2.0, ev.PinChanged("a", 1))
    assert policy.now.models["b"].switch_cost == 5.0
