"""Whose turn is next, by what each key has had."""

from __future__ import annotations

import random

import pytest
from playbook import Later, Oldest, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.admission import HELD
from llmux.core.policy import WaitUntil
from llmux.estimates.fair_order import FairOrder
from llmux.estimates.fairness import (
    ABOUT,
    AHEAD,
    ANSWERS,
    DEMAND,
    GAPS,
    KNOCK_ON,
    LATELY,
    LITTLE,
    LONG,
    STILL,
    UNKNOWN,
    Fairness,
    Prices,
)


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


@pytest.mark.no_cover
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


# ---- keys that are over


def two(asked=200.0, cost=0.0, by_answers=False, **weights):
    """Return books in which a flood has asked for so many seconds, and cost ``a`` some; this waited 100."""
    fair = Fairness(weights=weights)
    fair.joined("a")
    fair.joined("flood")
    fair.passed(50.0, {"a": 2, "flood": asked / 50.0}, {})
    fair.blame(["flood"], cost, {"a": 1}, answers=by_answers)
    fair.served("a", (100, 0))
    fair.served("flood", (101, 0))
    return fair


@pytest.mark.parametrize(
    ("fair", "over"),
    [(two(DEMAND * 100.0), False), (two(DEMAND * 100.0 + 50.0), True), (two(900.0, flood=2.0), False)],
)
def test_a_key_is_over_that_has_had_more_than_its_part_and_asks_for_much(fair, over):
    assert fair.over("flood") is over
    assert not fair.over("a")


def test_a_key_that_is_over_stays_so_until_it_has_had_far_less_than_its_part():
    fair = two(900.0)
    fair.served("a", (int(101 / STILL) - 101, 0))  # it has had a bit more than that much of its part
    assert fair.over("flood")
    fair.served("a", (2, 0))
    assert not fair.over("flood")
    fair.served("flood", (100, 0))  # and to be over again it has to have had all of it
    assert not fair.over("flood")
    fair.served("flood", (1000, 0))
    assert fair.over("flood")


def test_it_asks_for_much_if_that_is_more_than_some_requests_take():
    fair = two(300.0)
    fair.started("flood")
    fair.stopped("flood", 10.5)  # MUCH such
    fair.served("flood", (0, 0))
    assert not fair.over("flood")
    fair.passed(10.0, {}, {"flood": 1})
    fair.served("flood", (0, 0))
    assert fair.over("flood")


def test_a_key_may_cost_the_others_its_part_of_what_they_wait():
    limit = 100.0 / KNOCK_ON / 2.0  # of two keys it is half of what they wait in all
    assert not two(900.0, limit - 0.1).holds("flood", answers=False)
    fair = two(900.0, limit + 0.1)
    assert fair.holds("flood", answers=False)
    assert not fair.holds("flood", answers=True)  # it was by switches
    fair = two(900.0, ANSWERS * limit - 0.1, by_answers=True)
    assert not fair.holds("flood", answers=True)
    fair = two(900.0, limit + 0.1, by_answers=True)
    assert fair.holds("flood", answers=True)
    fair.passed(10.0, {"a": 1}, {})
    assert not fair.holds("flood", answers=False)


@pytest.mark.parametrize(("answer", "part"), [(10.0, 1.0), (20.0, 0.5), (200.0, LONG)])
def test_of_that_it_may_cost_less_by_answers_which_are_longer_than_a_switch(answer, part):
    whole = 100.0 / KNOCK_ON  # of which what it has cost is taken off
    for more, held in ((-0.1, False), (0.1, True)):
        fair = two(10_000.0, ANSWERS * part / (1.0 + ANSWERS * part) * whole + more, by_answers=True)
        fair.started("a")
        fair.stopped("a", answer)
        assert not fair.holds("flood", answers=True) or part == 1.0  # no switch is known
        fair.switched(["a"], 10.0)
        fair.switched(["flood"], 10.0)
        assert fair.over("flood")
        assert fair.holds("flood", answers=True) is held


def test_where_the_others_hardly_wait_it_goes_by_their_answers():
    fair = two(900.0, 1000.0)
    assert fair.holds("flood", answers=False)
    fair.passed(1000.0 * KNOCK_ON / LITTLE - 1.0, {}, {"a": 1})
    assert fair.holds("flood", answers=False)
    fair.passed(2.0, {}, {"a": 1})
    assert not fair.holds("flood", answers=False)


def behind():
    """Return books in which a flood is over whose counter is far below that of the other key."""
    fair = two()
    fair.served("a", (10**6, 0))
    fair.now = 10.0 * LATELY  # that was long ago
    fair.passed(1.0, {"flood": 10**6}, {})
    assert not fair.over("flood")
    assert not fair.entitled("a", 0)  # it is the flood's turn
    fair.served("flood", (100, 0))
    assert fair.over("flood")
    assert fair.counters() == {"a": 1_000_100.0, "flood": 201.0}
    return fair


