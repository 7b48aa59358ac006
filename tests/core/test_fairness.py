"""Whose turn is next, by what each key has had."""

from __future__ import annotations

import random

import pytest

from llmux.estimates.fairness import AHEAD, UNKNOWN, Fairness, Prices


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
    assert fair.entitled("flood", 0)  # it may be ahead by two switches, or by one and requests
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
