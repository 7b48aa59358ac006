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


class _Look(NamedTuple):
    """One resolution under way. Virtual models may share targets: what each of these chose is kept until then."""

    ask: Ask
    view: View
    chosen: dict[tuple[str, float], Resolution]  # by the name and the number drawn


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
        self._ends: dict[tuple[str, str | None], tuple[Target, ...]] = {}  # by the virtual model and the role

    def __contains__(self, name: str) -> bool:
        return name in self._targets or name in self._virtual

    def resolve(self, name: str, ask: Ask, view: View) -> Resolution:
        """Return the target that a known name stands for at this moment."""
        target = self._targets.get(name)
        if target is not None:
            return Resolution(target, Reason.NAMED if target.variant is None else Reason.VARIANT, (name,))
        kept, look = ask.kept, _Look(ask, view, {})
        if kept is not None and kept in self.targets(name, ask.role) and _keeps(self._virtual[name], kept, view):
            return Resolution(kept, Reason.CONVERSATION, (name, kept.name), self._after(name, kept, look))
        found = self._decide(name, look)
        others = self._after(name, found.target, look)
        return Resolution(found.target, found.reason, found.way, others) if others else found

    def targets(self, name: str, role: str | None = None) -> tuple[Target, ...]:
        """Return all targets of a name, each once; for a ladder, those at or above the role's floor."""
        target = self._targets.get(name)
        if target is not None:
            return (target,)
        known = self._ends.get((name, role))
        if known is None:
            found: dict[Target, None] = {}
            for each in _rungs(self._virtual[name], role):
                found |= dict.fromkeys(self.targets(each, role))
            known = self._ends[name, role] = tuple(found)
        return known

    def _choose(self, name: str, look: _Look) -> Resolution:
        target = self._targets.get(name)
        if target is not None:
            return Resolution(target, Reason.FIRST, (name,))
        at = name, look.ask.draw
        known = look.chosen.get(at)
        if known is None:
            known = look.chosen[at] = self._decide(name, look)
        return known

    def _decide(self, name: str, look: _Look) -> Resolution:
        virtual = self._virtual[name]
        match virtual.kind:
            case "awake":
                chosen, reason = self._awake(virtual.targets, look)
            case "first":
                chosen, reason = self._first(virtual.targets, look)
            case "ladder":
                chosen, reason = self._ladder(_rungs(virtual, look.ask.role), look)
            case _:
                chosen, reason = self._choose(*self._share(name, virtual, look)), Reason.SPLIT
        return Resolution(chosen.target, reason, (name, *chosen.way))

    def _awake(self, names: Sequence[str], look: _Look) -> tuple[Resolution, Reason]:
        view = look.view
        each = [self._choose(name, look) for name in names]
        for one in each:
            if view.awake(one.target.model):
                return one, Reason.AWAKE
            if one.target.remote and view.wait(one.target.model) is not None:
                return one, Reason.REMOTE
        for one in each:
            if view.waking(one.target.model):
                return one, Reason.WAKING
        return self._first(names, look)

    def _first(self, names: Sequence[str], look: _Look) -> tuple[Resolution, Reason]:
        for name in names:
            one = self._choose(name, look)
            if look.view.wait(one.target.model) is not None:
                return one, Reason.FIRST
        name = next((name for name in names if self._leads(name, look)), names[0])
        return self._choose(name, look), Reason.NONE_SERVES

    def _ladder(self, rungs: Sequence[str], look: _Look) -> tuple[Resolution, Reason]:
        each = [self._choose(name, look) for name in rungs]
        for one in each:
            if look.view.awake(one.target.model):
                return one, Reason.AWAKE
        costs = [_cost(one.target.model, look.view) for one in each]
        best = min(range(len(each)), key=lambda index: (*costs[index], index))
        return self._first(rungs, look) if math.isinf(costs[best][0]) else (each[best], Reason.SHORTEST_WAIT)

    def _after(self, name: str, chosen: Target, look: _Look) -> tuple[Target, ...]:
        """Return the next targets after a chosen one: of the ``first`` that led to it, then of those around it."""
        virtual = self._virtual[name]
        in_order = virtual.kind == "first"
        among = virtual.targets if in_order else self._within[name]
        led = next((each for each in among if chosen in self.targets(each, look.ask.role)), None)
        after = () if led is None or led in self._targets else self._after(led, chosen, look)
        if in_order:
            place = 0 if led is None else virtual.targets.index(led) + 1
            each = [self._choose(target, look).target for target in virtual.targets[place:]]
            after += tuple(target for target in each if target != chosen and look.view.allowed(target.model))
        return tuple(dict.fromkeys(after))

    def _leads(self, name: str, look: _Look) -> bool:
        """Whether the request may go to one of the targets of a name."""
        return any(look.view.allowed(end.model) for end in self.targets(name, look.ask.role))

    def _share(self, name: str, virtual: VirtualConfig, look: _Look) -> tuple[str, _Look]:
        """Return the target of a share: always the same one for the same key or conversation.

        A share that the request may not have goes to the others, which keep their own requests. A choice
        within the target has a number of its own.
        """
        weights, ask = virtual.split, look.ask
        assert weights is not None
        holder = ask.key if virtual.sticky == "key" and ask.key is not None else ask.conversation
        draw = ask.draw
        if holder is not None:
            digest = blake2b(f"{name}\0{holder}".encode(errors="surrogatepass"), digest_size=8).digest()
            draw = int.from_bytes(digest) / 2**64
        target, draw = _drawn(weights, draw)
        if not self._leads(target, look):
            others = {each: weight for each, weight in weights.items() if self._leads(each, look)}
            target, draw = _drawn(others or weights, draw)
        same = holder is not None or target in self._targets
        return target, look if same else look._replace(ask=replace(ask, draw=draw))


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
