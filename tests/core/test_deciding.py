"""Deciding: the policy, and the guard rails over it."""

from __future__ import annotations

import asyncio

import pytest
from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.phases import Phase
from llmux.core.policy import Stay, SwitchRecord, SwitchTo, WaitUntil
from llmux.core.spec import Rules
from llmux.core.state import FIRST_COME, Turns
from policies.adaptive import Adaptive


class Answers:
    """A policy that gives these answers, one after the other, the last one for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0
        self.records = []

    def decide(self, _now):
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def on_switch_completed(self, record):
        self.records.append(record)


def test_policy_is_asked_only_while_somebody_waits_for_what_is_not_awake() -> None:
    policy = Answers(Stay())
    play = given(models("a", "b", max_in_flight=1), awake=["a"], policy=policy)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "a"), queued(2, "a")),
    )
    assert policy.asked == 0
    play(at(3.0, asks(3, "b"), queued(3, "b"), fx.PolicyDecided("stay", None, "")))
    assert policy.asked == 1


def test_stay_while_every_awake_model_is_idle_is_overruled_and_said_once() -> None:
    play = given(models("a", "b"), awake=["a"], policy=Answers(Stay()))
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), fx.PolicyDecided("stay", None, "")),
        at(
            3.0,
            ev.RequestFinished(1),
            fx.PolicyOverruled("stayed although every awake model is idle"),
            fx.PolicyDecided("switch", "b", "first come, first served: the policy was overruled"),
            begins("b", "a", why="first come, first served"),
            leaves("a", 3.0),
        ),
        at(4.0, ok("sleep a"), holders(), wakes("b")),
        at(5.0, ok("wake b"), awake("b", 2.0), ends(2.0, 0.0, 2.0, 2.0), admitted(2, "b", 3.0)),
        at(6.0, ev.RequestFinished(2)),
        at(
            7.0,
            asks(3, "a"),
            queued(3, "a"),
            fx.PolicyDecided("switch", "a", "first come, first served: the policy was overruled"),
            begins("a", "b", why="first come, first served"),
            leaves("b", 2.0),
        ),
    )


def test_a_policy_that_always_stays_cannot_starve_anybody() -> None:
    play = given(models("a", "b"), awake=["a"], policy=Answers(Stay()), max_wait=10.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), fx.PolicyDecided("stay", None, "")),
        at(
            12.0,
            ev.DeadlineReached(),
            fx.PolicyDecided("overdue", "b", "a request has waited 10 s"),
            begins("b", "a", why="a request has waited 10 s"),
        ),
        at(13.0, asks(3, "a"), queued(3, "a")),
    )


def test_a_max_wait_below_a_second_is_kept_to_the_moment() -> None:
    play = given(models("a", "b"), awake=["a"], policy=Answers(Stay()), max_wait=0.5, alive_every=0.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), fx.PolicyDecided("stay", None, "")),
    )
    assert play.core.next_deadline() == 2.5


def test_the_longest_overdue_goes_first_over_policy_and_min_active() -> None:
    policy = Answers(SwitchTo("c"))
    play = given(models("a", "b", "c"), awake=["a"], policy=policy, max_wait=10.0, min_active=100.0)
    play(
        at(
            1.0,
            asks(1, "b"),
            queued(1, "b"),
            fx.PolicyOverruled("named 'c', for which no request waits"),
            fx.PolicyDecided("switch", "b", "first come, first served: the policy was overruled"),
        ),
        at(2.0, asks(2, "c"), queued(2, "c"), fx.PolicyDecided("switch", "c", "")),
        at(
            11.0,
            ev.DeadlineReached(),
            fx.PolicyDecided("overdue", "b", "a request has waited 10 s"),
            begins("b", "a", why="a request has waited 10 s"),
            leaves("a", 11.0),
        ),
        at(13.0, ok("sleep a"), holders(), wakes("b")),
        at(
            14.0,
            ok("wake b"),
            awake("b", 3.0),
            ends(3.0, 0.0, 3.0, 3.0),
            admitted(1, "b", 13.0),
            fx.PolicyDecided("overdue", "c", "a request has waited 12 s"),
            begins("c", "b", why="a request has waited 12 s"),
        ),
    )


def test_min_active_is_that_of_the_last_which_woke_of_several_which_leave() -> None:
    specs = [*models("a", "b", memory=4), *models("c", memory=8)]
    play = given(specs, awake=["a"], capacity=8, min_active=5.0)
    (wake,) = [
        effect.hook for effect in play.feed(1.0, ev.RequestArrived(1, "b")) if isinstance(effect, fx.RunHook)
    ]
    play.feed(10.0, ev.HookFinished(wake, ok=True))
    play.feed(11.0, ev.RequestFinished(1))
    assert not any(isinstance(effect, fx.SwitchStarted) for effect in play.feed(12.0, ev.RequestArrived(2, "c")))
    assert play.core.next_deadline() == 15.0
    begun = [effect for effect in play.feed(15.0, ev.DeadlineReached()) if isinstance(effect, fx.SwitchStarted)]
    assert [(set(effect.sources), effect.to) for effect in begun] == [({"a", "b"}, "c")]


def test_min_active_holds_a_switch_back() -> None:
    play = given(models("a", "b"), awake=["a"], min_active=5.0)
    play(at(1.0, asks(1, "b"), queued(1, "b"), fx.PolicyDecided("switch", "b", "")))
    assert play.core.next_deadline() == 5.0
    play(at(5.0, ev.DeadlineReached(), fx.SwitchStarted(1, ("a",), "b", "policy"), leaves("a", 5.0)))


def test_wait_until_is_asked_again_then_and_after_sixty_seconds_at_the_latest() -> None:
    policy = Answers(WaitUntil(4.0, "soon"), WaitUntil(1e9, "never"), SwitchTo("b", "enough"))
    play = given(models("a", "b"), awake=["a"], policy=policy, alive_every=0.0)
    play(at(1.0, asks(1, "b"), queued(1, "b"), fx.PolicyDecided("wait", None, "soon")))
    assert play.core.next_deadline() == 4.0
    play(at(4.0, ev.DeadlineReached()))
    assert play.core.next_deadline() == 64.0
    play(
        at(
            64.0,
            ev.DeadlineReached(),
            fx.PolicyDecided("switch", "b", "enough"),
            begins("b", "a", why="enough"),
            leaves("a", 64.0),
        )
    )


def test_nonsense_is_treated_as_first_come_first_served() -> None:
    class PanicError(BaseException):
        """As what pyo3 raises."""

    class SpeechlessError(Exception):
        def __str__(self):
            raise ValueError

    nonsense = [
        SwitchTo("nobody"),
        SwitchTo("a"),
        WaitUntil(0.5),
        WaitUntil(float("nan")),
        WaitUntil("later"),
        RuntimeError("ill"),
        SystemExit(3),
        asyncio.CancelledError("no more"),
        PanicError("in Rust"),
        SpeechlessError(),
        None,
        "b",
        "b" * 1_000_000,
    ]
    found = []
    for answer in nonsense:
        play = given(models("a", "b"), awake=["a"], policy=Answers(answer))
        effects = play.feed(1.0, ev.RequestArrived(1, "b"))
        assert fx.SwitchStarted(1, ("a",), "b", "first come, first served") in effects
        found += [effect.answer for effect in effects if isinstance(effect, fx.PolicyOverruled)]
    assert found == [
        "named 'nobody', for which no request waits",
        "named 'a', for which no request waits",
        "waits until 0.5, which is not in the future",
        "waits until nan, which is not in the future",
        "raised TypeError: '>' not supported between instances of 'str' and 'float'",
        "raised RuntimeError: ill",
        "raised SystemExit: 3",
        "raised CancelledError: no more",
        "raised PanicError: in Rust",
        "raised SpeechlessError: ",
        "answered None, which is not a decision",
        "answered 'b', which is not a decision",
        "answered '" + "b" * 299 + ", which is not a decision",
    ]


def test_ctrl_c_in_a_policy_ends_a_simulation() -> None:
    play = given(models("a", "b"), awake=["a"], policy=Answers(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        play.feed(1.0, ev.RequestArrived(1, "b"))


def test_policy_hears_of_every_switch_that_ended() -> None:
    policy = Answers(SwitchTo("b"))
    play = given(models("a", "b"), awake=["a"], policy=policy)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(3.0, ev.RequestAbandoned(2), ends(1.0, 1.0, result="abandoned")),
        at(4.0, asks(3, "b"), queued(3, "b"), begins("b", "a")),
        at(5.0, ev.RequestFinished(1), drained(1.0), sleeps("a", 5.0)),
        at(6.0, ok("sleep a"), holders(), wakes("b")),
        at(9.0, ok("wake b"), awake("b", 5.0), ends(5.0, 1.0, 4.0, 4.0), admitted(3, "b", 5.0)),
    )
    assert policy.records == [
        SwitchRecord(1, ("a",), "b", "abandoned", 1.0, None, 3.0),
        SwitchRecord(2, ("a",), "b", "success", 1.0, 4.0, 9.0),
    ]


def test_policy_that_raises_when_it_hears_of_a_switch_is_complained_about_once() -> None:
    class Deaf(Answers):
        def on_switch_completed(self, _record):
            raise SystemExit("what?")

    play = given(models("a", "b"), awake=["a"], policy=Deaf(SwitchTo("b")))
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(
            2.0,
            ok("sleep a"),
            holders(),
            ends(1.0, 0.0, 1.0),
            fx.PolicyOverruled("on_switch_completed raised SystemExit: what?"),
        ),
        at(3.0, ev.ActivationRequested("a", 2), begins("a", why="requested"), wakes("a"), accepted(2)),
        at(4.0, ok("wake a"), awake("a", 1.0), ends(1.0, 0.0, 1.0, 1.0)),
    )


def test_a_lost_engine_leaves_the_policy_no_reason_to_stay() -> None:
    play = given(models("a", "b"), awake=["a"], policy=Answers(Stay()))
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), fx.PolicyDecided("stay", None, "")),
        at(3.0, ev.EngineLost("a", refused=True), alone("alive a")),
        at(
            4.0,
            failed("alive a"),
            lost("a", "a connection failed, and alive failed", 4.0),
            fx.PolicyOverruled("stayed although every awake model is idle"),
            fx.PolicyDecided("switch", "b", "first come, first served: the policy was overruled"),
            begins("b", "a", why="first come, first served"),
        ),
        at(5.0, ev.RequestFinished(1), drained(1.0), run("sleep a")),
    )


def test_waiter_whose_model_has_no_room_any_more_under_its_new_definition_is_turned_away() -> None:
    small, big, others = models("a", memory=4), models("a", memory=8), models("p", memory=4)
    play = given([*small, *others], awake=["a", "p"], capacity=8)
    play(
        at(1.0, ev.PinChanged("p", 1), fx.PinSet("p", True, None), fx.Answer(1, True)),
        at(2.0, ev.SleepRequested("a", 2), begins(None, "a", why="requested"), leaves("a", 2.0), accepted(2)),
        at(3.0, asks(1, "a"), queued(1, "a")),
        at(
            4.0,
            replaced([*big, *others], capacity=8),
            refused(1, "a", "pinned", "model 'p' is pinned", 60.0, 1.0),
        ),
        at(6.0, ok("sleep a"), holders("p"), ends(4.0, 0.0, 4.0)),
    )


def test_what_fits_beside_those_awake_is_woken_whatever_the_policy_says() -> None:
    play = given(models("a", "b", "c", memory=4), awake=["a"], capacity=8, policy=Answers(WaitUntil(1e9)))
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(
            2.0,
            asks(2, "b"),
            queued(2, "b"),
            begins("b", why="there is room beside what is awake"),
            wakes("b", "a"),
        ),
        at(3.0, ok("wake b"), awake("b", 1.0), ends(1.0, 0.0, 1.0, 1.0), admitted(2, "b", 1.0)),
        at(4.0, asks(3, "c"), queued(3, "c"), fx.PolicyDecided("wait", None, "")),
    )


def test_of_groups_too() -> None:
    specs = models("a", "b", "c", companions=frozenset({"a", "b"}))
    play = given(specs, awake=["a"], policy=Answers(WaitUntil(1e9)))
    found = play.feed(1.0, ev.RequestArrived(1, "b"))
    assert [effect.model for effect in found if isinstance(effect, fx.RunHook)] == ["b"]


class Watched(dict):
    """Counts how often all models are gone through."""

    looks = 0

    def values(self):
        self.looks += 1
        return super().values()

    def items(self):
        self.looks += 1
        return super().items()

    def __iter__(self):
        self.looks += 1
        return super().__iter__()


@pytest.mark.parametrize("turns", [FIRST_COME, Turns()], ids=["first come", "fair"])
def test_what_a_request_costs_does_not_grow_with_the_models(turns) -> None:
    """It comes to an awake model while another one is waited for, so that the policy is asked at each event."""
    policy = Adaptive(Adaptive.Options())
    play = given(models("a", "b", "c", "d", max_in_flight=9), awake=["a"], policy=policy, max_wait=1e9)
    s = play.core.state
    s.turns = turns
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(1.5, ev.RequestArrived(2, "b"))
    assert s.switch is None
    s.models = Watched(s.models)
    for number in range(3, 9):
        play.core.handle(ev.RequestArrived(number, "a"), 1.5 + number / 100.0)
        play.core.handle(ev.RequestFinished(number), 1.505 + number / 100.0)
    assert s.switch is None
    assert s.queued == 1
    assert s.models.looks == 0


def test_what_is_in_a_phase_is_known_after_each_move_and_reload() -> None:
    play = given(models("a", "b"), awake=["a"])
    s = play.core.state
    assert [model.name for model in s.in_phase(Phase.AWAKE)] == ["a"]
    play.feed(1.0, ev.ConfigReplaced(models("c", "a", "b"), Rules(), s.policy, {}))
    assert [model.name for model in s.in_phase(Phase.UNKNOWN)] == ["c"]
    play.feed(1.1, ev.HookFinished(next(iter(play.ledger.hooks)), ok=False))
    assert [model.name for model in s.in_phase(Phase.ASLEEP, Phase.AWAKE)] == ["c", "a", "b"]
    play.feed(2.0, ev.ConfigReplaced(models("a", "b"), Rules(), s.policy, {}))
    assert [model.name for model in s.in_phase(Phase.ASLEEP)] == ["b"]
