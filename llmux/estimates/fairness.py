"""How much of the GPU each key got, what it cost the others, and which key is served next. Pure.

Each key has a virtual counter: the tokens that it was served and the seconds of the switches that its requests
caused, each times its price, divided by the key's weight. Queued requests are served lowest counter first. The
counter of a key that comes back is raised to the lowest of the active keys: unused time is not saved up. When the
GPU returns to a model that it left for a key, the switch back is charged to that key, too.

This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024,
arXiv:2401.00588), with a term for switches, which the bound of that paper does not cover. As in start-time fair
queueing (Goyal, Vin and Cheng, SIGCOMM 1996), a counter says where a key's service began: a request is charged
when its tokens are known; while it is in flight, the key's usual cost is added for the order only.

A policy weighs how many requests wait for each model. Once a key is ahead of the others by more than ``AHEAD``
switches and requests, its queued requests do not count (``entitled``) until the others have caught up: a flood
weighs as one key, not as a thousand waiters. A smaller ``AHEAD`` would make keys that take turns cost a switch
each; with a larger one, the others would notice a flood.

Order alone does not help a request that finds the GPU with a model of the flood, or busy with the flood's answers,
which are not cut. So the *cost* of a key to the others is measured, too: the seconds that their requests wait
while what the GPU does (a switch, the switch back, an answer) is due to that key alone. A key is *over* when it
has had more than its part of the GPU and asks for several times as much as the others; it stays over until it has
had far less, because a flood that comes and goes fills all slots each time. An over key may cost the others its
part of what they wait anyway: one key of six makes the other five wait a fifth longer. It causes no switch while
others wait for one, or once it has cost too much; once its answers have, it is held back even from an awake model.
Requests that cost the others nothing are always served. ``max_wait`` takes precedence, but for an over key it
counts from its last admission: otherwise every request of a flood would be overdue, and no other key served.

The counter of an over key is raised like that of an absent one, so that it comes back to its part, not to all that
it missed, and the others need not wait for it to catch up. A key counts as *about* for longer if it asks seldom.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

ALPHA = 0.2  # weight of the newest value in an average
UNKNOWN = 500.0  # the cost of a request, in tokens, until one has ended
AHEAD = 1.5  # switches, and requests, by which a key may be ahead and still count for the policy
ABOUT = 300.0  # a key counts as about for this many seconds after its last request, or for
GAPS = 3.0  # times its usual gap between requests, if that is longer
LATELY = 1800.0  # seconds in which the past fades to about a third (1/e)
DEMAND = 2.0  # an over key asks for more than this many times what each of the others asks for
STILL = 0.25  # of its part: an over key stays over while it has had more than this
MUCH = 10.0  # requests beyond that: keys that ask now and then exceed their part by chance
KNOCK_ON = 1.5  # seconds that others wait per second measured: requests that arrive meanwhile wait longer
ANSWERS = 0.7  # of what a key may cost the others, the part for its answers: a switch costs more at once
LONG = 0.4  # the least of that part where a switch is shorter than an answer, whose cost shows late
LITTLE = 0.1  # of an answer: this long a request may be made to wait in any case
LEAST = 1e-3  # seconds


@dataclass(frozen=True, slots=True)
class Prices:
    """The price of a token, and of a second of a switch; each >= 0."""

    input: float = 1.0
    output: float = 2.0
    switch_second: float = 500.0


@dataclass(slots=True)
class _Key:
    weight: float = 1.0
    counter: float = 0.0
    present: int = 0  # requests queued or in flight
    running: int = 0  # of these, in flight
    usual: float | None = None  # average cost of its requests; None until one has ended
    over: bool = False  # it has had more than its part, and asks for much more than the others
    held: bool = False  # it has cost the others all that it may
    came: float | None = None  # when its last request arrived
    gap: float = 0.0  # average seconds between two of its requests
    # These fade with time; they are as of ``time``:
    had: float = 0.0  # its cost, not divided by its weight
    waited: float = 0.0  # seconds that its requests were queued, summed
    ran: float = 0.0  # seconds that its requests were in flight, summed
    cost: float = 0.0  # seconds that requests of others waited because of it, summed
    by_answers: float = 0.0  # of these, because of its answers
    time: float = 0.0

    def forget(self, now: float) -> None:
        """Let the past fade up to now."""
        past = now - self.time
        if past > 0.0:
            keep = math.exp(-past / LATELY)
            self.had *= keep
            self.waited *= keep
            self.ran *= keep
            self.cost *= keep
            self.by_answers *= keep
            self.time = now

    def rank(self, usual: float) -> float:
        """Return its counter plus the usual cost of its requests in flight."""
        return self.counter + self.running * (usual if self.usual is None else self.usual) / self.weight


@dataclass(slots=True)
class Fairness:
    """The counters of one core's keys. ``weights`` by key, each > 0; 1 where there is none.

    Report each request with ``joined``, ``started``, ``served``, ``stopped`` and ``left``; one that is rejected or
    abandoned has no answer. A key may be any string, "" too.
    """

    prices: Prices = field(default_factory=Prices)
    weights: Mapping[str, float] = field(default_factory=dict)
    _keys: dict[str, _Key] = field(default_factory=dict)
    _active: dict[str, _Key] = field(default_factory=dict)
    _about: dict[str, float] = field(default_factory=dict)  # keys, and the time until which they count as about
    now: float = 0.0  # on the core's clock; the caller sets it before it reports anything
    _time: float = 0.0  # while no key is active: the counter of the last one that was
    _usual: float = UNKNOWN  # average cost of a request, over all keys
    _switch: float = 0.0  # average cost of a switch
    _switch_seconds: float = 0.0  # the same in seconds
    _answer_seconds: float = 0.0  # average seconds of an answer
    _share: tuple[float, float] | None = None  # when computed, and the seconds that a key of weight 1 may cost

    def configure(self, prices: Prices, weights: Mapping[str, float]) -> None:
        """Replace the prices and weights; the counters stay."""
        self.prices, self.weights = prices, weights
        for name, key in self._keys.items():
            key.weight = weights.get(name, 1.0)

    # ---- what happens

    def joined(self, name: str) -> None:
        """Record that a request of a key has arrived, to be queued or served at once."""
        self._share = None
        key = self._keys.get(name)
        if key is None:
            key = self._keys[name] = _Key(self.weights.get(name, 1.0))
        if not key.present:
            key.counter = max(key.counter, self.lowest)
            self._active[name] = key
        key.present += 1
        if key.came is not None:
            key.gap = _average(key.gap, self.now - key.came)
        key.came = self.now
        self._about[name] = math.inf

    def left(self, name: str) -> None:
        """Record that a request of a key has gone, served or not."""
        key = self._keys[name]
        key.present -= 1
        if not key.present:
            del self._active[name]
            self._about[name] = self.now + min(max(ABOUT, GAPS * key.gap), LATELY)
            if not self._active:
                self._time = max(self._time, key.counter)

    def started(self, name: str) -> None:
        """Record that a request of a key is in flight from now on."""
        self._keys[name].running += 1

    def stopped(self, name: str, seconds: float = 0.0) -> None:
        """Record that a request of a key is no longer in flight, after so many seconds."""
        self._answer_seconds = _average(self._answer_seconds, seconds)
        self._keys[name].running -= 1

    def served(self, name: str, tokens: tuple[int, int]) -> None:
        """Charge a key for an answer, with its tokens (input, output)."""
        key, prices = self._keys[name], self.prices
        cost = tokens[0] * prices.input + tokens[1] * prices.output
        key.counter += cost / key.weight
        key.forget(self.now)
        key.had += cost
        key.usual = cost if key.usual is None else _average(key.usual, cost)
        self._usual = _average(self._usual, cost)
        self._compare()

    def switched(self, names: Collection[str], seconds: float) -> None:
        """Charge a switch, in seconds, to the keys whose requests caused it; with no keys, to none."""
        cost = seconds * self.prices.switch_second
        for name in names:
            key = self._keys[name]
            key.counter += cost / len(names) / key.weight
            key.forget(self.now)
            key.had += cost / len(names)
        if names:
            self._switch = _average(self._switch, cost)
            self._switch_seconds = _average(self._switch_seconds, seconds)
            self._compare()

    def passed(self, seconds: float, waiting: Mapping[str, int], running: Mapping[str, int]) -> None:
        """Record how many requests of each key were queued, and in flight, for the last ``seconds``."""
        self._share = None
        for name, count in waiting.items():
            key = self._keys[name]
            if not key.held:  # holding a key back must not count as asking for more
                key.forget(self.now)
                key.waited += count * seconds
        for name, count in running.items():
            key = self._keys[name]
            key.forget(self.now)
            key.ran += count * seconds

    def blame(self, names: Collection[str], seconds: float, waiting: Mapping[str, int], *, answers: bool) -> None:
        """Charge keys for the seconds that requests waited because of them, or of their ``answers``."""
        self._share = None
        harmed = sum(count for other, count in waiting.items() if other not in names and not self.over(other))
        for name in names if harmed else ():
            key = self._keys[name]
            key.forget(self.now)
            key.cost += harmed * seconds / len(names)
            if answers:
                key.by_answers += harmed * seconds / len(names)

    def _compare(self) -> None:
        """Find the keys that have had more than their part."""
        self._share = None
        about = self._those_about()
        for key in about:
            key.forget(self.now)
        had, asked = sum(key.had for key in about), sum(key.waited + key.ran for key in about)
        weights = sum(key.weight for key in about)
        much = MUCH * (self._answer_seconds + self._switch_seconds)
        for key in about:
            own, odds = key.waited + key.ran, key.weight / max(weights - key.weight, LEAST)
            part = odds * (had - key.had) * (STILL if key.over else 1.0)
            key.over = key.had > part and own > DEMAND * odds * (asked - own) + much

    def _those_about(self) -> list[_Key]:
        for name in [name for name, until in self._about.items() if until < self.now]:
            del self._about[name]
        return [self._keys[name] for name in self._about]

    # ---- what follows

    @property
    def lowest(self) -> float:
        """The lowest counter of the active keys that are not over; see ``_in_turn``."""
        return min((key.counter for key in self._in_turn()), default=self._time)

    def _in_turn(self) -> list[_Key]:
        """Return the active keys that set the pace: not over, else not held; the rest would stall all."""
        active = self._active.values()
        return [key for key in active if not key.over] or [key for key in active if not key.held]

    def rank(self, name: str) -> float:
        """Return the rank of a key's next request: the lowest is served first."""
        return self._keys[name].rank(self._usual)

    def entitled(self, name: str, place: int) -> bool:
        """Say whether a key's request at ``place`` (from 0) in its queue counts for the policy."""
        if len(self._active) <= 1:
            return True
        key, usual = self._keys[name], self._usual
        own = usual if key.usual is None else key.usual
        floor = min((other.rank(usual) for other in self._in_turn()), default=-math.inf)
        return key.rank(usual) + place * own / key.weight <= floor + self.slack

    def over(self, name: str) -> bool:
        """Say whether a key has had more than its part, and asks for much more than the others."""
        return self._keys[name].over

    def holds(self, name: str, *, answers: bool) -> bool:
        """Say whether a key has cost the others all it may, by ``answers`` or in all; lifts a key that is over."""
        key = self._keys[name]
        limit = self._limit(key) if key.over else math.inf
        key.held = key.cost > limit
        if key.over:
            key.counter = max(key.counter, self.lowest)
        return key.by_answers > self._by_answers * limit if answers else key.held

    @property
    def _by_answers(self) -> float:
        """The fraction of what a key may cost the others that its answers may."""
        if not self.long or not self._switch_seconds:
            return ANSWERS
        return ANSWERS * max(LONG, self._switch_seconds / self._answer_seconds)

    def _limit(self, key: _Key) -> float:
        """Return the seconds that requests of others may wait because of a key; inf if there are no others."""
        if self._share is None or self._share[0] != self.now:
            self._share = self.now, self._share_of_one()
        return key.weight * self._share[1]

    def _share_of_one(self) -> float:
        about = self._those_about()
        for other in about:
            other.forget(self.now)
        others = [other for other in about if not other.over]
        if not others:
            return math.inf
        cost = KNOCK_ON * sum(other.cost for other in about if other.over)
        own = max(sum(other.waited for other in others) - cost, LITTLE * sum(other.ran for other in others))
        return own / KNOCK_ON / sum(other.weight for other in others)

    @property
    def long(self) -> bool:
        """Whether an answer usually takes longer than a switch."""
        return self._answer_seconds > self._switch_seconds

    @property
    def slack(self) -> float:
        """By how much a key may be ahead of another and still count for the policy."""
        return AHEAD * (self._switch + self._usual)

    def counters(self) -> dict[str, float]:
        """Return the counter of each key that was ever seen."""
        return {name: key.counter for name, key in self._keys.items()}


def _average(before: float, value: float) -> float:
    return before + ALPHA * (value - before) if before else value
