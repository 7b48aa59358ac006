"""Why those left who left: the figures of the moment in which it was chosen."""

from __future__ import annotations

import pytest
from playbook import given, models

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import Stay
from llmux.core.spec import HookKind, ModelSpec, Rules
from llmux.estimates import Estimates

THREE = [*models("a", "b", memory=3), *models("c", memory=7), *models("d", memory=2, keep_awake=True)]


def rows(play):
    made = play.ledger.decisions.eviction
    return {each.model: (each.left, each.why, each.keep_awake) for each in made.candidates}


def test_who_was_cheapest_to_lose_and_what_the_others_would_have_cost():
    play = given(THREE, awake=["a", "b", "d"], capacity=10)
    play.feed(1.0, ev.RequestArrived(1, "b"))
    play.feed(2.0, ev.RequestArrived(2, "c"))
    made = play.ledger.decisions.eviction
    assert (made.time, made.switch, made.target) == (2.0, 1, "c")
    assert made.left == ("a", "b")
    assert (made.need, made.free, made.grouped) == ({"": 7}, {"": 2}, False)
    assert rows(play) == {"a": (True, "", False), "b": (True, "", False), "d": (False, "", True)}
    busy = made.candidates[1]
    assert (busy.in_flight, busy.queued, busy.memory) == (1, 0, {"": 3})
    assert (busy.sleep, busy.wake, busy.expected) == (2.0, 10.0, pytest.approx(2.0, abs=0.01))
    assert busy.cost == busy.sleep + busy.wake * (1 + busy.expected)
    assert [play.ledger.decisions.evicted.get(name) for name in "abcd"] == [made, made, None, None]


def test_who_could_not_leave():
    specs = [*models("a", "b", "c", memory=2), *models("d", memory=3)]
    play = given(specs, awake=["a", "b", "c"], capacity=7, alive_every=0.0)
    play.feed(1.0, ev.PinChanged("a", 1))
    play.feed(2.0, ev.SleepRequested("b", 2))
    for ok in (False, True):  # its sleep fails, and it still answers
        (hook,) = play.ledger.hooks
        play.feed(2.5, ev.HookFinished(hook, ok, "" if ok else "exited with 1"))
    play.feed(2.6, ev.RequestArrived(1, "d"))
    assert rows(play) == {"a": (False, "pinned", False), "b": (False, "backoff", False), "c": (True, "", False)}


def test_without_memory_and_with_groups():
    play = given(models("a", "b"), awake=["a"])
    play.feed(1.0, ev.ActivationRequested("b", 1))
    made = play.ledger.decisions.eviction
    assert (made.need, made.free, made.grouped) == (None, None, False)
    assert rows(play) == {"a": (True, "apart", False)}
    assert made.candidates[0].memory is None
    grouped = [ModelSpec("a", companions=frozenset({"b"})), ModelSpec("b", companions=frozenset({"a"}))]
    play = given([*grouped, ModelSpec("c", companions=frozenset())], awake=["a", "b"])
    play.feed(1.0, ev.RequestArrived(1, "c"))
    assert play.ledger.decisions.eviction.grouped
    assert play.ledger.decisions.eviction.left == ("a", "b")


def test_going_to_sleep_and_a_wake_that_displaces_nobody_are_no_evictions():
    play = given(models("a", "b"), awake=["a"])
    play.feed(1.0, ev.SleepRequested("a", 1))
    (hook,) = play.ledger.hooks
    play.feed(2.0, ev.HookFinished(hook, ok=True))
    play.feed(3.0, ev.RequestArrived(1, "b"))
    assert [run.kind for run in play.ledger.hooks.values()] == [HookKind.WAKE]
    assert play.ledger.decisions.eviction is None


def test_where_nothing_is_explained_neither_is_this_nor_what_waits():
    class Waits:
        def decide(self, _now):
            return Stay()

    core = Core(models("a", "b"), Rules(), Waits(), Estimates(), explain=False)
    core.handle(ev.Started(), 0.0)
    core.handle(ev.HookFinished(1, ok=True), 0.0)
    core.handle(ev.HookFinished(2, ok=False), 0.0)
    told = core.handle(ev.RequestArrived(1, "a"), 1.0)
    told += core.handle(ev.RequestArrived(2, "b"), 1.0)
    told += core.handle(ev.ActivationRequested("b", 1), 1.0)
    assert core.state.switch.leaving
    assert not [effect for effect in told if isinstance(effect, fx.Decided | fx.RequestQueued)]
