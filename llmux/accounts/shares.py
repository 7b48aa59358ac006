"""Which key pays for the time that the GPU is held: shares of it, by request, key and switch. Pure.

Theory of operation
===================

From the start of a model's wake hook until its sleep has been confirmed, the GPU is *held*. Each moment is divided
equally between the requests in flight and, while one of its sleep or wake hooks runs, the switch under way; with
none of these, it falls to the house. So all shares together are exactly the time that the GPU was held. (Several
GPUs, or several models awake, count as one GPU.)

A switch's share is divided equally between its *causers*, the keys whose requests waited for its target when it
began, and for each key equally between those of these requests that have not ended. A switch for which no request
waited (an idle model put to sleep, a pin, an operator's command) falls to the house.

Shares are measured by a clock that advances by one part: a request's share is the difference of two readings of
it, however many requests come and go in between.
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
"""The own part of a request of the GPU's time, and its part of switches, in seconds."""


class Due(NamedTuple):
    """Seconds of a switch that a key owes, as none of its requests can carry them."""

    key: str
    seconds: float
    model: str  # the switch's target


class Tally:
    """The clock of shares, and the data for the ends of requests; ``tally.c`` does the same, and more."""

    __slots__ = (
        "clock", "epoch", "held", "holds", "house", "left", "made", "now", "plain", "prices", "rest", "running",
        "switch_seconds", "switching",
    )  # fmt: skip

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = 0.0  # seconds of one part
        self.held = 0.0  # seconds, in total
        self.house = 0.0  # of these, the house's since the last ``take``
        self.switch_seconds = 0.0  # the part of the switch under way
        self.holds = False  # a model holds the GPU
        self.switching = False  # one of its hooks runs for the switch under way
        self.plain = True  # no switch under way, and no request that was queued again or caused a switch
        self.running: dict[int, float] = {}  # requests in flight, and the clock at their admission
        # For the ends of requests:
        self.epoch = 0.0  # Unix time at which the core's clock is 0
        self.rest = 0.0  # fraction of a microsecond
        self.left: Any = None  # a request that left without an answer and is not accounted for yet
        self.prices: Any = None
        self.made = 0  # rows made by ``tally.c``

    def pass_to(self, now: float) -> None:
        """Advance to ``now``, on the core's clock."""
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
        """Record that a request goes to its engine."""
        if now > self.now:  # within one turn of the loop the time is the same
            self.pass_to(now)
        if effect.request not in self.running:
            self.running[effect.request] = self.clock

    def over(self, now: float, request: int) -> float:
        """Return the part of a request that is no longer in flight; 0 if it was not."""
        if now > self.now:
            self.pass_to(now)
        since = self.running.pop(request, None)
        return 0.0 if since is None else self.clock - since


def native() -> Any:
    """Return the compiled module; None if there is none, or it is switched off."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return importlib.import_module("llmux.accounts._tally")
    except ImportError:
        return None


def new_tally() -> Any:
    """Return a ``Tally``, compiled if possible."""
    module = native()
    return Tally() if module is None else module.Tally()


@dataclass(slots=True)
class _Switch:
    to: str  # its target, "" for none
    causers: dict[int, str | None]  # requests, and their keys if known
    tally: Any

    @property
    def seconds(self) -> float:
        """Its part so far."""
        return float(self.tally.switch_seconds)


@dataclass(slots=True)
class _Request:
    own: float = 0.0  # before it was queued again
    charged: float = 0.0


@dataclass(slots=True)
class Shares:
    """Divides the time. ``waiters(model)`` returns the requests that the core has queued for a model.

    ``key_of(request)`` returns the name of the key of a request that has not ended, "" without one. ``everyone``
    has the names of all keys.
    """

    waiters: Callable[[str], Iterable[int]]
    key_of: Callable[[int], str]
    payers: Payers = "causers"
    everyone: Sequence[str] = ()
    due: list[Due] = field(default_factory=list)
    tally: Any = field(default_factory=new_tally)

    _requests: dict[int, _Request] = field(default_factory=dict)  # that need more than the tally; rare
    _holders: dict[str, Phase] = field(default_factory=dict)
    _hooks: int = 0  # models with a sleep or wake hook running
    _switch: _Switch | None = None

    @property
    def held(self) -> float:
        """Seconds that the GPU was held in total."""
        return float(self.tally.held)

    # ---- what happens

    def admitted(self, now: float, effect: Admit) -> None:
        """Record that a request goes to its engine."""
        self.tally.admitted(now, effect)

    def returned(self, now: float, request: int) -> None:
        """Record that a request is queued again: its engine was dead."""
        own = self.tally.over(now, request)
        if own or request in self._requests:
            self._requests.setdefault(request, _Request()).own += own
        self._look()

    def ended(self, now: float, request: int, key: str) -> Share:
        """Return the share of a request that has ended, in flight or not."""
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
        """Record that a model changed its phase."""
        self.tally.pass_to(now)
        if effect.target in KNOWN_TO_HOLD:
            self._holders[effect.model] = effect.target
        else:
            self._holders.pop(effect.model, None)
        self._count_hooks()

    def removed(self, now: float, effect: ModelRemoved) -> None:
        """Record that a model was removed."""
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
        """Record that a switch has begun."""
        self.tally.pass_to(now)
        waiting = () if effect.to is None else self.waiters(effect.to)
        self.tally.switch_seconds = 0.0
        self._switch = _Switch(effect.to or "", dict.fromkeys(waiting), self.tally)
        for ident in self._switch.causers:
            self._requests.setdefault(ident, _Request())
        self._look()

    def switch_ended(self, now: float, _effect: SwitchEnded) -> None:
        """Charge a switch that is over."""
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
        """Return the house's seconds, and what keys owe for switches, since the last call."""
        self.tally.pass_to(now)
        house, due = self.tally.house, self.due
        self.tally.house, self.due = 0.0, []
        return house, due
