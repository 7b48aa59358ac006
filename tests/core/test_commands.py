"""Commands: wake, sleep, reset, pin, lease. Each is answered exactly once."""

from __future__ import annotations

from playbook import Oldest, Playbook, at, given, models
from steps import *

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import Rules
from llmux.estimates import Estimates


def test_commands_before_the_start_is_over_and_for_strangers_are_refused() -> None:
    play = Playbook(Core(models("a"), Rules(), Oldest(), Estimates()))
    play(
        at(0.0, ev.Started(), alone("alive a")),
        at(0.1, ev.ActivationRequested("a", 1), fx.Answer(1, False, reason="llmux is still looking at what runs")),
        at(0.2, failed("alive a"), fx.Ready(())),
        at(0.3, ev.ActivationRequested("b", 2), fx.Answer(2, False, reason="model 'b' not found")),
        at(0.4, ev.SleepRequested("b", 3), fx.Answer(3, False, reason="model 'b' not found")),
        at(0.5, ev.ResetRequested("b", 4), fx.Answer(4, False, reason="model 'b' not found")),
        at(0.6, ev.PinChanged("b", 5), fx.Answer(5, False, reason="model 'b' not found")),
    )


def test_wake_needs_no_waiter() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.ActivationRequested("b", 1), begins("b", "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(1.1, ev.ActivationRequested("b", 2), accepted(2)),
        at(
            1.2,
            ev.ActivationRequested("a", 3),
            fx.Answer(3, False, switch=1, reason="switch 1 to 'b' is under way"),
        ),
        at(2.0, ok("sleep a"), holders(), wakes("b")),
        at(3.0, ok("wake b"), awake("b", 2.0), ends(2.0, 0.0, 2.0, 2.0)),
        at(4.0, ev.ActivationRequested("b", 4), fx.Answer(4, True)),
    )


def test_wake_of_the_target_keeps_a_switch_that_has_lost_its_waiters() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(3.0, ev.ActivationRequested("b", 1), accepted(1)),
        at(4.0, ev.RequestAbandoned(2)),
        at(5.0, ev.RequestFinished(1), drained(3.0), sleeps("a", 5.0)),
    )


def test_wake_of_a_target_that_has_failed_is_refused() -> None:
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
        at(
            3.0,
            ev.ActivationRequested("a", 1),
            fx.Answer(1, False, switch=1, reason="switch 1 to 'a' is under way"),
        ),
    )


def test_wake_is_not_held_by_the_backoff_of_its_model_but_by_a_pin() -> None:
    play = given(models("a", "b"))
    play(
        at(1.0, ev.ActivationRequested("a", 1), begins("a", why="requested"), wakes("a"), accepted(1)),
        at(2.0, failed("wake a", "exited with 1"), backs_off("wake a", "exited with 1"), run("sleep a")),
        at(2.1, ok("sleep a"), holders(), fails("wake exited with 1", 1.1)),
        at(2.2, ev.ActivationRequested("a", 2), begins("a", why="requested"), wakes("a"), accepted(2)),
        at(
            3.0,
            ok("wake a"),
            awake("a", 0.7999999999999998),
            ends(0.7999999999999998, 0.0, 0.7999999999999998, 0.7999999999999998),
        ),
        at(4.0, ev.PinChanged("a", 3), fx.PinSet("a", True, None), fx.Answer(3, True)),
        at(5.0, ev.ActivationRequested("b", 4), fx.Answer(4, False, reason="model 'a' is pinned")),
    )


def test_sleep_that_is_asked_for() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("b", 1), fx.Answer(1, True)),
        at(2.0, ev.SleepRequested("a", 2), begins(None, "a", why="requested"), leaves("a", 2.0), accepted(2)),
        at(2.1, ev.SleepRequested("a", 3), accepted(3)),
        at(2.2, ev.SleepRequested("b", 4), fx.Answer(4, False, switch=1, reason="switch 1 to sleep is under way")),
        at(3.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0)),
    )


def test_reset_forgets_a_fault() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ev.ResetRequested("a", 2), fx.Answer(2, False, switch=1, reason="switch 1 to sleep is under way")),
        at(2.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(3.0, failed("alive a"), faults("a", "sleep failed"), fails("a: sleep failed", 2.0)),
        at(3.1, ev.ResetRequested("a", 3), holders(), fx.ModelReset("a"), fx.Answer(3, True)),
        at(3.2, asks(1, "b"), queued(1, "b"), begins("b"), wakes("b")),
    )


def test_reset_waits_for_the_answers_of_a_lost_engine() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.EngineLost("a", refused=True), alone("alive a")),
        at(3.0, failed("alive a"), lost("a", "a connection failed, and alive failed", 3.0)),
        at(4.0, ev.ResetRequested("a", 1), fx.Answer(1, False, reason="1 requests of 'a' have not ended yet")),
        at(5.0, ev.RequestFinished(1)),
        at(6.0, ev.ResetRequested("a", 2), holders(), fx.ModelReset("a"), fx.Answer(2, True)),
    )


def test_reset_of_an_awake_model_clears_the_backoff_of_its_sleep() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(3.0, ok("alive a"), again("a"), backs_off("sleep a", "sleep failed"), fails("a: sleep failed", 2.0)),
        at(3.1, ev.ResetRequested("a", 2), fx.ModelReset("a"), fx.Answer(2, True)),
    )
    assert not play.core.state.models["a"].sleep_backoff.active(3.2)
