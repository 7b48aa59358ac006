"""Whose the time is that the GPU is held: shares of it, by request, key and switch. Pure.

Theory of operation
===================

From the moment a model's wake hook starts until its sleep has been confirmed the GPU is *held*, and at each moment
it is held for something: for every request in flight, and for the switch under way while a sleep or wake hook of
it runs. Each of these gets an equal part of the moment; when there is nothing, it is the house's. So what all get
is the time that the GPU was held, no more and no less. (Several GPUs, or several models awake, are one GPU here.)

A switch's part goes to its *causers*: the keys whose requests waited for its target when it began, in equal parts,
and of a key in equal parts to those of these requests which have not ended. What nothing waited for (an idle model
put to sleep, a pin, an operator's command) is the house's.

Shares grow with a clock of their own, which runs at the speed of one part: what a request gets is the difference
of two of its readings, however many come and go between them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from llmux.core.effects import Admit, ModelRemoved, PhaseChanged, SwitchEnded, SwitchStarted
from llmux.core.phases import HOLDING, Phase
from llmux.upstream.native import SWITCH

Payers = Literal["causers", "everyone", "house"]
"""Which keys pay for switches."""

KNOWN_TO_HOLD = HOLDING - {Phase.UNKNOWN}
_SWITCHING = frozenset({Phase.SLEEPING, Phase.WAKING})


Share = tuple[float, float]
"""What a request got: its own part of the GPU's time, and its part of switches. Seconds."""


class Due(NamedTuple):
    """Seconds of a switch that are due from a key, none of whose requests can carry them."""

    key: str
    seconds: float
    model: str  # the switch's target


class Tally:
    """The clock of shares, and what else the end of a request takes; ``tally.c`` does the same, and more."""

    __slots__ = (
        "clock", "epoch", "held", "holds", "house", "left", "made", "now", "plain", "prices", "rest", "running",
        "switch_seconds", "switching",
    )  # fmt: skip

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = 0.0  # seconds of one part
        self.held = 0.0  # seconds, in all
        self.house = 0.0  # of these, the house's, since they were last taken
        self.switch_seconds = 0.0  # the parts of the switch under way
        self.holds = False  # a model holds the GPU
        self.switching = False  # and it is a switch's, too
        self.plain = True  # what runs has run from its admission on, and caused no switch that is under way
        self.running: dict[int, float] = {}  # since when requests run, on the clock
        # For the ends of requests:
        self.epoch = 0.0  # seconds since 1970 where the core's clock begins
        self.rest = 0.0  # of a microsecond
        self.left: Any = None  # what left without an answer, and is not accounted for yet
        self.prices: Any = None
        self.made = 0  # rows, where they are made by ``tally.c``

    def pass_to(self, now: float) -> None:
        """Let the time pass up to ``now``, on the core's clock."""
        past = now - self.now
        if past <= 0:
            return
        self.now = now
        if not self.holds:
            return
        self.held += past
        parts = len(self.running) + self.switching
        if not parts:
            self.house += past
            return
        part = past / parts
        self.clock += part
        if self.switching:
            self.switch_seconds += part

    def admitted(self, now: float, effect: Admit) -> None:
        """A request goes to its engine."""
        if now > self.now:  # in one turn of the loop the time is the same
            self.pass_to(now)
        if effect.request not in self.running:
            self.running[effect.request] = self.clock

    def over(self, now: float, request: int) -> float:
        """Return the part of a request that runs no longer, 0 where it did not."""
        if now > self.now:
            self.pass_to(now)
        since = self.running.pop(request, None)
        return 0.0 if since is None else self.clock - since


