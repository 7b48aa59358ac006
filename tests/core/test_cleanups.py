"""Cleanups: an engine is gone, or never came, and its sleep hook may not know that."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_failed_cleanup_is_decided_by_verify() -> None:
    play = given(models("a", verify=True))
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
        at(4.0, failed("alive a", "exited with 3"), run("verify a")),
        at(5.0, ok("verify a"), holders(), fails("wake exited with 1", 4.0)),
    )


def test_failed_cleanup_whose_verify_never_passes_is_a_fault() -> None:
    play = given(models("a", verify=True, timeouts={HookKind.VERIFY: 0.5}))
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
        at(4.0, failed("alive a", "exited with 3"), run("verify a")),
        at(5.0, failed("verify a", "exited with 4"), run("alive a")),
        at(
            6.0,
            failed("alive a", "exited with 3"),
            faults("a", "verify exited with 4"),
            fails("wake exited with 1", 5.0),
        ),
    )


def test_cleanup_whose_sleep_and_stop_fail_is_a_fault() -> None:
    play = given(models("a", stop=True))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(
            2.0,
            failed("wake a", "exited with 1"),
            backs_off("wake a", "exited with 1"),
            refused(1, "a", "wake_failed", "model 'a' failed to wake: exited with 1", 1.0, 1.0),
            run("sleep a"),
        ),
        at(3.0, failed("sleep a", "exited with 2"), unslept("a", "sleep exited with 2"), run("stop a")),
        at(4.0, failed("stop a", "exited with 3"), run("alive a")),
        at(
            5.0,
            failed("alive a", "exited with 4"),
            faults("a", "stop exited with 3"),
            fails("wake exited with 1", 4.0),
        ),
    )


def test_three_failed_cleanups_over_a_minute_with_a_dead_engine_count_as_asleep() -> None:
    play = given(models("a", "b"), holders=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), drained(), run("sleep a")),
        at(1.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            1.0,
            failed("alive a"),
            faults("a", "sleep exited with 1"),
            fails("a: sleep exited with 1", 0.0),
            refused(1, "b", "sleep_failed", "model 'b' cannot be woken: a: sleep exited with 1", 1.0),
        ),
        at(20.0, asks(2, "b"), queued(2, "b"), begins("b", "a"), drained(), run("sleep a")),
        at(20.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            20.0,
            failed("alive a"),
            faults("a", "sleep exited with 1", 2, 2.0),
            fails("a: sleep exited with 1", 0.0),
            refused(2, "b", "sleep_failed", "model 'b' cannot be woken: a: sleep exited with 1", 2.0),
        ),
        # The third try is not yet a minute after the first.
        at(60.0, asks(3, "b"), queued(3, "b"), begins("b", "a"), drained(), run("sleep a")),
        at(60.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            60.9,
            failed("alive a"),
            faults("a", "sleep exited with 1", 3, 4.0),
            fails("a: sleep exited with 1", 0.8999999999999986),
            refused(
                3,
                "b",
                "sleep_failed",
                "model 'b' cannot be woken: a: sleep exited with 1",
                4.000000000000007,
                0.8999999999999986,
            ),
        ),
        at(70.0, asks(4, "b"), queued(4, "b"), begins("b", "a"), drained(), run("sleep a")),
        at(70.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(70.0, failed("alive a"), fx.ModelAssumedAsleep("a", 4, "sleep exited with 1"), holders(), wakes("b")),
        at(71.0, ok("wake b"), awake("b", 1.0), ends(1.0, 0.0, 1.0), admitted(4, "b", 1.0)),
    )


def test_fault_of_an_engine_that_was_seen_running_after_a_cleanup_is_an_ordinary_one() -> None:
    play = given(models("a", "b"), holders=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), drained(), run("sleep a")),
        at(1.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            1.0,
            failed("alive a"),
            faults("a", "sleep exited with 1"),
            fails("a: sleep exited with 1", 0.0),
            refused(1, "b", "sleep_failed", "model 'b' cannot be woken: a: sleep exited with 1", 1.0),
        ),
        at(40.0, asks(2, "b"), queued(2, "b"), begins("b", "a"), drained(), run("sleep a")),
        at(40.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            40.0,
            ok("alive a"),
            again("a"),
            backs_off("sleep a", "sleep exited with 1", 2, 2.0),
            fails("a: sleep exited with 1", 0.0),
            refused(2, "b", "sleep_failed", "model 'b' cannot be woken: a: sleep exited with 1", 2.0),
        ),
        at(90.0, asks(3, "b"), queued(3, "b"), begins("b", "a"), leaves("a", 50.0)),
        at(91.0, failed("sleep a", "exited with 1"), unslept("a", "sleep exited with 1"), run("alive a")),
        at(
            92.0,
            failed("alive a"),
            faults("a", "sleep exited with 1", 3, 4.0),
            fails("a: sleep exited with 1", 2.0),
            refused(3, "b", "sleep_failed", "model 'b' cannot be woken: a: sleep exited with 1", 4.0, 2.0),
        ),
    )
    assert not play.core.state.models["a"].cleanup.again


def test_an_engine_that_was_seen_running_again_needs_three_failed_cleanups_anew() -> None:
    play = given(models("a", "b"), holders=["a"])
    hook, request = 3, 1
    for time, alive in [(1.0, False), (30.0, False), (60.0, True), (100.0, False), (120.0, False), (170.0, False)]:
        if time == 100.0:
            play.feed(99.0, ev.EngineLost("a", refused=True))
            play.feed(99.0, ev.HookFinished(hook, ok=False))
            hook += 1
        assert "a" in play.core.state.recorded
        play.feed(time, ev.RequestArrived(request, "b"))
        play.feed(time, ev.HookFinished(hook, ok=False))
        play.feed(time, ev.HookFinished(hook + 1, ok=alive))
        hook, request = hook + 2, request + 1
    assert play.core.state.recorded == {"b"}
