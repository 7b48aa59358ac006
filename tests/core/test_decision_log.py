"""The decision log: what was decided and why, in words with the figures of that moment."""

from __future__ import annotations

import pytest
from playbook import given, models

from llmux.core import Core
from llmux.core import events as ev
from llmux.core.policy import Stay, SwitchTo, WaitUntil
from llmux.core.spec import Rules
from llmux.observability.decision_log import KEPT, DecisionLog, duration
from llmux.observability.figures import figures
from llmux.observability.timeline import Timeline


class Says:
    """A policy that gives these answers, one after the other, the last one for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def decide(self, _now):
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def asked(policy, *arrivals, specs=None, awake=("a",), **rules):
    """Let requests arrive, one a second (``a`` first, which keeps it busy)."""
    play = given(specs or models("a", "b", "c"), awake=awake, policy=policy, **rules)
    for time, model in enumerate(arrivals, 1):
        play.feed(float(time), ev.RequestArrived(time, model))
    return play


def told(play, count=KEPT):
    return [record.reason for record in play.ledger.decisions.latest(play.core.state, count)]


def test_a_policy_that_stays_says_what_that_costs_at_this_moment():
    play = asked(Says(Stay("more come here")), "a", "b", "b", "c")
    (record,) = play.ledger.decisions.records
    assert (record.kind, record.target, record.by, record.switch) == ("stay", None, "policy", None)
    assert (record.time, record.last, record.times) == (2.0, 4.0, 3)
    assert record.serving == (("a", 1, 0),)
    assert record.waiting == (("b", 1, 0.0, 0.0, 12.0),)
    play.core.state.now = 10.0
    (now,) = play.ledger.decisions.latest(play.core.state, 5)
    assert now.waiting == (("b", 2, 8.0, 15.0, 12.0), ("c", 1, 6.0, 6.0, 12.0))
    assert now.reason == (
        "stays with a (1 in flight): more come here; 2 waiting for b have cost 15 s of waiting,"
        " a switch costs 12 s; 1 waiting for c has cost 6 s of waiting, a switch costs 12 s"
    )
    assert record.waiting == (("b", 1, 0.0, 0.0, 12.0),)  # the look has changed nothing


def test_a_switch_is_the_decision_that_led_to_it():
    play = asked(Says(Stay(), SwitchTo("b", "enough")), "a", "b", "b")
    stay, switch = play.ledger.decisions.records
    assert (stay.id, stay.switch, switch.id, switch.switch, switch.leaving) == (1, None, 2, 1, ("a",))
    assert (
        switch.reason == "goes from a to b: enough; 2 waiting for b have cost 1 s of waiting, a switch costs 12 s"
    )
    assert play.ledger.decisions.latest(play.core.state, 1) == [switch]
    assert play.ledger.decisions.latest(play.core.state, 0) == []
    assert play.ledger.decisions.since(0) == [stay, switch]
    assert play.ledger.decisions.since(1) == [switch]
    assert play.ledger.decisions.since(2) == []


def test_the_same_answer_after_a_switch_is_another_decision():
    play = asked(Says(SwitchTo("b")), "a", "b")
    play.feed(3.0, ev.RequestAbandoned(2))
    play.feed(4.0, ev.RequestArrived(3, "b"))
    assert [record.switch for record in play.ledger.decisions.records] == [1, 2]


def test_a_wait_says_until_when():
    play = asked(Says(WaitUntil(5.0, "soon")), "b")
    assert told(play) == [
        (
            "stays with a, and thinks again in 4 s at the latest: soon; 1 waiting for b has cost 0 s of waiting,"
            " a switch costs 12 s"
        )
    ]
    assert asked(Says(WaitUntil(1e9)), "b").ledger.decisions.records[-1].until == 61.0


def test_guard_rails_are_named():
    held = asked(Says(SwitchTo("b", "now")), "b", min_active=5.0)
    assert told(held)[0].startswith(
        "stays with a for 4 s more, then goes to b: now, but min_active is not over; 1 "
    )
    assert told(asked(Says(SwitchTo("b")), "b", min_active=5.0))[0].partition("; ")[0] == (
        "stays with a for 4 s more, then goes to b: min_active is not over"
    )
    held.feed(5.0, ev.DeadlineReached())
    assert [(record.kind, record.by, record.switch) for record in held.ledger.decisions.records] == [
        ("wait", "min_active", None),
        ("switch", "policy", 1),
    ]
    overruled = asked(Says(SwitchTo("c")), "b")
    assert told(overruled)[0].startswith(
        "goes from a to b: the oldest waiter is there; the policy cannot be followed, it named 'c', for which"
    )
    overdue = asked(Says(Stay()), "a", "b", max_wait=10.0)
    overdue.feed(12.0, ev.DeadlineReached())
    assert told(overdue)[1].startswith("goes from a to b: a request has waited 10 s, which is as long as max_wait")


@pytest.mark.parametrize("reason", [7, None, object(), "long " * 1000])
def test_a_policy_may_give_any_reason(reason):
    play = asked(Says(Stay(reason)), "a", "b")
    assert len(told(play)[0]) < 400
    assert asked(Says(SwitchTo("b", reason)), "b").core.state.switch.reason


def test_switches_that_nobody_waits_for_say_who_wanted_them():
    play = given(models("a", "b"), awake=["a"])
    play.feed(1.0, ev.SleepRequested("a", 1))
    play.feed(2.0, ev.HookFinished(3, ok=True))
    play.feed(3.0, ev.ActivationRequested("b", 2))
    assert told(play) == ["puts a to sleep: an operator asked for it", "wakes b: an operator asked for it"]
    assert [record.by for record in play.ledger.decisions.records] == ["core", "core"]


def test_nobody_awake_and_nothing_to_do():
    play = asked(Says(WaitUntil(9.0)), "b", awake=())
    assert told(play)[0].startswith("wakes no model yet, and thinks again in 8 s at the latest; 1 waiting for b")


def test_only_some_of_many_that_wait_are_told_of():
    names = [f"m{number}" for number in range(12)]
    play = asked(Says(Stay()), *names[:4], *names[3:], specs=models(*names), awake=["m0"])
    assert told(play)[0].endswith("; 8 more waiting for other models")
    assert "2 waiting for m3" in told(play)[0]
    assert "m4" not in told(play)[0]
    (record,) = play.ledger.decisions.latest(play.core.state, 1)
    assert [each.model for each in record.waiting] == names[1:9]
    assert record.more == 3


def test_the_log_is_bounded_and_decisions_can_be_left_out():
    core = Core(models("a"), Rules(), Says(Stay()))
    quiet = Core(models("a"), Rules(), Says(Stay()), explain=False)
    core.state.figures = quiet.state.figures = figures
    logs = []
    for each in (core, quiet):
        timeline = Timeline()
        logs.append(DecisionLog(timeline, 2))

        def feed(event, each=each, timeline=timeline):
            timeline.add(1.0, event, each.handle(event, 1.0))

        feed(ev.Started())
        feed(ev.HookFinished(1, ok=False))
        for turn in range(3):
            feed(ev.ActivationRequested("a", turn))
            feed(ev.HookFinished(next(iter(each.state.hooks)), ok=True))
            feed(ev.SleepRequested("a", turn))
            feed(ev.HookFinished(next(iter(each.state.hooks)), ok=True))
        feed(ev.RequestArrived(1, "a"))
    assert [record.id for record in logs[0].records] == [6, 7]
    assert not logs[1].records
    assert logs[1].latest(quiet.state, 5) == logs[1].since(0) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (0.254, "0.25 s"), (9.96, "10 s"), (13.6, "14 s"), (119.0, "119 s"), (200.0, "3.33 min")],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text
