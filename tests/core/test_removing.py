"""Removed models: what runs is finished, then they sleep, then they are forgotten."""

from __future__ import annotations

from playbook import ANY, at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import WaitUntil
from llmux.core.spec import HookKind, Rules


class Later:
    def decide(self, now):
        return WaitUntil(now.time + 1e9)


def replaced(specs, **rules):
    return ev.ConfigReplaced(specs, Rules(**rules), ANY)


class Mute:
    def decide(self, _now):
        return None


def test_removed_model_finishes_its_answers_and_is_then_slept_with_its_old_hooks() -> None:
    play = given(models("a", "b", definition="old"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", "old", 1, False, 0.0)),
        at(2.0, replaced(models("b", definition="new"))),
        at(
            3.0,
            ev.RequestArrived(2, "a"),
            fx.Reject(2, "a", fx.Refusal.UNKNOWN_MODEL, "model 'a' not found", None, 0.0),
        ),
        at(
            4.0,
            ev.RequestFinished(1),
            fx.SwitchStarted(1, ("a",), None, "not wanted"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 4.0),
            fx.RunHook(3, "a", HookKind.SLEEP, "old", switch=1, sources=("a",)),
        ),
        at(
            5.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 1.0, 0.0, 1.0, None),
            fx.ModelRemoved("a"),
        ),
    )
    assert list(play.core.state.models) == ["b"]


def test_removed_model_with_answers_under_way_holds_up_nobody_else() -> None:
    play = given(models("a", "b", memory=4), awake=["a"], capacity=8)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, replaced(models("b", memory=4), capacity=8)),
        at(
            3.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.SwitchStarted(1, (), "b", "there is room beside what is awake"),
            fx.RecordHolders(frozenset({"a", "b"})),
            fx.RunHook(3, "b", HookKind.WAKE, None, switch=1, target="b"),
        ),
        at(
            4.0,
            ev.HookFinished(3, ok=True),
            fx.ModelActivated("b", 1, (), 1.0),
            fx.SwitchEnded(1, (), "b", "success", 1.0, 0.0, 1.0, 1.0),
            fx.Admit(2, "b", None, 1, False, 1.0),
        ),
    )


def test_removed_model_that_is_asleep_is_forgotten_at_once_with_its_waiters_and_its_pin() -> None:
    play = given(models("a", "b", max_in_flight=1), awake=["a"], policy=Later())
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(1.0, ev.RequestArrived(2, "b"), fx.RequestQueued(2, "b", 1), fx.PolicyDecided("wait", None, "")),
        at(
            2.0,
            replaced(models("a")),
            fx.Reject(
                2,
                "b",
                fx.Refusal.UNKNOWN_MODEL,
                "model 'b' not found: it was removed from the configuration",
                None,
                1.0,
            ),
            fx.ModelRemoved("b"),
        ),
        at(3.0, ev.PinChanged("a", 1, until=50.0), fx.PinSet("a", True, 50.0), fx.Answer(1, True)),
        at(4.0, replaced(models("c")), fx.PinSet("a", False, None), fx.RunHook(3, "c", HookKind.ALIVE, None)),
        at(5.0, ev.RequestFinished(1)),
        at(
            6.0,
            ev.HookFinished(3, ok=False),
            fx.SwitchStarted(1, ("a",), None, "not wanted"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 6.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
        ),
        at(
            7.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 1.0, 0.0, 1.0, None),
            fx.ModelRemoved("a"),
        ),
    )
    assert not any(key == ("pin", "a") for key, _ in play.core.state.timers)


def test_removed_target_calls_the_switch_off() -> None:
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
        at(
            4.0,
            replaced(models("a")),
            fx.Reject(
                2,
                "b",
                fx.Refusal.UNKNOWN_MODEL,
                "model 'b' not found: it was removed from the configuration",
                None,
                2.0,
            ),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 2.0, 2.0, None, None),
            fx.ModelRemoved("b"),
        ),
    )


