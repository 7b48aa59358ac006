"""The decisions, and why: in words, with their figures; and why models were evicted.

The core calls ``figures`` as it decides (``State.figures``): which models wait for what, and what that costs. The
result is in ``Decided``, and ``DecisionLog`` is a fold of these. A decision that is only repeated (the policy is
asked at every event) stays one record, whose ``times`` grow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from llmux.core.effects import By, Decided, Kind, ModelRemoved, PolicyAdopted
from llmux.core.levels import at_stake
from llmux.core.model import Model, Reason, Switch
from llmux.core.phases import Phase
from llmux.core.residency import (
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
from llmux.estimates import costs_of
from llmux.observability.timeline import Timeline, after

TOLD = 8  # models whose waiters are listed one by one

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
    """Why these models leave in a switch: the cost of losing each, as of its begin.

    ``time`` is on the core's clock. ``need`` is the memory of the target, ``free`` what there was: bytes by GPU,
    None without ``capacity``. ``grouped`` says that groups are in use.
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
        """The models that left."""
        return tuple(each.model for each in self.candidates if each.left)


class Figures(NamedTuple):
    """The figures of a decision."""

    serving: tuple[Serving, ...]
    waiting: tuple[Waiting, ...]  # oldest waiter first; a few at most
    more: int  # waiters of further models
    evicted: Evicted | None = None  # if models leave for a target


def figures(s: State) -> Figures:
    """Return the figures of this moment, and why models leave in a switch that begins with it."""
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
    costs, sources = costs_of(s), [model.name for model in leaving if model is not target]
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


KEPT = 200
SHOWN = 2  # further models with waiters that are named in words
MINUTE = 60.0
MILLISECONDS, INSTANT = 0.0995, 0.0005  # seconds below which they are shown as such, and as nothing

WORDS: dict[str, str] = {
    Reason.REQUESTED: "an operator asked for it",
    Reason.PINNED: "it is pinned",
    Reason.KEEP_AWAKE: "keep_awake applies to it, and there is room",
    Reason.DEFAULT: "it is the default model, and no request has come for default_after",
    Reason.PRELOAD: "preload",
    Reason.LEASE: "the GPU is lent to another job",
    Reason.IDLE: "no request for as long as idle_sleep, or a client's keep-alive, says",
    Reason.UNWANTED: "it was removed, or is one more than may be awake, or its engine is gone",
    Reason.STOPPING: "llmux stops, and on_exit says sleep",
}


@dataclass(slots=True)
class DecisionRecord:
    """One decision. Times are on the core's clock, in seconds."""

    id: int  # 1, 2, …
    time: float  # when it was made first
    kind: Kind
    target: str | None  # where to; None for stay and for going to sleep
    by: By  # what made it; ``min_active`` holds back what the policy wants
    said: str  # the policy's own reason, its fault, or the reason of a switch that no request waits for
    serving: tuple[Serving, ...]
    waiting: tuple[Waiting, ...]  # oldest waiter first; a few at most
    more: int = 0  # waiters of further models
    until: float | None = None  # when it ends by itself, for ``wait``
    last: float = 0.0  # when it was made last
    times: int = 1
    switch: int | None = None  # the switch that it led to
    leaving: tuple[str, ...] = ()  # what made room in that switch

    @property
    def reason(self) -> str:
        """What was done and why, in one line with the figures that matter."""
        if self.kind == "adopt":
            return self.said
        deed, *rest = filter(None, (self._deed(), self._why(), *self._figures()))
        return f"{deed}: {'; '.join(rest)}" if rest else deed

    def _deed(self) -> str:
        here, gone = (" and ".join(names) for names in ([each.model for each in self.serving], self.leaving))
        if self.kind == "switch":
            if self.target is None:
                return f"{gone} → asleep"
            return f"{gone} → {self.target}" if gone else f"wakes {self.target}"
        busy = sum(each.in_flight for each in self.serving)
        stays = f"{here} {'stay' if len(self.serving) > 1 else 'stays'}" if here else "no model is woken yet"
        if busy:
            stays += f" ({busy} in flight)"
        if self.until is None:
            return stays
        left = duration(self.until - self.last)
        if self.by == "min_active":
            return f"{stays} for {left} more (min_active), then {self.target}"
        return f"{stays}, decided again within {left}"

    def _why(self) -> str:
        if self.by == "overruled":
            return f"the oldest request first, because the policy {self.said}"
        if self.by == "max_wait":
            return f"{self.said}, as long as max_wait allows"
        if self.by == "manual":
            return "manual mode, only an operator switches"
        if self.by == "core":
            return WORDS.get(self.said, self.said)
        # A policy's reason for a switch mostly repeats the figures; `explain -v` shows it.
        return "" if self.kind == "switch" or self.by == "min_active" else self.said

    def _figures(self) -> Iterator[str]:
        goes = self.kind == "switch"
        others = list(self.waiting)
        main = next((each for each in others if each.model == self.target), None)
        if main is None and self.target is None and not goes:
            main = next(iter(others), None)
        if main is not None:
            others.remove(main)
            longest = f", longest {duration(main.oldest)}" if main.oldest >= INSTANT else ""
            yield f"{main.queued} waiting{'' if goes else f' for {main.model}'}{longest}"
            what = "a switch" if (self.leaving if goes else self.serving) else "a wake"
            yield f"{what} takes {duration(main.cost)} ({measured(main.samples)})"
        named = [f"{each.queued} for {each.model}" for each in others[:SHOWN]]
        beyond = self.more + sum(each.queued for each in others[SHOWN:])
        if beyond:
            named.append(f"{beyond} for other models")
        if named:
            yield f"also waiting: {', '.join(named)}"


