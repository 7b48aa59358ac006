"""What comes back by itself: the default model after quiet, and what is to be kept awake."""

from __future__ import annotations

from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind

WAKE, SLEEP = HookKind.WAKE, HookKind.SLEEP
CALM = {"default_model": "a", "default_after": 10.0, "alive_every": 0.0}


def started(effects):
    return [(it.reason, it.sources, it.to) for it in effects if isinstance(it, fx.SwitchStarted)]


def end(play, time, model, *, ok=True):
    """End the one hook of a model that runs; return the switches that begin then."""
    (hook,) = [run.hook for run in play.ledger.hooks.values() if run.model == model]
    return started(play.feed(time, ev.HookFinished(hook, ok, "" if ok else "exited with 1")))


def due(play, time):
    """Let time pass; return the switches that begin."""
    return started(play.feed(time, ev.DeadlineReached()))


# ---- the default model


def test_the_default_model_comes_back_after_quiet() -> None:
    play = given(models("a", "b"), awake=["b"], **CALM)
    play.feed(1.0, ev.RequestArrived(1, "b"))
    assert due(play, 10.0) == []
    play.feed(14.0, ev.RequestFinished(1))
    assert play.core.next_deadline() == 24.0
    assert due(play, 23.9) == []
    play(
        at(
            24.0,
            ev.DeadlineReached(),
            begins("a", "b", why="default"),
            drained(),
            fx.ModelDeactivated("b", 24.0),
            fx.RunHook(3, "b", SLEEP, None, 1, ("b",), "a"),
        ),
    )
    assert end(play, 25.0, "b") == []
    assert end(play, 26.0, "a") == []
    assert play.core.next_deadline() is None  # it is there
    (decision,) = play.ledger.decisions.records
    assert decision.reason == "b → a: it is the default model, and no request has come for default_after"


def test_it_comes_at_the_start_when_nobody_asks_for_anything() -> None:
    play = given(models("a", "b"), **CALM)
    assert due(play, 10.0) == [("default", (), "a")]


def test_whoever_asks_for_anything_ends_the_quiet() -> None:
    play = given(models("a", "b"), awake=["b"], **CALM)
    play.feed(9.0, ev.RequestArrived(1, "b"))
    assert play.core.next_deadline() is None
    play.feed(9.5, ev.RequestAbandoned(1))
    assert due(play, 19.0) == []
    assert due(play, 19.5) == [("default", ("b",), "a")]


def test_one_that_waited_in_vain_was_not_quiet() -> None:
    play = given(models("a", "b", "c"), awake=["c"], **CALM, min_active=100.0)
    play.feed(1.0, ev.RequestArrived(1, "b"))
    assert due(play, 30.0) == []
    play.feed(50.0, ev.RequestAbandoned(1))
    assert due(play, 59.0) == []
    assert due(play, 60.0) == [("default", ("c",), "a")]


def test_a_wake_that_fails_is_not_tried_again_before_the_next_quiet() -> None:
    play = given(models("a", "b"), **CALM)
    due(play, 10.0)
    end(play, 11.0, "a", ok=False)
    end(play, 12.0, "a")
    assert due(play, 100.0) == []
    play.feed(101.0, ev.RequestArrived(1, "b"))
    end(play, 102.0, "b")
    play.feed(103.0, ev.RequestFinished(1))
    assert due(play, 113.0) == [("default", ("b",), "a")]


def test_its_own_idle_sleep_is_not_undone() -> None:
    play = given(models("a", "b", idle_sleep=20.0), **CALM)
    due(play, 10.0)
    end(play, 11.0, "a")
    assert due(play, 31.0) == [("idle", ("a",), None)]
    end(play, 32.0, "a")
    assert due(play, 1000.0) == []


def test_what_an_operator_put_to_sleep_stays_asleep_until_it_is_asked_for() -> None:
    play = given(models("a", "b"), awake=["a"], **CALM)
    play.feed(1.0, ev.SleepRequested("a", 1))
    end(play, 2.0, "a")
    assert due(play, 10.0) == []
    play.feed(20.0, ev.RequestArrived(1, "a"))
    end(play, 21.0, "a")
    play.feed(22.0, ev.RequestFinished(1))
    play.feed(23.0, ev.RequestArrived(2, "b"))
    end(play, 24.0, "a")
    end(play, 25.0, "b")
    play.feed(26.0, ev.RequestFinished(2))
    assert due(play, 36.0) == [("default", ("b",), "a")]
    end(play, 37.0, "b")
    end(play, 38.0, "a")
    # Also one that slept already.
    play.feed(39.0, ev.SleepRequested("b", 3))
    assert play.core.state.models["b"].put_away


