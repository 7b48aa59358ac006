"""Lost engines: who is woken, who is cleaned up after, and when."""

from __future__ import annotations

from playbook import at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_lost_engine_is_cleaned_up_before_a_conflicting_model_wakes_and_after_its_last_answer() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.EngineLost("a", refused=True), fx.RunHook(3, "a", HookKind.ALIVE, None)),
        at(
            3.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.ModelDeactivated("a", 3.0),
            fx.ModelLost("a", "a connection failed, and alive exited with 1"),
        ),
        at(
            4.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
        ),
        at(
            5.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), "b", 1.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            6.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(5, "b", HookKind.WAKE, None, switch=1, sources=("a",), target="b"),
        ),
    )


def test_engine_that_never_answered_after_its_wake_counts_as_a_failed_wake() -> None:
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
        at(1.1, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 2)),
        at(
            2.0,
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("a", 1, (), 1.0),
            fx.SwitchEnded(1, (), "a", "success", 1.0, 0.0, 1.0, 1.0),
            fx.Admit(1, "a", None, 1, False, 1.0),
            fx.Admit(2, "a", None, 1, False, 0.8999999999999999),
        ),
        at(
            2.1,
            ev.RequestReturned(1, connected=False),
            fx.ModelDeactivated("a", 0.10000000000000009),
            fx.ModelLost("a", "its wake hook succeeded, but the engine refuses connections"),
            fx.BackoffStarted(
                "a", HookKind.WAKE, 1, 1.0, "its wake hook succeeded, but the engine refuses connections"
            ),
            fx.Reject(
                1,
                "a",
                fx.Refusal.BACKING_OFF,
                "model 'a' failed to wake: its wake hook succeeded, but the engine refuses connections",
                1.0,
                1.1,
            ),
        ),
        at(
            2.2,
            ev.RequestReturned(2, connected=False),
            fx.Reject(
                2,
                "a",
                fx.Refusal.BACKING_OFF,
                "model 'a' failed to wake: its wake hook succeeded, but the engine refuses connections",
                0.8999999999999999,
                1.1,
            ),
            fx.SwitchStarted(2, ("a",), None, "not wanted"),
            fx.SwitchDrained(2, ("a",), None, 0.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=2, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(2, ("a",), None, "success", 0.7999999999999998, 0.0, 0.7999999999999998, None),
        ),
        # The second time its backoff is twice as long, although its wake hook succeeded in between.
        at(
            4.0,
            ev.RequestArrived(3, "a"),
            fx.RequestQueued(3, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(3, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(4, "a", HookKind.WAKE, None, switch=3, target="a"),
        ),
        at(
            5.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("a", 3, (), 1.0),
            fx.SwitchEnded(3, (), "a", "success", 1.0, 0.0, 1.0, 1.0),
            fx.Admit(3, "a", None, 2, False, 1.0),
        ),
        at(
            5.1,
            ev.RequestReturned(3, connected=False),
            fx.ModelDeactivated("a", 0.09999999999999964),
            fx.ModelLost("a", "its wake hook succeeded, but the engine refuses connections"),
            fx.BackoffStarted(
                "a", HookKind.WAKE, 2, 2.0, "its wake hook succeeded, but the engine refuses connections"
            ),
            fx.Reject(
                3,
                "a",
                fx.Refusal.BACKING_OFF,
                "model 'a' failed to wake: its wake hook succeeded, but the engine refuses connections",
                2.0,
                1.0999999999999996,
            ),
            fx.SwitchStarted(4, ("a",), None, "not wanted"),
            fx.SwitchDrained(4, ("a",), None, 0.0),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=4, sources=("a",)),
        ),
        at(
            6.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(4, ("a",), None, "success", 0.9000000000000004, 0.0, 0.9000000000000004, None),
        ),
    )


def test_engine_that_never_answered_but_whose_cleanup_fails_and_which_is_alive_is_served() -> None:
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
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("a", 1, (), 1.0),
            fx.SwitchEnded(1, (), "a", "success", 1.0, 0.0, 1.0, 1.0),
            fx.Admit(1, "a", None, 1, False, 1.0),
        ),
        at(
            2.1,
            ev.RequestReturned(1, connected=False),
            fx.ModelDeactivated("a", 0.10000000000000009),
            fx.ModelLost("a", "its wake hook succeeded, but the engine refuses connections"),
            fx.BackoffStarted(
                "a", HookKind.WAKE, 1, 1.0, "its wake hook succeeded, but the engine refuses connections"
            ),
            fx.Reject(
                1,
                "a",
                fx.Refusal.BACKING_OFF,
                "model 'a' failed to wake: its wake hook succeeded, but the engine refuses connections",
                1.0,
                1.1,
            ),
            fx.SwitchStarted(2, ("a",), None, "not wanted"),
            fx.SwitchDrained(2, ("a",), None, 0.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=2, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", None, "sleep exited with 1"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=2, sources=("a",)),
        ),
        at(
            4.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("a", 2, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
            fx.SwitchFailed(2, ("a",), None, "a: sleep exited with 1"),
            fx.SwitchEnded(2, ("a",), None, "failure", 1.9, 0.0, None, None),
        ),
        # Nobody asks for its cleanup any more when the backoff is over.
        at(5.0, ev.DeadlineReached()),
    )


def test_engine_that_answered_once_is_suspected_like_any_other() -> None:
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
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("a", 1, (), 1.0),
            fx.SwitchEnded(1, (), "a", "success", 1.0, 0.0, 1.0, 1.0),
            fx.Admit(1, "a", None, 1, False, 1.0),
        ),
        at(
            3.0,
            ev.RequestReturned(1, connected=True),
            fx.RunHook(3, "a", HookKind.ALIVE, None),
            fx.RequestQueued(1, "a", 1),
        ),
    )


def test_pinned_engine_that_is_lost_is_woken_without_anybody_waiting() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.PinChanged("a", 1), fx.PinSet("a", True, None), fx.Answer(1, True)),
        at(2.0, ev.EngineLost("a", refused=True), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(
            3.0,
            ev.HookFinished(2, ok=False),
            fx.ModelDeactivated("a", 3.0),
            fx.ModelLost("a", "a connection failed, and alive failed"),
            fx.SwitchStarted(1, (), "a", "pinned"),
            fx.RunHook(3, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
    )


def test_lost_engine_is_woken_by_its_own_request_whatever_its_sleep_has_come_to() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(
            1.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(1, True, switch=1),
        ),
        at(
            2.0,
            ev.HookFinished(3, ok=False),
            fx.SleepHookFailed("a", None, "sleep failed"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(1, ("a",), None, "a: sleep failed"),
            fx.SwitchEnded(1, ("a",), None, "failure", 2.0, 0.0, None, None),
        ),
        at(3.1, ev.EngineLost("a", refused=True), fx.RunHook(5, "a", HookKind.ALIVE, None)),
        at(
            3.2,
            ev.HookFinished(5, ok=False),
            fx.ModelDeactivated("a", 0.20000000000000018),
            fx.ModelLost("a", "a connection failed, and alive failed"),
        ),
        at(
            3.3,
            ev.RequestArrived(1, "b"),
            fx.Reject(
                1,
                "b",
                fx.Refusal.SLEEP_FAILED,
                "model 'a' could not be put to sleep: a connection failed, and alive failed",
                0.7000000000000002,
                0.0,
            ),
        ),
        at(
            3.4,
            ev.RequestArrived(2, "a"),
            fx.RequestQueued(2, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(2, (), "a", "policy"),
            fx.RunHook(6, "a", HookKind.WAKE, None, switch=2, target="a"),
        ),
    )
