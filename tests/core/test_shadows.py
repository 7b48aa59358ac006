"""Shadows: asked what they would do, counted, never followed, dropped when they fail."""

from __future__ import annotations

import asyncio

import pytest
from playbook import given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import Stay, SwitchTo, WaitUntil
from llmux.runtime.shadow import Shadow, Shadowed


class Says:
    """A policy that gives these answers, one after the other, the last one for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = []

    def decide(self, now):
        self.seen.append((now.time, now.waiting))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Learns(Says):
    def __init__(self, *answers):
        super().__init__(*answers)
        self.records = []

    def on_switch_completed(self, record):
        self.records.append(record.id)
        if len(self.records) > 1:
            raise SystemExit("enough")


def shadowed(policy, *shadows):
    """Return a playbook of a and b, a awake and busy, with these shadows, and three arrivals for b."""
    own = tuple(Shadow(f"s{number}", each) for number, each in enumerate(shadows))
    dropped = []
    followed = Shadowed(policy, own, lambda *told: dropped.append(told))
    play = given(models("a", "b"), awake=["a"], policy=followed)
    play.shadows, play.dropped = own, dropped
    play.feed(1.0, ev.RequestArrived(1, "a"))
    effects = [play.feed(2.0 + number, ev.RequestArrived(2 + number, "b")) for number in range(3)]
    return play, effects


def test_answers_are_counted_by_whether_they_lead_to_what_was_done():
    real = Says(Stay(), WaitUntil(60.0), SwitchTo("b"))
    shadow = Says(Stay(), SwitchTo("b"), SwitchTo("b"))
    play, _ = shadowed(real, shadow, Says(WaitUntil(50.0)), Says(SwitchTo("c"), "b", None))
    assert shadow.seen == real.seen
    assert [each.counts for each in play.shadows] == [
        {("stay", True): 1, ("switch", False): 1, ("switch", True): 1},
        {("wait", True): 2, ("wait", False): 1},
        {("nonsense", False): 2, ("nonsense", True): 1},
    ]


def test_shadows_change_nothing():
    alone, told = shadowed(Says(Stay(), Stay(), SwitchTo("b")))
    followed, same = shadowed(Says(Stay(), Stay(), SwitchTo("b")), Says(SwitchTo("b")), Says(Stay()))
    assert told == same
    assert alone.core.next_deadline() == followed.core.next_deadline()
    assert not followed.core.state.policy_errors


@pytest.mark.parametrize("error", [RuntimeError("ill"), SystemExit("ill"), asyncio.CancelledError("ill")])
def test_a_shadow_that_raises_is_told_once_and_dropped(error):
    ill = Says(error)
    play, _ = shadowed(Says(Stay()), ill, Says(Stay()))
    assert play.dropped == [("s0", f"{type(error).__name__}: ill")]
    assert len(ill.seen) == 1
    assert [sum(each.counts.values()) for each in play.shadows] == [0, 3]


def test_shadows_learn_from_switches():
    learns, deaf, own = Learns(Stay()), Says(Stay()), Learns(Stay())
    dropped = []
    shadows = (Shadow("learns", learns), Shadow("deaf", deaf))
    policy = Shadowed(own, shadows, lambda *told: dropped.append(told))
    play = given(models("a"), awake=["a"], policy=policy)
    found = []
    for number, event in enumerate(
        (ev.SleepRequested("a", 1), ev.ActivationRequested("a", 2), ev.SleepRequested("a", 3))
    ):
        play.feed(number + 1.0, event)
        found += play.feed(number + 1.5, ev.HookFinished(number + 2, ok=True))
    assert learns.records == [1, 2]
    assert own.records == [1, 2, 3]
    assert dropped == [("learns", "SystemExit: enough")]
    assert any(isinstance(each, fx.PolicyOverruled) for each in found)  # of its own policy's error


@pytest.mark.parametrize("answer", [RuntimeError("ill"), SwitchTo("c"), WaitUntil(0.0), None])
def test_what_the_core_overrules_goes_to_the_oldest(answer):
    play, effects = shadowed(Says(answer), Says(SwitchTo("b")))
    assert any(isinstance(each, fx.SwitchStarted) for each in effects[0])
    assert [each.counts for each in play.shadows] == [{("switch", True): 1}]


def test_to_stay_with_what_is_idle_is_overruled():
    shadow = Shadow("s", Says(SwitchTo("b")))
    play = given(models("a", "b"), awake=["a"], policy=Shadowed(Says(Stay()), (shadow,), print))
    play.feed(1.0, ev.RequestArrived(1, "b"))
    assert shadow.counts == {("switch", True): 1}


def test_what_else_a_policy_has_is_had():
    policy = Shadowed(Learns(Stay()), (), print)
    assert policy.records == []
    with pytest.raises(AttributeError):
        _ = policy.anticipate
