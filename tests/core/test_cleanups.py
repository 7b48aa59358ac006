"""Cleanups: an engine is gone, or never came, and its sleep hook may not know that."""

from __future__ import annotations

from playbook import at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_failed_cleanup_is_decided_by_verify() -> None:
    play = given(models("a", verify=True))
    play(
        at(
            1.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False, detail="exited with 1"),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "exited with 1"),
            fx.Reject(1, "a", fx.Refusal.WAKE_FAILED, "model 'a' failed to wake: exited with 1", 1.0, 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=False, detail="exited with 2"),
            fx.SleepHookFailed("a", "a", "sleep exited with 2"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, target="a"),
        ),
        at(
            4.0,
            ev.HookFinished(4, ok=False, detail="exited with 3"),
            fx.RunHook(5, "a", HookKind.VERIFY, None, switch=1, target="a"),
        ),
        at(
            5.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 4.0, 0.0, None, None),
        ),
    )


def test_failed_cleanup_whose_verify_never_passes_is_a_fault() -> None:
    play = given(models("a", verify=True, timeouts={HookKind.VERIFY: 0.5}))
    play(
        at(
            1.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False, detail="exited with 1"),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "exited with 1"),
            fx.Reject(1, "a", fx.Refusal.WAKE_FAILED, "model 'a' failed to wake: exited with 1", 1.0, 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=False, detail="exited with 2"),
            fx.SleepHookFailed("a", "a", "sleep exited with 2"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, target="a"),
        ),
        at(
            4.0,
            ev.HookFinished(4, ok=False, detail="exited with 3"),
            fx.RunHook(5, "a", HookKind.VERIFY, None, switch=1, target="a"),
        ),
        at(
            5.0,
            ev.HookFinished(5, ok=False, detail="exited with 4"),
            fx.RunHook(6, "a", HookKind.ALIVE, None, switch=1, target="a"),
        ),
        at(
            6.0,
            ev.HookFinished(6, ok=False, detail="exited with 3"),
            fx.ModelFaulted("a", "verify exited with 4"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "verify exited with 4"),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 5.0, 0.0, None, None),
        ),
    )


def test_cleanup_whose_sleep_and_stop_fail_is_a_fault() -> None:
    play = given(models("a", stop=True))
    play(
        at(
            1.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False, detail="exited with 1"),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "exited with 1"),
            fx.Reject(1, "a", fx.Refusal.WAKE_FAILED, "model 'a' failed to wake: exited with 1", 1.0, 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=False, detail="exited with 2"),
            fx.SleepHookFailed("a", "a", "sleep exited with 2"),
            fx.RunHook(4, "a", HookKind.STOP, None, switch=1, target="a"),
        ),
        at(
            4.0,
            ev.HookFinished(4, ok=False, detail="exited with 3"),
            fx.RunHook(5, "a", HookKind.ALIVE, None, switch=1, target="a"),
        ),
        at(
            5.0,
            ev.HookFinished(5, ok=False, detail="exited with 4"),
            fx.ModelFaulted("a", "stop exited with 3"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "stop exited with 3"),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 4.0, 0.0, None, None),
        ),
    )


