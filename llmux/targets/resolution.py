"""From the name that a client uses to the model that serves it, and why. Pure.

Theory of operation. A name is a model's, an alias, a variant's, or that of a virtual model, which chooses between
other names. ``Names.resolve`` follows it down to a *target*: a model, perhaps in one of its variants. It sees the
present state of the models through a ``View`` and changes nothing; ``Ask`` describes the caller. The same view and
ask give the same target. There are no circles: the configuration was checked for them.

In the outermost virtual model, a conversation keeps its target (``Ask.kept``) as long as that serves: while it is
awake in ``awake`` and ``ladder``, which exist to avoid switches, and while it can be had in ``first`` and
``split``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple, Protocol

from llmux.config import Config
from llmux.config.targets import VirtualConfig

ALL = "*"  # the role of all others in `floor`


class Reason(enum.StrEnum):
    """Why this target, and no other."""

    NAMED = "named"  # the client named it
    VARIANT = "variant"  # the client named one of its variants
    CONVERSATION = "conversation"  # it has served this conversation
    AWAKE = "awake"  # the first one, or the best rung, that is awake
    WAKING = "waking"  # the first one that is being woken
    FIRST = "first"  # the first one that can be had; none is awake
    SHORTEST_WAIT = "shortest_wait"  # no rung is awake
    SPLIT = "split"  # its share of the requests
    REMOTE = "remote"  # none is awake that comes before it, and it needs no switch
    SPILL = "spill"  # the wait for the model asked for would be too long
    ROUTE = "route"  # a rule of `routes` says so
    NONE_SERVES = "none_serves"  # none can be had: the client gets its error


class Target(NamedTuple):
    """What serves a request."""

    model: str
    variant: str | None = None
    remote: bool = False  # it is on another host

    @property
    def name(self) -> str:
        """The name with which a client would get it."""
        return self.variant or self.model


class View(Protocol):
    """The present state of the models."""

    def awake(self, model: str) -> bool:
        """Whether it serves requests now."""

    def waking(self, model: str) -> bool:
        """Whether the switch under way wakes it."""

    def allowed(self, model: str) -> bool:
        """Whether the request may go to a model, by its key and by what is left of its budget."""

    def wait(self, model: str) -> float | None:
        """Return the expected wait of a new request, in seconds; None if it would be refused."""

    def switch_cost(self, model: str) -> float:
        """Return the cost of a switch to it, in seconds."""


@dataclass(frozen=True, slots=True)
class Ask:
    """The caller, and a random number for choices that nothing else decides."""

    key: str | None = None
    role: str | None = None
    conversation: str | None = None
    kept: Target | None = None
    draw: float = 0.0
    """From 0 up to, but not including, 1."""


class Resolution(NamedTuple):
    """A target, and why it was chosen. ``way``: the names from the client's down to the target's."""

    target: Target
    reason: Reason
    way: tuple[str, ...]
    others: tuple[Target, ...] = ()
    """The next targets if this one fails before it has answered: of each ``first`` that led to it."""


class Names:
    """The names of one configuration."""

    def __init__(self, config: Config) -> None:
        self._targets = {name: Target(model) for name, model in config.names.items()}
        self._targets |= {name: Target(model, name) for name, model in config.variants.items()}
        self._targets |= {name: Target(name, remote=True) for name in config.remote_models}
        self._virtual: Mapping[str, VirtualConfig] = config.virtual
        self._within = {
            name: [target for target in virtual.targets if target in config.virtual]
            for name, virtual in config.virtual.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._targets or name in self._virtual

    def resolve(self, name: str, ask: Ask, view: View) -> Resolution:
        """Return the target that a known name stands for at this moment."""
        target = self._targets.get(name)
        if target is not None:
            return Resolution(target, Reason.NAMED if target.variant is None else Reason.VARIANT, (name,))
        kept = ask.kept
        if kept is not None and kept in self.targets(name, ask.role) and _keeps(self._virtual[name], kept, view):
            return Resolution(kept, Reason.CONVERSATION, (name, kept.name), self._after(name, kept, ask, view))
        found = self._choose(name, ask, view)
        others = self._after(name, found.target, ask, view)
        return Resolution(found.target, found.reason, found.way, others) if others else found

    def targets(self, name: str, role: str | None = None) -> tuple[Target, ...]:
        """Return all targets of a name, each once; for a ladder, those at or above the role's floor."""
        target = self._targets.get(name)
        if target is not None:
            return (target,)
        found: dict[Target, None] = {}
        for each in _rungs(self._virtual[name], role):
            found |= dict.fromkeys(self.targets(each, role))
        return tuple(found)

    def _choose(self, name: str, ask: Ask, view: View) -> Resolution:
        target = self._targets.get(name)
        if target is not None:
            return Resolution(target, Reason.FIRST, (name,))
        virtual = self._virtual[name]
        match virtual.kind:
            case "awake":
                chosen, reason = self._awake(virtual.targets, ask, view)
            case "first":
                chosen, reason = self._first(virtual.targets, ask, view)
            case "ladder":
                chosen, reason = self._ladder(_rungs(virtual, ask.role), ask, view)
            case _:
                chosen, reason = self._choose(*self._share(name, virtual, ask, view), view), Reason.SPLIT
        return Resolution(chosen.target, reason, (name, *chosen.way))

    def _awake(self, names: Sequence[str], ask: Ask, view: View) -> tuple[Resolution, Reason]:
        each = [self._choose(name, ask, view) for name in names]
        for one in each:
            if view.awake(one.target.model):
                return one, Reason.AWAKE
            if one.target.remote and view.wait(one.target.model) is not None:
                return one, Reason.REMOTE
        for one in each:
            if view.waking(one.target.model):
                return one, Reason.WAKING
        return self._first(names, ask, view)

    def _first(self, names: Sequence[str], ask: Ask, view: View) -> tuple[Resolution, Reason]:
        for name in names:
            one = self._choose(name, ask, view)
            if view.wait(one.target.model) is not None:
                return one, Reason.FIRST
        name = next((name for name in names if self._leads(name, ask, view)), names[0])
        return self._choose(name, ask, view), Reason.NONE_SERVES

    def _ladder(self, rungs: Sequence[str], ask: Ask, view: View) -> tuple[Resolution, Reason]:
        each = [self._choose(name, ask, view) for name in rungs]
        for one in each:
            if view.awake(one.target.model):
                return one, Reason.AWAKE
        costs = [_cost(one.target.model, view) for one in each]
        best = min(range(len(each)), key=lambda index: (*costs[index], index))
        return self._first(rungs, ask, view) if math.isinf(costs[best][0]) else (each[best], Reason.SHORTEST_WAIT)

    def _after(self, name: str, chosen: Target, ask: Ask, view: View) -> tuple[Target, ...]:
        """Return the next targets after a chosen one: of the ``first`` that led to it, then of those around it."""
        virtual = self._virtual[name]
        in_order = virtual.kind == "first"
        among = virtual.targets if in_order else self._within[name]
        led = next((each for each in among if chosen in self.targets(each, ask.role)), None)
        after = () if led is None or led in self._targets else self._after(led, chosen, ask, view)
        if in_order:
            place = 0 if led is None else virtual.targets.index(led) + 1
            each = [self._choose(target, ask, view).target for target in virtual.targets[place:]]
            after += tuple(target for target in each if target != chosen and view.allowed(target.model))
        return tuple(dict.fromkeys(after))

    def _leads(self, name: str, ask: Ask, view: View) -> bool:
        """Whether the request may go to one of the targets of a name."""
        return any(view.allowed(end.model) for end in self.targets(name, ask.role))

    def _share(self, name: str, virtual: VirtualConfig, ask: Ask, view: View) -> tuple[str, Ask]:
        """Return the target of a share: always the same one for the same key or conversation.

        A share that the request may not have goes to the others, which keep their own requests. The ``Ask`` is for
        a choice within the target.
        """
        weights = virtual.split
        assert weights is not None
        holder = ask.key if virtual.sticky == "key" and ask.key is not None else ask.conversation
        draw = ask.draw
        if holder is not None:
            digest = blake2b(f"{name}\0{holder}".encode(errors="surrogatepass"), digest_size=8).digest()
            draw = int.from_bytes(digest) / 2**64
        target, draw = _drawn(weights, draw)
        if not self._leads(target, ask, view):
            others = {each: weight for each, weight in weights.items() if self._leads(each, ask, view)}
            target, draw = _drawn(others or weights, draw)
        return target, ask if holder is not None or target in self._targets else replace(ask, draw=draw)


def _rungs(virtual: VirtualConfig, role: str | None) -> tuple[str, ...]:
    """Return the names that it chooses from; for a ladder, down to the role's floor."""
    floor = virtual.floor.get(role or ALL, virtual.floor.get(ALL))
    targets = virtual.targets
    return targets if floor is None else targets[: targets.index(floor) + 1]


def _keeps(virtual: VirtualConfig, kept: Target, view: View) -> bool:
    if virtual.kind in {"awake", "ladder"} and not kept.remote:
        return view.awake(kept.model)
    return view.wait(kept.model) is not None


def _cost(model: str, view: View) -> tuple[float, float]:
    wait = view.wait(model)
    return (math.inf, 0.0) if wait is None else (wait, view.switch_cost(model))


def _drawn(weights: Mapping[str, float], draw: float) -> tuple[str, float]:
    """Return the target in whose share a number from 0 to 1 falls, and its place in it: from 0 to 1 again."""
    left = draw * sum(weights.values())
    for target, weight in weights.items():
        if left < weight:
            return target, left / weight
        left -= weight
    return list(weights)[-1], 0.0  # after rounding errors
