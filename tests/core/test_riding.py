"""Requests that ride along, and such as have a deadline: classes of what waits."""

from __future__ import annotations

import pytest
from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.phases import InvalidEventError
from llmux.core.policy import SwitchTo
from llmux.core.spec import Rules
from llmux.core.state import Turns
from llmux.runtime import wait_estimate


def rides(number, model, seconds=100.0):
    return ev.RequestArrived(number, model, rides=seconds)


def riding(play):
    return [request for model in play.core.state.models.values() for request in model.riders]


def test_it_causes_no_switch_and_is_served_when_its_model_is_awake_anyway():
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, rides(1, "b")),
        at(2.0, rides(2, "a"), admitted(2, "a")),
        at(3.0, ev.RequestFinished(2)),
        at(4.0, asks(3, "b"), queued(3, "b"), begins("b", "a"), leaves("a", 4.0)),
    )
    assert riding(play) == [1]
    play.feed(5.0, ev.HookFinished(3, ok=True))
    found = play.feed(6.0, ev.HookFinished(4, ok=True))
    assert [(each.request, each.waited) for each in found if isinstance(each, fx.Admit)] == [(3, 2.0), (1, 0.0)]
    assert not riding(play)


def test_policies_are_not_shown_it():
    class Spy:
        def decide(self, now):
            self.seen = now.waiting, [(each.queued, list(each.arrivals())) for each in now.models.values()]
            return SwitchTo(now.waiting[0])

    spy = Spy()
    play = given(models("a", "b", "c"), awake=["a"], policy=spy)
    play.feed(1.0, rides(1, "b"))
    play.feed(2.0, asks(2, "c"))
    assert spy.seen == (("c",), [(0, []), (0, []), (1, [2.0])])
    assert play.core.state.models["b"].meter.arrival_rate(2.0) == 0.0  # nor is it expected


def test_when_its_time_is_over_it_waits_as_if_it_had_just_come():
    play = given(models("a", "b"), awake=["a"], request_timeout=50.0, alive_every=0.0)
    play(
        at(1.0, rides(1, "b", 100.0)),
        at(101.0, ev.DeadlineReached(), queued(1, "b"), begins("b", "a"), leaves("a", 101.0)),
    )
    assert play.core.state.models["b"].oldest().arrived == 101.0


def test_a_window_ends_all_rides():
    play = given(models("a", "b", "c"), awake=["a"], policy=SwitchesTo("c"))
    play.feed(1.0, rides(1, "b"))
    play.feed(1.0, rides(2, "c"))
    found = play.feed(2.0, ev.RidesEnded())
    assert [each.request for each in found if isinstance(each, fx.RequestQueued)] == [1, 2]
    assert [each.to for each in found if isinstance(each, fx.SwitchStarted)] == ["c"]
    assert play.feed(3.0, ev.RidesEnded()) == []


class SwitchesTo:
    def __init__(self, model):
        self.model = model

    def decide(self, _now):
        return SwitchTo(self.model)


def test_waiters_go_first_and_as_many_ride_as_there_is_room_for():
    play = given(models("a", max_in_flight=1), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, rides(2, "a")),
        at(2.0, rides(3, "a")),
        at(3.0, asks(4, "a"), queued(4, "a")),
        at(4.0, ev.RequestFinished(1), fx.Admit(4, "a", None, 1, returned=False, waited=1.0)),
        at(5.0, ev.RequestFinished(4), fx.Admit(2, "a", None, 1, returned=False, waited=0.0)),
    )
    assert riding(play) == [3]


@pytest.mark.parametrize("end", [ev.RequestAbandoned(2), ev.DeadlineReached()])
def test_it_is_served_when_what_was_held_back_before_it_is_gone(end):
    class HoldsBack(Turns):
        def pick(self, model):
            found = super().pick(model)
            return None if found.id == 2 else found

    play = given(models("a", max_in_flight=1), awake=["a"], request_timeout=8.0, alive_every=0.0)
    play.core.state.turns = HoldsBack()
    play.feed(1.0, asks(1, "a"))
    play.feed(2.0, asks(2, "a"))
    play.feed(3.0, rides(3, "a"))
    assert play.feed(4.0, ev.RequestFinished(1)) == []
    assert fx.Admit(3, "a", None, 1, returned=False, waited=0.0) in play.feed(10.0, end)


def test_no_more_ride_than_may_wait():
    play = given(models("a", "b", max_queued=1), awake=["a"])
    message = "1 requests ride along for 'b' already"
    play(
        at(1.0, rides(1, "b")),
        at(2.0, rides(2, "b"), fx.Reject(2, "b", fx.Refusal.QUEUE_FULL, message, 60.0, 0.0)),
        at(3.0, ev.RequestAbandoned(1)),
        at(4.0, rides(3, "b")),
    )


