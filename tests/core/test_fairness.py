"""Whose turn is next, by what each key has had."""

from __future__ import annotations

import math
import random

import pytest
from playbook import Later, Oldest, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import WaitUntil
from llmux.estimates.fairness import ABOUT, AHEAD, NEARLY, UNKNOWN, Fairness, FairOrder, Prices


def serve(fair, key, tokens=(100, 100)):
    """Serve one request of a key from its arrival to its end."""
    fair.joined(key)
    fair.started(key)
    fair.stopped(key)
    fair.served(key, tokens)
    fair.left(key)


def test_tokens_cost_their_prices():
    fair = Fairness(Prices(input=1.0, output=2.0))
    serve(fair, "a", (100, 50))
    assert fair.counters() == {"a": 200.0}


def test_a_weight_makes_all_cheaper():
    fair = Fairness(Prices(input=1.0, output=2.0, switch_second=10.0), {"a": 4.0})
    serve(fair, "a", (100, 50))
    assert fair.counters() == {"a": 50.0}
    fair.joined("a")
    fair.switched(["a"], 8.0)
    assert fair.counters() == {"a": 70.0}
    assert fair.rank("a") == 70.0


def test_those_that_cause_a_switch_share_it():
    fair = Fairness(Prices(switch_second=10.0))
    for key in "ab":
        fair.joined(key)
    fair.switched(["a", "b"], 3.0)
    assert fair.counters() == {"a": 15.0, "b": 15.0}
    fair.switched([], 3.0)
    assert fair.counters() == {"a": 15.0, "b": 15.0}


def test_a_key_that_comes_back_is_lifted_to_the_lowest_active():
    fair = Fairness()
    for key in "ab":
        fair.joined(key)
    fair.served("a", (0, 50))
    fair.served("b", (0, 200))
    fair.joined("new")
    assert fair.counters()["new"] == 100.0
    fair.left("new")
    fair.left("a")
    fair.joined("new")
    assert fair.counters()["new"] == 400.0
    fair.joined("a")
    assert fair.counters()["a"] == 400.0


def test_what_nothing_uses_is_not_saved_up():
    fair = Fairness()
    serve(fair, "a", (1000, 0))
    fair.joined("b")
    assert fair.counters()["b"] == 1000.0


def test_what_is_in_flight_counts_with_what_it_usually_takes():
    fair = Fairness()
    fair.joined("a")
    fair.joined("a")
    fair.started("a")
    fair.started("a")
    assert fair.rank("a") == 2 * UNKNOWN
    fair.joined("b")
    assert fair.rank("b") == 0.0  # it is lifted to where the service of the other began
    fair.stopped("a")
    fair.served("a", (0, 15))
    assert fair.rank("a") == 30.0 + 30.0
    fair.served("a", (0, 20))
    assert fair.rank("a") == pytest.approx(102.0)


def test_what_is_far_ahead_does_not_count_for_the_policy():
    fair = Fairness(Prices(switch_second=10.0))
    fair.joined("flood")
    assert all(fair.entitled("flood", place) for place in (0, 10**6))  # nothing else is there
    fair.joined("a")
    places = [fair.entitled("flood", place) for place in range(10)]
    assert places == [place <= AHEAD for place in range(10)]
    assert fair.entitled("a", 0)
    fair.switched(["flood"], 1000.0)
    assert fair.entitled("flood", 0)  # it may be ahead by a switch
    fair.switched(["flood"], 1200.0)
    assert not fair.entitled("flood", 0)
    assert fair.entitled("a", 0)
    fair.left("a")
    assert fair.entitled("flood", 0)


def test_other_prices_and_weights_leave_the_counters():
    fair = Fairness()
    serve(fair, "a", (100, 0))
    fair.configure(Prices(input=3.0), {"a": 2.0})
    serve(fair, "a", (100, 0))
    assert fair.counters() == {"a": 250.0}


@pytest.mark.parametrize("seed", range(20))
def test_keys_that_always_wait_get_the_same_each_by_its_weight(seed):
    """The bound of the paper: no two that always wait differ by more than what is in flight can take."""
    dice = random.Random(seed)
    weights = {"a": 1.0, "b": dice.choice([1.0, 3.0]), "flood": 1.0}
    fair = Fairness(Prices(1.0, 2.0), weights)
    waiting = {"a": 400, "b": 400, "flood": 4000}
    for key, count in waiting.items():
        for _ in range(count):
            fair.joined(key)
    slots, most, flying = dice.randint(1, 8), 900, []
    before = fair.counters()
    while min(waiting.values()) > 0:
        while len(flying) < slots:
            key = min(waiting, key=fair.rank)
            waiting[key] -= 1
            fair.started(key)
            flying.append(key)
        key = flying.pop(dice.randrange(len(flying)))
        fair.stopped(key)
        fair.served(key, (dice.randint(1, 300), dice.randint(1, 300)))
        fair.left(key)
        after = fair.counters()
        assert all(after[name] >= before[name] for name in after)
        assert max(after.values()) - min(after.values()) <= 2 * (slots + 1) * most
        before = after


