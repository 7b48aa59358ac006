"""``idle_sleep``: a model that nobody asks for goes to sleep by itself."""

from __future__ import annotations

import pytest
from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev


def test_idle_model_sleeps_after_a_while_without_a_request() -> None:
    play = given(models("a", idle_sleep=10.0), awake=["a"], alive_every=0.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(4.0, ev.RequestFinished(1)),
        at(10.0, ev.DeadlineReached()),
    )
    assert play.core.next_deadline() == 14.0
    play(
        at(14.0, ev.DeadlineReached(), begins(None, "a", why="idle"), leaves("a", 14.0)),
        at(15.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0)),
    )


def test_the_time_since_the_last_answer_counts_whatever_else_happens_meanwhile() -> None:
    specs = [*models("a", idle_sleep=10.0), *models("b")]
    play = given(specs, awake=["a"], alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(9.0, ev.RequestFinished(1))
    for ticket, pinned in enumerate((True, False)):
        found = play.feed(12.0, ev.PinChanged("a", ticket + 1, pinned=pinned))
        assert not any(isinstance(effect, fx.SwitchStarted) for effect in found)
    assert any(isinstance(effect, fx.SwitchStarted) for effect in play.feed(19.0, ev.DeadlineReached()))


def test_idle_model_that_is_pinned_sleeps_when_the_pin_is_over() -> None:
    play = given(models("a", idle_sleep=10.0), awake=["a"], alive_every=0.0)
    play(
        at(1.0, ev.PinChanged("a", 1, until=30.0), fx.PinSet("a", True, 30.0), fx.Answer(1, True)),
        at(10.0, ev.DeadlineReached()),
        at(
            30.0,
            ev.DeadlineReached(),
            fx.PinSet("a", False, None),
            begins(None, "a", why="idle"),
            leaves("a", 30.0),
        ),
    )


def test_idle_sleep_that_fails_is_tried_again_when_it_has_been_idle_as_long_again() -> None:
    play = given(models("a", idle_sleep=10.0), awake=["a"], alive_every=0.0)
    play(
        at(10.0, ev.DeadlineReached(), begins(None, "a", why="idle"), leaves("a", 10.0)),
        at(11.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(12.0, ok("alive a"), again("a"), backs_off("sleep a", "sleep failed"), fails("a: sleep failed", 2.0)),
        at(13.0, ev.DeadlineReached()),
        at(22.0, ev.DeadlineReached(), begins(None, "a", why="idle"), leaves("a", 10.0)),
    )


def test_model_that_answers_for_longer_than_its_idle_sleep_is_not_idle() -> None:
    play = given(models("a", idle_sleep=10.0), awake=["a"], alive_every=0.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(10.0, ev.DeadlineReached()),
        at(20.0, ev.EngineLost("b")),
        at(30.0, ev.RequestFinished(1)),
    )
    assert play.core.next_deadline() == 40.0


def test_request_says_how_long_its_model_stays_awake_after_it() -> None:
    play = given(models("a", idle_sleep=10.0), awake=["a"], alive_every=0.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.RequestFinished(1, 60.0)),
        at(3.0, asks(2, "a"), admitted(2, "a")),
        at(4.0, ev.RequestFinished(2)),
        at(14.0, ev.DeadlineReached()),
    )
    assert play.core.next_deadline() == 64.0
    play(
        at(64.0, ev.DeadlineReached(), begins(None, "a", why="idle"), leaves("a", 64.0)),
        at(65.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0)),
    )


def test_last_answered_request_decides_how_long_and_a_wake_forgets_it() -> None:
    play = given(models("a", idle_sleep=10.0), awake=["a"], alive_every=0.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "a"), admitted(2, "a")),
        at(2.0, ev.RequestFinished(2, 500.0)),
        at(3.0, ev.RequestFinished(1, 0.0)),
        at(3.0, ev.DeadlineReached(), begins(None, "a", why="idle"), leaves("a", 3.0)),
        at(4.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0)),
    )
    play.feed(5.0, ev.ActivationRequested("a", 1))
    play.feed(6.0, ok("wake a")(play.moment))
    assert play.core.next_deadline() == 16.0


@pytest.mark.parametrize("idle_sleep", [None, 10.0])
def test_request_may_keep_its_model_awake(idle_sleep: float | None) -> None:
    play = given(models("a", idle_sleep=idle_sleep), awake=["a"], alive_every=0.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.RequestFinished(1, -1.0)),
        at(500.0, ev.DeadlineReached()),
    )
    assert play.core.next_deadline() is None


def test_what_waits_for_another_model_displaces_one_that_is_kept() -> None:
    play = given(models("a", "b"), awake=["a"], alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestFinished(1, 600.0))
    found = play.feed(3.0, ev.RequestArrived(2, "b"))
    assert [effect.to for effect in found if isinstance(effect, fx.SwitchStarted)] == ["b"]


def test_pin_and_keep_awake_go_before_what_a_request_says() -> None:
    play = given(models("a"), awake=["a"], alive_every=0.0)
    play.feed(1.0, ev.PinChanged("a", 1))
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestFinished(1, 0.0))
    assert play.feed(2.0, ev.DeadlineReached()) == []
    play = given(models("a", keep_awake=True), awake=["a"], alive_every=0.0)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestFinished(1, 0.0))
    assert play.feed(2.0, ev.DeadlineReached()) == []