def test_it_may_leave_and_is_unknown_then():
    play = given(models("a", "b"), awake=["a"])
    play.feed(1.0, rides(1, "b"))
    assert play.feed(2.0, ev.RequestAbandoned(1)) == []
    with pytest.raises(InvalidEventError):
        play.core.handle(ev.RequestAbandoned(1), 3.0)
    with pytest.raises(InvalidEventError):
        play.core.handle(ev.RequestFinished(1), 3.0)


def test_what_is_awake_falls_asleep_though_something_rides_along_elsewhere():
    play = given(models("a", "b", idle_sleep=5.0), awake=["a"], default_model="b", default_after=60.0)
    play.feed(1.0, rides(1, "b", 1e6))
    found = play.feed(6.0, ev.DeadlineReached())
    assert [each.reason for each in found if isinstance(each, fx.SwitchStarted)] == ["idle"]


def test_a_removed_model_and_a_stop_end_rides():
    play = given(models("a", "b", "c"), awake=["a"])
    play.feed(1.0, rides(1, "b"))
    play.feed(1.0, rides(2, "c"))
    play.feed(1.0, asks(4, "a"))  # in flight, so that the stop takes a while
    found = play.feed(2.0, ev.ConfigReplaced(models("a", "c"), Rules(), play.core.state.policy))
    assert [(r.request, r.refusal) for r in found if isinstance(r, fx.Reject)] == [(1, fx.Refusal.UNKNOWN_MODEL)]
    found = play.feed(3.0, ev.ShutdownRequested())
    assert [(r.request, r.refusal) for r in found if isinstance(r, fx.Reject)] == [(2, fx.Refusal.STOPPING)]
    found = play.feed(3.0, rides(3, "c"))
    assert [(r.request, r.refusal) for r in found if isinstance(r, fx.Reject)] == [(3, fx.Refusal.STOPPING)]


# ---- deadlines


def hopeful(**more):
    play = given(models("a", "b"), awake=["a"], first_guesses={"b": (60.0, None)}, **more)
    play.core.state.too_late = wait_estimate.too_late
    return play


def test_what_cannot_be_in_time_is_rejected_and_causes_no_switch():
    play = hopeful()
    (reject,) = play.feed(1.0, ev.RequestArrived(1, "b", deadline=30.0))
    assert (reject.refusal, reject.retry_after) == (fx.Refusal.DEADLINE, pytest.approx(32.0))
    assert "cannot be had within 30s: a request waits about 1m2s" in reject.message
    assert play.core.state.switch is None
    assert play.core.state.models["b"].meter.arrival_rate(1.0) == 0.0
    play(at(2.0, ev.RequestArrived(2, "b", deadline=70.0), queued(2, "b"), begins("b", "a"), leaves("a", 2.0)))


def test_answers_count_for_it():
    play = hopeful()
    play.core.state.models["a"].meter.service = 40.0
    (reject,) = play.feed(1.0, ev.RequestArrived(1, "a", deadline=30.0))
    assert reject.refusal is fx.Refusal.DEADLINE
    play(at(2.0, ev.RequestArrived(2, "a", deadline=50.0), admitted(2, "a")))


def test_what_is_refused_anyway_is_refused_for_that():
    play = hopeful()
    play.feed(1.0, ev.LeaseChanged(1))
    found = play.feed(2.0, ev.RequestArrived(1, "b", deadline=1.0))
    assert [each.refusal for each in found if isinstance(each, fx.Reject)] == [fx.Refusal.LEASED]


def test_a_deadline_holds_for_what_rides_along():
    play = hopeful()
    (reject,) = play.feed(1.0, ev.RequestArrived(1, "b", rides=100.0, deadline=5.0))
    assert reject.refusal is fx.Refusal.DEADLINE


def test_the_default_model_does_not_come_back_while_what_rode_along_is_served():
    play = given(models("a", "b"), awake=["b"], default_model="a", default_after=5.0, alive_every=0.0)
    play.feed(0.0, ev.SleepRequested("b", 1))
    play.feed(0.0, rides(1, "b", 1e6))
    play.feed(1.0, ev.HookFinished(3, ok=False))
    found = play.feed(6.0, ev.HookFinished(4, ok=True))  # b would not sleep, and is served; the quiet is over
    assert [each.request for each in found if isinstance(each, fx.Admit)] == [1]
    assert not [each for each in found if isinstance(each, fx.SwitchStarted)]