def test_it_waits_for_the_switch_under_way_and_for_the_end_of_a_lease() -> None:
    play = given(models("a", "b"), awake=["b"], **CALM)
    play.feed(9.0, ev.SleepRequested("b", 1))
    assert due(play, 10.0) == []
    assert end(play, 11.0, "b") == [("default", (), "a")]
    end(play, 12.0, "a")
    play.feed(20.0, ev.RequestArrived(1, "b"))
    end(play, 21.0, "a")
    end(play, 22.0, "b")
    play.feed(23.0, ev.RequestFinished(1))
    play.feed(24.0, ev.LeaseChanged(2, until=50.0))
    end(play, 25.0, "b")
    assert due(play, 33.0) == []
    assert due(play, 50.0) == [("default", (), "a")]


def test_quiet_that_ended_meanwhile_brings_nobody_back() -> None:
    play = given(models("a", "b"), awake=["b"], **CALM)
    play.feed(9.0, ev.SleepRequested("b", 1))
    assert due(play, 10.0) == []
    play.feed(10.5, ev.RequestArrived(1, "b"))
    play.feed(10.6, ev.RequestAbandoned(1))
    assert end(play, 11.0, "b") == []
    assert due(play, 20.6) == [("default", (), "a")]


def test_it_displaces_nobody_that_is_pinned_or_to_be_kept_awake() -> None:
    play = given([*models("a"), *models("b", keep_awake=True)], awake=["b"], **CALM)
    assert due(play, 10.0) == []
    play = given(models("a", "b"), awake=["b"], **CALM)
    play.feed(1.0, ev.PinChanged("b", 1))
    assert due(play, 10.0) == []


def test_a_reload_begins_the_quiet_anew() -> None:
    play = given(models("a", "b"), awake=["b"], **CALM)
    play.feed(5.0, replaced(models("a", "b"), **{**CALM, "default_after": 6.0}))
    assert due(play, 10.0) == []
    assert due(play, 11.0) == [("default", ("b",), "a")]
    end(play, 12.0, "b")
    end(play, 13.0, "a")
    play.feed(14.0, replaced(models("a", "b"), alive_every=0.0))
    assert play.core.next_deadline() is None
    play.feed(15.0, replaced(models("b"), **CALM))  # it is gone
    end(play, 16.0, "a")
    assert due(play, 25.0) == []


def test_stopping_ends_the_quiet() -> None:
    play = given(models("a", "b"), awake=["b"], **CALM)
    play(at(1.0, ev.ShutdownRequested(), fx.Stopped()))
    assert play.core.next_deadline() is None


# ---- keep_awake


def small_and_big(**fields):
    return [
        *models("small", memory=2, keep_awake=True, **fields),
        *models("one", "two", memory=6),
        *models("all", memory=9),
    ]


def test_what_is_to_be_kept_awake_is_woken_at_the_start_and_does_not_sleep_for_being_idle() -> None:
    play = given(small_and_big(idle_sleep=5.0), capacity=10, alive_every=0.0)
    assert play.core.state.switch.reason == "keep_awake"
    end(play, 1.0, "small")
    assert play.core.state.models["small"].awake_since == 1.0
    assert due(play, 100.0) == []


def test_it_is_the_last_to_make_room_and_comes_back_as_soon_as_it_fits() -> None:
    play = given(small_and_big(), awake=["small", "one"], capacity=10, alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "one"))
    assert started(play.feed(2.0, ev.RequestArrived(2, "two")))[0][1:] == (("one",), "two")  # busy, not kept
    play.feed(3.0, ev.RequestFinished(1))
    end(play, 4.0, "one")
    assert end(play, 5.0, "two") == []
    play.feed(6.0, ev.RequestFinished(2))
    # Nothing else would do.
    assert started(play.feed(7.0, ev.RequestArrived(3, "all")))[0][1:] == (("small", "two"), "all")
    end(play, 8.0, "small")
    end(play, 9.0, "two")
    assert end(play, 10.0, "all") == []
    play.feed(11.0, ev.RequestFinished(3))
    assert started(play.feed(12.0, ev.RequestArrived(4, "one")))[0][1:] == (("all",), "one")
    end(play, 13.0, "all")
    assert end(play, 14.0, "one") == [("keep_awake", (), "small")]


def test_a_wake_of_it_that_fails_is_tried_again_after_the_backoff() -> None:
    play = given(models("a", keep_awake=True))
    end(play, 1.0, "a", ok=False)
    assert end(play, 2.0, "a") == [("keep_awake", (), "a")]  # the backoff of a second is over
    end(play, 2.1, "a", ok=False)
    assert end(play, 2.2, "a") == []
    assert due(play, 4.1) == [("keep_awake", (), "a")]


def test_an_operator_may_put_it_to_sleep() -> None:
    play = given(models("a", keep_awake=True), awake=["a"])
    play.feed(1.0, ev.SleepRequested("a", 1))
    assert end(play, 2.0, "a") == []
    assert due(play, 100.0) == []
    assert started(play.feed(101.0, ev.ActivationRequested("a", 2)))
    end(play, 102.0, "a")
    play.feed(103.0, ev.LeaseChanged(3))
    end(play, 104.0, "a")
    assert started(play.feed(105.0, ev.LeaseChanged(4, leased=False))) == [("keep_awake", (), "a")]
