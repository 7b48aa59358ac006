"""Admission: who gets in at once, who waits, who is turned away."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev


def test_awake_model_admits_at_once_and_counts_in_the_same_step() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "a"), admitted(2, "a")),
        at(3.0, ev.RequestFinished(1)),
        at(4.0, ev.RequestAbandoned(2)),
    )
    assert not play.core.state.requests


def test_unknown_model_is_rejected() -> None:
    given(models("a"), awake=["a"])(
        at(1.0, asks(1, "b"), refused(1, "b", "model_not_found", "model 'b' not found"))
    )


def test_more_than_max_in_flight_wait_and_more_than_max_queued_are_turned_away() -> None:
    play = given(models("a", max_in_flight=1, max_queued=1), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "a"), queued(2, "a")),
        at(1.0, asks(3, "a"), refused(3, "a", "queue_full", "1 requests already wait for 'a'", 1.0)),
        at(5.0, ev.RequestFinished(1), admitted(2, "a", 4.0)),
        at(5.0, asks(4, "a"), queued(4, "a")),
        # The model's service time is known by now, and so is when to come back.
        at(5.0, asks(5, "a"), refused(5, "a", "queue_full", "1 requests already wait for 'a'", 4.0)),
    )


def test_full_queue_of_a_sleeping_model_says_when_to_come_back() -> None:
    play = given(models("a", "b", max_queued=1), awake=["a"], first_guesses={"a": (None, 4.0), "b": (7.0, None)})
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(1.0, asks(3, "b"), refused(3, "b", "queue_full", "1 requests already wait for 'b'", 11.0)),
    )


def test_waiter_is_turned_away_after_request_timeout_and_the_next_in_its_turn() -> None:
    play = given(models("a", max_in_flight=1), awake=["a"], request_timeout=10.0)
    play(
        at(0.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "a"), queued(2, "a")),
        at(3.0, asks(3, "a"), queued(3, "a", 2)),
        at(
            11.0, ev.DeadlineReached(), refused(2, "a", "request_timeout", "waited 10 s for model 'a'", None, 10.0)
        ),
    )
    assert play.core.next_deadline() == 13.0
    play(
        at(12.0, ev.RequestAbandoned(3)),
        at(13.0, ev.DeadlineReached()),
    )


def test_timeout_of_the_last_waiter_calls_the_switch_off() -> None:
    play = given(models("a", "b"), awake=["a"], request_timeout=10.0)
    play(
        at(0.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(2.0, asks(3, "a"), queued(3, "a")),
        at(
            11.0,
            ev.DeadlineReached(),
            refused(2, "b", "request_timeout", "waited 10 s for model 'b'", None, 10.0),
            ends(10.0, 10.0, result="abandoned"),
            admitted(3, "a", 9.0),
        ),
        at(12.0, ev.RequestFinished(1)),
    )


def test_activation_admits_up_to_max_in_flight_before_anything_else_is_decided() -> None:
    play = given([*models("a", max_in_flight=2), *models("b")], max_wait=5.0)
    play(
        at(0.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(1.0, asks(2, "a"), queued(2, "a", 2)),
        at(1.0, asks(3, "a"), queued(3, "a", 3)),
        at(1.0, asks(4, "b"), queued(4, "b")),
        at(
            9.0,
            ok("wake a"),
            awake("a", 9.0),
            ends(9.0, 0.0, 9.0, 9.0),
            admitted(1, "a", 9.0),
            admitted(2, "a", 8.0),
            fx.PolicyDecided("overdue", "b", "a request has waited 8 s"),
            begins("b", "a", why="a request has waited 8 s"),
        ),
    )


def test_returned_request_keeps_its_place_in_the_queue() -> None:
    play = given(models("a", max_in_flight=2), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "a"), admitted(2, "a")),
        at(3.0, asks(3, "a"), queued(3, "a")),
        at(4.0, ev.RequestReturned(2), alone("alive a"), queued(2, "a", 2)),
        at(4.0, ev.RequestReturned(1), queued(1, "a", 3)),
        # Two connections failed, the second one after alive was asked: it is asked again.
        at(5.0, ok("alive a"), alone("alive a")),
        at(6.0, ok("alive a"), fx.Admit(1, "a", None, 1, True, 5.0), fx.Admit(2, "a", None, 1, True, 4.0)),
        at(7.0, ev.RequestFinished(2), admitted(3, "a", 4.0)),
        at(8.0, ev.RequestFinished(1)),
        at(9.0, ev.RequestFinished(3)),
    )


def test_returned_request_whose_time_is_up_is_turned_away() -> None:
    play = given(models("a"), awake=["a"], request_timeout=5.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(
            6.0,
            ev.RequestReturned(1),
            alone("alive a"),
            queued(1, "a"),
            refused(1, "a", "request_timeout", "waited 5 s for model 'a'", None, 5.0),
        ),
    )
