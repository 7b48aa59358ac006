"""Pins: a model is kept awake, and the others out."""

from __future__ import annotations

from playbook import at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_pin_excludes_the_others_until_it_is_over() -> None:
    play = given(models("a", "b"), awake=["a"], max_wait=5.0)
    play(
        at(1.0, ev.PinChanged("a", 1, until=30.0), fx.PinSet("a", True, 30.0), fx.Answer(1, True)),
        at(2.0, ev.RequestArrived(1, "b"), fx.Reject(1, "b", fx.Refusal.PINNED, "model 'a' is pinned", 28.0, 0.0)),
        at(3.0, ev.SleepRequested("a", 2), fx.Answer(2, False, reason="model 'a' is pinned")),
        at(
            4.0,
            ev.PinChanged("b", 3),
            fx.Answer(3, False, reason="model 'a' is pinned and may not be awake with it"),
        ),
        at(30.0, ev.DeadlineReached(), fx.RunHook(3, "a", HookKind.ALIVE, None), fx.PinSet("a", False, None)),
        at(
            31.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.SwitchDrained(1, ("a",), "b", 0.0),
            fx.ModelDeactivated("a", 31.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
    )


def test_pin_wakes_its_model_and_keeps_trying() -> None:
    play = given(models("a"), backoff_first=4.0)
    play(
        at(
            1.0,
            ev.PinChanged("a", 1),
            fx.PinSet("a", True, None),
            fx.SwitchStarted(1, (), "a", "pinned"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
            fx.Answer(1, True, switch=1),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False, detail="exited with 1"),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 4.0, "exited with 1"),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        # The wake may be tried at 6 s, the sleep at 7 s.
        at(
            2.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "a", "sleep exited with 1"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, target="a"),
        ),
        at(
            3.0,
            ev.HookFinished(4, ok=False, detail="exited with 1"),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 4.0, "sleep exited with 1"),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 2.0, 0.0, None, None),
        ),
        at(6.0, ev.DeadlineReached()),
        at(
            7.0,
            ev.DeadlineReached(),
            fx.SwitchStarted(2, (), "a", "pinned"),
            fx.SwitchDrained(2, (), "a", 0.0),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=2, target="a"),
        ),
    )


def test_wake_backoff_that_outlasts_the_sleep_backoff_is_waited_for() -> None:
    play = given(models("a"))
    play(
        at(
            1.0,
            ev.PinChanged("a", 1),
            fx.PinSet("a", True, None),
            fx.SwitchStarted(1, (), "a", "pinned"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
            fx.Answer(1, True, switch=1),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False, detail="exited with 1"),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "exited with 1"),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 1.0, 0.0, None, None),
        ),
        at(
            3.0,
            ev.DeadlineReached(),
            fx.SwitchStarted(2, (), "a", "pinned"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(4, "a", HookKind.WAKE, None, switch=2, target="a"),
        ),
        at(
            3.0,
            ev.HookFinished(4, ok=False, detail="exited with 1"),
            fx.BackoffStarted("a", HookKind.WAKE, 2, 2.0, "exited with 1"),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=2, target="a"),
        ),
        # The wake may be tried at 5 s, the sleep at 4 s.
        at(
            3.0,
            ev.HookFinished(5, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "a", "sleep exited with 1"),
            fx.RunHook(6, "a", HookKind.ALIVE, None, switch=2, target="a"),
        ),
        at(
            3.0,
            ev.HookFinished(6, ok=False, detail="exited with 1"),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
            fx.SwitchFailed(2, (), "a", "wake exited with 1"),
            fx.SwitchEnded(2, (), "a", "failure", 0.0, 0.0, None, None),
        ),
        at(4.0, ev.DeadlineReached()),
    )
    assert play.core.next_deadline() == 5.0
    play(
        at(
            5.0,
            ev.DeadlineReached(),
            fx.SwitchStarted(3, (), "a", "pinned"),
            fx.SwitchDrained(3, (), "a", 0.0),
            fx.RunHook(7, "a", HookKind.SLEEP, None, switch=3, target="a"),
        )
    )


def test_pin_of_what_leaves_calls_the_switch_off() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.ActivationRequested("b", 1),
            fx.SwitchStarted(1, ("a",), "b", "requested"),
            fx.Answer(1, True, switch=1),
        ),
        at(
            3.0,
            ev.PinChanged("a", 2),
            fx.PinSet("a", True, None),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 1.0, 1.0, None, None),
            fx.Answer(2, True),
        ),
        at(4.0, ev.RequestArrived(2, "a"), fx.Admit(2, "a", None, 1, False, 0.0)),
    )


def test_pin_of_what_leaves_when_its_sleep_hook_runs_comes_too_late() -> None:
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
            ev.PinChanged("a", 1),
            fx.PinSet("a", True, None),
            fx.Reject(1, "b", fx.Refusal.PINNED, "model 'a' is pinned", 60.0, 1.0),
            fx.Answer(1, True),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 2.0, 0.0, None, None),
            fx.SwitchStarted(2, (), "a", "pinned"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(4, "a", HookKind.WAKE, None, switch=2, target="a"),
        ),
        at(
            4.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("a", 2, (), 1.0),
            fx.SwitchEnded(2, (), "a", "success", 1.0, 0.0, 1.0, 1.0),
        ),
    )


