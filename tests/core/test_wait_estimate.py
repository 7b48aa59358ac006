"""How long those who wait will have to: figures by hand."""

from __future__ import annotations

import pytest
from playbook import Oldest, given, models

from llmux.core import events as ev
from llmux.core.phases import Stage
from llmux.core.policy import Stay
from llmux.core.spec import HookKind
from llmux.runtime.wait_estimate import for_a_newcomer, in_queue, until_awake

GUESSES = {"a": (10.0, 2.0), "b": (20.0, 4.0), "c": (40.0, 8.0)}  # (wake, sleep)


def open_play(names="abc", awake=("a",), policy=None, **more):
    limits = {key: more.pop(key) for key in ("max_in_flight", "max_queued", "memory") if key in more}
    return given(models(*names, **limits), awake=awake, policy=policy, first_guesses=GUESSES, **more)


def wait(play, name: str, now: float) -> float:
    s = play.core.state
    return until_awake(s, s.models[name], now)


def newcomer(play, name: str, now: float) -> float | None:
    s = play.core.state
    return for_a_newcomer(s, s.models[name], now)


def arrive(play, *arrivals: tuple[float, str]) -> None:
    for number, (time, name) in enumerate(arrivals, 100):
        play.feed(time, ev.RequestArrived(number, name))


def finish(play, time: float, *requests: int) -> None:
    for request in requests:
        play.feed(time, ev.RequestFinished(request))


def hook_of(play, kind: HookKind) -> int:
    return next(run.id for run in play.core.state.hooks.values() if run.kind is kind)


def test_who_is_let_in_at_once_waits_for_nothing():
    play = open_play()
    assert newcomer(play, "a", 0.0) == 0.0
    assert wait(play, "a", 0.0) == 0.0


def test_a_switch_from_here_is_its_drain_and_its_cost():
    play = open_play(policy=Stays())
    assert newcomer(play, "b", 0.0) == 2 + 20
    arrive(play, (1.0, "a"))
    finish(play, 7.0, 100)  # answers take 6 s
    play.feed(8.0, ev.RequestArrived(1, "a"))
    play.feed(10.0, ev.RequestArrived(2, "a"))
    assert newcomer(play, "b", 10.0) == 6 + 2 + 20
    assert newcomer(play, "b", 13.0) == 3 + 2 + 20
    assert newcomer(play, "b", 99.0) == 2 + 20  # it takes longer than the mean: any moment now


def test_a_cold_start_is_a_wake():
    assert newcomer(open_play(awake=()), "c", 5.0) == 40.0


class Stays(Oldest):
    """Stays while what is awake is busy."""

    def decide(self, _now):
        return Stay()


def test_a_drain_is_cut_at_its_timeout_and_begins_when_min_active_is_over():
    play = open_play(policy=Stays(), drain_timeout=3.0, min_active=30.0)
    arrive(play, (1.0, "a"))
    finish(play, 7.0, 100)
    play.feed(40.0, ev.RequestArrived(1, "a"))
    assert newcomer(play, "b", 40.0) == 3 + 2 + 20
    assert newcomer(play, "b", 12.0) == 18 + 2 + 20


def test_the_switch_under_way_is_counted_down():
    play = open_play(awake=("a",))
    arrive(play, (1.0, "a"), (2.0, "b"))
    assert play.core.state.switch.stage is Stage.DRAINING
    assert wait(play, "b", 2.0) == 2 + 20
    finish(play, 5.0, 100)
    assert play.core.state.switch.stage is Stage.SLEEPING
    assert wait(play, "b", 6.0) == 22 - 1
    assert wait(play, "b", 99.0) == 0.0
    play.feed(7.0, ev.HookFinished(hook_of(play, HookKind.SLEEP), ok=True))
    assert play.core.state.switch.stage is Stage.WAKING
    assert wait(play, "b", 7.0) == 20.0
    assert wait(play, "b", 12.0) == 15.0
    play.feed(12.0, ev.HookFinished(hook_of(play, HookKind.WAKE), ok=False))
    assert play.core.state.switch.stage is Stage.CLEANUP
    assert wait(play, "b", 12.0) == 0.0


def test_the_drain_under_way_is_counted_down():
    play = open_play(policy=Oldest())
    arrive(play, (1.0, "a"))
    finish(play, 11.0, 100)
    play.feed(20.0, ev.RequestArrived(1, "a"))
    play.feed(21.0, ev.RequestArrived(2, "b"))
    assert wait(play, "b", 24.0) == 6 + 2 + 20