def test_no_other_key_waits_for_what_is_over():
    fair = behind()
    assert fair.entitled("a", 0)
    assert fair.lowest == 1_000_100.0
    fair.joined("new")
    assert fair.counters()["new"] == 1_000_100.0


def test_of_keys_that_are_all_over_the_lowest_goes_first():
    fair = Fairness()
    for key in "abcd":
        fair.joined(key)
        fair.served(key, (0, 0))
    for number, key in enumerate("ab"):
        fair.passed(100.0, {key: 10}, {})
        fair.served(key, (10_000 * (1 + number), 0))
    assert fair.over("a")
    assert fair.over("b")
    for key in "cd":
        fair.left(key)
    assert fair.lowest == 10_000.0
    assert fair.entitled("a", 0)
    assert not fair.entitled("b", 0)


@pytest.mark.parametrize("cost", [0.0, 1000.0])
def test_what_is_over_is_lifted_as_if_it_were_away(cost):
    fair = behind()
    fair.blame(["flood"], cost, {"a": 1}, answers=False)
    assert fair.holds("flood", answers=False) is (cost > 0.0)
    assert fair.counters() == {"a": 1_000_100.0, "flood": 1_000_100.0}
    fair.served("a", (10, 0))
    assert fair.lowest == 1_000_110.0
    assert fair.entitled("a", 0)


@pytest.mark.parametrize(
    ("gap", "about"), [(10.0, ABOUT), (200.0, GAPS * 200.0), (5000.0, LATELY)], ids=["often", "seldom", "hardly"]
)
def test_a_key_that_asks_seldom_is_about_for_longer(gap, about):
    fair = two(900.0)
    for _ in range(60):  # which is forgotten, but for the gap
        fair.left("a")
        fair.now += gap
        fair.joined("a")
    fair.left("a")
    fair.blame(["flood"], 10**6, {"a": 1}, answers=False)
    fair.passed(1.0, {"a": 1000, "flood": 10**6}, {})
    fair.served("a", (1, 0))
    fair.served("flood", (1000, 0))
    left = fair.now
    for after, held in ((about - 1.0, True), (about + 1.0, False)):
        fair.now = left + after
        assert fair.holds("flood", answers=False) is held


def test_what_is_held_back_asks_for_no_more_by_waiting():
    fair = two(900.0, 200.0)
    assert fair.holds("flood", answers=False)
    for _ in range(20):
        fair.passed(1.0, {"flood": 1000, "a": 10}, {})
    fair.blame(["flood"], 10**6, {"a": 1}, answers=False)
    fair.served("flood", (100, 0))
    assert fair.over("flood")
    fair.passed(1.0, {"flood": 10**6, "a": 300}, {})
    fair.served("flood", (100, 0))
    assert not fair.over("flood")


def test_nothing_is_held_back_for_what_is_not_about():
    fair = two(900.0, 200.0)
    fair.left("a")
    assert fair.holds("flood", answers=False)
    fair.now = ABOUT + 1
    assert not fair.holds("flood", answers=False)
    fair.joined("a")
    assert fair.holds("flood", answers=False)


def test_nothing_is_held_back_for_what_is_over_itself():
    fair = Fairness()
    for key in "abcd":
        fair.joined(key)
    for key in "ab":
        fair.passed(100.0, {key: 10}, {})
        fair.served(key, (100, 0))
    for key in "cd":
        fair.left(key)
    fair.now = ABOUT / 2
    assert fair.over("a")
    fair.blame(["a"], 10.0, {"c": 5}, answers=True)
    assert fair.holds("a", answers=True)
    fair.now = ABOUT + 1.0
    assert fair.over("b")
    assert not fair.holds("a", answers=True)


# ---- what is held back, in a core


def flooded(keys, tokens=(0, 250), **rest):
    """Return a playbook in which ``flood`` has cost another key, which has requests elsewhere, what it may."""
    play, order = fairly(keys=keys, tokens=tokens, alive_every=0.0, **rest)
    order.before(0.0, ev.RequestArrived(70, "x", key="quiet"))
    order.before(0.0, ev.RequestArrived(71, "x", key="flood"))
    order.before(0.0, ev.RequestAbandoned(71))
    order.fairness.passed(1.0, {"flood": 10**6}, {})
    order.fairness.blame(["flood"], 1000.0, {"quiet": 1}, answers=True)
    order.fairness.served("flood", (10**6, 0))
    assert order.fairness.over("flood")
    return play, order


def switches(effects):
    return [each.to for each in effects if isinstance(each, fx.SwitchStarted)]


