"""Events in any order, found and shrunk by hypothesis: the invariants of the ledger hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from world import DEEDS, World


class Drawn:
    """The part of ``random.Random`` that a world uses, drawn by hypothesis, so that it shrinks."""

    def __init__(self, data) -> None:
        self.data = data

    def random(self):
        return self.data.draw(st.integers(0, 99)) / 100

    def randint(self, low, high):
        return self.data.draw(st.integers(low, high))

    def choice(self, among):
        return self.data.draw(st.sampled_from(list(among)))

    def sample(self, among, count):
        return self.data.draw(st.permutations(list(among)))[:count]


class AnyOrder(RuleBasedStateMachine):
    world: World | None = None

    @initialize(data=st.data())
    def begin(self, data) -> None:
        self.world = World(Drawn(data))

    @rule(data=st.data(), deed=st.sampled_from(DEEDS), pause=st.sampled_from([0, 0.3, 2.0]))
    def step(self, data, deed, pause) -> None:
        world, self.world = self.world, None  # a world that failed is not asked to settle
        world.rng = Drawn(data)
        if not world.ledger.stopped:
            world.now += pause
            getattr(world, deed)()
        self.world = world

    def teardown(self) -> None:
        if self.world is not None:
            self.world.rng = random.Random(0)
            self.world.settle()


AnyOrder.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
# Coverage is the playbooks' to have: of random runs it would be had by chance, and at twice the time.
TestAnyOrder = pytest.mark.no_cover(AnyOrder.TestCase)
