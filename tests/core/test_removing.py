"""Removed models: what runs is finished, then they sleep, then they are forgotten."""

from __future__ import annotations

from playbook import Later, at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev


def test_removed_model_finishes_its_answers_and_is_then_slept_with_its_old_hooks() -> None:
    play = given(models("a", "b", definition="old"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a", of="old")),
        at(2.0, replaced(models("b", definition="new"))),
        at(3.0, asks(2, "a"), refused(2, "a", "model_not_found", "model 'a' not found")),
        at(
            4.0,
            ev.RequestFinished(1),
            begins(None, "a", why="not wanted"),
            drained(),
            fx.ModelDeactivated("a", 4.0),
            run("sleep a", "old"),
        ),
        at(5.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0), fx.ModelRemoved("a")),
    )
    assert list(play.core.state.models) == ["b"]


def test_removed_model_with_answers_under_way_holds_up_nobody_else() -> None:
    play = given(models("a", "b", memory=4), awake=["a"], capacity=8)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, replaced(models("b", memory=4), capacity=8)),
        at(
            3.0,
            asks(2, "b"),
            queued(2, "b"),
            begins("b", why="there is room beside what is awake"),
            wakes("b", "a"),
        ),
        at(4.0, ok("wake b"), awake("b", 1.0), ends(1.0, 0.0, 1.0, 1.0), admitted(2, "b", 1.0)),
    )


def test_removed_model_that_is_asleep_is_forgotten_at_once_with_its_waiters_and_its_pin() -> None:
    play = given(models("a", "b", max_in_flight=1), awake=["a"], policy=Later())
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "b"), queued(2, "b"), fx.PolicyDecided("wait", None, "")),
        at(
            2.0,
            replaced(models("a")),
            refused(
                2, "b", "model_not_found", "model 'b' not found: it was removed from the configuration", None, 1.0
            ),
            fx.ModelRemoved("b"),
        ),
        at(3.0, ev.PinChanged("a", 1, until=50.0), fx.PinSet("a", True, 50.0), fx.Answer(1, True)),
        at(4.0, replaced(models("c")), fx.PinSet("a", False, None), alone("alive c")),
        at(5.0, ev.RequestFinished(1)),
        at(6.0, failed("alive c"), begins(None, "a", why="not wanted"), leaves("a", 6.0)),
        at(7.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0), fx.ModelRemoved("a")),
    )
    assert ("pin", "a") not in play.core.state.timers


def test_removed_target_calls_the_switch_off() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(3.0, ev.ActivationRequested("b", 1), accepted(1)),
        at(
            4.0,
            replaced(models("a")),
            refused(
                2, "b", "model_not_found", "model 'b' not found: it was removed from the configuration", None, 2.0
            ),
            ends(2.0, 2.0, result="abandoned"),
            fx.ModelRemoved("b"),
        ),
    )


def test_removed_target_is_slept_again_when_its_wake_is_over() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(
            2.0,
            replaced(models("b")),
            refused(
                1, "a", "model_not_found", "model 'a' not found: it was removed from the configuration", None, 1.0
            ),
            alone("alive b"),
        ),
        at(2.1, failed("alive b")),
        at(
            3.0,
            ok("wake a"),
            awake("a", 2.0),
            ends(2.0, 0.0, 2.0, 2.0),
            begins(None, "a", why="not wanted"),
            leaves("a", 0.0),
        ),
        at(4.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0), fx.ModelRemoved("a")),
    )


def test_removed_source_goes_on_leaving() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(2.0, replaced(models("b"))),
        at(3.0, ok("sleep a"), holders(), wakes("b")),
        at(
            4.0,
            ok("wake b"),
            awake("b", 3.0),
            ends(3.0, 0.0, 3.0, 3.0),
            admitted(1, "b", 3.0),
            fx.ModelRemoved("a"),
        ),
    )


def test_model_that_is_removed_and_comes_back_goes_on() -> None:
    play = given(models("a", definition="old"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a", of="old")),
        at(2.0, replaced(models("b")), alone("alive b")),
        at(2.5, failed("alive b")),
        at(3.0, replaced(models("a", definition="new")), fx.ModelRemoved("b")),
        at(4.0, asks(2, "a"), admitted(2, "a", of="old")),
    )


def test_returned_request_of_a_removed_model_is_turned_away() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, replaced(models("b"))),
        at(
            3.0,
            ev.RequestReturned(1),
            alone("alive a"),
            refused(
                1, "a", "model_not_found", "model 'a' not found: it was removed from the configuration", None, 2.0
            ),
            begins(None, "a", why="not wanted"),
        ),
        at(
            4.0,
            failed("alive a"),
            lost("a", "a connection failed, and alive failed", 4.0),
            drained(1.0),
            run("sleep a"),
        ),
        at(5.0, ok("sleep a"), holders(), ends(2.0, 1.0, 1.0), fx.ModelRemoved("a")),
    )


def test_removed_models_are_forgotten_when_no_switch_needs_them() -> None:
    specs = [*models("a", "b", memory=4), *models("c", "d", memory=8)]
    play = given(specs, awake=["a", "b"], capacity=8)
    play(
        at(1.0, asks(1, "c"), queued(1, "c"), begins("c", "a", "b"), leaves("a", 1.0), sleeps("b", 1.0)),
        at(2.0, replaced(specs[1:3], capacity=8), fx.ModelRemoved("d")),
        at(3.0, ok("sleep a"), holders("b")),
        at(4.0, ok("sleep b"), holders(), wakes("c")),
        at(5.0, ok("wake c"), awake("c", 4.0), ends(4.0, 0.0, 4.0), admitted(1, "c", 4.0), fx.ModelRemoved("a")),
    )
