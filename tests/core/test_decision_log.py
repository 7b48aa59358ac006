"""The decision log: what was decided and why, in words with the figures of that moment."""

from __future__ import annotations

import pytest
from playbook import given, models

from llmux.core import Core
from llmux.core import events as ev
from llmux.core.policy import Stay, SwitchTo, WaitUntil
from llmux.core.spec import Level, Rules
from llmux.estimates import Estimates
from llmux.observability.decision_log import KEPT, DecisionLog, duration, figures
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
    assert record.waiting == (("b", 1, 0.0, 0.0, 12.0, 0),)
    play.core.state.now = 10.0
    (now,) = play.ledger.decisions.latest(play.core.state, 5)
    assert now.waiting == (("b", 2, 8.0, 15.0, 12.0, 0), ("c", 1, 6.0, 6.0, 12.0, 0))
    assert now.reason == (
        "a stays (1 in flight): more come here; 2 waiting for b, longest 8 s;"
        " a switch takes 12 s (assumed, not measured yet); also waiting: 1 for c"
    )
    assert record.waiting == (("b", 1, 0.0, 0.0, 12.0, 0),)  # the look has changed nothing


def test_how_often_the_cost_of_a_switch_was_measured():
    play = asked(Says(Stay()), "a", "b")
    costs = play.core.state.costs

    def words():
        return told(play, 1)[0].partition("; ")[2]

    assert words() == "a switch takes 12 s (assumed, not measured yet)"
    costs.record_wake("b", 7.0)
    costs.record_wake("b", 7.0)
    assert words() == "a switch takes 9 s (assumed, not measured yet)"  # the sleep of a is still a guess
    costs.record_sleep("a", 3.0)
    assert words() == "a switch takes 10 s (measured once)"
    for _ in range(6):
        costs.record(["a"], "b", 0.6)
    assert words() == "a switch takes 0.6 s (measured 6 times)"


def test_how_often_was_measured_what_a_switch_between_levels_costs():
    specs = [*models("a", levels=(Level("ram", 5), Level("off", 0))), *models("b")]
    play = asked(Says(Stay()), "a", "b", specs=specs)
    costs = play.core.state.costs

    def samples():
        (waiting,) = play.ledger.decisions.latest(play.core.state, 1)[0].waiting
        return waiting.samples

    costs.record(["a"], "b", 0.6)  # says nothing about levels
    costs.record_wake("b", 3.0)
    assert samples() == 0
    costs.record_sleep("a", 3.0, "off")
    assert samples() == 0
    costs.record_sleep("a", 3.0, "ram")
    assert samples() == 1


def test_a_switch_is_the_decision_that_led_to_it():
    play = asked(Says(Stay(), SwitchTo("b", "enough")), "a", "b", "b")
    stay, switch = play.ledger.decisions.records
    assert (stay.id, stay.switch, switch.id, switch.switch, switch.leaving) == (1, None, 2, 1, ("a",))
    assert switch.reason == "a → b: 2 waiting, longest 1 s; a switch takes 12 s (assumed, not measured yet)"
    assert switch.said == "enough"
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
            "a stays, decided again within 4 s: soon; 1 waiting for b;"
            " a switch takes 12 s (assumed, not measured yet)"
        )
    ]
    assert asked(Says(WaitUntil(1e9)), "b").ledger.decisions.records[-1].until == 61.0


def test_guard_rails_are_named():
    held = asked(Says(SwitchTo("b", "now")), "b", min_active=5.0)
    assert told(held)[0].startswith("a stays for 4 s more (min_active), then b: 1 waiting for b; a switch takes")
    held.feed(5.0, ev.DeadlineReached())
    assert [(record.kind, record.by, record.switch) for record in held.ledger.decisions.records] == [
        ("wait", "min_active", None),
        ("switch", "policy", 1),
    ]
    overruled = asked(Says(SwitchTo("c")), "b")
    assert told(overruled)[0].startswith(
        "a → b: the oldest request first, because the policy named 'c', for which no request waits; 1 waiting"
    )
    overdue = asked(Says(Stay()), "a", "b", max_wait=10.0)
    overdue.feed(12.0, ev.DeadlineReached())
    assert told(overdue)[1].startswith("a → b: a request has waited 10 s, as long as max_wait")


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
    assert told(play) == ["a → asleep: an operator asked for it", "wakes b: an operator asked for it"]
    assert [record.by for record in play.ledger.decisions.records] == ["core", "core"]


def test_nobody_awake_and_nothing_to_do():
    play = asked(Says(WaitUntil(9.0)), "b", awake=())
    assert told(play)[0].startswith("no model is woken yet, decided again within 8 s: 1 waiting for b")


def test_only_some_of_many_that_wait_are_told_of():
    names = [f"m{number}" for number in range(12)]
    play = asked(Says(Stay()), *names[:4], *names[3:], specs=models(*names), awake=["m0"])
    assert told(play)[0].endswith("; also waiting: 1 for m2, 2 for m3, 8 for other models")
    assert "m4" not in told(play)[0]
    (record,) = play.ledger.decisions.latest(play.core.state, 1)
    assert [each.model for each in record.waiting] == names[1:9]
    assert record.more == 3


def test_the_log_is_bounded_and_decisions_can_be_left_out():
    core = Core(models("a"), Rules(), Says(Stay()), Estimates())
    quiet = Core(models("a"), Rules(), Says(Stay()), Estimates(), explain=False)
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
    [
        (0.0, "0 s"),
        (0.0004, "0 s"),
        (0.0406, "41 ms"),
        (0.0999, "0.1 s"),
        (0.254, "0.25 s"),
        (9.96, "10 s"),
        (13.6, "14 s"),
        (119.0, "119 s"),
        (200.0, "3.33 min"),
    ],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text
