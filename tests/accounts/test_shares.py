"""Whose the GPU's time is: all of it goes to something, over the random walk too."""

import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from llmux.accounts.shares import KNOWN_TO_HOLD, Due, Shares
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.phases import Phase

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))


class Share(NamedTuple):
    own: float
    switch: float


class Scene:
    """Shares, and requests by the first letter of their key: 1 of key a is ``a1``."""

    def __init__(self, **more):
        self.waiting = {}
        self.keys = {}
        self.shares = Shares(lambda model: self.waiting.get(model, ()), self.keys.__getitem__, **more)
        self.numbers = {}

    def id(self, name):
        ident = self.numbers.setdefault(name, len(self.numbers) + 1)
        self.keys[ident] = name[0]
        return ident

    def phase(self, now, model, target, source=Phase.ASLEEP):
        self.shares.phase_changed(now, fx.PhaseChanged(model, source, target, ""))

    def wait(self, model, *names):
        self.waiting[model] = [self.id(name) for name in names]

    def start(self, now, to, *sources):
        self.shares.switch_started(now, fx.SwitchStarted(1, sources, to, ""))

    def end(self, now, to="m"):
        self.shares.switch_ended(now, fx.SwitchEnded(1, (), to, "success", 0.0, 0.0, None, None))

    def admit(self, now, *names):
        for name in names:
            self.shares.admitted(now, fx.Admit(self.id(name), "m", None, 1, False, 0.0))

    def leave(self, now, name):
        return Share(*self.shares.ended(now, self.id(name), name[0]))

    def switch(self, began, ended, *names):
        """Wake ``m`` for requests, which are then admitted."""
        self.wait("m", *names)
        self.start(began, "m")
        self.phase(began, "m", Phase.WAKING)
        self.phase(ended, "m", Phase.AWAKE)
        self.end(ended)
        self.admit(ended, *names)


@pytest.fixture
def scene():
    return Scene()


def test_a_request_alone_has_all_of_it(scene):
    scene.switch(0, 10, "a1")
    assert scene.leave(13, "a1") == Share(3.0, 10.0)
    assert scene.shares.take(20) == (7.0, [])  # awake for nothing
    assert scene.shares.held == 20


def test_requests_share_equally(scene):
    scene.switch(0, 10, "a1", "b1")
    assert scene.leave(14, "a1").own == 2.0
    scene.admit(15, "c1")  # b1 alone for one second
    assert scene.leave(17, "b1").own == 2.0 + 1.0 + 1.0
    assert scene.leave(20, "c1").own == 1.0 + 3.0


def test_a_switch_is_split_among_keys_not_requests(scene):
    scene.switch(0, 12, "a1", "a2", "a3", "b1")
    shares = [scene.leave(12, name).switch for name in ("a1", "a2", "a3", "b1")]
    assert shares == [2.0, 2.0, 2.0, 6.0]


def test_what_a_request_that_left_owes_goes_to_the_others_of_its_key(scene):
    scene.wait("m", "a1", "a2", "b1")
    scene.start(0, "m")
    scene.phase(0, "m", Phase.WAKING)
    assert scene.leave(5, "a1") == Share(0.0, 0.0)
    assert scene.leave(6, "b1") == Share(0.0, 0.0)
    scene.phase(10, "m", Phase.AWAKE)
    scene.end(10)
    assert scene.leave(10, "a2").switch == 5.0
    assert scene.shares.take(10) == (0.0, [Due("b", 5.0, "m")])


def test_a_switch_that_nothing_waited_for_is_the_houses(scene):
    scene.start(0, "m")
    scene.phase(0, "m", Phase.WAKING)
    scene.phase(4, "m", Phase.AWAKE)
    scene.end(4)
    assert scene.shares.take(4) == (4.0, [])


@pytest.mark.parametrize(
    ("who", "house", "due"),
    [("house", 10.0, []), ("everyone", 0.0, [Due("a", 5.0, "m"), Due("b", 5.0, "m")])],
)
def test_others_may_pay(who, house, due):
    scene = Scene(payers=who, everyone=("a", "b"))
    scene.switch(0, 10, "a1")
    assert scene.leave(10, "a1").switch == 0.0
    assert scene.shares.take(10) == (house, due)


def test_during_a_drain_what_is_served_has_all_of_it(scene):
    scene.switch(0, 1, "a1")
    scene.leave(1, "a1")
    scene.admit(1, "a2")
    scene.wait("n", "b1")
    scene.start(2, "n", "m")
    scene.phase(2, "m", Phase.DRAINING)
    assert scene.leave(8, "a2").own == 7.0
    scene.phase(8, "m", Phase.SLEEPING)
    scene.phase(9, "m", Phase.ASLEEP)
    scene.phase(9, "n", Phase.WAKING)
    scene.phase(11, "n", Phase.AWAKE)
    scene.end(11, "n")
    assert scene.leave(11, "b1").switch == 3.0


