"""Switching: drain, sleep, wake; called off, abandoned, failed."""

from __future__ import annotations

from playbook import at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_a_switch_drains_sleeps_and_wakes() -> None:
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
        at(3.0, ev.RequestArrived(3, "a"), fx.RequestQueued(3, "a", 1)),
        at(
            4.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), "b", 2.0),
            fx.ModelDeactivated("a", 4.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            5.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(4, "b", HookKind.WAKE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            9.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("b", 1, ("a",), 7.0),
            fx.SwitchEnded(1, ("a",), "b", "success", 7.0, 2.0, 5.0, 5.0),
            fx.Admit(2, "b", None, 1, False, 7.0),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(2, ("b",), "a", "policy"),
        ),
        at(
            10.0,
            ev.RequestFinished(2),
            fx.SwitchDrained(2, ("b",), "a", 1.0),
            fx.ModelDeactivated("b", 1.0),
            fx.RunHook(5, "b", HookKind.SLEEP, None, switch=2, sources=("b",), target="a"),
        ),
        at(
            11.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(6, "a", HookKind.WAKE, None, switch=2, sources=("b",), target="a"),
        ),
        at(
            12.0,
            ev.HookFinished(6, ok=True),
            fx.ModelActivated("a", 2, ("b",), 3.0),
            fx.SwitchEnded(2, ("b",), "a", "success", 3.0, 1.0, 2.0, 2.0),
            fx.Admit(3, "a", None, 2, False, 9.0),
        ),
        at(13.0, ev.RequestFinished(3)),
    )


def test_last_waiter_leaves_during_the_drain_and_what_was_to_leave_reopens() -> None:
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
        at(3.0, ev.RequestArrived(3, "a"), fx.RequestQueued(3, "a", 1)),
        at(
            4.0,
            ev.RequestAbandoned(2),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 2.0, 2.0, None, None),
            fx.Admit(3, "a", None, 1, False, 1.0),
        ),
    )


def test_last_waiter_leaves_during_the_sleep_and_nothing_is_woken() -> None:
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
        at(2.0, ev.RequestAbandoned(1)),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 2.0, 0.0, None, None),
        ),
    )


def test_last_waiter_leaves_during_the_wake_which_is_finished() -> None:
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
        at(2.0, ev.RequestAbandoned(1)),
        at(
            3.0,
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("a", 1, (), 2.0),
            fx.SwitchEnded(1, (), "a", "success", 2.0, 0.0, 2.0, 2.0),
        ),
    )


def test_drain_timeout_cuts_what_runs_and_the_sleep_hook_waits_for_its_end() -> None:
    play = given(
        models("a", "b"), awake=["a"], drain_timeout=5.0, first_guesses={"a": (1.0, 2.0), "b": (3.0, 4.0)}
    )
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
        ),
        at(7.0, ev.DeadlineReached(), fx.CancelRequests((1,), "a", fx.CutReason.DRAIN_DEADLINE, retry_after=5.0)),
        at(
            7.5,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), "b", 5.5),
            fx.ModelDeactivated("a", 7.5),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
    )


def test_without_drain_answers_are_cut_at_once() -> None:
    play = given(models("a", "b"), awake=["a"], drain_timeout=0.0)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.CancelRequests((1,), "a", fx.CutReason.DRAIN_DEADLINE, retry_after=12.0),
        ),
        at(
            2.1,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), "b", 0.10000000000000009),
            fx.ModelDeactivated("a", 2.1),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
    )


def test_a_sleep_that_is_asked_for_cuts_without_a_retry_after() -> None:
    play = given(models("a"), awake=["a"], drain_timeout=0.0)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.CancelRequests((1,), "a", fx.CutReason.DRAIN_DEADLINE),
            fx.Answer(1, True, switch=1),
        ),
        at(
            2.1,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), None, 0.10000000000000009),
            fx.ModelDeactivated("a", 2.1),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(2, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 1.0, 0.10000000000000009, 0.8999999999999999, None),
        ),
    )


