"""Lost engines: who is woken, who is cleaned up after, and when."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev


def test_lost_engine_is_cleaned_up_before_a_conflicting_model_wakes_and_after_its_last_answer() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.EngineLost("a", refused=True), alone("alive a")),
        at(
            3.0, failed("alive a", "exited with 1"), lost("a", "a connection failed, and alive exited with 1", 3.0)
        ),
        at(4.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(5.0, ev.RequestFinished(1), drained(1.0), run("sleep a")),
        at(6.0, ok("sleep a"), holders(), wakes("b")),
    )


def test_engine_that_never_answered_after_its_wake_counts_as_a_failed_wake() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(1.1, asks(2, "a"), queued(2, "a", 2)),
        at(
            2.0,
            ok("wake a"),
            awake("a", 1.0),
            ends(1.0, 0.0, 1.0, 1.0),
            admitted(1, "a", 1.0),
            admitted(2, "a", 0.8999999999999999),
        ),
        at(
            2.1,
            ev.RequestReturned(1, connected=False),
            lost("a", "its wake hook succeeded, but the engine refuses connections", 0.10000000000000009),
            backs_off("wake a", "its wake hook succeeded, but the engine refuses connections"),
            refused(
                1,
                "a",
                "backing_off",
                "model 'a' failed to wake: its wake hook succeeded, but the engine refuses connections",
                1.0,
                1.1,
            ),
        ),
        at(
            2.2,
            ev.RequestReturned(2, connected=False),
            refused(
                2,
                "a",
                "backing_off",
                "model 'a' failed to wake: its wake hook succeeded, but the engine refuses connections",
                0.8999999999999999,
                1.1,
            ),
            begins(None, "a", why="not wanted"),
            drained(),
            run("sleep a"),
        ),
        at(3.0, ok("sleep a"), holders(), ends(0.7999999999999998, 0.0, 0.7999999999999998)),
        # The second time its backoff is twice as long, although its wake hook succeeded in between.
        at(4.0, asks(3, "a"), queued(3, "a"), begins("a"), wakes("a")),
        at(5.0, ok("wake a"), awake("a", 1.0), ends(1.0, 0.0, 1.0, 1.0), admitted(3, "a", 1.0, epoch=2)),
        at(
            5.1,
            ev.RequestReturned(3, connected=False),
            lost("a", "its wake hook succeeded, but the engine refuses connections", 0.09999999999999964),
            backs_off("wake a", "its wake hook succeeded, but the engine refuses connections", 2, 2.0),
            refused(
                3,
                "a",
                "backing_off",
                "model 'a' failed to wake: its wake hook succeeded, but the engine refuses connections",
                2.0,
                1.0999999999999996,
            ),
            begins(None, "a", why="not wanted"),
            drained(),
            run("sleep a"),
        ),
        at(6.0, ok("sleep a"), holders(), ends(0.9000000000000004, 0.0, 0.9000000000000004)),
    )


def test_engine_that_never_answered_but_whose_cleanup_fails_and_which_is_alive_is_served() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(2.0, ok("wake a"), awake("a", 1.0), ends(1.0, 0.0, 1.0, 1.0), admitted(1, "a", 1.0)),
        at(
            2.1,
            ev.RequestReturned(1, connected=False),
            lost("a", "its wake hook succeeded, but the engine refuses connections", 0.10000000000000009),
            backs_off("wake a", "its wake hook succeeded, but the engine refuses connections"),
            refused(
                1,
                "a",
                "backing_off",
                "model 'a' failed to wake: its wake hook succeeded, but the engine refuses connections",
                1.0,
                1.1,
            ),
            begins(None, "a", why="not wanted"),
            drained(),
            run("sleep a"),
        ),
        at(3.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            4.0,
            ok("alive a"),
            again("a"),
            backs_off("sleep a", "sleep exited with 1"),
            fails("a: sleep exited with 1", 1.9),
        ),
        # Nobody asks for its cleanup any more when the backoff is over.
        at(5.0, ev.DeadlineReached()),
    )


def test_engine_that_answered_once_is_suspected_like_any_other() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(2.0, ok("wake a"), awake("a", 1.0), ends(1.0, 0.0, 1.0, 1.0), admitted(1, "a", 1.0)),
        at(3.0, ev.RequestReturned(1, connected=True), alone("alive a"), queued(1, "a")),
    )


def test_pinned_engine_that_is_lost_is_woken_without_anybody_waiting() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.PinChanged("a", 1), fx.PinSet("a", True, None), fx.Answer(1, True)),
        at(2.0, ev.EngineLost("a", refused=True), alone("alive a")),
        at(
            3.0,
            failed("alive a"),
            lost("a", "a connection failed, and alive failed", 3.0),
            begins("a", why="pinned"),
            run("wake a"),
        ),
    )


def test_lost_engine_is_woken_by_its_own_request_whatever_its_sleep_has_come_to() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(3.0, ok("alive a"), again("a"), backs_off("sleep a", "sleep failed"), fails("a: sleep failed", 2.0)),
        at(3.1, ev.EngineLost("a", refused=True), alone("alive a")),
        at(3.2, failed("alive a"), lost("a", "a connection failed, and alive failed", 0.20000000000000018)),
        at(
            3.3,
            asks(1, "b"),
            refused(
                1,
                "b",
                "sleep_failed",
                "model 'a' could not be put to sleep: a connection failed, and alive failed",
                0.7000000000000002,
            ),
        ),
        at(3.4, asks(2, "a"), queued(2, "a"), begins("a"), run("wake a")),
    )
