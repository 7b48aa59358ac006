"""Waking before anybody waits, where the user allows it."""

from __future__ import annotations

import pytest
from llmux.policies.adaptive import Memory, foresee
from playbook import at, given, models, unexplained
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import Stay, SwitchTo, WaitUntil
from llmux.core.spec import HookKind

LIKELY = "it is likely to be asked next"


class Foreseeing:
    """Answers the oldest waiter, and in quiet times what it was told to."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = 0

    def decide(self, now):
        return SwitchTo(now.waiting[0])

    def anticipate(self, _now):
        self.asked += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def quiet(answer, **more):
    """Feed one request of "a" from its arrival to its end; return what that leads to."""
    rules = {"anticipate": True, **more.pop("rules", {})}
    play = given(more.pop("specs", None) or models("a", "b"), awake=["a"], policy=Foreseeing(answer), **rules)
    for time, event in more.pop("before", ()):
        play.feed(time, event)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    return play, play.feed(2.0, ev.RequestFinished(1))


def started(effects):
    return [effect.to for effect in effects if isinstance(effect, fx.SwitchStarted)]


def test_a_model_is_woken_that_nobody_waits_for():
    play, found = quiet(SwitchTo("b"))
    assert unexplained(found)[0] == fx.SwitchStarted(1, ("a",), "b", LIKELY)
    play(
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            holders(),
            holders("b"),
            fx.RunHook(4, "b", HookKind.WAKE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            4.0,
            ok("wake b"),
            fx.ModelActivated("b", 1, ("a",), 2.0),
            fx.SwitchEnded(1, ("a",), "b", "success", 2.0, 0.0, 2.0, 2.0),
        ),
    )


def test_not_unless_the_user_allows_it():
    play, found = quiet(SwitchTo("b"), rules={"anticipate": False})
    assert not started(found)
    assert play.core.state.policy.asked == 0


@pytest.mark.parametrize("answer", [Stay(), WaitUntil(9.0)])
def test_it_may_leave_things_as_they_are(answer):
    play, found = quiet(answer)
    assert not started(found)
    assert play.core.state.policy.asked == 1


ODD = [SwitchTo("a"), SwitchTo("x"), None, WaitUntil(0.0), RuntimeError("ill"), SystemExit(3)]


@pytest.mark.parametrize("answer", ODD)
def test_nonsense_is_told_once_and_changes_nothing(answer):
    play, found = quiet(answer)
    assert not started(found)
    assert [type(effect) for effect in found if isinstance(effect, fx.PolicyOverruled)] == [fx.PolicyOverruled]
    play.feed(3.0, ev.RequestArrived(2, "a"))
    assert not play.feed(4.0, ev.RequestFinished(2))


def test_while_something_is_in_flight_or_waits_nothing_is_anticipated():
    play = given(models("a", "b"), awake=["a"], policy=Foreseeing(SwitchTo("b")), anticipate=True)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(1.0, ev.RequestArrived(2, "a"))
    play.feed(2.0, ev.RequestFinished(1))
    assert play.core.state.policy.asked == 0


def test_while_the_policy_lets_a_request_wait_nothing_is_anticipated():
    policy = Foreseeing(SwitchTo("c"))
    policy.decide = lambda now: WaitUntil(now.time + 50.0)
    play = given(models("a", "b", "c"), awake=["a"], policy=policy, anticipate=True)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(1.5, ev.RequestArrived(2, "b"))
    assert not started(play.feed(2.0, ev.RequestFinished(1)))
    assert policy.asked == 0


def test_a_pin_goes_before():
    _, found = quiet(SwitchTo("b"), before=[(0.5, ev.PinChanged("a", 1))])
    assert not started(found)


def test_min_active_goes_before():
    _, found = quiet(SwitchTo("b"), rules={"min_active": 60.0})
    assert not started(found)


def test_a_lease_goes_before():
    play = given(models("a", "b"), awake=["a"], policy=Foreseeing(SwitchTo("b")), anticipate=True)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(1.5, ev.LeaseChanged(1, leased=True))
    play.feed(2.0, ev.RequestFinished(1))
    assert play.core.state.policy.asked == 0


def test_a_policy_without_foresight_is_not_asked():
    play = given(models("a", "b"), awake=["a"], anticipate=True)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    assert not play.feed(2.0, ev.RequestFinished(1))


def test_nothing_is_anticipated_while_nothing_is_awake():
    play = given(models("a", "b"), awake=["a"], policy=Foreseeing(SwitchTo("b")), anticipate=True)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(1.5, ev.SleepRequested("a", 1))
    play.feed(2.0, ev.RequestFinished(1))
    found = play.feed(3.0, ev.HookFinished(3, ok=True))
    assert not started(found)


# ---- what a policy makes of it


def rounds(order, delay=5.0):
    """Feed a core with requests, each of which follows the answer before it after so long."""
    play = given(models("a", "b", "c"), awake=["a"])
    now, hook = 0.0, 3
    for number, model in enumerate(order, 1):
        now += delay
        for effect in play.feed(now, ev.RequestArrived(number, model)):
            if isinstance(effect, fx.RunHook):
                hook = effect.hook
        while play.core.state.switch is not None:
            now += 1.0
            for effect in play.feed(now, ev.HookFinished(hook, ok=True)):
                if isinstance(effect, fx.RunHook):
                    hook = effect.hook
        now += 1.0
        play.feed(now, ev.RequestFinished(number))
    return play.core._snapshot


def test_of_two_that_alternate_the_other_is_next():
    assert foresee(rounds("abababab"), Memory()).model == "a"


def test_nobody_is_next_who_was_not_seen_often_enough():
    assert isinstance(foresee(rounds("abab"), Memory()), Stay)


def test_who_is_asked_again_and_again_stays():
    assert isinstance(foresee(rounds("aaabaaabaaabaaab" + "aaa"), Memory()), Stay)


def test_who_has_not_been_asked_since_its_wake_stays():
    shown = rounds("abababab")
    shown.models["b"]._model.awake_since = 1e9
    assert isinstance(foresee(shown, Memory()), Stay)


def test_a_model_that_is_gone_is_not_next():
    shown = rounds("abababab")
    shown._models.pop("a")
    assert isinstance(foresee(shown, Memory()), Stay)
