"""Random walks of a placement: whatever happens in whatever order, the ledger's invariants hold.

``LLMUX_WALK_SEED`` repeats a walk, ``LLMUX_WALK_EVENTS`` makes it longer.
"""

from __future__ import annotations

import os
import random

import pytest
from fleet_playbook import Playbook

from llmux.core.phases import Phase
from llmux.fleet import events as ev
from llmux.fleet.fleet_view import HostReport, ModelReport
from llmux.fleet.placement import Stage
from llmux.fleet.routes import SHIPPED

STEPS = 250
HABITS = {
    "arrive": 300, "end": 120, "begin": 120, "refuse": 60, "fail": 30, "break_off": 10, "leave": 20,
    "forecast": 120, "withdrawn": 30, "report": 200, "wait": 80, "unreachable": 15, "reachable": 30, "remove": 5,
    "add": 5, "claim": 15, "load": 15,
}  # fmt: skip
DEEDS, WEIGHTS = list(HABITS), list(HABITS.values())
CODES = ["pinned", "leased", "stopping", "backing_off", "queue_full", "of_a_later_version"]


class Wild:
    """A route that names anything, or nothing, or raises."""

    moves = True

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def place(self, _model, fleet):
        if self.rng.random() < 0.1:
            raise RuntimeError("route is ill")
        return self.rng.choice([None, *fleet.hosts.values()])


