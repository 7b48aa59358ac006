"""Shadows: asked what they would do, counted, never followed, dropped when they fail."""

from __future__ import annotations

import pytest
from playbook import ANY, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import Stay, SwitchTo, WaitUntil
from llmux.core.spec import Rules
from llmux.runtime.shadow import Shadow


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
    play = given(models("a", "b"), awake=["a"], policy=policy)
    play.core.state.shadows = tuple(Shadow(f"s{number}", each) for number, each in enumerate(shadows))
    play.feed(1.0, ev.RequestArrived(1, "a"))
    effects = [play.feed(2.0 + number, ev.RequestArrived(2 + number, "b")) for number in range(3)]
    return play, effects


def test_answers_are_counted_by_whether_they_lead_to_what_was_done():
    real = Says(Stay(), WaitUntil(60.0), SwitchTo("b"))
    shadow = Says(Stay(), SwitchTo("b"), SwitchTo("b"))
    play, _ = shadowed(real, shadow, Says(WaitUntil(50.0)), Says(SwitchTo("c"), "b", None))
    assert shadow.seen == real.seen
    assert [each.counts for each in play.core.state.shadows] == [
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


@pytest.mark.parametrize("error", [RuntimeError("ill"), SystemExit("ill")])
def test_a_shadow_that_raises_is_told_once_and_dropped(error):
    ill = Says(error)
    play, effects = shadowed(Says(Stay()), ill, Says(Stay()))
    dropped = [each for told in effects for each in told if isinstance(each, fx.ShadowDropped)]
    assert dropped == [fx.ShadowDropped("s0", f"{type(error).__name__}: ill")]
    assert len(ill.seen) == 1
    assert [sum(each.counts.values()) for each in play.core.state.shadows] == [0, 3]


def test_shadows_learn_from_switches():
    learns, deaf = Learns(Stay()), Says(Stay())
    play = given(models("a"), awake=["a"])
    play.core.state.shadows = (Shadow("learns", learns), Shadow("deaf", deaf))
    effects = []
    for number, event in enumerate(
        (ev.SleepRequested("a", 1), ev.ActivationRequested("a", 2), ev.SleepRequested("a", 3))
    ):
        play.feed(number + 1.0, event)
        effects += play.feed(number + 1.5, ev.HookFinished(number + 2, ok=True))
    assert learns.records == [1, 2]
    assert fx.ShadowDropped("learns", "SystemExit: enough") in effects


@pytest.mark.parametrize("shadows", [(), (Shadow("new", Says(Stay())),)])
def test_a_reload_brings_its_own(shadows):
    play, _ = shadowed(Says(Stay()), Says(Stay()))
    play.feed(9.0, ev.ConfigReplaced(models("a", "b"), Rules(), ANY, shadows=shadows))
    assert play.core.state.shadows == shadows
