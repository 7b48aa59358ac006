"""Reloading: nothing is dropped, and a switch under way keeps its plan."""

from __future__ import annotations

from playbook import Mute, Oldest, at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import Rules


def test_model_keeps_the_definition_under_which_it_was_woken_until_it_is_asleep() -> None:
    play = given(models("a", definition="old"), awake=["a"])
    play(
        at(1.0, replaced(models("a", definition="new"))),
        at(2.0, asks(1, "a"), admitted(1, "a", of="old")),
        at(3.0, ev.RequestReturned(1), alone("alive a", "old"), queued(1, "a")),
        # Lost, it is woken again as it was.
        at(
            4.0,
            failed("alive a"),
            lost("a", "a connection failed, and alive failed", 4.0),
            begins("a"),
            run("wake a", "old"),
        ),
        at(5.0, ok("wake a"), awake("a", 1.0), ends(1.0, 0.0, 1.0, 1.0), fx.Admit(1, "a", "old", 2, True, 3.0)),
        at(6.0, ev.RequestFinished(1)),
        at(
            7.0,
            ev.SleepRequested("a", 1),
            begins(None, "a", why="requested"),
            drained(),
            fx.ModelDeactivated("a", 2.0),
            run("sleep a", "old"),
            accepted(1),
        ),
        at(8.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0)),
        at(9.0, asks(2, "a"), queued(2, "a"), begins("a"), holders("a"), run("wake a", "new")),
    )


def test_switch_under_way_wakes_its_target_as_it_was_planned() -> None:
    play = given(models("a", "b", definition="old"), awake=["a"])
    play(
        at(
            1.0,
            asks(1, "b"),
            queued(1, "b"),
            begins("b", "a"),
            drained(),
            fx.ModelDeactivated("a", 1.0),
            run("sleep a", "old"),
        ),
        at(2.0, replaced(models("a", "b", definition="new"))),
        at(3.0, ok("sleep a"), holders(), holders("b"), run("wake b", "old")),
    )


def test_limits_apply_at_once() -> None:
    play = given(models("a", max_in_flight=1), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "a"), queued(2, "a")),
        at(3.0, asks(3, "a"), queued(3, "a", 2)),
        at(4.0, replaced(models("a", max_in_flight=2), request_timeout=3.0), admitted(2, "a", 2.0)),
        at(6.0, ev.DeadlineReached(), refused(3, "a", "request_timeout", "waited 3 s for model 'a'", None, 3.0)),
        at(7.0, ev.RequestFinished(1)),
        at(8.0, ev.RequestFinished(2)),
        at(9.0, replaced(models("a", idle_sleep=1.0)), begins(None, "a", why="idle"), leaves("a", 9.0)),
        at(10.0, ev.DeadlineReached()),
    )


def test_shorter_request_timeout_calls_off_a_switch_whose_waiters_are_late() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(
            9.0,
            replaced(models("a", "b"), request_timeout=5.0),
            refused(2, "b", "request_timeout", "waited 7 s for model 'b'", None, 7.0),
            ends(7.0, 7.0, result="abandoned"),
        ),
    )


def test_changed_definition_clears_the_backoff() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(
            2.0,
            failed("wake a"),
            backs_off("wake a", ""),
            refused(1, "a", "wake_failed", "model 'a' failed to wake: ", 1.0, 1.0),
            run("sleep a"),
        ),
        at(2.0, ok("sleep a"), holders(), fails("wake ", 1.0)),
        at(2.1, replaced(models("a", definition="new"))),
        at(2.2, asks(2, "a"), queued(2, "a"), begins("a"), holders("a"), run("wake a", "new")),
    )


def test_less_room_puts_to_sleep_what_was_used_longest_ago() -> None:
    specs = models("a", "b", "c", memory=4)
    play = given(specs, awake=["a", "b", "c"], capacity=12)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.RequestFinished(1)),
        at(3.0, asks(2, "c"), admitted(2, "c")),
        at(4.0, ev.RequestFinished(2)),
        at(5.0, ev.PinChanged("b", 1), fx.PinSet("b", True, None), fx.Answer(1, True)),
        at(6.0, replaced(specs, capacity=8), begins(None, "a", why="not wanted"), leaves("a", 6.0)),
        at(7.0, ok("sleep a"), holders("b", "c"), ends(1.0, 0.0, 1.0)),
        at(8.0, replaced(specs), begins(None, "c", why="not wanted"), leaves("c", 8.0)),
        at(9.0, ok("sleep c"), holders("b"), ends(1.0, 0.0, 1.0)),
    )


def test_new_policy_is_asked_from_now_on_and_may_be_complained_about_anew() -> None:
    play = given(models("a", "b"), awake=["a"], policy=Mute(), min_active=1e6)
    play(
        at(
            1.0,
            asks(1, "b"),
            queued(1, "b"),
            fx.PolicyOverruled("answered None, which is not a decision"),
            fx.PolicyDecided("switch", "b", "first come, first served: the policy was overruled"),
        ),
        at(
            2.0,
            ev.ConfigReplaced(models("a", "b"), Rules(min_active=1e6), Mute()),
            fx.PolicyOverruled("answered None, which is not a decision"),
            fx.PolicyDecided("switch", "b", "first come, first served: the policy was overruled"),
        ),
        at(
            3.0,
            ev.ConfigReplaced(models("a", "b"), Rules(), Oldest(), {"b": (4.0, None)}),
            begins("b", "a"),
            leaves("a", 3.0),
        ),
    )
    assert play.core.state.costs.wake_of("b") == 4.0


def test_reload_while_stopping_begins_nothing() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.ShutdownRequested()),
        at(3.0, replaced(models("a", "b"))),
        at(18.0, ev.DeadlineReached()),
        at(19.0, ev.RequestFinished(1), fx.Stopped()),
    )


def test_order_of_the_models_is_that_of_the_new_configuration() -> None:
    play = given(models("a", "b"))
    play.feed(1.0, replaced(models("b", "c", "a")))
    assert list(play.core.state.models) == ["b", "c", "a"]


def test_clocks_of_an_awake_model_follow_a_reload() -> None:
    play = given(models("a"), awake=["a"], alive_every=0.0)
    play(at(10.0, replaced(models("a"), alive_every=7.0)))
    assert play.core.next_deadline() == 17.0
    play(at(11.0, replaced(models("a", idle_sleep=20.0), alive_every=0.0)))
    assert play.core.next_deadline() == 31.0


def test_reload_while_something_is_put_to_sleep() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, replaced(models("a", definition="new"))),
        at(3.0, ok("sleep a"), holders(), ends(2.0, 0.0, 2.0)),
    )