def test_three_failed_cleanups_over_a_minute_with_a_dead_engine_count_as_asleep() -> None:
    play = given(models("a", "b"), holders=["a"])
    play(
        at(
            1.0,
            ev.RequestArrived(1, "b"),
            fx.RequestQueued(1, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.SwitchDrained(1, ("a",), "b", 0.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            1.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            1.0,
            ev.HookFinished(4, ok=False),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
            fx.SwitchFailed(1, ("a",), "b", "a: sleep exited with 1"),
            fx.SwitchEnded(1, ("a",), "b", "failure", 0.0, 0.0, None, None),
            fx.Reject(
                1, "b", fx.Refusal.SLEEP_FAILED, "model 'b' cannot be woken: a: sleep exited with 1", 1.0, 0.0
            ),
        ),
        at(
            20.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(2, ("a",), "b", "policy"),
            fx.SwitchDrained(2, ("a",), "b", 0.0),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=2, sources=("a",), target="b"),
        ),
        at(
            20.0,
            ev.HookFinished(5, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(6, "a", HookKind.ALIVE, None, switch=2, sources=("a",), target="b"),
        ),
        at(
            20.0,
            ev.HookFinished(6, ok=False),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 2, 2.0, "sleep exited with 1"),
            fx.SwitchFailed(2, ("a",), "b", "a: sleep exited with 1"),
            fx.SwitchEnded(2, ("a",), "b", "failure", 0.0, 0.0, None, None),
            fx.Reject(
                2, "b", fx.Refusal.SLEEP_FAILED, "model 'b' cannot be woken: a: sleep exited with 1", 2.0, 0.0
            ),
        ),
        # The third try is not yet a minute after the first.
        at(
            60.0,
            ev.RequestArrived(3, "b"),
            fx.RequestQueued(3, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(3, ("a",), "b", "policy"),
            fx.SwitchDrained(3, ("a",), "b", 0.0),
            fx.RunHook(7, "a", HookKind.SLEEP, None, switch=3, sources=("a",), target="b"),
        ),
        at(
            60.0,
            ev.HookFinished(7, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(8, "a", HookKind.ALIVE, None, switch=3, sources=("a",), target="b"),
        ),
        at(
            60.9,
            ev.HookFinished(8, ok=False),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 3, 4.0, "sleep exited with 1"),
            fx.SwitchFailed(3, ("a",), "b", "a: sleep exited with 1"),
            fx.SwitchEnded(3, ("a",), "b", "failure", 0.8999999999999986, 0.0, None, None),
            fx.Reject(
                3,
                "b",
                fx.Refusal.SLEEP_FAILED,
                "model 'b' cannot be woken: a: sleep exited with 1",
                4.000000000000007,
                0.8999999999999986,
            ),
        ),
        at(
            70.0,
            ev.RequestArrived(4, "b"),
            fx.RequestQueued(4, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(4, ("a",), "b", "policy"),
            fx.SwitchDrained(4, ("a",), "b", 0.0),
            fx.RunHook(9, "a", HookKind.SLEEP, None, switch=4, sources=("a",), target="b"),
        ),
        at(
            70.0,
            ev.HookFinished(9, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(10, "a", HookKind.ALIVE, None, switch=4, sources=("a",), target="b"),
        ),
        at(
            70.0,
            ev.HookFinished(10, ok=False),
            fx.ModelAssumedAsleep("a", 4, "sleep exited with 1"),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(11, "b", HookKind.WAKE, None, switch=4, sources=("a",), target="b"),
        ),
        at(
            71.0,
            ev.HookFinished(11, ok=True),
            fx.ModelActivated("b", 4, ("a",), 1.0),
            fx.SwitchEnded(4, ("a",), "b", "success", 1.0, 0.0, 1.0, None),
            fx.Admit(4, "b", None, 1, False, 1.0),
        ),
    )


def test_fault_of_an_engine_that_was_seen_running_after_a_cleanup_is_an_ordinary_one() -> None:
    play = given(models("a", "b"), holders=["a"])
    play(
        at(
            1.0,
            ev.RequestArrived(1, "b"),
            fx.RequestQueued(1, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.SwitchDrained(1, ("a",), "b", 0.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            1.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            1.0,
            ev.HookFinished(4, ok=False),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
            fx.SwitchFailed(1, ("a",), "b", "a: sleep exited with 1"),
            fx.SwitchEnded(1, ("a",), "b", "failure", 0.0, 0.0, None, None),
            fx.Reject(
                1, "b", fx.Refusal.SLEEP_FAILED, "model 'b' cannot be woken: a: sleep exited with 1", 1.0, 0.0
            ),
        ),
        at(
            40.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(2, ("a",), "b", "policy"),
            fx.SwitchDrained(2, ("a",), "b", 0.0),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=2, sources=("a",), target="b"),
        ),
        at(
            40.0,
            ev.HookFinished(5, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(6, "a", HookKind.ALIVE, None, switch=2, sources=("a",), target="b"),
        ),
        at(
            40.0,
            ev.HookFinished(6, ok=True),
            fx.ModelActivated("a", 2, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 2, 2.0, "sleep exited with 1"),
            fx.SwitchFailed(2, ("a",), "b", "a: sleep exited with 1"),
            fx.SwitchEnded(2, ("a",), "b", "failure", 0.0, 0.0, None, None),
            fx.Reject(
                2, "b", fx.Refusal.SLEEP_FAILED, "model 'b' cannot be woken: a: sleep exited with 1", 2.0, 0.0
            ),
        ),
        at(
            90.0,
            ev.RequestArrived(3, "b"),
            fx.RequestQueued(3, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(3, ("a",), "b", "policy"),
            fx.SwitchDrained(3, ("a",), "b", 0.0),
            fx.ModelDeactivated("a", 50.0),
            fx.RunHook(7, "a", HookKind.SLEEP, None, switch=3, sources=("a",), target="b"),
        ),
        at(
            91.0,
            ev.HookFinished(7, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(8, "a", HookKind.ALIVE, None, switch=3, sources=("a",), target="b"),
        ),
        at(
            92.0,
            ev.HookFinished(8, ok=False),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 3, 4.0, "sleep exited with 1"),
            fx.SwitchFailed(3, ("a",), "b", "a: sleep exited with 1"),
            fx.SwitchEnded(3, ("a",), "b", "failure", 2.0, 0.0, None, None),
            fx.Reject(
                3, "b", fx.Refusal.SLEEP_FAILED, "model 'b' cannot be woken: a: sleep exited with 1", 4.0, 2.0
            ),
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
