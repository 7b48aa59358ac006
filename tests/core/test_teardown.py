"""Retirement: sleep, verify, stop, alive, and what they mean together."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_verify_is_polled_until_it_passes() -> None:
    play = given(models("a", verify=True), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ok("sleep a"), run("verify a")),
        at(3.0, failed("verify a", "exited with 1")),
    )
    assert play.core.next_deadline() == 3.5
    play(
        at(3.5, ev.DeadlineReached(), run("verify a")),
        at(3.6, ok("verify a"), holders(), ends(2.6, 0.0, 2.6)),
    )


def test_verify_that_never_passes_is_tried_until_its_time_is_over() -> None:
    play = given(models("a", verify=True, timeouts={HookKind.VERIFY: 1.5}), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ok("sleep a"), run("verify a")),
        at(2.0, failed("verify a", "exited with 1")),
        at(2.5, ev.DeadlineReached(), run("verify a")),
        at(2.9, failed("verify a", "exited with 1")),
        at(3.4, ev.DeadlineReached(), run("verify a")),
        # A poll at 3.5 would have no time left.
        at(3.45, failed("verify a", "exited with 1"), unslept("a", "verify exited with 1"), run("alive a")),
        at(
            3.5,
            ok("alive a"),
            again("a"),
            backs_off("sleep a", "verify exited with 1"),
            fails("a: verify exited with 1", 2.5),
        ),
    )


def test_verify_is_not_polled_in_the_moment_when_its_time_is_over() -> None:
    play = given(models("a", verify=True, timeouts={HookKind.VERIFY: 1.5}), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ok("sleep a"), run("verify a")),
        at(3.0, failed("verify a"), unslept("a", "verify failed"), run("alive a")),
    )


def test_verify_that_hangs_is_ended_when_its_time_is_over() -> None:
    play = given(models("a", verify=True, stop=True, timeouts={HookKind.VERIFY: 2.0}), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ok("sleep a"), run("verify a")),
        at(2.1, failed("verify a", "exited with 1")),
        at(2.6, ev.DeadlineReached(), run("verify a")),
        at(4.0, ev.DeadlineReached(), fx.KillHook(4, "timeout")),
        at(4.1, failed("verify a", "ended by SIGTERM"), unslept("a", "verify ended by SIGTERM"), run("stop a")),
        # After stop, verify has all its time again.
        at(5.0, ok("stop a"), run("verify a")),
        at(6.0, ok("verify a"), holders(), ends(5.0, 0.0, 5.0)),
    )


def test_failed_sleep_is_followed_by_stop() -> None:
    play = given(models("a", stop=True), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, failed("sleep a"), unslept("a", "sleep failed"), run("stop a")),
        at(3.0, ok("stop a"), holders(), ends(2.0, 0.0, 2.0)),
    )


def test_failed_sleep_and_stop_of_an_engine_that_answers_leave_it_awake() -> None:
    play = given(models("a", "b", stop=True), awake=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(2.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("stop a")),
        at(3.0, failed("stop a", "exited with 2"), run("alive a")),
        at(
            4.0,
            ok("alive a"),
            again("a"),
            backs_off("sleep a", "stop exited with 2"),
            fails("a: stop exited with 2", 3.0),
            refused(1, "b", "sleep_failed", "model 'b' cannot be woken: a: stop exited with 2", 1.0, 3.0),
        ),
        at(4.5, asks(2, "a"), admitted(2, "a")),
        at(
            4.5,
            asks(3, "b"),
            refused(3, "b", "sleep_failed", "model 'a' could not be put to sleep: stop exited with 2", 0.5),
        ),
        at(4.6, ev.RequestFinished(2)),
        at(5.0, ev.DeadlineReached()),
        # The backoff is over: the next request is the next try, and the backoff after it is twice as long.
        at(6.0, asks(4, "b"), queued(4, "b"), begins("b", "a"), leaves("a", 2.0)),
        at(7.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("stop a")),
        at(8.0, failed("stop a", "exited with 2"), run("alive a")),
        at(
            9.0,
            ok("alive a"),
            again("a"),
            backs_off("sleep a", "stop exited with 2", 2, 2.0),
            fails("a: stop exited with 2", 3.0),
            refused(4, "b", "sleep_failed", "model 'b' cannot be woken: a: stop exited with 2", 2.0, 3.0),
        ),
    )


def test_faulted_model_is_tried_again_by_its_own_request_after_the_backoff() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(2.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            3.0,
            failed("alive a", "exited with 1"),
            faults("a", "sleep exited with 1"),
            fails("a: sleep exited with 1", 2.0),
            refused(1, "b", "sleep_failed", "model 'b' cannot be woken: a: sleep exited with 1", 1.0, 2.0),
        ),
        at(
            3.5,
            asks(2, "a"),
            refused(2, "a", "faulted", "model 'a' could not be put to sleep: sleep exited with 1", 0.5),
        ),
        at(
            3.5,
            asks(3, "b"),
            refused(3, "b", "faulted", "model 'a' could not be put to sleep: sleep exited with 1", 0.5),
        ),
        at(4.0, ev.DeadlineReached()),
        at(5.0, asks(4, "a"), queued(4, "a"), begins("a"), drained(), run("sleep a")),
        at(6.0, ok("sleep a"), holders(), wakes("a")),
        at(7.0, ok("wake a"), awake("a", 2.0), ends(2.0, 0.0, 2.0), admitted(4, "a", 2.0, epoch=2)),
    )


def test_faulted_model_is_tried_again_by_a_conflicting_request_after_the_backoff() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            3.0,
            failed("alive a", "exited with 1"),
            faults("a", "sleep exited with 1"),
            fails("a: sleep exited with 1", 2.0),
        ),
        at(5.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), drained(), run("sleep a")),
        at(6.0, ok("sleep a"), holders(), wakes("b")),
    )


def test_faulted_model_that_turns_out_to_run_serves_the_request_that_tried_again() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            3.0,
            failed("alive a", "exited with 1"),
            faults("a", "sleep exited with 1"),
            fails("a: sleep exited with 1", 2.0),
        ),
        at(5.0, asks(1, "a"), queued(1, "a"), begins("a"), drained(), run("sleep a")),
        at(6.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            7.0,
            ok("alive a"),
            awake("a"),
            backs_off("sleep a", "sleep exited with 1", 2, 2.0),
            fails("a: sleep exited with 1", 2.0),
            admitted(1, "a", 2.0),
        ),
    )
