"""Stopping with ``on_exit: sleep``."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev


def test_sleep_on_exit_sleeps_what_is_awake_once_it_has_drained() -> None:
    play = given(models("a", "b", memory=4), awake=["a", "b"], capacity=8, sleep_on_exit=True, drain_timeout=0.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        # The grace is the only limit of what runs, whatever the drain's is.
        at(2.0, ev.ShutdownRequested(), begins(None, "a", "b", why="stopping")),
        at(3.0, ev.RequestFinished(1), drained(1.0), sleeps("a", 3.0), sleeps("b", 3.0)),
        at(4.0, ok("sleep a"), holders("b")),
        at(5.0, ok("sleep b"), holders(), ends(3.0, 1.0, 2.0), fx.Stopped()),
    )


def test_sleep_on_exit_after_a_verify_that_was_ended_sleeps_the_others() -> None:
    specs = [*models("a", memory=4, verify=True), *models("b", memory=4)]
    play = given(specs, awake=["a", "b"], capacity=8, sleep_on_exit=True)
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ok("sleep a"), run("verify a")),
        at(3.0, ev.ShutdownRequested(), fx.KillHook(4, "stopping")),
        at(
            3.1,
            failed("verify a"),
            ends(2.1, result="abandoned"),
            begins(None, "b", why="stopping"),
            leaves("b", 3.1),
        ),
        at(4.0, ok("sleep b"), holders("a"), ends(0.8999999999999999, 0.0, 0.8999999999999999), fx.Stopped()),
    )


def test_sleep_on_exit_does_not_wait_for_a_suspicion_or_a_backoff() -> None:
    play = given(models("a"), awake=["a"], sleep_on_exit=True)
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(3.0, ok("alive a"), again("a"), backs_off("sleep a", "sleep failed"), fails("a: sleep failed", 2.0)),
        at(3.1, ev.EngineLost("a", refused=True), alone("alive a")),
        at(
            3.2,
            ev.ShutdownRequested(),
            fx.KillHook(4, "stopping"),
            begins(None, "a", why="stopping"),
            leaves("a", 0.20000000000000018),
        ),
        at(3.3, failed("alive a")),
        at(4.0, failed("sleep a"), ends(0.7999999999999998, result="abandoned"), fx.Stopped()),
    )


def test_sleep_on_exit_that_fails_is_followed_by_stop() -> None:
    play = given(models("a", stop=True), awake=["a"], sleep_on_exit=True)
    play(
        at(1.0, ev.ShutdownRequested(), begins(None, "a", why="stopping"), leaves("a", 1.0)),
        at(2.0, failed("sleep a"), unslept("a", "sleep failed"), run("stop a")),
        at(3.0, ok("stop a"), holders(), ends(2.0, 0.0, 2.0), fx.Stopped()),
    )


def test_sleep_on_exit_cleans_up_after_a_wake_that_was_ended() -> None:
    play = given(models("a"), sleep_on_exit=True)
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(
            2.0,
            ev.ShutdownRequested(),
            refused(1, "a", "stopping", "llmux is stopping", 5.0, 1.0),
            fx.KillHook(2, "stopping"),
        ),
        at(
            3.0,
            failed("wake a"),
            ends(2.0, result="abandoned"),
            begins(None, "a", why="stopping"),
            drained(),
            run("sleep a"),
        ),
        at(4.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0), fx.Stopped()),
    )


def test_sleep_on_exit_whose_stop_fails_too_leaves_things_as_they_are() -> None:
    play = given(models("a", stop=True), awake=["a"], sleep_on_exit=True)
    play(
        at(1.0, ev.ShutdownRequested(), begins(None, "a", why="stopping"), leaves("a", 1.0)),
        at(2.0, failed("sleep a"), unslept("a", "sleep failed"), run("stop a")),
        at(3.0, failed("stop a"), ends(2.0, result="abandoned"), fx.Stopped()),
    )
