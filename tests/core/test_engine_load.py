"""What is learnt of an engine from when its answers end."""

import random

import pytest

from llmux.core import Core
from llmux.core.effects import Admit, RunHook
from llmux.core.events import HookFinished, RequestArrived, RequestFinished, Started
from llmux.core.policy import WaitUntil
from llmux.core.spec import ModelSpec, Rules
from llmux.estimates import Estimates
from llmux.estimates.meter import LEVELS, EngineLoad


def observed(speed, levels, answers=400, seed=1):
    """Return what is known of an engine that answers ``speed(n)`` times a second with n in flight."""
    load, dice, now = EngineLoad(), random.Random(seed), 0.0
    for number in range(answers):
        count = levels[number % len(levels)]
        load.changed(now, count, answered=False)
        now += dice.expovariate(speed(count))
        load.changed(now, count - 1, answered=True)
    return load


def free(count):
    return count / 4.0


def full(count):
    """Four slots."""
    return min(count, 4) / 4.0


def test_nothing_is_known_before_an_answer():
    load = EngineLoad()
    assert (load.throughput(3), load.drain(3), load.serving(3, None), load.slots, load.most) == (0, 0, 0, None, 0)
    load.changed(1.0, 2, answered=False)
    load.changed(9.0, 1, answered=False)
    assert (load.throughput(3), load.drain(3), load.most) == (0, 0, 0)


def test_an_answer_within_the_same_moment_says_nothing_yet():
    load = EngineLoad()
    load.changed(1.0, 1, answered=False)
    load.changed(1.0, 0, answered=True)
    assert load.throughput(1) == 0.0


def test_an_engine_with_room():
    load = observed(free, [1, 2, 3, 5, 8, 12])
    for count in (1, 2, 5, 12):
        assert load.throughput(count) == pytest.approx(free(count), rel=0.25)
    assert load.throughput(0) == 0.0
    # The longest of eight exponential services of four seconds.
    assert load.drain(8) == pytest.approx(4.0 * sum(1.0 / k for k in range(1, 9)), rel=0.25)
    assert load.drain(0) == 0.0
    assert load.slots is None


def test_a_full_engine():
    load = observed(full, [1, 2, 4, 8, 16, 30])
    # A level is counted as one, from 16 to 31.
    assert load.throughput(30) == pytest.approx(1.0, rel=0.6)
    assert load.most == pytest.approx(1.0, rel=0.6)
    assert load.drain(30) == pytest.approx(26.0 + 4.0 * (1 + 1 / 2 + 1 / 3 + 1 / 4), rel=0.3)
    assert load.slots in (4, 8)


def test_what_was_never_seen_follows_from_the_rest():
    """An engine that was always given more than it can serve is not taken for a quick one when it has less."""
    load = observed(full, [12, 24])
    assert load.throughput(64) == pytest.approx(1.0, rel=0.6)
    assert 12.0 < load.drain(20) < 45.0
    assert load.throughput(1 << 40) > 0.0
    assert load.throughput(1 << 40) == load.throughput(1 << LEVELS) * (1 << 40) / (1 << LEVELS)


def test_more_than_the_limit_come_one_after_the_other():
    load = observed(free, [1, 2, 3, 4])
    assert load.serving(3, None) == load.drain(3)
    assert load.serving(10, 4) == pytest.approx(load.drain(4) + 6.0 / load.throughput(4))


def test_what_is_old_is_forgotten():
    load = observed(lambda count: count / 40.0, [2], answers=300)
    now = load._since
    dice = random.Random(2)
    for _ in range(300):
        load.changed(now, 2, answered=False)
        now += dice.expovariate(2.0)
        load.changed(now, 1, answered=True)
    assert load.throughput(2) == pytest.approx(2.0, rel=0.35)


def test_policies_are_shown_it():
    class Spy:
        def decide(self, now):
            self.seen = now.models["a"].engine.throughput(1)
            return WaitUntil(now.time + 5.0)

    spy = Spy()
    core = Core([ModelSpec("a"), ModelSpec("b")], Rules(alive_every=0.0), spy, Estimates())
    for effect in core.handle(Started(), 0.0):
        if isinstance(effect, RunHook):
            core.handle(HookFinished(effect.hook, ok=effect.model == "a"), 0.0)
    assert any(isinstance(effect, Admit) for effect in core.handle(RequestArrived(1, "a"), 1.0))
    core.handle(RequestFinished(1), 3.0)
    core.handle(RequestArrived(2, "a"), 4.0)
    core.handle(RequestArrived(3, "b"), 5.0)
    assert spy.seen == pytest.approx(0.5, rel=0.3)