def test_rates_of_random_use_never_make_a_counter_fall():
    dice, fair = random.Random(7), Fairness()
    present, flying = [], []
    before: dict[str, float] = {}
    for _ in range(5000):
        what = dice.random()
        if what < 0.3 or not present:
            key = dice.choice("abcde")
            fair.joined(key)
            present.append(key)
        elif what < 0.5:
            flying.append(present.pop(dice.randrange(len(present))))
            fair.started(flying[-1])
        elif what < 0.6:
            fair.left(present.pop(dice.randrange(len(present))))
        elif what < 0.7:
            fair.switched(sorted(set(present)), dice.random() * 20)
        elif flying:
            key = flying.pop(dice.randrange(len(flying)))
            fair.stopped(key)
            fair.served(key, (dice.randint(0, 900), dice.randint(0, 900)))
            fair.left(key)
        after = fair.counters()
        assert all(after[name] >= counter for name, counter in before.items())
        active = {*present, *flying}
        assert fair.lowest == min((after[name] for name in active), default=fair.lowest)
        before = after


# ---- in a core


def fairly(specs, keys, awake=("a",), policy=None, tokens=(0, 250), **rules):
    """Return a playbook of a core that is fair, and the order; ``keys`` by request."""
    play = given(specs, awake=awake, policy=policy, **rules)
    order = FairOrder(Fairness())
    play.ledger.handle = order.attach(play.core, keys.__getitem__, lambda _request: tokens)
    return play, order


def admissions(effects):
    return [each.request for each in effects if isinstance(each, fx.Admit)]


def test_the_key_that_has_had_least_is_next():
    keys = {1: "flood", 2: "flood", 3: "flood", 4: "a", 5: "b"}
    play, _ = fairly(models("a", max_in_flight=1), keys)
    for request in keys:
        play.feed(1.0, ev.RequestArrived(request, "a"))
    found = [play.feed(2.0, ev.RequestFinished(1))]
    found += [play.feed(3.0, ev.RequestFinished(4)), play.feed(4.0, ev.RequestFinished(5))]
    assert [admissions(each) for each in found] == [[4], [5], [2]]


def test_several_that_are_let_in_at_once_are_shared_out():
    keys = {1: "flood", 2: "flood", 3: "flood", 4: "a", 5: "a"}
    play, _ = fairly(models("a", "b", max_in_flight=3), keys, awake=["b"], policy=Oldest())
    for request in keys:
        play.feed(1.0, ev.RequestArrived(request, "a"))
    play.feed(2.0, ev.HookFinished(3, ok=True))
    assert admissions(play.feed(3.0, ev.HookFinished(4, ok=True))) == [1, 4, 2]


def test_a_switch_is_charged_to_the_keys_that_waited_for_it():
    keys = {1: "a", 2: "b", 3: "c"}
    play, order = fairly(models("a", "b"), keys, policy=Later())
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(1.0, ev.RequestArrived(2, "b"))
    play.core.state.policy = Oldest()
    play.feed(2.0, ev.RequestArrived(3, "b"))
    play.feed(4.0, ev.RequestFinished(1))
    play.feed(5.0, ev.HookFinished(3, ok=True))
    play.feed(8.0, ev.HookFinished(4, ok=True))
    assert order.fairness.counters() == {"a": 500.0, "b": 4.0 * 250.0, "c": 4.0 * 250.0}


class Spy:
    """Waits, and keeps what it was shown."""

    extra = "had"

    def decide(self, now):
        self.seen = {
            name: (each.queued, list(each.arrivals()), each.in_flight) for name, each in now.models.items()
        }
        self.oldest = {name: each.oldest_arrival for name, each in now.models.items()}
        self.waiting, self.at = now.waiting, (now.time, now.awake)
        return WaitUntil(now.time + 1e6)


def test_policies_are_shown_what_counts():
    keys = {**dict.fromkeys(range(1, 9), "flood"), 9: "a", 10: "b"}
    spy = Spy()
    play, order = fairly(models("a", "b", "c"), keys, policy=spy)
    play.feed(1.0, ev.RequestArrived(9, "a"))
    for request in range(1, 9):
        play.feed(1.0 + request, ev.RequestArrived(request, "b"))
    play.feed(11.0, ev.RequestArrived(10, "c"))
    assert spy.seen == {"a": (0, [], 1), "b": (2, [2.0, 3.0], 0), "c": (1, [11.0], 0)}
    assert spy.oldest == {"a": None, "b": 2.0, "c": 11.0}
    assert (spy.waiting, spy.at) == (("b", "c"), (11.0, ("a",)))
    assert play.core.state.policy.extra == "had"
    order.fairness.served("flood", (10**6, 0))
    play.feed(12.0, ev.EngineLost("c"))
    assert spy.waiting == ("c",)


