"""The breaker, as a playbook: what happens at which second, and what it does then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.targets.breaker import FAILURES, FIRST, LONGEST, LONGEST_REST, Breaker, State


def played(*lines):
    """Play lines of (second, what happens, the state after it): a pass is called by the number of its line."""
    breaker, passes = Breaker(), {}
    for number, (now, what, expected) in enumerate(lines, 1):
        word, _, rest = what.partition(" ")
        if word == "pass":
            assert breaker.wait(now) is None, (number, breaker)
            passes[rest] = breaker.passed(now)
        elif word == "refused":
            assert breaker.wait(now) == pytest.approx(float(rest)), (number, breaker)
        elif word == "failed":
            breaker.failed(passes[rest], now, "it broke")
        elif word == "rests":
            name, _, seconds = rest.partition(" ")
            breaker.rests(passes[name], now, float(seconds))
        elif word != "later":
            getattr(breaker, word)(passes[rest])
        assert breaker.state(now) is State(expected), (number, breaker)
    return breaker


OPENED = tuple(line for n in range(3) for line in ((0, f"pass {n}", "closed"), (0, f"failed {n}", "closed")))[:5]


def test_three_failures_in_a_row_open_it_and_its_pause_ends_in_a_probe():
    breaker = played(
        *OPENED,
        (1, "failed 2", "open"),
        (1, "refused 5", "open"),
        (5.9, "refused 0.1", "open"),
        (6, "pass probe", "half_open"),
        (6, "refused 1", "half_open"),
        (7, "succeeded probe", "closed"),
        (7, "pass next", "closed"),
        (7, "pass more", "closed"),
    )
    assert (breaker.failures, breaker.error) == (0, "")


def test_a_success_in_between_starts_the_count_anew():
    played(*OPENED, (0, "succeeded 2", "closed"), *OPENED, (0, "succeeded 2", "closed"))


def test_the_pause_doubles_with_each_probe_that_fails_and_begins_anew_after_a_success():
    played(
        *OPENED,
        (0, "failed 2", "open"),
        (5, "pass p", "half_open"),
        (6, "failed p", "open"),
        (6, "refused 10", "open"),
        (16, "pass p", "half_open"),
        (16, "failed p", "open"),
        (16, "refused 20", "open"),
        (36, "pass p", "half_open"),
        (36, "succeeded p", "closed"),
        *((36 + line[0], *line[1:]) for line in OPENED),
        (36, "failed 2", "open"),
        (36, "refused 5", "open"),
    )


def test_a_probe_of_which_no_end_is_told_makes_room_for_the_next():
    played(
        *OPENED,
        (0, "failed 2", "open"),
        (5, "pass p", "half_open"),
        (5, "abandoned p", "half_open"),
        (5, "pass q", "half_open"),
        (5, "refused 1", "half_open"),
        (5, "failed q", "open"),
    )


def test_what_was_under_way_when_it_opened_does_not_prolong_the_pause_but_its_success_ends_it():
    played(
        (0, "pass slow", "closed"),
        (0, "pass slower", "closed"),
        *OPENED,
        (0, "failed 2", "open"),
        (4, "failed slow", "open"),
        (4, "refused 1", "open"),
        (4, "succeeded slower", "closed"),
    )


def test_a_rest_is_no_failure_and_leaves_all_as_it_was():
    breaker = played(
        (0, "pass a", "closed"),
        (0, "rests a 7", "resting"),
        (1, "refused 6", "resting"),
        (7, "pass b", "closed"),
        (7, "rests b 100000", "resting"),
        (7, f"refused {LONGEST_REST}", "resting"),
    )
    assert breaker.failures == 0


STEPS = st.lists(
    st.tuples(st.floats(0, 60), st.sampled_from(["pass", "ok", "fail", "leave", "rest"])), max_size=80
)


@given(STEPS)
def test_whatever_happens_it_opens_only_after_failures_and_lets_one_probe_pass_at_a_time(steps):
    breaker, now, under_way, failures = Breaker(), 0.0, [], 0
    probes = set()
    for pause, what in steps:
        now += pause
        wait = breaker.wait(now)
        assert wait is None or 0 < wait <= max(LONGEST, LONGEST_REST)
        state = breaker.state(now)
        assert state is not State.OPEN or failures >= FAILURES
        assert (wait is None) == (state is State.CLOSED or (state is State.HALF_OPEN and not probes))
        if what == "pass":
            if wait is None:
                under_way.append(breaker.passed(now))
                if state is State.HALF_OPEN:
                    probes.add(under_way[-1])
            continue
        if not under_way:
            continue
        one = under_way.pop(0)
        probes.discard(one)
        if what == "fail":
            failures += 1
            breaker.failed(one, now, "no")
        elif what == "leave":
            breaker.abandoned(one)
        else:
            failures = 0
            if what == "ok":
                breaker.succeeded(one)
            else:
                breaker.rests(one, now, FIRST)
