"""Stopping: TERM at every stage."""

from __future__ import annotations

from playbook import Oldest, Playbook, at, given, models
from steps import *

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind, Rules
from llmux.estimates import Estimates


def test_nothing_under_way_stops_at_once() -> None:
    given(models("a"), awake=["a"])(at(1.0, ev.ShutdownRequested(), fx.Stopped()))


def test_everything_queued_is_turned_away_and_answers_may_finish_within_the_grace() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(
            3.0,
            ev.ShutdownRequested(),
            refused(2, "b", "stopping", "llmux is stopping", 5.0, 1.0),
            ends(1.0, 1.0, result="abandoned"),
        ),
        at(3.0, ev.ShutdownRequested()),
        at(4.0, asks(3, "a"), refused(3, "a", "stopping", "llmux is stopping", 5.0)),
        at(5.0, ev.EngineLost("a", refused=True)),
    )
    # No alive is asked meanwhile: the next thing due is the end of the grace.
    assert play.core.next_deadline() == 33.0
    play(
        at(33.0, ev.DeadlineReached(), fx.CancelRequests((1,), "a", fx.CutReason.STOPPING)),
        at(33.1, ev.RequestReturned(1), refused(1, "a", "stopping", "llmux is stopping", 5.0, 32.1), fx.Stopped()),
    )


def test_term_during_the_start() -> None:
    play = Playbook(Core(models("a", "b"), Rules(), Oldest(), Estimates()))
    play(
        at(0.0, ev.Started(), alone("alive a"), alone("alive b")),
        at(0.1, asks(1, "a"), queued(1, "a")),
        at(0.2, ok("alive a")),
        at(
            0.3,
            ev.ShutdownRequested(),
            refused(1, "a", "stopping", "llmux is stopping", 5.0, 0.19999999999999998),
            fx.KillHook(2, "stopping"),
        ),
        at(0.4, ok("alive b"), fx.Stopped()),
    )


def test_term_before_the_start() -> None:
    play = Playbook(Core(models("a"), Rules(), Oldest(), Estimates()))
    play(
        at(0.0, ev.ShutdownRequested(), fx.Stopped()),
        at(0.1, ev.Started()),
    )


def test_term_during_a_sleep_lets_it_finish_and_wakes_nobody() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(2.0, ev.ShutdownRequested(), refused(1, "b", "stopping", "llmux is stopping", 5.0, 1.0)),
        at(3.0, ok("sleep a"), holders(), ends(2.0, result="abandoned"), fx.Stopped()),
    )


def test_term_during_a_sleep_that_fails_begins_nothing_further() -> None:
    play = given(models("a", "b", stop=True), awake=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(2.0, ev.ShutdownRequested(), refused(1, "b", "stopping", "llmux is stopping", 5.0, 1.0)),
        at(3.0, failed("sleep a"), ends(2.0, result="abandoned"), fx.Stopped()),
    )


def test_term_during_verify_ends_it_and_the_state_file_keeps_the_model() -> None:
    play = given(models("a", verify=True), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ok("sleep a"), run("verify a")),
        at(3.0, ev.ShutdownRequested(), fx.KillHook(3, "stopping")),
        at(3.1, failed("verify a"), ends(2.1, result="abandoned"), fx.Stopped()),
    )


def test_term_during_a_sleep_that_verify_was_to_prove() -> None:
    play = given(models("a", verify=True), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ev.ShutdownRequested()),
        at(3.0, ok("sleep a"), ends(2.0, result="abandoned"), fx.Stopped()),
    )


def test_term_between_two_polls_of_verify() -> None:
    play = given(models("a", verify=True), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ok("sleep a"), run("verify a")),
        at(3.0, failed("verify a")),
        at(3.1, ev.ShutdownRequested(), ends(2.1, result="abandoned"), fx.Stopped()),
    )


def test_term_while_one_of_two_is_asleep_and_the_other_is_verified() -> None:
    specs = [*models("a", memory=4), *models("b", memory=4, verify=True), *models("c", memory=8)]
    play = given(specs, awake=["a", "b"], capacity=8)
    play(
        at(1.0, asks(1, "c"), queued(1, "c"), begins("c", "a", "b"), leaves("a", 1.0), sleeps("b", 1.0)),
        at(2.0, ok("sleep b"), run("verify b")),
        at(
            3.0,
            ev.ShutdownRequested(),
            refused(1, "c", "stopping", "llmux is stopping", 5.0, 2.0),
            fx.KillHook(6, "stopping"),
        ),
        at(3.1, failed("verify b")),
        at(4.0, ok("sleep a"), holders("b"), ends(3.0, result="abandoned"), fx.Stopped()),
    )


def test_term_during_a_wake_ends_it_and_leaves_the_engine() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(
            2.0,
            ev.ShutdownRequested(),
            refused(1, "a", "stopping", "llmux is stopping", 5.0, 1.0),
            fx.KillHook(2, "stopping"),
        ),
        at(3.0, failed("wake a"), ends(2.0, result="abandoned"), fx.Stopped()),
    )


def test_term_during_a_wake_that_succeeds_all_the_same() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(
            2.0,
            ev.ShutdownRequested(),
            refused(1, "a", "stopping", "llmux is stopping", 5.0, 1.0),
            fx.KillHook(2, "stopping"),
        ),
        at(3.0, ok("wake a"), awake("a", 2.0), ends(2.0, 0.0, 2.0, 2.0), fx.Stopped()),
    )


def test_term_during_the_cleanup_of_a_failed_wake() -> None:
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
        at(2.5, ev.ShutdownRequested()),
        at(3.0, ok("sleep a"), holders(), fails("wake exited with 1", 2.0), fx.Stopped()),
    )


def test_alive_that_is_ended_but_succeeds_says_that_the_engine_runs() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(3.0, ev.ShutdownRequested(), fx.KillHook(3, "stopping")),
        at(
            3.1,
            ok("alive a"),
            again("a"),
            backs_off("sleep a", "sleep failed"),
            fails("a: sleep failed", 2.1),
            fx.Stopped(),
        ),
    )


def test_lease_that_would_end_while_stopping_is_forgotten() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(
            2.0, ev.LeaseChanged(1, until=5.0), fx.LeaseSet(True, 5.0), begins(None, "a", why="lease"), accepted(1)
        ),
        at(3.0, ev.ShutdownRequested(), ends(1.0, 1.0, result="abandoned")),
    )
    assert play.core.next_deadline() == 33.0
    play(at(6.0, ev.RequestFinished(1), fx.Stopped()))


def test_hook_that_is_being_ended_is_not_ended_twice() -> None:
    play = given(models("a", timeouts={HookKind.WAKE: 30.0}))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(31.0, ev.DeadlineReached(), fx.KillHook(2, "timeout")),
        at(32.0, ev.ShutdownRequested(), refused(1, "a", "stopping", "llmux is stopping", 5.0, 31.0)),
        at(33.0, failed("wake a"), ends(32.0, result="abandoned"), fx.Stopped()),
    )