def test_while_something_is_served_what_does_not_count_waits():
    keys = {1: "a", 2: "flood"}
    spy = Spy()
    play, order = fairly(models("a", "b"), keys, policy=spy)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    order.before(1.0, ev.RequestArrived(7, "x", key="flood"))  # of another core, as it were
    order.fairness.served("flood", (10**6, 0))
    play.feed(2.0, ev.RequestArrived(2, "b"))
    assert not hasattr(spy, "seen")
    play.ledger.order = None
    found = play.feed(3.0, ev.RequestFinished(1))
    assert spy.waiting == ("b",)  # nothing else is there
    assert not admissions(found)


def test_what_is_served_by_a_key_that_is_ahead_is_left_for_one_that_is_not():
    keys = {1: "flood", 2: "a"}
    play, order = fairly(models("a", "b"), keys, policy=Later())
    play.feed(1.0, ev.RequestArrived(1, "a"))
    found = play.feed(2.0, ev.RequestArrived(2, "b"))
    assert not [each for each in found if isinstance(each, fx.SwitchStarted)]
    order.fairness.served("flood", (10**6, 0))
    found = play.feed(3.0, ev.EngineLost("b"))
    assert [each.to for each in found if isinstance(each, fx.SwitchStarted)] == ["b"]


def test_what_waits_for_too_long_goes_first_all_the_same():
    keys = {1: "a", 2: "flood", 3: "a"}
    play, order = fairly(models("a", "b"), keys, policy=Later(), max_wait=60.0, alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "b"))
    order.fairness.served("flood", (10**6, 0))
    found = play.feed(62.0, ev.DeadlineReached())
    assert [each.reason for each in found if isinstance(each, fx.SwitchStarted)] == ["a request has waited 60 s"]


def test_what_rides_along_is_no_part_of_it_until_it_enters():
    keys = {1: "nightly", 2: "a"}
    play, order = fairly(models("a", "b"), keys, policy=Oldest())
    play.feed(1.0, ev.RequestArrived(1, "b", rides=100.0))
    assert order.present() == {}
    play.feed(2.0, ev.RequestArrived(2, "b"))
    play.feed(3.0, ev.HookFinished(3, ok=True))
    play.feed(4.0, ev.HookFinished(4, ok=True))
    assert order.present() == {2: True, 1: True}
    play.feed(5.0, ev.RequestFinished(1))
    play.feed(5.0, ev.RequestArrived(1, "a", rides=100.0))
    play.feed(6.0, ev.RequestAbandoned(1))
    assert order.present() == {2: True}


def test_what_is_returned_goes_first_among_those_of_its_key():
    keys = dict.fromkeys(range(1, 4), "a")
    play, order = fairly(models("a", max_in_flight=1), keys)
    for request in keys:
        play.feed(float(request), ev.RequestArrived(request, "a"))
    found = play.feed(5.0, ev.RequestReturned(1, connected=True))
    (probe,) = [each.hook for each in found if isinstance(each, fx.RunHook)]
    assert order.waiters("a") == [1.0, 2.0, 3.0]
    assert admissions(play.feed(6.0, ev.HookFinished(probe, ok=True))) == [1]


def test_books_that_begin_late_order_what_they_know():
    play = given(models("a", max_in_flight=1), awake=["a"])
    for request in (1, 2, 3):
        play.feed(1.0, ev.RequestArrived(request, "a"))
    order = FairOrder(Fairness())
    play.ledger.handle = order.attach(play.core, lambda _request: "a", lambda _request: (0, 1))
    assert admissions(play.feed(2.0, ev.RequestFinished(1))) == [2]
    play.feed(3.0, ev.RequestArrived(4, "a"))
    assert admissions(play.feed(4.0, ev.RequestReturned(2, connected=True))) == []
    assert order.present() == {4: False}


# ---- keys that rest


def two(caused=40.0, **weights):
    """Return books in which a flood has caused switches, and a is about."""
    fair = Fairness(weights=weights)
    fair.joined("a")
    fair.joined("flood")
    fair.served("a", (100, 0))
    fair.switched(["flood"], caused)
    return fair


def test_a_key_that_has_had_its_part_of_the_switches_rests_for_a_while():
    fair = two(90.0)  # 180 s there and back, and its part of the last 300 are 150
    assert fair.rest("a") == 0
    rest = fair.rest("flood")
    assert rest == pytest.approx(ABOUT * math.log(180 / 150))
    fair.now = rest - 0.1
    assert fair.rest("flood") == pytest.approx(0.1)
    fair.now = rest + 0.1
    assert fair.rest("flood") == 0