def test_what_is_held_back_is_passed_by_what_is_not():
    keys = {1: "flood", 2: "quiet", 3: "flood", 4: "quiet"}
    play, order = flooded(keys, specs=models("a", max_in_flight=2))
    assert admissions(play.feed(1.0, ev.RequestArrived(1, "a"))) == []
    assert admissions(play.feed(2.0, ev.RequestArrived(2, "a"))) == [2]
    assert admissions(play.feed(3.0, ev.RequestArrived(3, "a"))) == []
    assert admissions(play.feed(4.0, ev.RequestFinished(2))) == []
    assert admissions(play.feed(5.0, ev.RequestArrived(4, "a"))) == [4]
    order.fairness.passed(1.0, {"quiet": 10**6}, {})
    assert admissions(play.feed(6.0, ev.EngineLost("x"))) == [1]


def test_what_has_ridden_along_passes_what_is_held_back():
    play, _ = flooded({1: "flood", 2: "quiet", 3: "flood"}, specs=models("a"))
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "a", rides=4.0))
    play.feed(2.0, ev.RequestArrived(3, "a", rides=4.0))
    assert admissions(play.feed(6.0, ev.DeadlineReached())) == [2]
    assert list(play.core.state.models["a"].queue) == [1, 3]


def test_what_is_held_back_stays_so_when_what_waited_before_it_leaves():
    play, _ = flooded({1: "flood", 2: "flood"}, specs=models("a"), request_timeout=5.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "a"))
    (rejected,) = play.feed(6.0, ev.DeadlineReached())
    assert (rejected.request, rejected.refusal) == (1, fx.Refusal.WAITED_TOO_LONG)


def test_what_is_held_back_is_looked_at_again():
    keys = {1: "flood"}
    play, order = flooded(keys, specs=models("a"))
    play.feed(1.0, ev.RequestArrived(1, "a"))
    assert play.core.next_deadline() == 1.0 + HELD
    assert admissions(play.feed(1.0 + HELD, ev.DeadlineReached())) == []
    assert play.core.next_deadline() == 1.0 + 2.0 * HELD
    order.fairness.passed(1.0, {"quiet": 10**6}, {})
    assert admissions(play.feed(1.0 + 2.0 * HELD, ev.DeadlineReached())) == [1]


def test_max_wait_goes_before_what_is_held_back_once_at_a_time():
    keys = {1: "flood", 2: "flood"}
    play, _ = flooded(keys, specs=models("a"), max_wait=100.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "a"))
    assert admissions(play.feed(100.0, ev.DeadlineReached())) == []
    assert admissions(play.feed(101.0, ev.DeadlineReached())) == [1]
    assert admissions(play.feed(200.0, ev.DeadlineReached())) == []
    assert admissions(play.feed(201.0, ev.DeadlineReached())) == [2]


def test_without_fairness_all_that_was_held_back_is_let_in():
    play, _ = flooded({1: "flood"}, specs=models("a"))
    play.feed(1.0, ev.RequestArrived(1, "a"))
    state = play.core.state
    (request,) = state.models["a"].queue.values()
    assert not state.turns.admits(request)
    found = play.feed(2.0, ev.ConfigReplaced(models("a"), state.rules, Oldest()))
    assert state.turns.admits(request)
    assert admissions(found) == [1]


def test_a_flood_lets_the_gpu_be_idle():
    keys = {1: "quiet", 2: "flood", 3: "quiet"}
    play, _ = flooded(keys, specs=models("a", "b"), policy=Oldest(), max_wait=100.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestFinished(1))
    assert not switches(play.feed(3.0, ev.RequestArrived(2, "b")))
    assert play.core.next_deadline() == 3.0 + HELD
    assert admissions(play.feed(4.0, ev.RequestArrived(3, "a"))) == [3]  # what is awake serves what comes
    play.feed(98.0, ev.RequestFinished(3))
    assert play.core.next_deadline() == 103.0
    assert switches(play.feed(103.0, ev.DeadlineReached())) == ["b"]


@pytest.mark.parametrize(("answer", "let_in"), [(1.0, [2, 3]), (9.0, [2])])
def test_what_is_woken_for_a_flood_serves_it_but_one_by_one_if_that_takes_long(answer, let_in):
    keys = {1: "quiet", 2: "flood", 3: "flood", 4: "flood", 5: "quiet"}
    play, order = flooded(keys, specs=models("a", "b"), policy=Oldest(), max_wait=100.0)
    play.feed(1.0, ev.RequestArrived(2, "b"))
    play.feed(2.0, ev.RequestArrived(3, "b"))
    play.feed(101.0 - answer, ev.RequestArrived(1, "a"))
    play.feed(101.0, ev.RequestFinished(1))
    order.fairness.switched(["quiet"], 5.0)
    play.feed(102.0, ev.HookFinished(3, ok=True))
    assert admissions(play.feed(103.0, ev.HookFinished(4, ok=True))) == let_in
    assert admissions(play.feed(104.0, ev.RequestArrived(4, "b"))) == []
    # And it is not overdue again before max_wait, though more of it has waited for as long.
    found = play.feed(105.0, ev.RequestArrived(5, "a"))
    found += [each for request in let_in for each in play.feed(106.0, ev.RequestFinished(request))]
    assert switches(found) == ["a"]
    play.feed(107.0, ev.HookFinished(5, ok=True))
    found = play.feed(108.0, ev.HookFinished(6, ok=True))
    assert admissions(found) == [5]
    assert not switches(play.feed(203.0 - 0.5, ev.RequestFinished(5)))
    assert switches(play.feed(204.0, ev.DeadlineReached())) == ["b"]


