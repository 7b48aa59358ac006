"""Switches that fail: at the wake, at the sleep, of one, of all."""

from __future__ import annotations

from playbook import at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_one_waiter_of_two_leaves_and_the_switch_goes_on() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
        ),
        at(2.0, ev.RequestArrived(3, "b"), fx.RequestQueued(3, "b", 2)),
        at(3.0, ev.RequestAbandoned(2)),
        at(
            4.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), "b", 2.0),
            fx.ModelDeactivated("a", 4.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
    )


def test_failed_wake_is_cleaned_up_after_and_its_waiters_are_turned_away() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(
            1.0,
            ev.RequestArrived(1, "b"),
            fx.RequestQueued(1, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.SwitchDrained(1, ("a",), "b", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            2.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(4, "b", HookKind.WAKE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            3.0,
            ev.HookFinished(4, ok=False, detail="exited with 1"),
            fx.BackoffStarted("b", HookKind.WAKE, 1, 1.0, "exited with 1"),
            fx.Reject(1, "b", fx.Refusal.WAKE_FAILED, "model 'b' failed to wake: exited with 1", 1.0, 2.0),
            fx.RunHook(5, "b", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            3.1,
            ev.RequestArrived(2, "b"),
            fx.Reject(
                2, "b", fx.Refusal.BACKING_OFF, "model 'b' failed to wake: exited with 1", 0.8999999999999999, 0.0
            ),
        ),
        at(3.2, ev.RequestArrived(3, "a"), fx.RequestQueued(3, "a", 1)),
        at(
            4.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchFailed(1, ("a",), "b", "wake exited with 1"),
            fx.SwitchEnded(1, ("a",), "b", "failure", 3.0, 0.0, None, None),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(2, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(6, "a", HookKind.WAKE, None, switch=2, target="a"),
        ),
        # a goes on being served while b is left alone.
        at(
            5.0,
            ev.HookFinished(6, ok=True),
            fx.ModelActivated("a", 2, (), 1.0),
            fx.SwitchEnded(2, (), "a", "success", 1.0, 0.0, 1.0, 1.0),
            fx.Admit(3, "a", None, 2, False, 1.7999999999999998),
        ),
        at(6.0, ev.DeadlineReached()),
        at(
            6.0,
            ev.RequestArrived(4, "b"),
            fx.RequestQueued(4, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(3, ("a",), "b", "policy"),
        ),
    )


def test_failed_wake_whose_cleanup_fails_too_but_which_answers_is_served() -> None:
    play = given(models("a"))
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
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 2"),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 3.0, 0.0, None, None),
        ),
        at(5.0, ev.RequestArrived(2, "a"), fx.Admit(2, "a", None, 1, False, 0.0)),
    )


def test_wake_hook_past_its_timeout_is_ended() -> None:
    play = given(models("a", timeouts={HookKind.WAKE: 30.0}))
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
        at(31.0, ev.DeadlineReached(), fx.KillHook(2, "timeout")),
        at(
            32.0,
            ev.HookFinished(2, ok=False, detail="ran past its timeout"),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "ran past its timeout"),
            fx.Reject(1, "a", fx.Refusal.WAKE_FAILED, "model 'a' failed to wake: ran past its timeout", 1.0, 31.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
    )


def test_failed_wake_of_a_lost_model_with_answers_still_running_is_cleaned_up_when_they_have_ended() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.RequestArrived(2, "a"), fx.Admit(2, "a", None, 1, False, 0.0)),
        at(3.0, ev.RequestReturned(2), fx.RunHook(2, "a", HookKind.ALIVE, None), fx.RequestQueued(2, "a", 1)),
        at(
            4.0,
            ev.HookFinished(2, ok=False, detail="exited with 1"),
            fx.ModelDeactivated("a", 4.0),
            fx.ModelLost("a", "a connection failed, and alive exited with 1"),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RunHook(3, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(
            5.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "exited with 1"),
            fx.Reject(2, "a", fx.Refusal.WAKE_FAILED, "model 'a' failed to wake: exited with 1", 1.0, 3.0),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 1.0, 0.0, None, None),
        ),
        at(6.0, ev.DeadlineReached()),
        at(
            7.0,
            ev.RequestFinished(1),
            fx.SwitchStarted(2, ("a",), None, "not wanted"),
            fx.SwitchDrained(2, ("a",), None, 0.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=2, sources=("a",)),
        ),
        at(
            8.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(2, ("a",), None, "success", 1.0, 0.0, 1.0, None),
        ),
    )


def test_of_two_that_leave_one_fails_and_is_served_while_the_other_still_sleeps() -> None:
    play = given([*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8)
    play(
        at(
            1.0,
            ev.RequestArrived(1, "c"),
            fx.RequestQueued(1, "c", 1),
            fx.PolicyDecided("switch", "c", ""),
            fx.SwitchStarted(1, ("a", "b"), "c", "policy"),
            fx.SwitchDrained(1, ("a", "b"), "c", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
            fx.ModelDeactivated("b", 1.0),
            fx.RunHook(5, "b", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(1.5, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 1)),
        at(
            2.0,
            ev.HookFinished(4, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "c", "sleep exited with 1"),
            fx.RunHook(6, "a", HookKind.ALIVE, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(
            3.0,
            ev.HookFinished(6, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
            fx.Admit(2, "a", None, 1, False, 1.5),
        ),
        at(4.0, ev.RequestArrived(3, "a"), fx.Admit(3, "a", None, 1, False, 0.0)),
        at(
            5.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset({"a"})),
            fx.SwitchFailed(1, ("a", "b"), "c", "a: sleep exited with 1"),
            fx.SwitchEnded(1, ("a", "b"), "c", "failure", 4.0, 0.0, None, None),
            fx.Reject(
                1, "c", fx.Refusal.SLEEP_FAILED, "model 'c' cannot be woken: a: sleep exited with 1", 0.0, 4.0
            ),
        ),
        # In the backoff nobody waits for what needs a's room; b fits beside it.
        at(
            5.1,
            ev.RequestArrived(4, "c"),
            fx.RequestQueued(4, "c", 1),
            fx.PolicyDecided("switch", "c", ""),
            fx.SwitchStarted(2, ("a",), "c", "policy"),
        ),
        at(5.2, ev.RequestArrived(5, "b"), fx.RequestQueued(5, "b", 1)),
    )


def test_of_two_that_leave_the_last_fails_and_both_are_served_again() -> None:
    play = given([*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8)
    play(
        at(
            1.0,
            ev.RequestArrived(1, "c"),
            fx.RequestQueued(1, "c", 1),
            fx.PolicyDecided("switch", "c", ""),
            fx.SwitchStarted(1, ("a", "b"), "c", "policy"),
            fx.SwitchDrained(1, ("a", "b"), "c", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
            fx.ModelDeactivated("b", 1.0),
            fx.RunHook(5, "b", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(1.5, ev.RequestArrived(2, "b"), fx.RequestQueued(2, "b", 1)),
        at(2.0, ev.HookFinished(4, ok=True), fx.RecordHolders(frozenset({"b"}))),
        at(
            3.0,
            ev.HookFinished(5, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("b", "c", "sleep exited with 1"),
            fx.RunHook(6, "b", HookKind.ALIVE, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(
            4.0,
            ev.HookFinished(6, ok=True),
            fx.ModelActivated("b", 1, (), None),
            fx.BackoffStarted("b", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
            fx.SwitchFailed(1, ("a", "b"), "c", "b: sleep exited with 1"),
            fx.SwitchEnded(1, ("a", "b"), "c", "failure", 3.0, 0.0, None, None),
            fx.Reject(
                1, "c", fx.Refusal.SLEEP_FAILED, "model 'c' cannot be woken: b: sleep exited with 1", 1.0, 3.0
            ),
            fx.Admit(2, "b", None, 1, False, 2.5),
        ),
    )


def test_of_two_that_leave_one_is_faulted_and_the_other_asleep() -> None:
    play = given([*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8)
    play(
        at(
            1.0,
            ev.RequestArrived(1, "c"),
            fx.RequestQueued(1, "c", 1),
            fx.PolicyDecided("switch", "c", ""),
            fx.SwitchStarted(1, ("a", "b"), "c", "policy"),
            fx.SwitchDrained(1, ("a", "b"), "c", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
            fx.ModelDeactivated("b", 1.0),
            fx.RunHook(5, "b", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(
            2.0,
            ev.HookFinished(4, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "c", "sleep exited with 1"),
            fx.RunHook(6, "a", HookKind.ALIVE, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(2.0, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 1)),
        at(
            3.0,
            ev.HookFinished(6, ok=False, detail="exited with 1"),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
        ),
        at(
            3.5,
            ev.RequestArrived(3, "a"),
            fx.Reject(
                3, "a", fx.Refusal.FAULTED, "model 'a' could not be put to sleep: sleep exited with 1", 0.5, 0.0
            ),
        ),
        at(
            4.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset({"a"})),
            fx.SwitchFailed(1, ("a", "b"), "c", "a: sleep exited with 1"),
            fx.SwitchEnded(1, ("a", "b"), "c", "failure", 3.0, 0.0, None, None),
            fx.Reject(
                1, "c", fx.Refusal.SLEEP_FAILED, "model 'c' cannot be woken: a: sleep exited with 1", 0.0, 3.0
            ),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(2, (), "a", "policy"),
            fx.SwitchDrained(2, (), "a", 0.0),
            fx.RunHook(7, "a", HookKind.SLEEP, None, switch=2, target="a"),
        ),
    )
