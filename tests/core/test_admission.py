"""Admission: who gets in at once, who waits, who is turned away."""

from __future__ import annotations

from playbook import at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_awake_model_admits_at_once_and_counts_in_the_same_step() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.RequestArrived(2, "a"), fx.Admit(2, "a", None, 1, False, 0.0)),
        at(3.0, ev.RequestFinished(1)),
        at(4.0, ev.RequestAbandoned(2)),
    )
    assert not play.core.state.requests


def test_unknown_model_is_rejected() -> None:
    given(models("a"), awake=["a"])(
        at(
            1.0,
            ev.RequestArrived(1, "b"),
            fx.Reject(1, "b", fx.Refusal.UNKNOWN_MODEL, "model 'b' not found", None, 0.0),
        )
    )


def test_more_than_max_in_flight_wait_and_more_than_max_queued_are_turned_away() -> None:
    play = given(models("a", max_in_flight=1, max_queued=1), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(1.0, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 1)),
        at(
            1.0,
            ev.RequestArrived(3, "a"),
            fx.Reject(3, "a", fx.Refusal.QUEUE_FULL, "1 requests already wait for 'a'", 1.0, 0.0),
        ),
        at(5.0, ev.RequestFinished(1), fx.Admit(2, "a", None, 1, False, 4.0)),
        at(5.0, ev.RequestArrived(4, "a"), fx.RequestQueued(4, "a", 1)),
        # The model's service time is known by now, and so is when to come back.
        at(
            5.0,
            ev.RequestArrived(5, "a"),
            fx.Reject(5, "a", fx.Refusal.QUEUE_FULL, "1 requests already wait for 'a'", 4.0, 0.0),
        ),
    )


def test_full_queue_of_a_sleeping_model_says_when_to_come_back() -> None:
    play = given(models("a", "b", max_queued=1), awake=["a"], first_guesses={"a": (None, 4.0), "b": (7.0, None)})
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            1.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
        ),
        at(
            1.0,
            ev.RequestArrived(3, "b"),
            fx.Reject(3, "b", fx.Refusal.QUEUE_FULL, "1 requests already wait for 'b'", 11.0, 0.0),
        ),
    )


def test_waiter_is_turned_away_after_request_timeout_and_the_next_in_its_turn() -> None:
    play = given(models("a", max_in_flight=1), awake=["a"], request_timeout=10.0)
    play(
        at(0.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(1.0, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 1)),
        at(3.0, ev.RequestArrived(3, "a"), fx.RequestQueued(3, "a", 2)),
        at(
            11.0,
            ev.DeadlineReached(),
            fx.Reject(2, "a", fx.Refusal.WAITED_TOO_LONG, "waited 10 s for model 'a'", None, 10.0),
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
        at(0.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            1.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
        ),
        at(2.0, ev.RequestArrived(3, "a"), fx.RequestQueued(3, "a", 1)),
        at(
            11.0,
            ev.DeadlineReached(),
            fx.Reject(2, "b", fx.Refusal.WAITED_TOO_LONG, "waited 10 s for model 'b'", None, 10.0),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 10.0, 10.0, None, None),
            fx.Admit(3, "a", None, 1, False, 9.0),
        ),
        at(12.0, ev.RequestFinished(1)),
    )


def test_activation_admits_up_to_max_in_flight_before_anything_else_is_decided() -> None:
    play = given([*models("a", max_in_flight=2), *models("b")], max_wait=5.0)
    play(
        at(
            0.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(3, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(1.0, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 2)),
        at(1.0, ev.RequestArrived(3, "a"), fx.RequestQueued(3, "a", 3)),
        at(1.0, ev.RequestArrived(4, "b"), fx.RequestQueued(4, "b", 1)),
        at(
            9.0,
            ev.HookFinished(3, ok=True),
            fx.ModelActivated("a", 1, (), 9.0),
            fx.SwitchEnded(1, (), "a", "success", 9.0, 0.0, 9.0, 9.0),
            fx.Admit(1, "a", None, 1, False, 9.0),
            fx.Admit(2, "a", None, 1, False, 8.0),
            fx.PolicyDecided("overdue", "b", "a request has waited 8 s"),
            fx.SwitchStarted(2, ("a",), "b", "a request has waited 8 s"),
        ),
    )


def test_returned_request_keeps_its_place_in_the_queue() -> None:
    play = given(models("a", max_in_flight=2), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.RequestArrived(2, "a"), fx.Admit(2, "a", None, 1, False, 0.0)),
        at(3.0, ev.RequestArrived(3, "a"), fx.RequestQueued(3, "a", 1)),
        at(4.0, ev.RequestReturned(2), fx.RunHook(2, "a", HookKind.ALIVE, None), fx.RequestQueued(2, "a", 2)),
        at(4.0, ev.RequestReturned(1), fx.RequestQueued(1, "a", 3)),
        # Two connections failed, the second one after alive was asked: it is asked again.
        at(5.0, ev.HookFinished(2, ok=True), fx.RunHook(3, "a", HookKind.ALIVE, None)),
        at(
            6.0,
            ev.HookFinished(3, ok=True),
            fx.Admit(1, "a", None, 1, True, 5.0),
            fx.Admit(2, "a", None, 1, True, 4.0),
        ),
        at(7.0, ev.RequestFinished(2), fx.Admit(3, "a", None, 1, False, 4.0)),
        at(8.0, ev.RequestFinished(1)),
        at(9.0, ev.RequestFinished(3)),
    )


def test_returned_request_whose_time_is_up_is_turned_away() -> None:
    play = given(models("a"), awake=["a"], request_timeout=5.0)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            6.0,
            ev.RequestReturned(1),
            fx.RunHook(2, "a", HookKind.ALIVE, None),
            fx.RequestQueued(1, "a", 1),
            fx.Reject(1, "a", fx.Refusal.WAITED_TOO_LONG, "waited 5 s for model 'a'", None, 5.0),
        ),
    )
