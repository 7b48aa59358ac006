"""Rates, budgets and their periods."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.accounts.limits import Allowance, Budget, Left, period, spell
from llmux.config.accounts import Rate


def test_all_of_it_at_once_and_then_evenly():
    allowance = Allowance(Rate(60, 60.0))
    for _ in range(60):
        assert allowance.wait(100.0, 1) == 0
        allowance.take(100.0, 1)
    assert allowance.wait(100.0, 1) == pytest.approx(1.0)
    assert allowance.left(100.0) == Left(60, 0, 60.0)
    assert allowance.wait(101.0, 1) == pytest.approx(0, abs=1e-9)
    assert allowance.wait(101.0, 2) == pytest.approx(1.0)
    assert allowance.left(110.0) == Left(60, 10, 50.0)
    assert allowance.left(1000.0) == Left(60, 60, 0.0)


@given(st.integers(1, 200), st.sampled_from([1.0, 60.0, 3600.0, 86_400.0]), st.floats(0, 1e8))
def test_all_of_it_can_be_taken_whatever_the_clock_says(number, seconds, now):
    """What the clock's numbers are rounded by is no reason to wait."""
    allowance = Allowance(Rate(number, seconds))
    for _ in range(number):
        assert allowance.wait(now, 1) == 0
        allowance.take(now, 1)
    assert allowance.wait(now, 1) == pytest.approx(seconds / number, rel=1e-3)


def test_an_estimate_is_corrected():
    tokens = Allowance(Rate(1000, 60.0))
    tokens.take(0.0, 900)
    assert tokens.wait(0.0, 200) > 0
    tokens.correct(-800)
    assert tokens.left(0.0).remaining == 900
    tokens.correct(5000)
    assert tokens.left(0.0).remaining == 0
    assert tokens.wait(0.0, 1) == pytest.approx(60.0 * 4.101)


def test_what_is_more_than_there_ever_is_takes_all_of_it():
    tokens = Allowance(Rate(1000, 60.0))
    assert tokens.wait(0.0, 5000) == 0
    tokens.take(0.0, 5000)
    assert tokens.wait(0.0, 5000) == pytest.approx(300.0)


@given(
    st.integers(1, 50),
    st.sampled_from([1.0, 60.0, 3600.0]),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.5, 60)), max_size=200),
)
def test_no_more_than_twice_the_rate_in_any_time_of_its_length(number, seconds, asked):
    """All at once, and what grew back meanwhile: the algorithm's bound."""
    allowance, now, taken = Allowance(Rate(number, seconds)), 0.0, []
    for pause, wanted in asked:
        now += pause
        count = min(wanted, number)
        if allowance.wait(now, count) <= 1e-9:
            allowance.take(now, count)
            taken.append((now, count))
    for begin, _ in taken:
        within = sum(count for at, count in taken if begin <= at < begin + seconds)
        assert within <= 2 * number + 1e-3


def seconds(*when):
    return int(datetime(*when, tzinfo=UTC).timestamp())


def test_periods():
    noon = seconds(2026, 11, 29, 12)
    assert period("day", noon) == (seconds(2026, 11, 29), seconds(2026, 11, 30))
    assert period("month", noon) == (seconds(2026, 11, 1), seconds(2026, 12, 1))
    assert period("month", seconds(2026, 12, 31, 23, 59, 59)) == (seconds(2026, 12, 1), seconds(2027, 1, 1))
    assert period("day", seconds(2026, 11, 29)) == (seconds(2026, 11, 29), seconds(2026, 11, 30))


def test_a_budget_begins_anew():
    budget = Budget(1000, "day", 0.8, awake_only=True)
    budget.turn(seconds(2026, 11, 29, 12))
    budget.spent, budget.reserved = 799, 1
    assert (budget.is_soft, budget.is_full, budget.is_spent) == (False, False, False)
    budget.spent = 999
    assert (budget.is_soft, budget.is_full, budget.is_spent) == (True, True, False)
    budget.spent = 1000
    assert budget.is_spent
    budget.turn(seconds(2026, 11, 29, 23))
    assert budget.is_spent
    known = {seconds(2026, 11, 30): 70, seconds(2026, 11, 29): 80, 0: 90}
    budget.known = lambda period: known[period[0]]
    budget.turn(seconds(2026, 11, 30))
    assert (budget.spent, budget.reserved) == (0, 1)
    budget.turn(seconds(2026, 11, 29))  # the clock was put back
    assert budget.spent == 80
    budget.turn(3)
    assert budget.spent == 90
    budget.turn(seconds(2026, 11, 30))
    assert (budget.spent, budget.reserved) == (70, 1)


@pytest.mark.parametrize(
    ("given", "text"),
    [(0.0, "0ms"), (0.02, "20ms"), (1.2, "1.2s"), (60.0, "1m0s"), (360.0, "6m0s"), (86_400.0, "24h0m0s")],
)
def test_durations_as_the_headers_say_them(given, text):
    assert spell(given) == text
