"""A policy that chooses among others: which of them decides is told to the core by an event."""

from __future__ import annotations

import pytest
from playbook import given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import Stay, SwitchTo
from llmux.observability.decision_log import DecisionLog, figures
from llmux.observability.timeline import Timeline


class Either:
    """Stays or goes, as it is told; ``ill`` makes it raise."""

    def __init__(self):
        self.chosen = "stays"

    def adopt(self, name):
        if name == "ill":
            raise RuntimeError("ill")
        if name not in ("stays", "goes") or name == self.chosen:
            return None
        before, self.chosen = self.chosen, name
        return before

    def decide(self, now):
        return Stay("not yet") if self.chosen == "stays" else SwitchTo(now.waiting[0], "at once")


def waiting_for_b(policy):
    """Return a playbook in which b waits and a serves."""
    play = given(models("a", "b"), awake=["a"], policy=policy)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "b"))
    return play


def test_the_one_that_is_chosen_decides_at_once():
    play = waiting_for_b(Either())
    effects = play.feed(3.0, ev.PolicyChosen("goes", "it was better"))
    assert effects[0] == fx.PolicyAdopted("goes", "stays", "it was better")
    assert [each.to for each in effects if isinstance(each, fx.SwitchStarted)] == ["b"]


@pytest.mark.parametrize("name", ["stays", "another"])
def test_nothing_changes_for_the_same_or_for_what_is_not_there(name):
    play = waiting_for_b(Either())
    effects = play.feed(3.0, ev.PolicyChosen(name))
    assert not [each for each in effects if isinstance(each, fx.PolicyAdopted | fx.SwitchStarted)]
    assert play.core.state.policy.chosen == "stays"


def test_one_that_raises_is_overruled_and_goes_on():
    play = waiting_for_b(Either())
    effects = play.feed(3.0, ev.PolicyChosen("ill"))
    assert fx.PolicyOverruled("adopt raised RuntimeError: ill") in effects
    assert play.core.state.policy.chosen == "stays"


def test_a_policy_that_chooses_among_none_is_left_alone():
    class Plain:
        def decide(self, _now):
            return Stay()

    play = waiting_for_b(Plain())
    effects = play.feed(3.0, ev.PolicyChosen("goes"))
    assert not [each for each in effects if isinstance(each, fx.PolicyAdopted | fx.PolicyOverruled)]


def test_decisions_tell_it():
    play = given(models("a", "b"), awake=["a"], policy=Either())
    s, timeline = play.core.state, Timeline()
    s.figures = figures
    log = DecisionLog(timeline)

    def feed(time, event):
        timeline.add(time, event, play.feed(time, event))

    feed(1.0, ev.RequestArrived(1, "a"))
    feed(2.0, ev.RequestArrived(2, "b"))
    feed(3.0, ev.PolicyChosen("goes", "it was better"))
    kinds = [(record.kind, record.by) for record in log.latest(s, 10)]
    assert kinds == [("stay", "policy"), ("adopt", "auto"), ("switch", "policy")]
    told = log.records[1]
    assert told.reason == "goes decides from now on, in place of stays: it was better"
    assert (told.time, told.target, told.switch) == (3.0, None, None)


def test_what_is_told_last_is_shown_as_it_was():
    play = given(models("a", "b"), awake=["a"], policy=Either())
    s, timeline = play.core.state, Timeline()
    s.figures = figures
    log = DecisionLog(timeline)
    timeline.add(1.0, None, play.feed(1.0, ev.PolicyChosen("goes", "it was better")))
    (last,) = log.latest(s, 10)
    assert (last.kind, last.waiting) == ("adopt", ())
