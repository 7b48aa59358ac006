"""Switching: drain, sleep, wake; called off, abandoned, failed."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev


def test_a_switch_drains_sleeps_and_wakes() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(3.0, asks(3, "a"), queued(3, "a")),
        at(4.0, ev.RequestFinished(1), drained(2.0), sleeps("a", 4.0)),
        at(5.0, ok("sleep a"), holders(), wakes("b")),
        at(9.0, ok("wake b"), awake("b", 7.0), ends(7.0, 2.0, 5.0, 5.0), admitted(2, "b", 7.0), begins("a", "b")),
        at(10.0, ev.RequestFinished(2), drained(1.0), sleeps("b", 1.0)),
        at(11.0, ok("sleep b"), holders(), wakes("a")),
        at(12.0, ok("wake a"), awake("a", 3.0), ends(3.0, 1.0, 2.0, 2.0), admitted(3, "a", 9.0, epoch=2)),
        at(13.0, ev.RequestFinished(3)),
    )


def test_last_waiter_leaves_during_the_drain_and_what_was_to_leave_reopens() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(3.0, asks(3, "a"), queued(3, "a")),
        at(4.0, ev.RequestAbandoned(2), ends(2.0, 2.0, result="abandoned"), admitted(3, "a", 1.0)),
    )


def test_last_waiter_leaves_during_the_sleep_and_nothing_is_woken() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(2.0, ev.RequestAbandoned(1)),
        at(3.0, ok("sleep a"), holders(), ends(2.0, result="abandoned")),
    )


def test_last_waiter_leaves_during_the_wake_which_is_finished() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(2.0, ev.RequestAbandoned(1)),
        at(3.0, ok("wake a"), awake("a", 2.0), ends(2.0, 0.0, 2.0, 2.0)),
    )


def test_drain_timeout_cuts_what_runs_and_the_sleep_hook_waits_for_its_end() -> None:
    play = given(
        models("a", "b"), awake=["a"], drain_timeout=5.0, first_guesses={"a": (1.0, 2.0), "b": (3.0, 4.0)}
    )
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(7.0, ev.DeadlineReached(), fx.CancelRequests((1,), "a", fx.CutReason.DRAIN_DEADLINE, retry_after=5.0)),
        at(7.5, ev.RequestFinished(1), drained(5.5), sleeps("a", 7.5)),
    )


def test_without_drain_answers_are_cut_at_once() -> None:
    play = given(models("a", "b"), awake=["a"], drain_timeout=0.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(
            2.0,
            asks(2, "b"),
            queued(2, "b"),
            begins("b", "a"),
            fx.CancelRequests((1,), "a", fx.CutReason.DRAIN_DEADLINE, retry_after=12.0),
        ),
        at(2.1, ev.RequestFinished(1), drained(0.10000000000000009), sleeps("a", 2.1)),
    )


def test_a_sleep_that_is_asked_for_cuts_without_a_retry_after() -> None:
    play = given(models("a"), awake=["a"], drain_timeout=0.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(
            2.0,
            ev.SleepRequested("a", 1),
            begins(None, "a", why="requested"),
            fx.CancelRequests((1,), "a", fx.CutReason.DRAIN_DEADLINE),
            accepted(1),
        ),
        at(2.1, ev.RequestFinished(1), drained(0.10000000000000009), sleeps("a", 2.1)),
        at(3.0, ok("sleep a"), holders(), ends(1.0, 0.10000000000000009, 0.8999999999999999)),
    )


def test_models_that_need_not_leave_serve_all_along() -> None:
    play = given(models("a", "b", "c", memory=4), awake=["a", "b"], capacity=8)
    play(
        at(0.5, asks(1, "b"), admitted(1, "b")),
        at(1.0, asks(2, "c"), queued(2, "c"), begins("c", "a"), leaves("a", 1.0)),
        at(1.5, asks(3, "b"), admitted(3, "b")),
        at(2.0, ok("sleep a"), holders("b"), wakes("c", "b")),
        at(2.5, asks(4, "b"), admitted(4, "b")),
        at(3.0, ok("wake c"), awake("c", 2.0), ends(2.0, 0.0, 2.0, 2.0), admitted(2, "c", 2.0)),
    )


def test_model_in_the_way_is_lost_during_its_drain_and_cleaned_up() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(3.0, ev.EngineLost("a"), run("alive a")),
        at(3.5, ev.RequestFinished(1)),
        at(
            4.0,
            failed("alive a", "exited with 1"),
            lost("a", "a connection failed, and alive exited with 1", 4.0),
            drained(2.0),
            run("sleep a"),
        ),
        at(5.0, ok("sleep a"), holders(), wakes("b")),
        at(9.0, ok("wake b"), awake("b", 7.0), ends(7.0, 2.0, 5.0), admitted(2, "b", 7.0)),
    )
    # A cleanup says nothing about what this direction costs.
    assert play.core.state.costs.measured("a", "b") is None


def test_suspected_engine_that_answers_goes_on_draining() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(3.0, ev.RequestReturned(1), run("alive a"), queued(1, "a")),
        at(4.0, ok("alive a"), drained(2.0), sleeps("a", 4.0)),
    )


def test_alive_that_fails_during_a_drain_but_was_not_asked_for_it_changes_nothing() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(15.0, ev.DeadlineReached(), alone("alive a")),
        at(16.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(17.0, failed("alive a", "exited with 1")),
        at(18.0, ev.RequestFinished(1), drained(2.0), sleeps("a", 18.0)),
    )


def test_drain_timeout_cuts_only_what_still_runs() -> None:
    play = given(
        [*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8, drain_timeout=5.0
    )
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "c"), queued(2, "c"), begins("c", "a", "b")),
        at(7.0, ev.DeadlineReached(), fx.CancelRequests((1,), "a", fx.CutReason.DRAIN_DEADLINE, retry_after=12.0)),
    )


def test_switch_that_is_called_off_leaves_a_lost_engine_lost() -> None:
    play = given([*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.EngineLost("b", refused=True), alone("alive b")),
        at(3.0, failed("alive b"), lost("b", "a connection failed, and alive failed", 3.0)),
        at(4.0, asks(2, "c"), queued(2, "c"), begins("c", "a", "b")),
        at(5.0, asks(3, "b"), queued(3, "b")),
        at(
            6.0,
            ev.RequestAbandoned(2),
            ends(2.0, 2.0, result="abandoned"),
            begins("b", why="there is room beside what is awake"),
            run("wake b"),
        ),
    )