def measured(samples: int) -> str:
    """Say how often a cost was measured."""
    if not samples:
        return "assumed, not measured yet"
    return f"measured {samples} times" if samples > 1 else "measured once"


def duration(seconds: float) -> str:
    """Return seconds for people: ``40 ms``, ``0.25 s``, ``14 s``, ``3 min``."""
    if INSTANT <= seconds < MILLISECONDS:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 2 * MINUTE:
        return f"{seconds:.2g} s" if MILLISECONDS <= seconds < MINUTE / 6 else f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.3g} min"


class DecisionLog:
    """The last ``kept`` decisions and the last evictions of one core."""

    def __init__(self, timeline: Timeline, kept: int = KEPT) -> None:
        self.records: deque[DecisionRecord] = deque(maxlen=kept)
        self.last_id = 0
        self.eviction: Evicted | None = None  # the last one
        self.evicted: dict[str, Evicted] = {}  # by model: the last time that it made room for another
        timeline.on(Decided, self._decided)
        timeline.on(ModelRemoved, self._removed)
        timeline.on(PolicyAdopted, self._adopted)

    def _decided(self, time: float, effect: Decided) -> None:
        made = effect.figures
        if not isinstance(made, Figures):
            last = self.records[-1]
            last.times += 1
            last.last, last.said, last.until = time, effect.said, effect.until
            return
        self.last_id += 1
        self.records.append(
            DecisionRecord(
                self.last_id,
                time,
                effect.kind,
                effect.target,
                effect.by,
                effect.said,
                made.serving,
                made.waiting,
                made.more,
                effect.until,
                last=time,
                switch=effect.switch,
                leaving=effect.leaving,
            )
        )

        if made.evicted is not None:
            self.eviction = made.evicted
            self.evicted.update(dict.fromkeys(made.evicted.left, made.evicted))

    def _adopted(self, time: float, effect: PolicyAdopted) -> None:
        self.last_id += 1
        said = f"{effect.policy} decides from now on, in place of {effect.before}: {effect.reason}"
        self.records.append(DecisionRecord(self.last_id, time, "adopt", None, "auto", said, (), (), last=time))

    def _removed(self, _time: float, effect: ModelRemoved) -> None:
        self.evicted.pop(effect.model, None)

    def latest(self, s: State, count: int) -> list[DecisionRecord]:
        """Return the last ``count`` decisions, oldest first; what still holds has the figures of this moment."""
        records = list(self.records)[-count:] if count > 0 else []
        if (
            records
            and records[-1].kind != "adopt"
            and records[-1].switch is None
            and s.switch is None
            and (now := figures(s)).waiting
        ):
            last = replace(records[-1], last=s.now, serving=now.serving, waiting=now.waiting, more=now.more)
            records[-1] = last
        return records

    def since(self, number: int) -> list[DecisionRecord]:
        """Return the decisions after the one with this id, oldest first."""
        return after(self.records, number)
