"""Probing: engines that are asked, suspected, lost and woken again."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev


def test_periodic_alive_loses_an_engine_after_three_failures_in_a_row() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(15.0, ev.DeadlineReached(), alone("alive a")),
        at(16.0, failed("alive a", "exited with 1")),
        at(31.0, ev.DeadlineReached(), alone("alive a")),
        at(32.0, ok("alive a")),
        at(47.0, ev.DeadlineReached(), alone("alive a")),
        at(48.0, failed("alive a", "exited with 1")),
        at(63.0, ev.DeadlineReached(), alone("alive a")),
        at(64.0, failed("alive a", "exited with 1")),
        at(79.0, ev.DeadlineReached(), alone("alive a")),
        at(
            80.0,
            failed("alive a", "exited with 1"),
            lost("a", "alive failed 3 times in a row: exited with 1", 80.0),
        ),
    )
    assert play.core.next_deadline() is None


def test_periodic_alive_does_not_count_while_an_answer_delivers_bytes() -> None:
    play = given(models("a"), awake=["a"], alive_failures=1)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(15.0, ev.DeadlineReached(), alone("alive a")),
        at(16.0, failed("alive a", "timeout", last_byte=1.0)),
        at(31.0, ev.DeadlineReached(), alone("alive a")),
        at(
            32.0,
            failed("alive a", "timeout", last_byte=16.9),
            lost("a", "alive failed 1 times in a row: timeout", 32.0),
        ),
    )


def test_fewer_failures_allowed_by_a_reload_do_not_lose_an_engine_that_delivers() -> None:
    play = given(models("a"), awake=["a"], alive_failures=5)
    play(
        at(15.0, ev.DeadlineReached(), alone("alive a")),
        at(15.0, failed("alive a")),
        at(30.0, ev.DeadlineReached(), alone("alive a")),
        at(30.0, failed("alive a")),
        at(31.0, replaced(models("a"), alive_failures=2)),
        at(46.0, ev.DeadlineReached(), alone("alive a")),
        at(46.0, failed("alive a", last_byte=45.0)),
    )


def test_alive_every_zero_asks_only_after_a_broken_connection() -> None:
    play = given(models("a"), awake=["a"], alive_every=0.0)
    assert play.core.next_deadline() is None
    play(
        at(1.0, ev.EngineLost("a"), alone("alive a")),
        at(2.0, failed("alive a")),
        at(3.0, ev.EngineLost("a"), alone("alive a")),
        at(3.0, ev.EngineLost("a")),
        at(4.0, ok("alive a"), alone("alive a")),
        at(5.0, ok("alive a")),
    )
    assert play.core.next_deadline() is None


def test_refused_connection_is_confirmed_and_its_request_wakes_the_engine_again() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, ev.RequestReturned(1), alone("alive a"), queued(1, "a")),
        at(1.5, asks(2, "a"), queued(2, "a", 2)),
        at(
            2.0,
            failed("alive a", "exited with 1"),
            lost("a", "a connection failed, and alive exited with 1", 2.0),
            begins("a"),
            run("wake a"),
        ),
        at(
            9.0,
            ok("wake a"),
            awake("a", 7.0),
            ends(7.0, 0.0, 7.0, 7.0),
            fx.Admit(1, "a", None, 2, True, 8.0),
            admitted(2, "a", 7.5, epoch=2),
        ),
    )


def test_refused_connection_of_an_engine_that_answers_is_tried_once_more() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, ev.RequestReturned(1), alone("alive a"), queued(1, "a")),
        at(1.5, asks(2, "a"), queued(2, "a", 2)),
        at(2.0, ok("alive a"), fx.Admit(1, "a", None, 1, True, 1.0), admitted(2, "a", 0.5)),
    )


def test_suspicion_during_a_periodic_alive_has_it_asked_again() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(15.0, ev.DeadlineReached(), alone("alive a")),
        at(15.1, ev.EngineLost("a", refused=True)),
        at(15.2, ok("alive a"), alone("alive a")),
        at(
            15.3,
            failed("alive a", "exited with 1"),
            lost("a", "a connection failed, and alive exited with 1", 15.3),
        ),
    )


def test_suspicion_of_what_is_not_awake_is_ignored() -> None:
    play = given(models("a"))
    play(
        at(1.0, ev.EngineLost("a", refused=True)),
        at(1.0, ev.EngineLost("b", refused=True)),
    )


def test_periodic_alive_waits_for_the_one_that_runs() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(14.0, ev.EngineLost("a"), alone("alive a")),
        at(15.0, ev.DeadlineReached()),
        at(16.0, ok("alive a")),
    )
    assert play.core.next_deadline() == 31.0


def test_failures_before_a_sleep_that_failed_do_not_count_after_it() -> None:
    play = given(models("a"), awake=["a"], alive_failures=2)
    play(
        at(15.0, ev.DeadlineReached(), alone("alive a")),
        at(15.0, failed("alive a")),
        at(16.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 16.0), accepted(1)),
        at(17.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(18.0, ok("alive a"), again("a"), backs_off("sleep a", "sleep failed"), fails("a: sleep failed", 2.0)),
        at(33.0, ev.DeadlineReached(), alone("alive a")),
        at(33.0, failed("alive a")),
    )


def test_alive_that_ends_when_its_model_is_asleep_changes_nothing() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(15.0, ev.DeadlineReached(), alone("alive a")),
        at(16.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 16.0), accepted(1)),
        at(17.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0)),
        at(18.0, ok("alive a")),
    )
    assert play.core.next_deadline() is None
