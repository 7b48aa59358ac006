"""Who is asked after whom."""

from __future__ import annotations

import pytest

from llmux.estimates.meter import FOLLOWERS, Successors


def follow(transitions, *pairs, delay=1.0):
    now = 0.0
    for before, after in pairs:
        transitions.last = before, now
        transitions.arrived(after, now + delay)
        now += 10.0


def test_nothing_is_known_at_first():
    transitions = Successors()
    transitions.arrived("a", 1.0)  # after no answer
    assert transitions.after("a") == {}


def test_shares_add_up_and_recent_ones_count_more():
    transitions = Successors()
    follow(transitions, ("a", "b"), ("a", "c"))
    found = transitions.after("a")
    assert found["b"].share + found["c"].share == pytest.approx(1.0)
    assert found["c"].share > found["b"].share
    assert found["b"].seen == found["c"].seen == 1


def test_only_the_first_arrival_after_an_answer_follows_it():
    transitions = Successors()
    transitions.last = "a", 0.0
    transitions.arrived("b", 1.0)
    transitions.arrived("c", 1.5)
    assert set(transitions.after("a")) == {"b"}


def test_delays_are_averaged():
    transitions = Successors()
    follow(transitions, ("a", "b"), delay=2.0)
    follow(transitions, ("a", "b"), delay=4.0)
    assert transitions.after("a")["b"].delay == pytest.approx(2.6)


def test_what_was_long_ago_fades_and_numbers_stay_finite():
    transitions = Successors()
    follow(transitions, *[("a", "b")] * 50)
    follow(transitions, *[("a", "c")] * 5000)
    found = transitions.after("a")
    assert found["c"].share == pytest.approx(1.0)
    assert 0.0 <= found["b"].share < 1e-9


def test_only_some_are_kept_of_each_model():
    transitions = Successors()
    for number in range(10 * FOLLOWERS):
        follow(transitions, ("a", f"m{number}"), ("a", "often"))
    found = transitions.after("a")
    assert len(found) == FOLLOWERS
    assert found["often"].share > 0.4
    assert found["often"].seen == 10 * FOLLOWERS
    assert f"m{10 * FOLLOWERS - 1}" in found