def native() -> Any:
    """Return what is compiled of this, as a module; None where it is not, or is left out."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return importlib.import_module("llmux.accounts._tally")
    except ImportError:
        return None


def new_tally() -> Any:
    """Return a ``Tally``, compiled where that could be."""
    module = native()
    return Tally() if module is None else module.Tally()


@dataclass(slots=True)
class _Switch:
    to: str  # its target, "" for none
    causers: dict[int, str | None]  # requests, and their keys, where those are known
    tally: Any

    @property
    def seconds(self) -> float:
        """Its parts so far."""
        return float(self.tally.switch_seconds)


@dataclass(slots=True)
class _Request:
    own: float = 0.0  # before it waited again
    charged: float = 0.0


@dataclass(slots=True)
class Shares:
    """Divides the time. ``waiters(model)`` returns the requests that wait for a model, as the core knows them.

    ``key_of(request)`` returns the name of the key of a request that has not ended, "" without one. ``everyone``
    are the names of all keys.
    """

    waiters: Callable[[str], Iterable[int]]
    key_of: Callable[[int], str]
    payers: Payers = "causers"
    everyone: Sequence[str] = ()
    due: list[Due] = field(default_factory=list)
    tally: Any = field(default_factory=new_tally)

    _requests: dict[int, _Request] = field(default_factory=dict)  # of which more is known; most run once, and end
    _holders: dict[str, Phase] = field(default_factory=dict)
    _hooks: int = 0  # models of which a sleep or wake hook runs
    _switch: _Switch | None = None

    @property
    def held(self) -> float:
        """Seconds that the GPU was held, in all."""
        return float(self.tally.held)

    # ---- what happens

    def admitted(self, now: float, effect: Admit) -> None:
        """A request goes to its engine."""
        self.tally.admitted(now, effect)

    def returned(self, now: float, request: int) -> None:
        """A request waits again: its engine was dead."""
        own = self.tally.over(now, request)
        if own or request in self._requests:
            self._requests.setdefault(request, _Request()).own += own
        self._look()

    def ended(self, now: float, request: int, key: str) -> Share:
        """Return what a request got, wherever it stood."""
        if self._switch is not None and request in self._switch.causers:
            self._switch.causers[request] = key
        own: float = self.tally.over(now, request)
        if self._requests:
            known = self._requests.pop(request, None)
            if known is not None:
                self._look()
                return known.own + own, known.charged
        return own, 0.0

    def phase_changed(self, now: float, effect: PhaseChanged) -> None:
        """A model came into another phase."""
        self.tally.pass_to(now)
        if effect.target in KNOWN_TO_HOLD:
            self._holders[effect.model] = effect.target
        else:
            self._holders.pop(effect.model, None)
        self._count_hooks()

    def removed(self, now: float, effect: ModelRemoved) -> None:
        """A model is gone."""
        self.tally.pass_to(now)
        self._holders.pop(effect.model, None)
        self._count_hooks()

    def _count_hooks(self) -> None:
        self._hooks = sum(phase in _SWITCHING for phase in self._holders.values())
        self._look()

    def _look(self) -> None:
        tally = self.tally
        tally.holds = bool(self._holders)
        tally.switching = self._switch is not None and self._hooks > 0
        tally.plain = self._switch is None and not self._requests

    def switch_started(self, now: float, effect: SwitchStarted) -> None:
        """A switch has begun."""
        self.tally.pass_to(now)
        waiting = () if effect.to is None else self.waiters(effect.to)
        self.tally.switch_seconds = 0.0
        self._switch = _Switch(effect.to or "", dict.fromkeys(waiting), self.tally)
        for ident in self._switch.causers:
            self._requests.setdefault(ident, _Request())
        self._look()

    def switch_ended(self, now: float, _effect: SwitchEnded) -> None:
        """A switch is over: it is paid for."""
        self.tally.pass_to(now)
        switch, self._switch = self._switch, None
        self._look()
        if switch is None or not switch.seconds:
            return
        if self.payers == "everyone" and self.everyone:
            self.due += [Due(key, switch.seconds / len(self.everyone), switch.to) for key in self.everyone]
        elif self.payers == "causers" and switch.causers:
            self._charge(switch)
        else:
            self.tally.house += switch.seconds

    def _charge(self, switch: _Switch) -> None:
        keys: dict[str, list[_Request]] = {}
        for ident, key in switch.causers.items():
            request = self._requests.get(ident)
            name = key if key is not None else "" if request is None else self.key_of(ident)
            still = keys.setdefault(name, [])
            if request is not None:
                still.append(request)
        part = switch.seconds / len(keys)
        for key, requests in keys.items():
            if not requests:
                self.due.append(Due(key, part, switch.to))
            for request in requests:
                request.charged += part / len(requests)

    # ---- what is due

    def take(self, now: float) -> tuple[float, list[Due]]:
        """Return the house's seconds, and what keys owe for switches, since this was asked last."""
        self.tally.pass_to(now)
        house, due = self.tally.house, self.due
        self.tally.house, self.due = 0.0, []
        return house, due
