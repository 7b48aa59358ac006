"""Which models may be awake together, and which must leave so that another fits.

The rule: any set of models may be awake together that is one model alone; or whose memories fit on every GPU
(with ``capacity``) and that names of each other as companions (with groups), and of which no two share an
address. With neither capacity nor groups that is one model at a time.

Of all the sets of holders whose leaving makes the target fit, and that spare the immovable, the one of least
cost is taken: the fewest that are to be kept awake, then the fewest busy ones, then the fewest seconds; at equal
cost the smaller, then the first by name. It is exact for up to ``EXACT`` holders that could stay; beyond, the
costliest are spared first while they fit.

The first part of this file knows specs only; the second asks the state what holds the GPU, what may not be moved,
and what it costs that it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from llmux.core import levels
from llmux.core.model import AWAKE, Model
from llmux.core.phases import HOLDING, Phase
from llmux.core.spec import ARRIVAL_WINDOW, NO_LEVELS, Memory, ModelSpec
from llmux.core.state import State

EXACT = 12


class Cost(NamedTuple):
    """What it costs that a model leaves. Costs compare in this order."""

    kept: int = 0  # 1 when ``keep_awake`` applies to it
    busy: int = 0  # 1 when requests are in flight or wait for it
    seconds: float = 0.0  # >= 0


Price = Callable[[str], Cost]


def fits(specs: Sequence[ModelSpec], capacity: Memory | None) -> bool:
    """Whether these models may hold the GPU together."""
    if len(specs) <= 1:
        return True
    if not all(_companions(a, b, grouped=capacity is None) for a, b in combinations(specs, 2)):
        return False
    return capacity is None or not any(left < 0 for left in free(specs, capacity).values())


def free(specs: Sequence[ModelSpec], capacity: Memory) -> dict[str, int]:
    """Return the bytes that these models leave of each GPU; less than 0 where they are too many."""
    left = dict(per_gpu(capacity))
    for spec in specs:
        if spec.memory is None:  # it may need everything
            return dict.fromkeys(left, -1)
        for gpu, need in per_gpu(spec.memory).items():
            left[gpu] = left.get(gpu, 0) - need
    return left


def per_gpu(memory: Memory) -> Mapping[str, int]:
    """Return bytes by GPU; the one GPU without a name is ``""``."""
    return {"": memory} if isinstance(memory, int) else memory


def _companions(a: ModelSpec, b: ModelSpec, *, grouped: bool) -> bool:
    """Whether nothing but memory keeps these two apart."""
    if a.shared_address is not None and a.shared_address == b.shared_address:
        return False
    if a.companions is None or b.companions is None:
        return not grouped and a.companions is b.companions
    return b.name in a.companions and a.name in b.companions


def leaving(
    target: ModelSpec,
    holders: Mapping[str, ModelSpec],
    capacity: Memory | None,
    *,
    immovable: Collection[str] = (),
    cost: Price = lambda _name: Cost(seconds=1.0),
) -> tuple[str, ...] | None:
    """Return the holders (``target`` not among them) that must leave, or None if that cannot be."""
    stay = [spec for name, spec in holders.items() if name in immovable]
    if not fits([target, *stay], capacity):
        return None
    movable = [name for name in holders if name not in immovable]
    if capacity is None and target.companions is None:
        return tuple(movable)
    if fits([target, *holders.values()], capacity):
        return ()
    kept = [target, *stay]
    gone: list[str] = []
    may_stay: list[str] = []
    for name in sorted(movable):
        (may_stay if fits([*kept, holders[name]], capacity) else gone).append(name)
    search = _cheapest if len(may_stay) <= EXACT else _greedy
    gone += search(kept, {name: holders[name] for name in may_stay}, capacity, {n: cost(n) for n in may_stay})
    return tuple(sorted(gone))


# Which of some models, each of which fits beside those that stay, have to leave. The models are sorted by name.


def _cheapest(
    stay: list[ModelSpec], models: Mapping[str, ModelSpec], capacity: Memory | None, costs: Mapping[str, Cost]
) -> list[str]:
    names, alone = list(models), capacity is None
    foes = {
        name: {other for other in names if other != name and not _companions(one, models[other], grouped=alone)}
        for name, one in models.items()
    }
    found: tuple[Cost, int, list[str]] | None = None
    # Depth first, sparing before leaving; what costs more than the best so far is cut off.
    room = None if capacity is None else free(stay, capacity)
    stack: list[tuple[int, list[str], dict[str, int] | None, Cost, list[str]]] = [(0, [], room, Cost(), [])]
    while stack:
        index, kept, room, cost, out = stack.pop()
        if found is not None and (cost, len(out)) > found[:2]:
            continue
        if index == len(names):
            found = (cost, len(out), out)  # of equals the later has the earlier name: it spared less early
            continue
        name = names[index]
        more = costs[name]
        total = Cost(cost.kept + more.kept, cost.busy + more.busy, cost.seconds + more.seconds)
        stack.append((index + 1, kept, room, total, [*out, name]))
        if not foes[name].isdisjoint(kept):
            continue
        if room is not None:
            need = per_gpu(models[name].memory or 0)
            room = {gpu: left - need.get(gpu, 0) for gpu, left in room.items()}
            if min(room.values()) < 0:
                continue
        stack.append((index + 1, [*kept, name], room, cost, out))
    assert found is not None  # with all of them gone the target fits
    return found[2]


def _greedy(
    stay: list[ModelSpec], models: Mapping[str, ModelSpec], capacity: Memory | None, costs: Mapping[str, Cost]
) -> list[str]:
    """Spare the costliest first: there are too many to try all sets."""
    kept, out = list(stay), []
    for name in sorted(models, key=lambda name: (*(-part for part in costs[name]), name)):
        if fits([*kept, models[name]], capacity):
            kept.append(models[name])
        else:
            out.append(name)
    return out


# ---- in the state


def immovable(s: State, but: Model) -> dict[str, Model]:
    """Return the holders that may not be put to sleep now for the sake of ``but``."""
    now = s.now
    if now >= s.free_from:
        return {}
    return {
        name: model
        for name, model in s.models.items()
        if (model.pin is not None or now < model.sleep_backoff.until)
        and model is not but
        and (model.pin is not None or model.holds)
    }


class Loss(NamedTuple):
    """What it takes that a model leaves, in seconds."""

    present: int  # requests in flight or waiting
    expected: float  # requests in the next two minutes, one at least
    sleep: float
    wake: float

    @property
    def seconds(self) -> float:
        """Its sleep, and a wake for each request."""
        return self.sleep + self.wake * (self.present + self.expected)


def loss(s: State, model: Model) -> Loss:
    """Return what it takes that a model leaves: its sleep, and its return for each request.

    Those that are there count, and as many as came, at its arrival rate, within two minutes; one in any case.
    """
    level = levels.lightest(model)
    return Loss(
        len(model.in_flight) + len(model.queue),
        1.0 + model.meter.arrival_rate(s.now) * ARRIVAL_WINDOW,
        s.costs.sleep_of(model.name, level),
        s.costs.wake_of(model.name, level),
    )


def leaving_cost(s: State, model: Model) -> Cost:
    """Return what it costs that a model leaves. One with ``keep_awake`` costs more than all others."""
    taken = loss(s, model)
    return Cost(int(model.spec.keep_awake), int(taken.present > 0), taken.seconds)


def switch_cost(s: State, leaving: Sequence[Model], target: Model) -> float:
    """Return the expected cost of a switch in seconds."""
    sources = [model.name for model in leaving if model is not target]
    stake = levels.at_stake(leaving, target) if s.has_levels else NO_LEVELS
    return s.costs.estimate(sources, target.name, stake)


def can_be_had(s: State, target: Model) -> bool:
    """Whether the immovable leave room for ``target``."""
    if s.now >= s.free_from:
        return True
    stay = immovable(s, target)
    return not stay or fits([target.next, *(model.running for model in stay.values())], s.rules.capacity)


def who_leaves(s: State, target: Model) -> tuple[Model, ...] | None:
    """Return the models that make room for ``target``, or None if the immovable are in the way."""
    stay = immovable(s, target)
    # What is pinned is as good as there: nothing may take its place before it is awake.
    there = s.in_phase(*HOLDING) if s.now >= s.free_from else s.models.values()
    holders = {
        model.name: model.running
        for model in there
        if model is not target and (model.phase in HOLDING or model.pin is not None)
    }
    if not stay and s.rules.capacity is None and target.next.companions is None:
        return tuple([s.models[name] for name in holders])  # one at a time
    names = leaving(
        target.next, holders, s.rules.capacity, immovable=stay, cost=lambda name: leaving_cost(s, s.models[name])
    )
    return None if names is None else tuple([s.models[name] for name in names])


def mark_extras(s: State, newcomers: Sequence[Model] = ()) -> None:
    """Mark what there is no room for: a start may find too many, and a reload may leave less room.

    The switch under way has its room. Then come the pinned, those that answer, the most recently used, and at
    last the newcomers in their order, for which what leaves still is there.
    """
    switch = s.switch
    target, leaving = (switch.target, switch.leaving) if switch else (None, ())
    chosen = [switch.spec] if switch and switch.spec else []
    apart = {target, *leaving, *newcomers}
    staying = [m for m in s.models.values() if m.holds and m.phase is not Phase.UNKNOWN and m not in apart]
    staying.sort(key=lambda m: (not m.pinned, m.phase in (Phase.LOST, Phase.FAULTED), -m.last_used))
    _mark(s, staying, chosen)
    chosen.extend(model.running for model in leaving if model.holds and model is not target)
    _mark(s, [model for model in newcomers if model.holds], chosen)


def _mark(s: State, models: Sequence[Model], chosen: list[ModelSpec]) -> None:
    """Choose greedily, in this order, what holds the GPU beside the ``chosen``, and add it to them."""
    for model in models:
        stays = fits([*chosen, model.running], s.rules.capacity)
        if stays:
            chosen.append(model.running)
            if model.extra:
                s.opened.append(model)
        model.extra = not stays


def waiting_models(s: State) -> list[Model]:
    """Return the models that are not awake and have waiters, the oldest waiter's first."""
    waiting = [model for model in s.queues if model.phase is not AWAKE]
    return sorted(waiting, key=lambda model: (next(iter(model.queue.values())).arrived, model.order))
