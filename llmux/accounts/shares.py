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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llmux.core.effects import Admit, ModelRemoved, PhaseChanged, SwitchEnded, SwitchStarted
from llmux.core.phases import HOLDING, Phase

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


@dataclass(slots=True)
class _Switch:
    to: str  # its target, "" for none
    causers: dict[int, str | None]  # requests, and their keys, where those are known
    seconds: float = 0.0  # its parts so far


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
    house: float = 0.0  # seconds that were the house's, since they were last taken
    due: list[Due] = field(default_factory=list)
    held: float = 0.0  # seconds, in all

    _now: float = 0.0
    _clock: float = 0.0
    _running: dict[int, float] = field(default_factory=dict)  # since when requests run, on the clock
    _requests: dict[int, _Request] = field(default_factory=dict)  # of which more is known; most run once, and end
    _holders: dict[str, Phase] = field(default_factory=dict)
    _hooks: int = 0  # models of which a sleep or wake hook runs
    _switch: _Switch | None = None

    def pass_to(self, now: float) -> None:
        """Let the time pass up to ``now``, on the core's clock."""
        past = now - self._now
        if past <= 0:
            return
        self._now = now
        if not self._holders:
            return
        self.held += past
        switch = self._switch if self._hooks else None
        parts = len(self._running) + (switch is not None)
        if not parts:
            self.house += past
            return
        part = past / parts
        self._clock += part
        if switch is not None:
            switch.seconds += part

    # ---- what happens

    def admitted(self, now: float, effect: Admit) -> None:
        """A request goes to its engine."""
        if now > self._now:  # in one turn of the loop the time is the same
            self.pass_to(now)
        if effect.request not in self._running:
            self._running[effect.request] = self._clock

    def returned(self, now: float, request: int) -> None:
        """A request waits again: its engine was dead."""
        self.pass_to(now)
        since = self._running.pop(request, None)
        if since is not None:
            self._requests.setdefault(request, _Request()).own += self._clock - since

    def ended(self, now: float, request: int, key: str) -> Share:
        """Return what a request got, wherever it stood."""
        if now > self._now:
            self.pass_to(now)
        if self._switch is not None and request in self._switch.causers:
            self._switch.causers[request] = key
        since = self._running.pop(request, None)
        own = 0.0 if since is None else self._clock - since
        if self._requests:
            known = self._requests.pop(request, None)
            if known is not None:
                return known.own + own, known.charged
        return own, 0.0

    def phase_changed(self, now: float, effect: PhaseChanged) -> None:
        """A model came into another phase."""
        self.pass_to(now)
        if effect.target in KNOWN_TO_HOLD:
            self._holders[effect.model] = effect.target
        else:
            self._holders.pop(effect.model, None)
        self._count_hooks()

    def removed(self, now: float, effect: ModelRemoved) -> None:
        """A model is gone."""
        self.pass_to(now)
        self._holders.pop(effect.model, None)
        self._count_hooks()

    def _count_hooks(self) -> None:
        self._hooks = sum(phase in _SWITCHING for phase in self._holders.values())

    def switch_started(self, now: float, effect: SwitchStarted) -> None:
        """A switch has begun."""
        self.pass_to(now)
        waiting = () if effect.to is None else self.waiters(effect.to)
        self._switch = _Switch(effect.to or "", dict.fromkeys(waiting))
        for ident in self._switch.causers:
            self._requests.setdefault(ident, _Request())

    def switch_ended(self, now: float, _effect: SwitchEnded) -> None:
        """A switch is over: it is paid for."""
        self.pass_to(now)
        switch, self._switch = self._switch, None
        if switch is None or not switch.seconds:
            return
        if self.payers == "everyone" and self.everyone:
            self.due += [Due(key, switch.seconds / len(self.everyone), switch.to) for key in self.everyone]
        elif self.payers == "causers" and switch.causers:
            self._charge(switch)
        else:
            self.house += switch.seconds

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
        self.pass_to(now)
        house, due = self.house, self.due
        self.house, self.due = 0.0, []
        return house, due