def test_whoever_has_waited_longer_comes_first():
    play = open_play()
    arrive(play, (1.0, "a"), (2.0, "b"), (3.0, "c"), (4.0, "b"), (5.0, "a"))
    # a drains for b; then c, then a again, where request 104 waits since 5.0
    assert wait(play, "b", 5.0) == 22.0
    assert wait(play, "c", 5.0) == 22 + (4 + 40)
    assert wait(play, "a", 5.0) == 22 + (4 + 40) + (8 + 10)


def test_the_answers_to_those_before_are_counted():
    play = open_play(awake=("b",), max_in_flight=2)
    arrive(play, (1.0, "b"))
    finish(play, 7.0, 100)  # 6 s
    for number, name in enumerate("aabbbbb", 1):
        play.feed(10.0, ev.RequestArrived(number, name))
    play.feed(11.0, ev.RequestArrived(50, "c"))
    # b serves nobody, so it sleeps at once for a; then the five for b in three rounds, then c
    assert play.core.state.switch.target.name == "a"
    a = 4 + 10
    b = a + (2 + 20)
    assert wait(play, "b", 10.0) == a + (2 + 20)
    assert wait(play, "c", 10.0) == b + 3 * 6 + (4 + 40)


def test_min_active_holds_for_those_before_too():
    play = open_play(awake=(), min_active=50.0)
    arrive(play, (1.0, "b"), (2.0, "c"))
    assert wait(play, "c", 1.0) == 20 + 50 + (4 + 40)


def test_a_model_that_goes_to_sleep_is_in_the_way_until_then():
    play = open_play()
    play.feed(1.0, ev.SleepRequested("a", 1))
    arrive(play, (1.0, "b"))
    assert wait(play, "b", 1.0) == 2 + (2 + 20)
    play.feed(3.0, ev.HookFinished(hook_of(play, HookKind.SLEEP), ok=True))
    assert wait(play, "b", 3.0) == 20.0


def test_places_come_free_one_after_the_other():
    play = open_play(max_in_flight=2, max_queued=2)
    arrive(play, (1.0, "a"))
    finish(play, 7.0, 100)
    for number in range(1, 5):
        play.feed(10.0, ev.RequestArrived(number, "a"))
    a, b = play.core.state.models["a"], play.core.state.models["b"]
    assert [in_queue(a, position) for position in (1, 2)] == [3.0, 6.0]
    assert newcomer(play, "a", 10.0) is None  # the queue is full
    b.meter.service = 6.0
    assert [in_queue(b, position) for position in range(1, 6)] == [0, 0, 6, 6, 12]
    assert in_queue(open_play().core.state.models["a"], 7) == 0.0


def test_who_would_be_turned_away_has_no_outlook():
    play = open_play()
    play.feed(1.0, ev.LeaseChanged(1))
    assert newcomer(play, "a", 1.0) is None
    play = open_play()
    play.feed(1.0, ev.PinChanged("a", 1))
    assert newcomer(play, "b", 1.0) is None


def test_a_lease_that_requests_wait_for_counts_until_its_end():
    play = open_play()
    play.feed(1.0, ev.LeaseChanged(1, until=100.0, waits=True))
    assert newcomer(play, "b", 1.0) == 99 + 2 + 20
    play.feed(2.0, ev.LeaseChanged(2, waits=True))
    assert newcomer(play, "b", 2.0) == 60 + 2 + 20


def test_the_wait_for_an_operator_counts_as_a_minute():
    play = open_play(manual=True)
    arrive(play, (1.0, "b"))
    assert wait(play, "b", 1.0) == 60 + 2 + 20
    play.feed(2.0, ev.ActivationRequested("b", 1))
    assert wait(play, "b", 2.0) == 2 + 20


def test_beside_others_nobody_has_to_leave():
    play = open_play("ab", memory=4, capacity=10)
    assert newcomer(play, "b", 1.0) == 20.0


def test_what_was_measured_counts():
    play = open_play("ab")
    arrive(play, (1.0, "b"))
    play.feed(4.0, ev.HookFinished(hook_of(play, HookKind.SLEEP), ok=True))
    play.feed(9.0, ev.HookFinished(hook_of(play, HookKind.WAKE), ok=True))
    finish(play, 9.0, 100)
    assert newcomer(play, "a", 10.0) == pytest.approx(4.0 + 10.0)  # never seen: b's guess to sleep, a's to wake
    play.core.state.costs.record(["b"], "a", 7.0)
    assert newcomer(play, "a", 10.0) == 7.0