def test_pin_that_ends_during_its_switch_calls_it_off() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.PinChanged("b", 1, until=5.0),
            fx.PinSet("b", True, 5.0),
            fx.SwitchStarted(1, ("a",), "b", "pinned"),
            fx.Answer(1, True, switch=1),
        ),
        at(3.0, ev.RequestArrived(2, "a"), fx.Reject(2, "a", fx.Refusal.PINNED, "model 'b' is pinned", 2.0, 0.0)),
        at(
            5.0,
            ev.DeadlineReached(),
            fx.PinSet("b", False, None),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 3.0, 3.0, None, None),
        ),
    )


def test_pin_that_ends_during_a_switch_with_waiters_changes_nothing() -> None:
    play = given(models("a", "b", "c"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.PinChanged("b", 1),
            fx.PinSet("b", True, None),
            fx.SwitchStarted(1, ("a",), "b", "pinned"),
            fx.Answer(1, True, switch=1),
        ),
        at(2.5, ev.RequestArrived(2, "b"), fx.RequestQueued(2, "b", 1)),
        at(3.0, ev.PinChanged("b", 2, pinned=False), fx.PinSet("b", False, None), fx.Answer(2, True, switch=1)),
        at(4.0, ev.RequestAbandoned(2), fx.SwitchEnded(1, ("a",), "b", "abandoned", 2.0, 2.0, None, None)),
    )


def test_pinned_models_have_to_fit_together() -> None:
    play = given(models("a", "b", "c", memory=4), awake=["a", "b"], capacity=10)
    play(
        at(1.0, ev.PinChanged("a", 1), fx.PinSet("a", True, None), fx.Answer(1, True)),
        at(2.0, ev.PinChanged("b", 2), fx.PinSet("b", True, None), fx.Answer(2, True)),
        at(
            3.0,
            ev.PinChanged("c", 3),
            fx.Answer(3, False, reason="models 'a', 'b' are pinned and may not be awake with it"),
        ),
        at(4.0, ev.RequestArrived(1, "c"), fx.Reject(1, "c", fx.Refusal.PINNED, "model 'a' is pinned", 60.0, 0.0)),
    )


def test_pin_during_a_backoff_wakes_when_it_is_over() -> None:
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
            ev.HookFinished(3, ok=False),
            fx.SleepHookFailed("a", "b", "sleep failed"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            2.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(1, ("a",), "b", "a: sleep failed"),
            fx.SwitchEnded(1, ("a",), "b", "failure", 1.0, 0.0, None, None),
            fx.Reject(1, "b", fx.Refusal.SLEEP_FAILED, "model 'b' cannot be woken: a: sleep failed", 1.0, 1.0),
        ),
        at(2.5, ev.PinChanged("b", 1), fx.PinSet("b", True, None), fx.Answer(1, True)),
        at(
            2.6,
            ev.RequestArrived(2, "b"),
            fx.Reject(
                2,
                "b",
                fx.Refusal.SLEEP_FAILED,
                "model 'a' could not be put to sleep: sleep failed",
                0.3999999999999999,
                0.0,
            ),
        ),
        at(2.7, ev.RequestArrived(3, "a"), fx.Admit(3, "a", None, 1, False, 0.0)),
        at(3.0, ev.DeadlineReached(), fx.SwitchStarted(2, ("a",), "b", "pinned")),
    )


def test_commands_while_stopping_are_refused() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.ShutdownRequested()),
        at(3.0, ev.SleepRequested("a", 1), fx.Answer(1, False, reason="llmux is stopping")),
        at(4.0, ev.LeaseChanged(2), fx.Answer(2, False, reason="llmux is stopping")),
    )


def test_pin_of_a_third_model_leaves_a_switch_alone() -> None:
    specs = models("a", "b", "c", "d", memory=4)
    play = given(specs, awake=["a", "b", "c"], capacity=12)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(1.0, ev.RequestArrived(2, "b"), fx.Admit(2, "b", None, 1, False, 0.0)),
        at(
            2.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.Answer(1, True, switch=1),
        ),
        at(2.5, ev.PinChanged("b", 2), fx.PinSet("b", True, None), fx.Answer(2, True)),
        at(
            3.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), None, 1.0),
            fx.ModelDeactivated("a", 3.0),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
        ),
        at(
            4.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset({"b", "c"})),
            fx.SwitchEnded(1, ("a",), None, "success", 2.0, 1.0, 1.0, None),
        ),
        at(
            5.0,
            ev.RequestArrived(3, "d"),
            fx.RequestQueued(3, "d", 1),
            fx.SwitchStarted(2, (), "d", "there is room beside what is awake"),
            fx.RecordHolders(frozenset({"b", "c", "d"})),
            fx.RunHook(6, "d", HookKind.WAKE, None, switch=2, target="d"),
        ),
        at(6.0, ev.PinChanged("b", 3, pinned=False), fx.PinSet("b", False, None), fx.Answer(3, True)),
    )


def test_end_of_a_pin_wakes_nobody() -> None:
    given(models("a"))(
        at(1.0, ev.PinChanged("a", 1, pinned=False), fx.PinSet("a", False, None), fx.Answer(1, True))
    )