def test_removed_target_is_slept_again_when_its_wake_is_over() -> None:
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
            replaced(models("b")),
            fx.Reject(
                1,
                "a",
                fx.Refusal.UNKNOWN_MODEL,
                "model 'a' not found: it was removed from the configuration",
                None,
                1.0,
            ),
            fx.RunHook(3, "b", HookKind.ALIVE, None),
        ),
        at(2.1, ev.HookFinished(3, ok=False)),
        at(
            3.0,
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("a", 1, (), 2.0),
            fx.SwitchEnded(1, (), "a", "success", 2.0, 0.0, 2.0, 2.0),
            fx.SwitchStarted(2, ("a",), None, "not wanted"),
            fx.SwitchDrained(2, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 0.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=2, sources=("a",)),
        ),
        at(
            4.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(2, ("a",), None, "success", 1.0, 0.0, 1.0, None),
            fx.ModelRemoved("a"),
        ),
    )


def test_removed_source_goes_on_leaving() -> None:
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
        at(2.0, replaced(models("b"))),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(4, "b", HookKind.WAKE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            4.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("b", 1, ("a",), 3.0),
            fx.SwitchEnded(1, ("a",), "b", "success", 3.0, 0.0, 3.0, 3.0),
            fx.Admit(1, "b", None, 1, False, 3.0),
            fx.ModelRemoved("a"),
        ),
    )


def test_model_that_is_removed_and_comes_back_goes_on() -> None:
    play = given(models("a", definition="old"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", "old", 1, False, 0.0)),
        at(2.0, replaced(models("b")), fx.RunHook(2, "b", HookKind.ALIVE, None)),
        at(2.5, ev.HookFinished(2, ok=False)),
        at(3.0, replaced(models("a", definition="new")), fx.ModelRemoved("b")),
        at(4.0, ev.RequestArrived(2, "a"), fx.Admit(2, "a", "old", 1, False, 0.0)),
    )


def test_returned_request_of_a_removed_model_is_turned_away() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, replaced(models("b"))),
        at(
            3.0,
            ev.RequestReturned(1),
            fx.RunHook(3, "a", HookKind.ALIVE, None),
            fx.Reject(
                1,
                "a",
                fx.Refusal.UNKNOWN_MODEL,
                "model 'a' not found: it was removed from the configuration",
                None,
                2.0,
            ),
            fx.SwitchStarted(1, ("a",), None, "not wanted"),
        ),
        at(
            4.0,
            ev.HookFinished(3, ok=False),
            fx.ModelDeactivated("a", 4.0),
            fx.ModelLost("a", "a connection failed, and alive failed"),
            fx.SwitchDrained(1, ("a",), None, 1.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
        ),
        at(
            5.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 2.0, 1.0, 1.0, None),
            fx.ModelRemoved("a"),
        ),
    )


def test_removed_models_are_forgotten_when_no_switch_needs_them() -> None:
    specs = [*models("a", "b", memory=4), *models("c", "d", memory=8)]
    play = given(specs, awake=["a", "b"], capacity=8)
    play(
        at(
            1.0,
            ev.RequestArrived(1, "c"),
            fx.RequestQueued(1, "c", 1),
            fx.PolicyDecided("switch", "c", ""),
            fx.SwitchStarted(1, ("a", "b"), "c", "policy"),
            fx.SwitchDrained(1, ("a", "b"), "c", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
            fx.ModelDeactivated("b", 1.0),
            fx.RunHook(6, "b", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(2.0, replaced(specs[1:3], capacity=8), fx.ModelRemoved("d")),
        at(3.0, ev.HookFinished(5, ok=True), fx.RecordHolders(frozenset({"b"}))),
        at(
            4.0,
            ev.HookFinished(6, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"c"})),
            fx.RunHook(7, "c", HookKind.WAKE, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(
            5.0,
            ev.HookFinished(7, ok=True),
            fx.ModelActivated("c", 1, ("a", "b"), 4.0),
            fx.SwitchEnded(1, ("a", "b"), "c", "success", 4.0, 0.0, 4.0, None),
            fx.Admit(1, "c", None, 1, False, 4.0),
            fx.ModelRemoved("a"),
        ),
    )
