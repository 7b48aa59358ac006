"""Switches that fail: at the wake, at the sleep, of one, of all."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_one_waiter_of_two_leaves_and_the_switch_goes_on() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(2.0, asks(3, "b"), queued(3, "b", 2)),
        at(3.0, ev.RequestAbandoned(2)),
        at(4.0, ev.RequestFinished(1), drained(2.0), sleeps("a", 4.0)),
    )


def test_failed_wake_is_cleaned_up_after_and_its_waiters_are_turned_away() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(2.0, ok("sleep a"), holders(), wakes("b")),
        at(
            3.0,
            failed("wake b", "exited with 1"),
            backs_off("wake b", "exited with 1"),
            refused(1, "b", "wake_failed", "model 'b' failed to wake: exited with 1", 1.0, 2.0),
            run("sleep b"),
        ),
        at(
            3.1,
            asks(2, "b"),
            refused(2, "b", "backing_off", "model 'b' failed to wake: exited with 1", 0.8999999999999999),
        ),
        at(3.2, asks(3, "a"), queued(3, "a")),
        at(4.0, ok("sleep b"), holders(), fails("wake exited with 1", 3.0), begins("a"), wakes("a")),
        # a goes on being served while b is left alone.
        at(
            5.0,
            ok("wake a"),
            awake("a", 1.0),
            ends(1.0, 0.0, 1.0, 1.0),
            admitted(3, "a", 1.7999999999999998, epoch=2),
        ),
        at(6.0, ev.DeadlineReached()),
        at(6.0, asks(4, "b"), queued(4, "b"), begins("b", "a")),
    )


def test_failed_wake_whose_cleanup_fails_too_but_which_answers_is_served() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(
            2.0,
            failed("wake a", "exited with 1"),
            backs_off("wake a", "exited with 1"),
            refused(1, "a", "wake_failed", "model 'a' failed to wake: exited with 1", 1.0, 1.0),
            run("sleep a"),
        ),
        at(3.0, failed("sleep a", "exited with 2"), unslept("a", "sleep exited with 2"), run("alive a")),
        at(
            4.0,
            ok("alive a"),
            awake("a"),
            backs_off("sleep a", "sleep exited with 2"),
            fails("wake exited with 1", 3.0),
        ),
        at(5.0, asks(2, "a"), admitted(2, "a")),
    )


def test_wake_hook_past_its_timeout_is_ended() -> None:
    play = given(models("a", timeouts={HookKind.WAKE: 30.0}))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(31.0, ev.DeadlineReached(), fx.KillHook(2, "timeout")),
        at(
            32.0,
            failed("wake a", "ran past its timeout"),
            backs_off("wake a", "ran past its timeout"),
            refused(1, "a", "wake_failed", "model 'a' failed to wake: ran past its timeout", 1.0, 31.0),
            run("sleep a"),
        ),
    )


def test_failed_wake_of_a_lost_model_with_answers_still_running_is_cleaned_up_when_they_have_ended() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "a"), admitted(2, "a")),
        at(3.0, ev.RequestReturned(2), alone("alive a"), queued(2, "a")),
        at(
            4.0,
            failed("alive a", "exited with 1"),
            lost("a", "a connection failed, and alive exited with 1", 4.0),
            begins("a"),
            run("wake a"),
        ),
        at(
            5.0,
            failed("wake a", "exited with 1"),
            backs_off("wake a", "exited with 1"),
            refused(2, "a", "wake_failed", "model 'a' failed to wake: exited with 1", 1.0, 3.0),
            fails("wake exited with 1", 1.0),
        ),
        at(6.0, ev.DeadlineReached()),
        at(7.0, ev.RequestFinished(1), begins(None, "a", why="not wanted"), drained(), run("sleep a")),
        at(8.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0)),
    )


def test_of_two_that_leave_one_fails_and_is_served_while_the_other_still_sleeps() -> None:
    play = given([*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8)
    play(
        at(1.0, asks(1, "c"), queued(1, "c"), begins("c", "a", "b"), leaves("a", 1.0), sleeps("b", 1.0)),
        at(1.5, asks(2, "a"), queued(2, "a")),
        at(2.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(3.0, ok("alive a"), again("a"), backs_off("sleep a", "sleep exited with 1"), admitted(2, "a", 1.5)),
        at(4.0, asks(3, "a"), admitted(3, "a")),
        at(
            5.0,
            ok("sleep b"),
            holders("a"),
            fails("a: sleep exited with 1", 4.0),
            refused(1, "c", "sleep_failed", "model 'c' cannot be woken: a: sleep exited with 1", 0.0, 4.0),
        ),
        # In the backoff nobody waits for what needs a's room; b fits beside it.
        at(5.1, asks(4, "c"), queued(4, "c"), begins("c", "a")),
        at(5.2, asks(5, "b"), queued(5, "b")),
    )


def test_of_two_that_leave_the_last_fails_and_both_are_served_again() -> None:
    play = given([*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8)
    play(
        at(1.0, asks(1, "c"), queued(1, "c"), begins("c", "a", "b"), leaves("a", 1.0), sleeps("b", 1.0)),
        at(1.5, asks(2, "b"), queued(2, "b")),
        at(2.0, ok("sleep a"), holders("b")),
        at(3.0, failed("sleep b", "exited with 1"), unslept("b", "sleep exited with 1"), run("alive b")),
        at(
            4.0,
            ok("alive b"),
            again("b"),
            backs_off("sleep b", "sleep exited with 1"),
            fails("b: sleep exited with 1", 3.0),
            refused(1, "c", "sleep_failed", "model 'c' cannot be woken: b: sleep exited with 1", 1.0, 3.0),
            admitted(2, "b", 2.5),
        ),
    )


def test_of_two_that_leave_one_is_faulted_and_the_other_asleep() -> None:
    play = given([*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8)
    play(
        at(1.0, asks(1, "c"), queued(1, "c"), begins("c", "a", "b"), leaves("a", 1.0), sleeps("b", 1.0)),
        at(2.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(2.0, asks(2, "a"), queued(2, "a")),
        at(3.0, failed("alive a", "exited with 1"), faults("a", "sleep exited with 1")),
        at(
            3.5,
            asks(3, "a"),
            refused(3, "a", "faulted", "model 'a' could not be put to sleep: sleep exited with 1", 0.5),
        ),
        at(
            4.0,
            ok("sleep b"),
            holders("a"),
            fails("a: sleep exited with 1", 3.0),
            refused(1, "c", "sleep_failed", "model 'c' cannot be woken: a: sleep exited with 1", 0.0, 3.0),
            begins("a"),
            drained(),
            run("sleep a"),
        ),
    )
