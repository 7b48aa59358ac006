"""Commands: wake, sleep, reset, pin, lease. Each is answered exactly once."""

from __future__ import annotations

from playbook import Oldest, Playbook, at, given, models

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind, Rules


def test_commands_before_the_start_is_over_and_for_strangers_are_refused() -> None:
    play = Playbook(Core(models("a"), Rules(), Oldest()))
    play(
        at(0.0, ev.Started(), fx.RunHook(1, "a", HookKind.ALIVE, None)),
        at(0.1, ev.ActivationRequested("a", 1), fx.Answer(1, False, reason="llmux is still looking at what runs")),
        at(0.2, ev.HookFinished(1, ok=False), fx.Ready(())),
        at(0.3, ev.ActivationRequested("b", 2), fx.Answer(2, False, reason="model 'b' not found")),
        at(0.4, ev.SleepRequested("b", 3), fx.Answer(3, False, reason="model 'b' not found")),
        at(0.5, ev.ResetRequested("b", 4), fx.Answer(4, False, reason="model 'b' not found")),
        at(0.6, ev.PinChanged("b", 5), fx.Answer(5, False, reason="model 'b' not found")),
    )


def test_wake_needs_no_waiter() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(
            1.0,
            ev.ActivationRequested("b", 1),
            fx.SwitchStarted(1, ("a",), "b", "requested"),
            fx.SwitchDrained(1, ("a",), "b", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
            fx.Answer(1, True, switch=1),
        ),
        at(1.1, ev.ActivationRequested("b", 2), fx.Answer(2, True, switch=1)),
        at(
            1.2,
            ev.ActivationRequested("a", 3),
            fx.Answer(3, False, switch=1, reason="switch 1 to 'b' is under way"),
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
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("b", 1, ("a",), 2.0),
            fx.SwitchEnded(1, ("a",), "b", "success", 2.0, 0.0, 2.0, 2.0),
        ),
        at(4.0, ev.ActivationRequested("b", 4), fx.Answer(4, True)),
    )


def test_wake_of_the_target_keeps_a_switch_that_has_lost_its_waiters() -> None:
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
        at(3.0, ev.ActivationRequested("b", 1), fx.Answer(1, True, switch=1)),
        at(4.0, ev.RequestAbandoned(2)),
        at(
            5.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), "b", 3.0),
            fx.ModelDeactivated("a", 5.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
    )


def test_wake_of_a_target_that_has_failed_is_refused() -> None:
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
            ev.ActivationRequested("a", 1),
            fx.Answer(1, False, switch=1, reason="switch 1 to 'a' is under way"),
        ),
    )


def test_wake_is_not_held_by_the_backoff_of_its_model_but_by_a_pin() -> None:
    play = given(models("a", "b"))
    play(
        at(
            1.0,
            ev.ActivationRequested("a", 1),
            fx.SwitchStarted(1, (), "a", "requested"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(3, "a", HookKind.WAKE, None, switch=1, target="a"),
            fx.Answer(1, True, switch=1),
        ),
        at(
            2.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "exited with 1"),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        at(
            2.1,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 1.1, 0.0, None, None),
        ),
        at(
            2.2,
            ev.ActivationRequested("a", 2),
            fx.SwitchStarted(2, (), "a", "requested"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(5, "a", HookKind.WAKE, None, switch=2, target="a"),
            fx.Answer(2, True, switch=2),
        ),
        at(
            3.0,
            ev.HookFinished(5, ok=True),
            fx.ModelActivated("a", 2, (), 0.7999999999999998),
            fx.SwitchEnded(2, (), "a", "success", 0.7999999999999998, 0.0, 0.7999999999999998, 0.7999999999999998),
        ),
        at(4.0, ev.PinChanged("a", 3), fx.PinSet("a", True, None), fx.Answer(3, True)),
        at(5.0, ev.ActivationRequested("b", 4), fx.Answer(4, False, reason="model 'a' is pinned")),
    )


def test_sleep_that_is_asked_for() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("b", 1), fx.Answer(1, True)),
        at(
            2.0,
            ev.SleepRequested("a", 2),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 2.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(2, True, switch=1),
        ),
        at(2.1, ev.SleepRequested("a", 3), fx.Answer(3, True, switch=1)),
        at(2.2, ev.SleepRequested("b", 4), fx.Answer(4, False, switch=1, reason="switch 1 to sleep is under way")),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 1.0, 0.0, 1.0, None),
        ),
    )


def test_reset_forgets_a_fault() -> None:
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
        at(2.0, ev.ResetRequested("a", 2), fx.Answer(2, False, switch=1, reason="switch 1 to sleep is under way")),
        at(
            2.0,
            ev.HookFinished(3, ok=False),
            fx.SleepHookFailed("a", None, "sleep failed"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(4, ok=False),
            fx.ModelFaulted("a", "sleep failed"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(1, ("a",), None, "a: sleep failed"),
            fx.SwitchEnded(1, ("a",), None, "failure", 2.0, 0.0, None, None),
        ),
        at(3.1, ev.ResetRequested("a", 3), fx.RecordHolders(frozenset()), fx.ModelReset("a"), fx.Answer(3, True)),
        at(
            3.2,
            ev.RequestArrived(1, "b"),
            fx.RequestQueued(1, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(2, (), "b", "policy"),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(5, "b", HookKind.WAKE, None, switch=2, target="b"),
        ),
    )


def test_reset_waits_for_the_answers_of_a_lost_engine() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.EngineLost("a", refused=True), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(
            3.0,
            ev.HookFinished(2, ok=False),
            fx.ModelDeactivated("a", 3.0),
            fx.ModelLost("a", "a connection failed, and alive failed"),
        ),
        at(4.0, ev.ResetRequested("a", 1), fx.Answer(1, False, reason="1 requests of 'a' have not ended yet")),
        at(5.0, ev.RequestFinished(1)),
        at(6.0, ev.ResetRequested("a", 2), fx.RecordHolders(frozenset()), fx.ModelReset("a"), fx.Answer(2, True)),
    )


def test_reset_of_an_awake_model_clears_the_backoff_of_its_sleep() -> None:
    play = given(models("a"), awake=["a"])
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
        at(3.1, ev.ResetRequested("a", 2), fx.ModelReset("a"), fx.Answer(2, True)),
    )
    assert not play.core.state.models["a"].sleep_backoff.active(3.2)
