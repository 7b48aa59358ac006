"""Pins: a model is kept awake, and the others out."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev


def test_pin_excludes_the_others_until_it_is_over() -> None:
    play = given(models("a", "b"), awake=["a"], max_wait=5.0)
    play(
        at(1.0, ev.PinChanged("a", 1, until=30.0), fx.PinSet("a", True, 30.0), fx.Answer(1, True)),
        at(2.0, asks(1, "b"), refused(1, "b", "pinned", "model 'a' is pinned", 28.0)),
        at(3.0, ev.SleepRequested("a", 2), fx.Answer(2, False, reason="model 'a' is pinned")),
        at(
            4.0,
            ev.PinChanged("b", 3),
            fx.Answer(3, False, reason="model 'a' is pinned and may not be awake with it"),
        ),
        at(30.0, ev.DeadlineReached(), alone("alive a"), fx.PinSet("a", False, None)),
        at(31.0, asks(2, "b"), queued(2, "b"), begins("b", "a"), leaves("a", 31.0)),
    )


def test_pin_wakes_its_model_and_keeps_trying() -> None:
    play = given(models("a"), backoff_first=4.0)
    play(
        at(
            1.0,
            ev.PinChanged("a", 1),
            fx.PinSet("a", True, None),
            begins("a", why="pinned"),
            wakes("a"),
            accepted(1),
        ),
        at(2.0, failed("wake a", "exited with 1"), backs_off("wake a", "exited with 1", 1, 4.0), run("sleep a")),
        # The wake may be tried at 6 s, the sleep at 7 s.
        at(2.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            3.0,
            failed("alive a", "exited with 1"),
            faults("a", "sleep exited with 1", 1, 4.0),
            fails("wake exited with 1", 2.0),
        ),
        at(6.0, ev.DeadlineReached()),
        at(7.0, ev.DeadlineReached(), begins("a", why="pinned"), drained(), run("sleep a")),
    )


def test_wake_backoff_that_outlasts_the_sleep_backoff_is_waited_for() -> None:
    play = given(models("a"))
    play(
        at(
            1.0,
            ev.PinChanged("a", 1),
            fx.PinSet("a", True, None),
            begins("a", why="pinned"),
            wakes("a"),
            accepted(1),
        ),
        at(2.0, failed("wake a", "exited with 1"), backs_off("wake a", "exited with 1"), run("sleep a")),
        at(2.0, ok("sleep a"), holders(), fails("wake exited with 1", 1.0)),
        at(3.0, ev.DeadlineReached(), begins("a", why="pinned"), wakes("a")),
        at(3.0, failed("wake a", "exited with 1"), backs_off("wake a", "exited with 1", 2, 2.0), run("sleep a")),
        # The wake may be tried at 5 s, the sleep at 4 s.
        at(3.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            3.0,
            failed("alive a", "exited with 1"),
            faults("a", "sleep exited with 1"),
            fails("wake exited with 1", 0.0),
        ),
        at(4.0, ev.DeadlineReached()),
    )
    assert play.core.next_deadline() == 5.0
    play(at(5.0, ev.DeadlineReached(), begins("a", why="pinned"), drained(), run("sleep a")))


def test_pin_of_what_leaves_calls_the_switch_off() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.ActivationRequested("b", 1), begins("b", "a", why="requested"), accepted(1)),
        at(
            3.0,
            ev.PinChanged("a", 2),
            fx.PinSet("a", True, None),
            ends(1.0, 1.0, result="abandoned"),
            fx.Answer(2, True),
        ),
        at(4.0, asks(2, "a"), admitted(2, "a")),
    )


def test_pin_of_what_leaves_when_its_sleep_hook_runs_comes_too_late() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(
            2.0,
            ev.PinChanged("a", 1),
            fx.PinSet("a", True, None),
            refused(1, "b", "pinned", "model 'a' is pinned", 60.0, 1.0),
            fx.Answer(1, True),
        ),
        at(3.0, ok("sleep a"), holders(), ends(2.0, result="abandoned"), begins("a", why="pinned"), wakes("a")),
        at(4.0, ok("wake a"), awake("a", 1.0), ends(1.0, 0.0, 1.0, 1.0)),
    )


def test_pin_that_ends_during_its_switch_calls_it_off() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(
            2.0,
            ev.PinChanged("b", 1, until=5.0),
            fx.PinSet("b", True, 5.0),
            begins("b", "a", why="pinned"),
            accepted(1),
        ),
        at(3.0, asks(2, "a"), refused(2, "a", "pinned", "model 'b' is pinned", 2.0)),
        at(5.0, ev.DeadlineReached(), fx.PinSet("b", False, None), ends(3.0, 3.0, result="abandoned")),
    )


def test_pin_that_ends_during_a_switch_with_waiters_changes_nothing() -> None:
    play = given(models("a", "b", "c"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.PinChanged("b", 1), fx.PinSet("b", True, None), begins("b", "a", why="pinned"), accepted(1)),
        at(2.5, asks(2, "b"), queued(2, "b")),
        at(3.0, ev.PinChanged("b", 2, pinned=False), fx.PinSet("b", False, None), accepted(2)),
        at(4.0, ev.RequestAbandoned(2), ends(2.0, 2.0, result="abandoned")),
    )


def test_pinned_models_have_to_fit_together() -> None:
    play = given(models("a", "b", "c", memory=4), awake=["a", "b"], capacity=10)
    play(
        at(1.0, ev.PinChanged("a", 1), fx.PinSet("a", True, None), fx.Answer(1, True)),
        at(2.0, ev.PinChanged("b", 2), fx.PinSet("b", True, None), fx.Answer(2, True)),
        at(
            3.0,
            ev.PinChanged("c", 3),
            fx.Answer(3, False, reason="models 'a', 'b' are pinned and may not be awake with it"),
        ),
        at(4.0, asks(1, "c"), refused(1, "c", "pinned", "model 'a' is pinned", 60.0)),
    )


def test_pin_during_a_backoff_wakes_when_it_is_over() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(2.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(
            2.0,
            ok("alive a"),
            again("a"),
            backs_off("sleep a", "sleep failed"),
            fails("a: sleep failed", 1.0),
            refused(1, "b", "sleep_failed", "model 'b' cannot be woken: a: sleep failed", 1.0, 1.0),
        ),
        at(2.5, ev.PinChanged("b", 1), fx.PinSet("b", True, None), fx.Answer(1, True)),
        at(
            2.6,
            asks(2, "b"),
            refused(
                2, "b", "sleep_failed", "model 'a' could not be put to sleep: sleep failed", 0.3999999999999999
            ),
        ),
        at(2.7, asks(3, "a"), admitted(3, "a")),
        at(3.0, ev.DeadlineReached(), begins("b", "a", why="pinned")),
    )


def test_commands_while_stopping_are_refused() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.ShutdownRequested()),
        at(3.0, ev.SleepRequested("a", 1), fx.Answer(1, False, reason="llmux is stopping")),
        at(4.0, ev.LeaseChanged(2), fx.Answer(2, False, reason="llmux is stopping")),
    )


def test_pin_of_a_third_model_leaves_a_switch_alone() -> None:
    specs = models("a", "b", "c", "d", memory=4)
    play = given(specs, awake=["a", "b", "c"], capacity=12)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "b"), admitted(2, "b")),
        at(2.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), accepted(1)),
        at(2.5, ev.PinChanged("b", 2), fx.PinSet("b", True, None), fx.Answer(2, True)),
        at(3.0, ev.RequestFinished(1), drained(1.0), sleeps("a", 3.0)),
        at(4.0, ok("sleep a"), holders("b", "c"), ends(2.0, 1.0, 1.0)),
        at(
            5.0,
            asks(3, "d"),
            queued(3, "d"),
            begins("d", why="there is room beside what is awake"),
            wakes("d", "b", "c"),
        ),
        at(6.0, ev.PinChanged("b", 3, pinned=False), fx.PinSet("b", False, None), fx.Answer(3, True)),
    )


def test_end_of_a_pin_wakes_nobody() -> None:
    given(models("a"))(
        at(1.0, ev.PinChanged("a", 1, pinned=False), fx.PinSet("a", False, None), fx.Answer(1, True))
    )


def test_what_is_pinned_has_its_room_before_it_is_awake() -> None:
    play = given(models("a", "b", "c", memory=4), awake=["b"], capacity=8, backoff_first=20.0)
    play.feed(1.0, ev.PinChanged("a", 1))
    play(
        at(2.0, failed("wake a", "failed"), backs_off("wake a", "failed", 1, 20.0), run("sleep a")),
        at(2.0, ok("sleep a"), holders("b"), fails("wake failed", 1.0)),
        at(3.0, asks(1, "c"), queued(1, "c"), begins("c", "b"), leaves("b", 3.0)),
    )