def test_the_way_back_is_charged_to_the_key_that_made_it_leave():
    keys = {1: "b", 2: "a"}
    play, order = fairly(models("a", "b"), keys, policy=Oldest(), alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "b"))
    play.feed(2.0, ev.HookFinished(3, ok=True))
    play.feed(3.0, ev.HookFinished(4, ok=True))
    play.feed(4.0, ev.RequestFinished(1))
    had = order.fairness.counters()["b"]
    play.feed(5.0, ev.RequestArrived(2, "a"))
    play.feed(6.0, ev.HookFinished(5, ok=True))
    play.feed(7.0, ev.HookFinished(6, ok=True))
    assert order.fairness.counters() == {"b": had + 1000.0, "a": had}


def cost(order, key):
    """Return the seconds that others have waited on account of a key: in all, and while its answers ran."""
    books = order.fairness._keys[key]
    return round(books.cost, 1), round(books.by_answers, 1)


def test_what_waits_is_on_account_of_what_is_served_or_switched_to():
    keys = {1: "flood", 2: "a", 3: "flood"}
    play, order = fairly(models("a", "b", "c"), keys, policy=Oldest(), alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "b"))  # it drains
    play.feed(5.0, ev.RequestFinished(1))
    assert cost(order, "flood") == (3.0, 3.0)
    play.feed(6.0, ev.HookFinished(4, ok=True))
    play.feed(7.0, ev.HookFinished(5, ok=True))
    play.feed(8.0, ev.RequestFinished(2))
    assert cost(order, "flood") == (3.0, 3.0)  # the switch was not for it
    play.feed(9.0, ev.RequestArrived(3, "c"))
    order.before(9.0, ev.RequestArrived(9, "b", key="a"))
    play.feed(10.0, ev.HookFinished(6, ok=True))
    play.feed(12.0, ev.HookFinished(7, ok=True))
    assert cost(order, "flood") == (6.0, 3.0)


def test_of_what_waits_where_others_are_served_as_much_as_the_flood_has_in_flight():
    keys = {1: "flood", 2: "quiet", 3: "quiet", 4: "quiet"}
    play, order = fairly(models("a", max_in_flight=2), keys, alive_every=0.0)
    for request in keys:
        play.feed(1.0, ev.RequestArrived(request, "a"))
    play.feed(2.0, ev.EngineLost("x"))
    assert cost(order, "flood") == (0.0, 0.0)  # it is not over
    order.fairness.passed(1.0, {"flood": 10**6}, {})
    order.fairness.served("flood", (10**6, 0))
    play.feed(3.0, ev.EngineLost("x"))
    assert cost(order, "flood") == (1.0, 1.0)  # of two that wait


def test_books_that_begin_during_a_switch_charge_it_to_none():
    play = given(models("a", "b"), awake=["a"], policy=Oldest(), alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "b"))
    order = FairOrder(Fairness())
    play.ledger.handle = order.attach(play.core, lambda _request: "a", lambda _request: (0, 1))
    play.feed(2.0, ev.HookFinished(3, ok=True))
    play.feed(3.0, ev.HookFinished(4, ok=True))
    assert order.fairness.counters() == {}


def test_a_key_that_rests_rides_with_others_and_holds_none_up():
    keys = {1: "a", 2: "flood", 3: "c"}
    play, _ = flooded(keys, specs=models("a", "b"), policy=Oldest())
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestFinished(1))
    play.feed(3.0, ev.RequestArrived(2, "b"))
    assert switches(play.feed(4.0, ev.RequestArrived(3, "b"))) == ["b"]
    play.feed(5.0, ev.HookFinished(3, ok=True))
    assert sorted(admissions(play.feed(6.0, ev.HookFinished(4, ok=True)))) == [2, 3]


def test_with_nothing_awake_no_key_rests():
    play, _ = flooded({1: "flood"}, specs=models("a", "b"), awake=[], policy=Oldest())
    assert switches(play.feed(3.0, ev.RequestArrived(1, "b"))) == ["b"]
