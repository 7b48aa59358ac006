"""Manual mode: the policy is off, and operators switch."""

from __future__ import annotations

from playbook import Playbook, at, given, models
from steps import *

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.model import Pin
from llmux.core.policy import SwitchTo
from llmux.core.spec import Rules
from llmux.estimates import Estimates


class NeverAsked:
    """A policy that must not be asked."""

    def decide(self, now):
        raise AssertionError(now)

    anticipate = decide


class Eager:
    """Would wake anybody."""

    def decide(self, now):
        return SwitchTo(now.waiting[0])

    def anticipate(self, _now):
        return SwitchTo("b")


def test_who_waits_waits_for_the_operator() -> None:
    play = given(models("a", "b"), awake=["a"], policy=NeverAsked(), manual=True, max_wait=5.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b")),
        at(3.0, ev.RequestFinished(1)),
        at(7.0, ev.DeadlineReached()),
        at(8.0, asks(3, "a"), admitted(3, "a")),
        at(9.0, ev.ActivationRequested("b", 1), begins("b", "a", why="requested"), accepted(1)),
        at(10.0, ev.RequestFinished(3), drained(1.0), sleeps("a", 10.0)),
        at(11.0, ok("sleep a"), holders(), wakes("b")),
        at(12.0, ok("wake b"), awake("b", 3.0), ends(3.0, 1.0, 2.0, 2.0), admitted(2, "b", 10.0)),
    )


def test_what_the_operator_put_to_sleep_stays_asleep_until_the_policy_is_back() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.ManualChanged(1), fx.ManualSet(True), fx.Answer(1, True)),
        at(1.5, ev.ManualChanged(2), fx.Answer(2, True)),
        at(2.0, ev.SleepRequested("a", 3), begins(None, "a", why="requested"), leaves("a", 2.0), accepted(3)),
        at(3.0, ok("sleep a"), holders(), ends(1.0, 0.0, 1.0)),
        at(4.0, asks(1, "a"), queued(1, "a")),
    )
    assert play.ledger.decisions.records[-1].reason.startswith(
        "no model is woken yet: manual mode, only an operator"
    )
    play(
        at(
            5.0,
            ev.ManualChanged(4, manual=False),
            fx.ManualSet(False),
            fx.Answer(4, True),
            begins("a"),
            wakes("a"),
        ),
    )


def test_nothing_goes_to_sleep_or_is_woken_by_itself() -> None:
    play = given(
        models("a", "b", idle_sleep=3.0),
        awake=["a"],
        policy=Eager(),
        manual=True,
        anticipate=True,
        alive_every=0.0,
    )
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.RequestFinished(1)),
        at(5.0, ev.DeadlineReached()),
    )
    assert play.core.next_deadline() is None
    effects = play.feed(6.0, ev.ManualChanged(1, manual=False))
    assert fx.SwitchStarted(1, ("a",), None, "idle") in effects


def test_an_engine_that_is_gone_comes_back_with_its_own_request() -> None:
    play = given(models("a", "b"), awake=["a"], policy=NeverAsked(), manual=True)
    play.feed(1.0, ev.EngineLost("a", refused=True))
    play(
        at(
            2.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            lost("a", "a connection failed, and alive exited with 1", 2.0),
        ),
        at(3.0, asks(1, "b"), queued(1, "b")),
        at(4.0, asks(2, "a"), queued(2, "a"), begins("a", why="its engine is gone"), run("wake a")),
    )


def test_pins_and_a_preload_are_what_operators_ask_for() -> None:
    play = given([*models("a", preload=True), *models("b")], policy=NeverAsked(), manual=True)
    assert play.core.state.switch.reason == "preload"
    play.feed(1.0, ev.HookFinished(3, ok=True))
    effects = play.feed(2.0, ev.PinChanged("b", 1))
    assert fx.SwitchStarted(2, ("a",), "b", "pinned") in effects


def test_a_reload_that_changes_it_has_the_last_word() -> None:
    play = given(models("a"))
    play(
        at(1.0, ev.ManualChanged(1), fx.ManualSet(True), fx.Answer(1, True)),
        at(2.0, replaced(models("a"), min_active=1.0)),
    )
    assert play.core.state.manual
    play(
        at(3.0, replaced(models("a"), manual=True)),
        at(4.0, replaced(models("a")), fx.ManualSet(False)),
    )


def test_what_operators_had_asked_of_the_last_llmux_holds() -> None:
    specs = models("a", "b", "c", "d")
    play = Playbook(Core(specs, Rules(capacity=None), NeverAsked(), Estimates()))
    pins = {"gone": Pin(), "b": Pin(-1.0, "over"), "c": Pin(30.0, "a demo"), "d": Pin(None, "another")}
    play(
        at(
            0.0,
            ev.Started(pins=pins, manual=True),
            fx.ManualSet(True),
            fx.PinSet("c", True, 30.0, "a demo"),
            fx.PinSet("d", False, None, "model 'c' is pinned and may not be awake with it"),
            alone("alive a"),
            alone("alive b"),
            alone("alive c"),
            alone("alive d"),
        ),
    )
    for hook in (1, 2, 3):
        play.feed(1.0, ev.HookFinished(hook, ok=False))
    effects = play.feed(1.0, ev.HookFinished(4, ok=False))
    assert fx.SwitchStarted(1, (), "c", "pinned") in effects
    play(
        at(2.0, asks(1, "a"), refused(1, "a", "pinned", "model 'c' is pinned: a demo", 28.0)),
        at(3.0, ev.SleepRequested("c", 1), fx.Answer(1, False, reason="model 'c' is pinned: a demo")),
    )
