"""What a decision of the core is told with: what waited for what and what it cost, and why those leave that leave.

The core asks ``figures`` as it decides (``State.figures``), and hands on what comes back in ``Decided``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from llmux.core.levels import at_stake
from llmux.core.model import Model, Switch
from llmux.core.phases import Phase
from llmux.core.placement import (
    fits,
    free,
    immovable,
    loss,
    per_gpu,
    switch_cost,
    waiting_models,
    who_leaves,
)
from llmux.core.state import State

TOLD = 8  # models whose waiters are told of one by one

Why = Literal["", "pinned", "backoff", "apart"]


class Serving(NamedTuple):
    """A model that is awake."""

    model: str
    in_flight: int
    queued: int


class Waiting(NamedTuple):
    """A model that is not awake and has waiters. Times in seconds."""

    model: str
    queued: int
    oldest: float  # how long the first of them has waited
    waited: float  # how long all of them have waited together
    cost: float  # expected cost of a switch to it
    samples: int  # how often that cost was measured; 0: at least a part of it is a guess


class Candidate(NamedTuple):
    """A model that held the GPU. Times in seconds."""

    model: str
    left: bool
    why: Why  # pinned, backoff: it could not leave; apart: it cannot be awake beside the target; else its cost
    keep_awake: bool
    in_flight: int
    queued: int
    expected: float  # requests in the next two minutes, one at least
    sleep: float
    wake: float
    cost: float  # its sleep, and a wake for each request that it has or that can be expected
    memory: Mapping[str, int] | None  # bytes by GPU


class Evicted(NamedTuple):
    """Why a switch makes those leave that leave: what it costs to lose each, as it was when it began.

    ``time`` is on the core's clock. ``need`` is what the target takes, ``free`` what there was: bytes by GPU, None
    without ``capacity``. ``grouped`` says that groups are in use.
    """

    time: float
    switch: int
    target: str
    candidates: tuple[Candidate, ...]
    need: Mapping[str, int] | None
    free: Mapping[str, int] | None
    grouped: bool

    @property
    def left(self) -> tuple[str, ...]:
        """What left."""
        return tuple(each.model for each in self.candidates if each.left)


class Figures(NamedTuple):
    """What a decision was made on."""

    serving: tuple[Serving, ...]
    waiting: tuple[Waiting, ...]  # oldest waiter first; a few at most
    more: int  # waiters of further models
    evicted: Evicted | None = None  # where something leaves for a target


def figures(s: State) -> Figures:
    """Return what is decided on at this moment, and why those leave that leave in a switch that begins with it."""
    waiting = waiting_models(s)
    serving = tuple(Serving(m.name, len(m.in_flight), len(m.queue)) for m in s.in_phase(Phase.AWAKE))
    told = tuple(_waiting(s, model) for model in waiting[:TOLD])
    more = sum(len(model.queue) for model in waiting[TOLD:])
    return Figures(serving, told, more, None if s.switch is None else _eviction(s, s.switch))


def _waiting(s: State, model: Model) -> Waiting:
    arrived = [request.arrived for request in model.queue.values()]
    leaving = who_leaves(s, model) or ()
    waited = s.now * len(arrived) - sum(arrived)
    costs = switch_cost(s, leaving, model), _samples(s, leaving, model)
    return Waiting(model.name, len(arrived), s.now - arrived[0], waited, *costs)


def _samples(s: State, leaving: Sequence[Model], target: Model) -> int:
    """Return how often this direction was measured, else the less measured of its halves."""
    costs, sources = s.costs, [model.name for model in leaving if model is not target]
    stake = at_stake(leaving, target) if s.has_levels else {}
    direction = None if stake else costs.pairs.get((next(iter(sources), None), target.name))
    if direction is not None and len(sources) <= 1:
        return direction.samples
    halves = [("sleep", costs.sleeps, name) for name in sources] + [("wake", costs.wakes, target.name)]
    seen = [
        costs.levels.get((half, name, stake[name])) if name in stake else known.get(name)
        for half, known, name in halves
    ]
    return min(average.samples if average else 0 for average in seen)


def _eviction(s: State, switch: Switch) -> Evicted | None:
    target = switch.target
    if target is None or not switch.sources:
        return None
    holders = [model for model in s.models.values() if model.holds and model is not target]
    capacity, need = s.rules.capacity, target.next.memory
    return Evicted(
        s.now,
        switch.id,
        target.name,
        _candidates(s, holders, target, switch.leaving),
        None if capacity is None or need is None else per_gpu(need),
        None if capacity is None else free([model.running for model in holders], capacity),
        target.next.companions is not None,
    )


def _candidates(
    s: State, holders: Sequence[Model], target: Model, leaving: Sequence[Model]
) -> tuple[Candidate, ...]:
    stuck = immovable(s, target)
    found = []
    for model in holders:
        why: Why = ""
        if model.name in stuck:
            why = "pinned" if model.pinned else "backoff"
        elif not fits([target.next, model.running], s.rules.capacity):
            why = "apart"
        taken, memory = loss(s, model), model.running.memory
        found.append(
            Candidate(
                model.name,
                model in leaving,
                why,
                model.spec.keep_awake,
                len(model.in_flight),
                len(model.queue),
                taken.expected,
                taken.sleep,
                taken.wake,
                taken.seconds,
                None if memory is None else per_gpu(memory),
            )
        )
    return tuple(found)