@pytest.mark.parametrize(
    ("fair", "rests"),
    [(two(70.0), False), (two(90.0), True), (two(90.0, flood=3.0), False), (two(70.0, a=3.0), True)],
)
def test_a_part_goes_by_the_weights(fair, rests):
    assert (fair.rest("flood") > 0) is rests


def test_it_does_not_rest_for_what_is_not_about():
    fair = two(90.0)
    fair.left("a")
    assert fair.rest("flood") > 0
    fair.now = ABOUT + 1
    fair.switched(["flood"], 500.0)
    assert fair.rest("flood") == 0
    fair.joined("a")
    assert fair.rest("flood") > 0


def test_it_does_not_rest_if_the_others_have_had_as_much():
    fair = two(90.0)
    fair.served("a", (50_000, 0))
    assert fair.rest("flood") == 0


def test_a_flood_lets_the_gpu_be_idle_and_has_its_turn_later():
    keys = {1: "a", 2: "flood", 3: "a"}
    play, order = fairly(models("a", "b"), keys, policy=Oldest(), alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    order.before(1.0, ev.RequestArrived(7, "x", key="flood"))
    order.fairness.switched(["flood"], 90.0)
    play.feed(2.0, ev.RequestFinished(1))
    found = play.feed(3.0, ev.RequestArrived(2, "b"))
    assert not [each for each in found if isinstance(each, fx.SwitchStarted)]
    assert admissions(play.feed(4.0, ev.RequestArrived(3, "a"))) == [3]  # what is awake serves what comes
    play.feed(5.0, ev.RequestFinished(3))
    again = play.core.next_deadline()
    assert again == pytest.approx(1.0 + ABOUT * math.log(180 / 150))
    found = play.feed(again + 0.01, ev.DeadlineReached())
    assert [each.to for each in found if isinstance(each, fx.SwitchStarted)] == ["b"]


def test_a_key_that_rests_rides_with_others_and_holds_none_up():
    keys = {1: "a", 2: "flood", 3: "c"}
    play, order = fairly(models("a", "b"), keys, policy=Oldest(), alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    order.before(1.0, ev.RequestArrived(7, "x", key="flood"))
    order.fairness.switched(["flood"], 90.0)
    play.feed(2.0, ev.RequestFinished(1))
    play.feed(3.0, ev.RequestArrived(2, "b"))
    found = play.feed(4.0, ev.RequestArrived(3, "b"))
    assert [each.to for each in found if isinstance(each, fx.SwitchStarted)] == ["b"]
    play.feed(5.0, ev.HookFinished(3, ok=True))
    assert sorted(admissions(play.feed(6.0, ev.HookFinished(4, ok=True)))) == [2, 3]


def test_with_nothing_awake_no_key_rests():
    keys = {1: "flood"}
    play, order = fairly(models("a", "b"), keys, awake=[], policy=Oldest())
    order.before(1.0, ev.RequestArrived(7, "x", key="a"))
    order.before(1.0, ev.RequestArrived(8, "x", key="flood"))
    order.fairness.switched(["flood"], 900.0)
    found = play.feed(3.0, ev.RequestArrived(1, "b"))
    assert [each.to for each in found if isinstance(each, fx.SwitchStarted)] == ["b"]


def test_what_is_nearly_overdue_is_served_before_its_model_is_left():
    keys = {1: "flood", 2: "flood", 3: "a", 4: "a"}
    specs = models("a", "b", max_in_flight=1)
    play, order = fairly(specs, keys, policy=Later(), max_wait=100.0, alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "a"))
    play.feed(3.0, ev.RequestArrived(3, "b"))
    order.fairness.switched(["a"], 60.0)
    order.fairness.served("flood", (10**6, 0))
    found = play.feed(2.0 + NEARLY * 100.0, ev.RequestArrived(4, "b"))
    assert not [each for each in found if isinstance(each, fx.SwitchStarted)]  # though its key has had more
    found = play.feed(90.0, ev.RequestFinished(1))
    assert admissions(found) == [2]
    assert [each.to for each in found if isinstance(each, fx.SwitchStarted)] == ["b"]


def test_a_visit_to_what_is_overdue_has_an_end():
    keys = {1: "flood", 2: "flood", 3: "a"}
    play, order = fairly(models("a", "b", max_in_flight=1), keys, policy=Later(), max_wait=100.0, alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "a"))
    play.feed(3.0, ev.RequestArrived(3, "b"))
    order.fairness.switched(["a"], 10.0)
    order.fairness.served("flood", (10**6, 0))
    found = play.feed(90.0, ev.EngineLost("b"))
    assert [each.to for each in found if isinstance(each, fx.SwitchStarted)] == ["b"]
