"""Stopping with ``on_exit: sleep``."""

from __future__ import annotations

from playbook import at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_sleep_on_exit_sleeps_what_is_awake_once_it_has_drained() -> None:
    play = given(models("a", "b", memory=4), awake=["a", "b"], capacity=8, sleep_on_exit=True, drain_timeout=0.0)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        # The grace is the only limit of what runs, whatever the drain's is.
        at(2.0, ev.ShutdownRequested(), fx.SwitchStarted(1, ("a", "b"), None, "stopping")),
        at(
            3.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a", "b"), None, 1.0),
            fx.ModelDeactivated("a", 3.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a", "b")),
            fx.ModelDeactivated("b", 3.0),
            fx.RunHook(4, "b", HookKind.SLEEP, None, switch=1, sources=("a", "b")),
        ),
        at(4.0, ev.HookFinished(3, ok=True), fx.RecordHolders(frozenset({"b"}))),
        at(
            5.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a", "b"), None, "success", 3.0, 1.0, 2.0, None),
            fx.Stopped(),
        ),
    )


def test_sleep_on_exit_after_a_verify_that_was_ended_sleeps_the_others() -> None:
    specs = [*models("a", memory=4, verify=True), *models("b", memory=4)]
    play = given(specs, awake=["a", "b"], capacity=8, sleep_on_exit=True)
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
        at(2.0, ev.HookFinished(3, ok=True), fx.RunHook(4, "a", HookKind.VERIFY, None, switch=1, sources=("a",))),
        at(3.0, ev.ShutdownRequested(), fx.KillHook(4, "stopping")),
        at(
            3.1,
            ev.HookFinished(4, ok=False),
            fx.SwitchEnded(1, ("a",), None, "abandoned", 2.1, 0.0, None, None),
            fx.SwitchStarted(2, ("b",), None, "stopping"),
            fx.SwitchDrained(2, ("b",), None, 0.0),
            fx.ModelDeactivated("b", 3.1),
            fx.RunHook(5, "b", HookKind.SLEEP, None, switch=2, sources=("b",)),
        ),
        at(
            4.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset({"a"})),
            fx.SwitchEnded(2, ("b",), None, "success", 0.8999999999999999, 0.0, 0.8999999999999999, None),
            fx.Stopped(),
        ),
    )


def test_sleep_on_exit_does_not_wait_for_a_suspicion_or_a_backoff() -> None:
    play = given(models("a"), awake=["a"], sleep_on_exit=True)
    play(
        at(
            1.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(1, True, switch=1),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False),
            fx.SleepHookFailed("a", None, "sleep failed"),
            fx.RunHook(3, "a", HookKind.ALIVE, None, switch=1, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(1, ("a",), None, "a: sleep failed"),
            fx.SwitchEnded(1, ("a",), None, "failure", 2.0, 0.0, None, None),
        ),
        at(3.1, ev.EngineLost("a", refused=True), fx.RunHook(4, "a", HookKind.ALIVE, None)),
        at(
            3.2,
            ev.ShutdownRequested(),
            fx.KillHook(4, "stopping"),
            fx.SwitchStarted(2, ("a",), None, "stopping"),
            fx.SwitchDrained(2, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 0.20000000000000018),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=2, sources=("a",)),
        ),
        at(3.3, ev.HookFinished(4, ok=False)),
        at(
            4.0,
            ev.HookFinished(5, ok=False),
            fx.SwitchEnded(2, ("a",), None, "abandoned", 0.7999999999999998, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_sleep_on_exit_that_fails_is_followed_by_stop() -> None:
    play = given(models("a", stop=True), awake=["a"], sleep_on_exit=True)
    play(
        at(
            1.0,
            ev.ShutdownRequested(),
            fx.SwitchStarted(1, ("a",), None, "stopping"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False),
            fx.SleepHookFailed("a", None, "sleep failed"),
            fx.RunHook(3, "a", HookKind.STOP, None, switch=1, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 2.0, 0.0, 2.0, None),
            fx.Stopped(),
        ),
    )


def test_sleep_on_exit_cleans_up_after_a_wake_that_was_ended() -> None:
    play = given(models("a"), sleep_on_exit=True)
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
            ev.ShutdownRequested(),
            fx.Reject(1, "a", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 1.0),
            fx.KillHook(2, "stopping"),
        ),
        at(
            3.0,
            ev.HookFinished(2, ok=False),
            fx.SwitchEnded(1, (), "a", "abandoned", 2.0, 0.0, None, None),
            fx.SwitchStarted(2, ("a",), None, "stopping"),
            fx.SwitchDrained(2, ("a",), None, 0.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=2, sources=("a",)),
        ),
        at(
            4.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(2, ("a",), None, "success", 1.0, 0.0, 1.0, None),
            fx.Stopped(),
        ),
    )


def test_sleep_on_exit_whose_stop_fails_too_leaves_things_as_they_are() -> None:
    play = given(models("a", stop=True), awake=["a"], sleep_on_exit=True)
    play(
        at(
            1.0,
            ev.ShutdownRequested(),
            fx.SwitchStarted(1, ("a",), None, "stopping"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False),
            fx.SleepHookFailed("a", None, "sleep failed"),
            fx.RunHook(3, "a", HookKind.STOP, None, switch=1, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=False),
            fx.SwitchEnded(1, ("a",), None, "abandoned", 2.0, 0.0, None, None),
            fx.Stopped(),
        ),
    )