def test_what_serves_beside_a_switch_has_its_part(scene):
    scene.switch(0, 0, "a1")
    scene.wait("n", "b1")
    scene.start(0, "n")
    scene.phase(0, "n", Phase.WAKING)
    scene.phase(10, "n", Phase.AWAKE)
    scene.end(10, "n")
    assert (scene.leave(10, "a1").own, scene.leave(10, "b1").switch) == (5.0, 5.0)


def test_a_request_that_is_returned_waits_for_free(scene):
    scene.switch(0, 0, "a1")
    scene.shares.returned(3, scene.id("a1"))
    scene.admit(9, "a1")
    assert scene.leave(10, "a1") == Share(4.0, 0.0)


def test_a_model_that_is_removed_holds_nothing(scene):
    scene.switch(0, 0, "a1")
    scene.leave(1, "a1")
    scene.shares.removed(5, fx.ModelRemoved("m"))
    scene.shares.take(100)
    assert scene.shares.held == 5


# ---- over the random walk


class Books:
    """Follows a world's ledger from outside: its own integral beside the shares."""

    def __init__(self, world):
        self.world = world
        self.phases = {}
        self.held = self.got = 0.0
        self.time = 0.0
        self.rng = random.Random(world.now)
        self.keys = {}
        self.shares = Shares(self.waiters, self.key, payers=world.rng.choice(["causers", "everyone", "house"]))
        self.shares.everyone = ("a", "b", "c")
        feed = world.ledger.feed
        on = world.ledger.timeline.on
        on(fx.PhaseChanged, self.phase)
        on(fx.ModelRemoved, self.removed)
        on(fx.Admit, self.shares.admitted)
        on(fx.SwitchStarted, self.shares.switch_started)
        on(fx.SwitchEnded, self.shares.switch_ended)

        def fed(event, now):
            effects = feed(event, now)
            self.after(event, effects, now)
            return effects

        world.ledger.feed = fed

    def waiters(self, model):
        return list(self.world.core.state.models[model].queue)

    def key(self, ident):
        return self.keys.setdefault(ident, self.rng.choice("abc"))

    def integrate(self, now):
        self.held += (now - self.time) * any(phase in KNOWN_TO_HOLD for phase in self.phases.values())
        self.time = now

    def phase(self, now, effect):
        self.integrate(now)
        self.phases[effect.model] = effect.target
        self.shares.phase_changed(now, effect)

    def removed(self, now, effect):
        self.integrate(now)
        self.phases.pop(effect.model, None)
        self.shares.removed(now, effect)

    def after(self, event, effects, now):
        ended = [effect.request for effect in effects if isinstance(effect, fx.Reject)]
        match event:
            case ev.RequestFinished(request=request) | ev.RequestAbandoned(request=request):
                ended.append(request)
            case ev.RequestReturned(request=request) if request not in ended:
                self.shares.returned(now, request)
        for request in ended:
            share = self.shares.ended(now, request, self.key(request))
            assert min(share) >= 0
            self.got += sum(share)


def test_all_get_what_was_held():
    """To the millisecond, over the random walk; what nothing was served for is the house's."""
    from world import World  # noqa: PLC0415 - a walk's modules find each other by that folder

    seed, held = random.SystemRandom().randrange(10**9), 0.0
    for number in range(20):
        world = World(random.Random(seed + number))
        books = Books(world)
        books.phases = {model.name: model.phase for model in world.core.state.models.values()}
        for name, phase in books.phases.items():
            books.shares.phase_changed(world.now, fx.PhaseChanged(name, Phase.UNKNOWN, phase, ""))
        for ident in world.ledger.in_flight:
            books.shares.admitted(world.now, fx.Admit(ident, "", None, 1, False, 0.0))
        for _ in range(250):
            world.step()
        world.settle()
        books.integrate(world.now)
        house, due = books.shares.take(world.now)
        switch = books.shares._switch
        under_way = 0.0 if switch is None else switch.seconds
        total = books.got + house + sum(each.seconds for each in due) + under_way
        assert math.isclose(books.held, books.shares.held, abs_tol=1e-6), seed + number
        assert abs(total - books.held) < 0.001, f"seed {seed + number}: {total} of {books.held}"
        held += books.held
    assert held > 0
