"""How much of the GPU each key has had, and which key's turn is next. Pure.

Each key has a virtual counter: the tokens that it was served and the seconds of the switches that its requests
caused, each times its price, divided by the key's weight. What waits is served lowest counter first. A key that
comes back is lifted to the lowest counter of those that are active: what it did not use is not saved up.

This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024,
arXiv:2401.00588), with a term for switches, which the bound of that paper does not cover. As in start-time fair
queueing (Goyal, Vin and Cheng, SIGCOMM 1996) a counter says where a key's service began: what is in flight is
charged when its tokens are known, and until then it counts for the order alone, with what the key's requests
usually take.

A policy weighs how much waits for each model. Of a key that is ahead of the others by more than a switch and a few
requests, what waits counts for nothing (``entitled``) until the others have caught up, so that a flood is one key,
not a thousand waiters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

ALPHA = 0.2  # of averages
UNKNOWN = 500.0  # what a request takes, in tokens, until one has ended
AHEAD = 2.0  # switches and requests by which a key may be ahead and still count for the policy


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
    _time: float = 0.0  # the counter of the key that was the last to be active, while none is
    _usual: float = UNKNOWN  # what a request takes, on average over all keys
    _switch: float = 0.0  # what a switch takes, on average

    def configure(self, prices: Prices, weights: Mapping[str, float]) -> None:
        """Take over other prices and weights; counters stay."""
        self.prices, self.weights = prices, weights
        for name, key in self._keys.items():
            key.weight = weights.get(name, 1.0)

    # ---- what happens

    def joined(self, name: str) -> None:
        """A request of a key has come, to wait or to be served at once."""
        key = self._keys.get(name)
        if key is None:
            key = self._keys[name] = _Key(self.weights.get(name, 1.0))
        if not key.present:
            key.counter = max(key.counter, self.lowest)
            self._active[name] = key
        key.present += 1

    def left(self, name: str) -> None:
        """A request of a key is gone, served or not."""
        key = self._keys[name]
        key.present -= 1
        if not key.present:
            del self._active[name]
            if not self._active:
                self._time = max(self._time, key.counter)

    def started(self, name: str) -> None:
        """A request of a key is in flight from now on."""
        self._keys[name].running += 1

    def stopped(self, name: str) -> None:
        """A request of a key is no longer in flight."""
        self._keys[name].running -= 1

    def served(self, name: str, tokens: tuple[int, int]) -> None:
        """A request of a key has been answered, with so many tokens of input and output."""
        key, prices = self._keys[name], self.prices
        cost = tokens[0] * prices.input + tokens[1] * prices.output
        key.counter += cost / key.weight
        key.usual = cost if key.usual is None else key.usual + ALPHA * (cost - key.usual)
        self._usual += ALPHA * (cost - self._usual)

    def switched(self, names: Collection[str], seconds: float) -> None:
        """A switch of so many seconds is over, which requests of these keys have caused; of none: nothing pays."""
        cost = seconds * self.prices.switch_second
        for name in names:
            key = self._keys[name]
            key.counter += cost / len(names) / key.weight
        if names:
            self._switch = cost if not self._switch else self._switch + ALPHA * (cost - self._switch)

    # ---- what follows

    @property
    def lowest(self) -> float:
        """The lowest counter of the keys with requests waiting or in flight."""
        return min((key.counter for key in self._active.values()), default=self._time)

    def rank(self, name: str) -> float:
        """Return where a key's next request stands: the lowest goes first."""
        return self._keys[name].rank(self._usual)

    def entitled(self, name: str, place: int) -> bool:
        """Say whether the request of a key at ``place`` (from 0) among its waiters counts for the policy."""
        if len(self._active) <= 1:
            return True
        key, usual = self._keys[name], self._usual
        own = usual if key.usual is None else key.usual
        floor = min(other.rank(usual) for other in self._active.values())
        return key.rank(usual) + place * own / key.weight <= floor + AHEAD * (self._switch + usual)

    def counters(self) -> dict[str, float]:
        """Return the counter of each key that was ever seen."""
        return {name: key.counter for name, key in self._keys.items()}