class World:
    """One walk: hosts that report as they like, and requests that have any fate."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        make = rng.choice([*SHIPPED.values(), *[SHIPPED["least_wait"]] * 4, None])
        route = make() if make is not None else Wild(rng)
        rules = {"max_queued": rng.choice([1, 5, 1000]), "max_wait": rng.choice([2.0, 30.0])}
        self.play = Playbook(route, seed=rng.randrange(1000), **rules)
        self.ledger, self.placement = self.play.ledger, self.play.placement
        self.hosts = [f"h{number}" for number in range(rng.randint(1, 6))]
        self.models = [f"m{number}" for number in range(rng.randint(1, 5))]
        self.seqs = dict.fromkeys(self.hosts, 0)
        self.instances = dict.fromkeys(self.hosts, 1)
        self.next_request = 0

    def step(self) -> None:
        """Do something; what cannot be done now is nothing."""
        self.ledger.now += self.rng.choice([0, 0, 0, 0.01, 0.3, 2.0])
        (deed,) = self.rng.choices(DEEDS, WEIGHTS)
        getattr(self, deed)()

    def feed(self, event: ev.Event) -> list[ev.Effect]:
        return self.ledger.feed(event, self.ledger.now)

    def _any(self, *stages: Stage) -> int | None:
        found = [number for number, request in self.placement.requests.items() if request.stage in stages]
        return self.rng.choice(found) if found else None

    def arrive(self) -> None:
        self.next_request += 1
        self.feed(ev.RequestArrived(self.next_request, self.rng.choice([*self.models, "m0", "stranger"])))

    def end(self) -> None:
        if (request := self._any(Stage.BEGUN, Stage.PLACED, Stage.WITHDRAWING)) is not None:
            self.feed(ev.RequestEnded(request))

    def begin(self) -> None:
        if (request := self._any(Stage.PLACED, Stage.WITHDRAWING)) is not None:
            self.feed(ev.AnswerBegan(request))

    def refuse(self) -> None:
        if (request := self._any(Stage.PLACED, Stage.WITHDRAWING)) is not None:
            code = self.rng.choice(CODES)
            self.feed(ev.RequestRefused(request, code, self.rng.choice([None, 0.0, 3.0, 300.0])))

    def fail(self) -> None:
        if (request := self._any(Stage.PLACED)) is not None:
            self.feed(ev.ConnectFailed(request))

    def break_off(self) -> None:
        if (request := self._any(Stage.PLACED, Stage.WITHDRAWING, Stage.BEGUN)) is not None:
            self.feed(ev.ConnectionBroken(request))

    def leave(self) -> None:
        if (request := self._any(*Stage)) is not None:
            self.feed(ev.RequestAbandoned(request))

    def forecast(self) -> None:
        if (request := self._any(Stage.PLACED, Stage.WITHDRAWING, Stage.BEGUN)) is not None:
            self.feed(ev.RequestWaiting(request, self.rng.choice([None, 0.0, 10.0, 1000.0])))

    def withdrawn(self) -> None:
        if (request := self._any(Stage.WITHDRAWING)) is not None:
            self.feed(ev.RequestWithdrawn(request))

    def _model(self) -> ModelReport:
        rng = self.rng
        cost = rng.choice([0.0, 3.0, 60.0])
        phase = rng.choice([Phase.ASLEEP, Phase.AWAKE, Phase.AWAKE, *Phase])
        expected = rng.choice([None, 0.0, cost, cost + 10.0, cost])
        return ModelReport(
            phase, rng.choice([0, 0, 3]), rng.choice([0, 0, 2, 9]), expected, cost, cost / 3, cost * 2 / 3,
            rng.choice([0.0, 0.1, 4.0]), rng.choice([0.0, 2.0]), rng.choice([None, 1, 4]), rng.choice([0.0, 50.0]),
        )  # fmt: skip

    def report(self) -> None:
        rng = self.rng
        host = rng.choice(self.hosts)
        self.seqs[host] += rng.choice([0, 1, 1, 1, 1])
        if rng.random() < 0.03:
            self.instances[host] += 1
            self.seqs[host] = 1
        models = {name: self._model() for name in self.models if rng.random() < 0.8}
        found = HostReport(
            host, str(self.instances[host]), self.seqs[host], models, rng.random() < 0.95, rng.random() < 0.03,
            rng.choice([6.0, 6.0, 1.0]),
        )  # fmt: skip
        self.feed(ev.HostReported(found, rng.choice([0.0, 0.0, 0.5, 9.0])))

    def wait(self) -> bool:
        deadline = self.placement.next_deadline()
        if deadline is None:
            return False
        self.ledger.now = max(self.ledger.now, deadline)
        self.feed(ev.DeadlineReached())
        return True

    def unreachable(self) -> None:
        self.feed(ev.HostUnreachable(self.rng.choice(self.hosts), "refused"))

    def reachable(self) -> None:
        self.feed(ev.HostReachable(self.rng.choice(self.hosts)))

    def remove(self) -> None:
        self.feed(ev.HostRemoved(self.rng.choice(self.hosts)))

    def add(self) -> None:
        self.feed(ev.HostAdded(self.rng.choice(self.hosts)))

    def claim(self) -> None:
        self.feed(
            ev.ClaimSeen(self.rng.choice(self.models), self.rng.choice(self.hosts), self.rng.choice([0.1, 9.0]))
        )

    def load(self) -> None:
        counts = {name: self.rng.randint(0, 9) for name in self.models}
        self.feed(ev.LoadSeen(self.rng.choice(self.hosts), counts))

    def settle(self) -> None:
        """With hosts that answer and time that passes, every request ends."""
        for _ in range(5000):
            if not self.placement.requests:
                break
            request = self._any(Stage.PLACED, Stage.WITHDRAWING, Stage.BEGUN)
            if request is not None:
                self.feed(ev.RequestEnded(request))
            else:
                assert self.wait(), "wedged: nothing will ever happen"
        assert self.ledger.done == set(range(1, self.next_request + 1)), "a request without an end"
        assert not any(host.own for host in self.placement.fleet.hosts.values())


def walk(seed: int, steps: int) -> None:
    """Walk, and tell seed and story if it goes wrong."""
    world = World(random.Random(seed))
    try:
        for _ in range(steps):
            world.step()
        world.settle()
    except Exception as error:
        story = "\n".join(
            f"{time:.2f} {event}\n      {effects}" for time, event, effects in world.ledger.pages[-12:]
        )
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{story}") from error


@pytest.mark.no_cover  # what is covered by chance is not
def test_random_walk_of_a_placement():
    seed = int(os.environ.get("LLMUX_WALK_SEED", random.SystemRandom().randrange(10**9)))
    events = int(os.environ.get("LLMUX_WALK_EVENTS", "20000"))
    print(f"walk: seed {seed}, {events} events")  # noqa: T201 - shown when it fails
    for number in range(events // STEPS):
        walk(seed + number, STEPS)
