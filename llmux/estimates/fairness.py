"""How much of the GPU each key has had, what it has cost the others, and which key's turn is next. Pure.

Each key has a virtual counter: the tokens that it was served and the seconds of the switches that its requests
caused, each times its price, divided by the key's weight. What waits is served lowest counter first. A key that
comes back is lifted to the lowest counter of those that are active: what it did not use is not saved up. Where the
GPU goes back to a model that was left for a key, the switch back is charged to that key, too.

This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024,
arXiv:2401.00588), with a term for switches, which the bound of that paper does not cover. As in start-time fair
queueing (Goyal, Vin and Cheng, SIGCOMM 1996) a counter says where a key's service began: what is in flight is
charged when its tokens are known, and until then it counts for the order alone, with what the key's requests
usually take.

A policy weighs how much waits for each model. Of a key that is ahead of the others by more than ``AHEAD`` switches
and requests, what waits counts for nothing (``entitled``) until the others have caught up, so that a flood is one
key, not a thousand waiters. With less, keys that take turns cost a switch each; with more, a flood is noticed.

Order alone does not help a request that finds the GPU at a model of the flood's own, or busy with its answers:
they are not cut. So it is also measured what a key *costs* the others: the seconds that their requests wait while
the GPU does something on its account alone, be it a switch, the way back, or an answer. A key that has had more
than its part of the GPU, and has asked for several times as much as the others, is *over*, until it has had far
less: a flood that comes and goes fills all slots at each of its turns. It may cost them as
much as its part of what they wait anyway, by which one key of six makes the other five wait a fifth longer. It
causes no switch while others wait for one, or once it has cost too much, and is held back even from what is awake
once its answers have. What costs no other key anything is served all along; and ``max_wait`` goes before this,
counted for such a key from when it was let in last: each of the thousand would be overdue, and no other key
served.

What is over is lifted as what is away, so that it comes back to its part and not to all that it has missed, and
no other key waits for it to catch up. A key that asks seldom is about for longer, as its next request comes later.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

ALPHA = 0.2  # of averages
UNKNOWN = 500.0  # what a request takes, in tokens, until one has ended
AHEAD = 1.5  # switches, and requests, by which a key may be ahead and still count for the policy
ABOUT = 300.0  # seconds without a request after which a key is not about, or
GAPS = 3.0  # times as long as it usually is between two of its requests
LATELY = 1800.0  # seconds in which what was is forgotten, but for a third
DEMAND = 2.0  # times as much as the others, each, that a key asks for which is over
STILL = 0.25  # of its part, that a key has had at least which is over still
MUCH = 10.0  # requests that it asks for at least: chance makes less of keys that ask now and then
KNOCK_ON = 1.5  # seconds that others wait for each that is seen: what has come meanwhile waits longer
ANSWERS = 0.7  # of what a key may cost the others, by its answers: a switch costs more at once
LONG = 0.4  # of that at least, where a switch is shorter than an answer: what those cost shows late
LITTLE = 0.1  # of an answer, for which a request may be made to wait in any case
LEAST = 1e-3  # seconds


@dataclass(frozen=True, slots=True)
class Prices:
    """What a token and a second of a switch count for; each >= 0."""

    input: float = 1.0
    output: float = 2.0
    switch_second: float = 500.0


@dataclass(slots=True)
class _Key:
    weight: float = 1.0
    counter: float = 0.0
    present: int = 0  # requests waiting or in flight
    running: int = 0  # of these in flight
    usual: float | None = None  # what one of its requests takes, on average; None until one has ended
    over: bool = False  # it has had more than its part, and asks for much
    held: bool = False  # it has cost the others what it may
    came: float | None = None  # when its last request did
    gap: float = 0.0  # seconds between two of its requests, on average
    # These are forgotten with time, and are of ``time``:
    had: float = 0.0  # of its counter, not divided by its weight
    waited: float = 0.0  # seconds that its requests have, together
    ran: float = 0.0  # seconds that its answers have, together
    cost: float = 0.0  # seconds that requests of others have waited on its account, together
    by_answers: float = 0.0  # of these, while its answers ran
    time: float = 0.0

    def forget(self, now: float) -> None:
        """Forget some of what was before."""
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
        """Return its counter, with what is in flight."""
        return self.counter + self.running * (usual if self.usual is None else self.usual) / self.weight


@dataclass(slots=True)
class Fairness:
    """The counters of one core's keys. ``weights`` by key, each > 0; 1 where there is none.

    A request that comes is told of with ``joined``, and with ``left`` when it is gone. Between them ``started``
    and ``stopped`` say that it is in flight, and ``served`` what it took. A key may be any string, "" too.
    """

    prices: Prices = field(default_factory=Prices)
    weights: Mapping[str, float] = field(default_factory=dict)
    _keys: dict[str, _Key] = field(default_factory=dict)
    _active: dict[str, _Key] = field(default_factory=dict)
    _about: dict[str, float] = field(default_factory=dict)  # keys, and until when they are about
    now: float = 0.0  # on the core's clock; whatever tells of requests sets it
    _time: float = 0.0  # the counter of the key that was the last to be active, while none is
    _usual: float = UNKNOWN  # what a request takes, on average over all keys
    _switch: float = 0.0  # what a switch takes, on average
    _switch_seconds: float = 0.0  # the same in seconds
    _answer_seconds: float = 0.0  # of an answer, on average
    _share: tuple[float, float] | None = None  # when, and how many seconds a key of weight 1 may cost

    def configure(self, prices: Prices, weights: Mapping[str, float]) -> None:
        """Take over other prices and weights; counters stay."""
        self.prices, self.weights = prices, weights
        for name, key in self._keys.items():
            key.weight = weights.get(name, 1.0)

    # ---- what happens

    def joined(self, name: str) -> None:
        """A request of a key has come, to wait or to be served at once."""
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
        """A request of a key is gone, served or not."""
        key = self._keys[name]
        key.present -= 1
        if not key.present:
            del self._active[name]
            self._about[name] = self.now + min(max(ABOUT, GAPS * key.gap), LATELY)
            if not self._active:
                self._time = max(self._time, key.counter)

    def started(self, name: str) -> None:
        """A request of a key is in flight from now on."""
        self._keys[name].running += 1

    def stopped(self, name: str, seconds: float = 0.0) -> None:
        """A request of a key is no longer in flight, which it was for so many seconds."""
        self._answer_seconds = _average(self._answer_seconds, seconds)
        self._keys[name].running -= 1

    def served(self, name: str, tokens: tuple[int, int]) -> None:
        """A request of a key has been answered, with so many tokens of input and output."""
        key, prices = self._keys[name], self.prices
        cost = tokens[0] * prices.input + tokens[1] * prices.output
        key.counter += cost / key.weight
        key.forget(self.now)
        key.had += cost
        key.usual = cost if key.usual is None else _average(key.usual, cost)
        self._usual = _average(self._usual, cost)
        self._compare()

    def switched(self, names: Collection[str], seconds: float) -> None:
        """A switch of so many seconds is over, which requests of these keys have caused; of none: nothing pays."""
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
        """So many requests of each key have waited, or been in flight, for some seconds until now."""
        self._share = None
        for name, count in waiting.items():
            key = self._keys[name]
            if not key.held:  # it does not ask for more by being held back
                key.forget(self.now)
                key.waited += count * seconds
        for name, count in running.items():
            key = self._keys[name]
            key.forget(self.now)
            key.ran += count * seconds

    def blame(self, names: Collection[str], seconds: float, waiting: Mapping[str, int], *, answers: bool) -> None:
        """So many requests of each key have waited for some seconds on account of these, or their ``answers``."""
        self._share = None
        harmed = sum(count for other, count in waiting.items() if other not in names and not self.over(other))
        for name in names if harmed else ():
            key = self._keys[name]
            key.forget(self.now)
            key.cost += harmed * seconds / len(names)
            if answers:
                key.by_answers += harmed * seconds / len(names)

    def _compare(self) -> None:
        """See which keys have had more than their part."""
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
        """The lowest counter of the keys with requests waiting or in flight, if they are not over."""
        return min((key.counter for key in self._in_turn()), default=self._time)

    def _in_turn(self) -> list[_Key]:
        """Return the active keys by which the others go: what rests, or is held back, would hold all up."""
        active = self._active.values()
        return [key for key in active if not key.over] or [key for key in active if not key.held]

    def rank(self, name: str) -> float:
        """Return where a key's next request stands: the lowest goes first."""
        return self._keys[name].rank(self._usual)

    def entitled(self, name: str, place: int) -> bool:
        """Say whether the request of a key at ``place`` (from 0) among its waiters counts for the policy."""
        if len(self._active) <= 1:
            return True
        key, usual = self._keys[name], self._usual
        own = usual if key.usual is None else key.usual
        floor = min((other.rank(usual) for other in self._in_turn()), default=-math.inf)
        return key.rank(usual) + place * own / key.weight <= floor + self.slack

    def over(self, name: str) -> bool:
        """Say whether a key has had more than its part, and asks for much."""
        return self._keys[name].over

    def holds(self, name: str, *, answers: bool) -> bool:
        """Say whether a key has cost the others what it may, by ``answers`` or by all. What is over is lifted."""
        key = self._keys[name]
        limit = self._limit(key) if key.over else math.inf
        key.held = key.cost > limit
        if key.over:
            key.counter = max(key.counter, self.lowest)
        return key.by_answers > self._by_answers * limit if answers else key.held

    @property
    def _by_answers(self) -> float:
        """How much of what a key may cost the others it may by its answers."""
        if not self.long or not self._switch_seconds:
            return ANSWERS
        return ANSWERS * max(LONG, self._switch_seconds / self._answer_seconds)

    def _limit(self, key: _Key) -> float:
        """Return how many seconds the requests of others may wait on account of a key; inf if there are none."""
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
        """By how much a key may be ahead of another without being held back."""
        return AHEAD * (self._switch + self._usual)

    def counters(self) -> dict[str, float]:
        """Return the counter of each key that was ever seen."""
        return {name: key.counter for name, key in self._keys.items()}


def _average(before: float, value: float) -> float:
    return before + ALPHA * (value - before) if before else value