def test_models_that_need_not_leave_serve_all_along() -> None:
    play = given(models("a", "b", "c", memory=4), awake=["a", "b"], capacity=8)
    play(
        at(0.5, ev.RequestArrived(1, "b"), fx.Admit(1, "b", None, 1, False, 0.0)),
        at(
            1.0,
            ev.RequestArrived(2, "c"),
            fx.RequestQueued(2, "c", 1),
            fx.PolicyDecided("switch", "c", ""),
            fx.SwitchStarted(1, ("a",), "c", "policy"),
            fx.SwitchDrained(1, ("a",), "c", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="c"),
        ),
        at(1.5, ev.RequestArrived(3, "b"), fx.Admit(3, "b", None, 1, False, 0.0)),
        at(
            2.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset({"b"})),
            fx.RecordHolders(frozenset({"b", "c"})),
            fx.RunHook(5, "c", HookKind.WAKE, None, switch=1, sources=("a",), target="c"),
        ),
        at(2.5, ev.RequestArrived(4, "b"), fx.Admit(4, "b", None, 1, False, 0.0)),
        at(
            3.0,
            ev.HookFinished(5, ok=True),
            fx.ModelActivated("c", 1, ("a",), 2.0),
            fx.SwitchEnded(1, ("a",), "c", "success", 2.0, 0.0, 2.0, 2.0),
            fx.Admit(2, "c", None, 1, False, 2.0),
        ),
    )


def test_model_in_the_way_is_lost_during_its_drain_and_cleaned_up() -> None:
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
        at(
            3.0, ev.EngineLost("a"), fx.RunHook(3, "a", HookKind.ALIVE, None, switch=1, sources=("a",), target="b")
        ),
        at(3.5, ev.RequestFinished(1)),
        at(
            4.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.ModelDeactivated("a", 4.0),
            fx.ModelLost("a", "a connection failed, and alive exited with 1"),
            fx.SwitchDrained(1, ("a",), "b", 2.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            5.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(5, "b", HookKind.WAKE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            9.0,
            ev.HookFinished(5, ok=True),
            fx.ModelActivated("b", 1, ("a",), 7.0),
            fx.SwitchEnded(1, ("a",), "b", "success", 7.0, 2.0, 5.0, None),
            fx.Admit(2, "b", None, 1, False, 7.0),
        ),
    )
    # A cleanup says nothing about what this direction costs.
    assert play.core.state.costs.measured("a", "b") is None


def test_suspected_engine_that_answers_goes_on_draining() -> None:
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
        at(
            3.0,
            ev.RequestReturned(1),
            fx.RunHook(3, "a", HookKind.ALIVE, None, switch=1, sources=("a",), target="b"),
            fx.RequestQueued(1, "a", 1),
        ),
        at(
            4.0,
            ev.HookFinished(3, ok=True),
            fx.SwitchDrained(1, ("a",), "b", 2.0),
            fx.ModelDeactivated("a", 4.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
    )


def test_alive_that_fails_during_a_drain_but_was_not_asked_for_it_changes_nothing() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(15.0, ev.DeadlineReached(), fx.RunHook(3, "a", HookKind.ALIVE, None)),
        at(
            16.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
        ),
        at(17.0, ev.HookFinished(3, ok=False, detail="exited with 1")),
        at(
            18.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), "b", 2.0),
            fx.ModelDeactivated("a", 18.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
    )


def test_drain_timeout_cuts_only_what_still_runs() -> None:
    play = given(
        [*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8, drain_timeout=5.0
    )
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.RequestArrived(2, "c"),
            fx.RequestQueued(2, "c", 1),
            fx.PolicyDecided("switch", "c", ""),
            fx.SwitchStarted(1, ("a", "b"), "c", "policy"),
        ),
        at(7.0, ev.DeadlineReached(), fx.CancelRequests((1,), "a", fx.CutReason.DRAIN_DEADLINE, retry_after=12.0)),
    )


def test_switch_that_is_called_off_leaves_a_lost_engine_lost() -> None:
    play = given([*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.EngineLost("b", refused=True), fx.RunHook(4, "b", HookKind.ALIVE, None)),
        at(
            3.0,
            ev.HookFinished(4, ok=False),
            fx.ModelDeactivated("b", 3.0),
            fx.ModelLost("b", "a connection failed, and alive failed"),
        ),
        at(
            4.0,
            ev.RequestArrived(2, "c"),
            fx.RequestQueued(2, "c", 1),
            fx.PolicyDecided("switch", "c", ""),
            fx.SwitchStarted(1, ("a", "b"), "c", "policy"),
        ),
        at(5.0, ev.RequestArrived(3, "b"), fx.RequestQueued(3, "b", 1)),
        at(
            6.0,
            ev.RequestAbandoned(2),
            fx.SwitchEnded(1, ("a", "b"), "c", "abandoned", 2.0, 2.0, None, None),
            fx.SwitchStarted(2, (), "b", "there is room beside what is awake"),
            fx.RunHook(5, "b", HookKind.WAKE, None, switch=2, target="b"),
        ),
    )
