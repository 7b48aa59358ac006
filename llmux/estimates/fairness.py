"""How much of the GPU each key has had, and which key's turn is next. Pure.

Each key has a virtual counter: the tokens that it was served and the seconds of the switches that its requests
caused, each times its price, divided by the key's weight. What waits is served lowest counter first. A key that
comes back is lifted to the lowest counter of those that are active: what it did not use is not saved up.

This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024,
arXiv:2401.00588), with a term for switches, which the bound of that paper does not cover. As in start-time fair
queueing (Goyal, Vin and Cheng, SIGCOMM 1996) a counter says where a key's service began: what is in flight is
charged when its tokens are known, and until then it counts for the order alone, with what the key's requests
usually take.

A policy weighs how much waits for each model. Of a key that is ahead of the others by more than ``AHEAD`` switches
and requests, what waits counts for nothing (``entitled``) until the others have caught up, so that a flood is one
key, not a thousand waiters. With less, keys that take turns cost a switch each; with more, a flood is noticed.

A key that floods a model which nothing else wants would have the GPU go there whenever the others pause, and each
of their next requests wait for the way back. So a key *rests* that has had ``OVER`` times its part of what all had
lately, and has caused switches, there and back, for more than its part of the time: until that is over, what it
waits for causes none, even if the GPU is idle. What is awake serves it all along. Parts go by the weights of keys
that are about: with requests, or not long without. It is no reason to wait where nothing else is about, or nothing
is awake.

What has waited for nearly ``max_wait`` is served for some time, as long as ``VISIT`` switches take, before its
model is left again. The core would come back for it at once, and where all that a flood waits for is overdue that
is every other switch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from llmux.core import Core
from llmux.core.effects import Admit, Effect, Reject, RequestQueued, SwitchEnded, SwitchStarted
from llmux.core.events import Event, RequestAbandoned, RequestArrived, RequestFinished, RequestReturned
from llmux.core.model import Model, Request
from llmux.core.policy import Decision, ModelView, Policy, Snapshot, Stay, SwitchTo, WaitUntil
from llmux.core.state import first_come

ALPHA = 0.2  # of averages
UNKNOWN = 500.0  # what a request takes, in tokens, until one has ended
AHEAD = 1.5  # switches, and requests, by which a key may be ahead and still count for the policy
ABOUT = 300.0  # seconds without a request after which a key is not about; also how fast switches are forgotten
LATELY = 1800.0  # seconds in which what a key has had is forgotten, but for a third
OVER = 1.5  # parts that a key has had for it to rest: chance makes less of keys that ask for the same
BACK = 2.0  # switches that one causes: what was awake will be wanted again
LEAST = 1e-3  # seconds
NEARLY = 0.8  # of ``max_wait``
VISIT = 2.0  # switches


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
    # Both are forgotten with time, and are of ``time``:
    caused: float = 0.0  # seconds of switches, those back included
    had: float = 0.0  # of its counter, not divided by its weight
    time: float = 0.0

    def take(self, now: float, had: float, caused: float = 0.0) -> None:
        """Add to what it has had, and caused; forget some of what was before."""
        past = max(0.0, now - self.time)
        if past:
            self.caused *= math.exp(-past / ABOUT)
            self.had *= math.exp(-past / LATELY)
            self.time = now
        self.had += had
        self.caused += caused

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
    _about: dict[str, float] = field(default_factory=dict)  # keys, and when they last had requests
    now: float = 0.0  # on the core's clock; whatever tells of requests sets it
    _time: float = 0.0  # the counter of the key that was the last to be active, while none is
    _usual: float = UNKNOWN  # what a request takes, on average over all keys
    _switch: float = 0.0  # what a switch takes, on average
    seconds: float = 0.0  # of a switch, on average

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
        self._about[name] = math.inf

    def left(self, name: str) -> None:
        """A request of a key is gone, served or not."""
        key = self._keys[name]
        key.present -= 1
        if not key.present:
            del self._active[name]
            self._about[name] = self.now
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
        key.take(self.now, cost)
        key.usual = cost if key.usual is None else key.usual + ALPHA * (cost - key.usual)
        self._usual += ALPHA * (cost - self._usual)

    def switched(self, names: Collection[str], seconds: float) -> None:
        """A switch of so many seconds is over, which requests of these keys have caused; of none: nothing pays."""
        cost = seconds * self.prices.switch_second
        for name in names:
            key = self._keys[name]
            key.counter += cost / len(names) / key.weight
            key.take(self.now, cost / len(names), BACK * seconds / len(names))
        if names:
            self._switch = cost if not self._switch else self._switch + ALPHA * (cost - self._switch)
            self.seconds = seconds if not self.seconds else self.seconds + ALPHA * (seconds - self.seconds)

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
        return key.rank(usual) + place * own / key.weight <= floor + self.slack

    def rest(self, name: str) -> float:
        """Return the seconds for which a key may cause no switch: others are about, and it has had its part."""
        key = self._keys[name]
        if not key.caused or len(self._about) <= 1:
            return 0.0
        for other in [other for other, left in self._about.items() if left < self.now - ABOUT]:
            del self._about[other]
        about = [self._keys[other] for other in self._about]
        for other_key in about:
            other_key.take(self.now, 0.0)
        part = key.weight / sum(other_key.weight for other_key in about)
        if part >= 1.0 or key.had <= OVER * part * sum(other_key.had for other_key in about):
            return 0.0
        return max(0.0, ABOUT * math.log(key.caused / (ABOUT * part)))

    @property
    def slack(self) -> float:
        """By how much a key may be ahead of another without being held back."""
        return AHEAD * (self._switch + self._usual)

    def counters(self) -> dict[str, float]:
        """Return the counter of each key that was ever seen."""
        return {name: key.counter for name, key in self._keys.items()}


@dataclass(slots=True)
class _Present:
    """A request that waits or is in flight."""

    key: str
    model: str
    since: float  # when it began to wait
    running: bool = False


class FairOrder:
    """Keeps the books of ``Fairness`` by what a core is told and does, and orders what waits in it.

    ``pick`` is for ``State.pick``, and the core follows a ``FairPolicy``. ``before`` and ``after`` have to be
    called with all that it is told and answers, and ``served`` before it is told that a request has been answered;
    or ``attach`` does so. ``max_wait`` is the core's, in seconds.
    """

    def __init__(self, fairness: Fairness, max_wait: float = math.inf) -> None:
        self.fairness = fairness
        self.max_wait = max_wait
        self._coming: dict[int, str] = {}  # requests that may yet wait, and their keys
        self._present: dict[int, _Present] = {}
        self._waiting: dict[str, dict[str, dict[int, float]]] = {}  # since when: by model, key and request
        self._running: dict[str, Counter[str]] = {}  # in flight: by model and key
        self._causers: dict[int, list[str]] = {}  # keys, by the switch under way

    def pick(self, model: Model) -> Request:
        """Return which of a model's waiters is let in now: the oldest of the key that stands lowest."""
        firsts = {key: next(iter(waiters)) for key, waiters in self._waiting.get(model.name, {}).items()}
        known = [key for key, request in firsts.items() if request in model.queue]
        if not known:  # all came before these books were begun
            return first_come(model)
        rank = self.fairness.rank
        chosen = firsts[min(known, key=lambda key: (rank(key), model.queue[firsts[key]].arrived))]
        self._start(chosen)
        return model.queue[chosen]

    def served(self, request: int, tokens: tuple[int, int]) -> None:
        """Take in what an answer has taken, before the core is told of its end."""
        entry = self._present.get(request)
        if entry is not None:
            self.fairness.served(entry.key, tokens)

    def before(self, now: float, event: Event) -> None:
        """Take in what the core is about to be told."""
        self.fairness.now = now
        if isinstance(event, RequestArrived):
            self._coming[event.request] = event.key
            if not event.rides:
                self._join(now, event.request, event.model)
        elif isinstance(event, RequestFinished | RequestAbandoned):
            self._leave(event.request)
        elif isinstance(event, RequestReturned) and event.request in self._present:
            entry = self._present[event.request]
            self._leave(event.request)
            self._coming[event.request] = entry.key
            self._join(entry.since, event.request, entry.model)
            waiters = self._waiting[entry.model][entry.key]
            self._waiting[entry.model][entry.key] = dict(sorted(waiters.items(), key=itemgetter(1)))

    def after(self, now: float, effects: Iterable[Effect]) -> None:
        """Take in what the core has answered."""
        self.fairness.now = now
        for effect in effects:
            if isinstance(effect, Admit | RequestQueued):
                self._join(now, effect.request, effect.model)
                if isinstance(effect, Admit):
                    self._start(effect.request)
            elif isinstance(effect, Reject):
                self._leave(effect.request)
            elif isinstance(effect, SwitchStarted):
                self._causers[effect.switch] = list(self._waiting.get(effect.to or "", ()))
            elif isinstance(effect, SwitchEnded):
                causers = self._causers.pop(effect.switch, [])
                self.fairness.switched(causers, max(0.0, effect.duration - effect.drain))

    def rests(self, awake: Collection[str]) -> dict[str, float]:
        """Return for how long the keys may cause no switch that wait for what is not awake; 0 for most."""
        waiting = {key for name, keys in self._waiting.items() if name not in awake for key in keys}
        return {key: self.fairness.rest(key) if awake else 0.0 for key in waiting}

    def waiters(self, model: str, without: Collection[str] = ()) -> list[float]:
        """Return when the waiters of a model began to wait which count for the policy, oldest first.

        Those of the keys ``without`` do not.
        """
        entitled = self.fairness.entitled
        found = []
        for key, waiters in self._waiting.get(model, {}).items():
            if key in without:
                continue
            for place, since in enumerate(waiters.values()):
                if not entitled(key, place):
                    break
                found.append(since)
        found.sort()
        return found

    def present(self) -> dict[int, bool]:
        """Return the requests that wait (False) or are in flight (True)."""
        return {request: entry.running for request, entry in self._present.items()}

    def due(self, awake: Collection[str], waiting: Sequence[str]) -> str | None:
        """Return the model, of those that wait, whose key stands lower than all that is served by one request."""
        rank = self.fairness.rank
        here = [key for name in awake for key, count in self._running.get(name, {}).items() if count]
        here += [key for name in awake for key in self._waiting.get(name, ())]
        found = [(rank(key), place, name) for place, name in enumerate(waiting) for key in self._waiting[name]]
        lowest, _, model = min(found)
        return model if here and min(map(rank, here)) > lowest + self.fairness.slack else None

    def holds(self, name: str, model: ModelView) -> bool:
        """Say whether a model has to serve what has waited for nearly as long as the core lets it."""
        if not model.in_flight or self.fairness.now > (model.awake_since or 0.0) + VISIT * self.fairness.seconds:
            return False
        before = self.fairness.now - NEARLY * self.max_wait
        return any(next(iter(waiters.values())) <= before for waiters in self._waiting.get(name, {}).values())

    def policy(self, policy: Policy) -> FairPolicy:
        """Return a policy as it decides when it is shown what counts."""
        return FairPolicy(policy, self)

    def attach(
        self, core: Core, key_of: Callable[[int], str], tokens_of: Callable[[int], tuple[int, int]]
    ) -> Callable[[Event, float], list[Effect]]:
        """Make a core fair which nothing else drives; return what to call instead of its ``handle``.

        ``key_of`` and ``tokens_of`` return the key of a request, and what its answer has taken.
        """
        handle = core.handle
        self.max_wait = core.state.rules.max_wait
        core.state.pick = self.pick
        core.state.policy = self.policy(core.state.policy)

        def fairly(event: Event, now: float) -> list[Effect]:
            if isinstance(event, RequestArrived):
                event.key = key_of(event.request)
            elif isinstance(event, RequestFinished):
                self.served(event.request, tokens_of(event.request))
            self.before(now, event)
            effects = handle(event, now)
            self.after(now, effects)
            return effects

        return fairly

    def _join(self, now: float, request: int, model: str) -> None:
        key = self._coming.pop(request, None)
        if key is not None:
            self._present[request] = _Present(key, model, now)
            self._waiting.setdefault(model, {}).setdefault(key, {})[request] = now
            self.fairness.joined(key)

    def _leave(self, request: int) -> None:
        self._coming.pop(request, None)
        entry = self._present.pop(request, None)
        if entry is None:
            return
        if entry.running:
            self._running[entry.model][entry.key] -= 1
            self.fairness.stopped(entry.key)
        else:
            self._waits_no_longer(request, entry)
        self.fairness.left(entry.key)

    def _start(self, request: int) -> None:
        entry = self._present.get(request)
        if entry is not None and not entry.running:
            entry.running = True
            self._waits_no_longer(request, entry)
            self._running.setdefault(entry.model, Counter())[entry.key] += 1
            self.fairness.started(entry.key)

    def _waits_no_longer(self, request: int, entry: _Present) -> None:
        waiting = self._waiting[entry.model]
        del waiting[entry.key][request]
        if not waiting[entry.key]:
            del waiting[entry.key]


class FairPolicy:
    """A policy that is shown, of what waits, what counts: see ``Fairness.entitled``."""

    def __init__(self, policy: Policy, order: FairOrder) -> None:
        self._policy = policy
        self._order = order

    def __getattr__(self, name: str) -> Any:
        """Return what the policy has beyond its decisions."""
        return getattr(self._policy, name)

    def decide(self, now: Snapshot) -> Decision:
        """Ask the policy about what counts; while something is served and nothing that waits counts, stay."""
        order = self._order
        if any(order.holds(name, now.models[name]) for name in now.awake):
            return Stay("what has waited for long is served before its model is left")
        rests = order.rests(now.awake)
        resting = {key for key, rest in rests.items() if rest > 0.0}
        models = {
            name: FairView(view, order.waiters(name, () if name in now.awake else resting))
            for name, view in now.models.items()
        }
        waiting = [name for name in now.waiting if models[name].queued]
        if not waiting:
            if any(now.models[name].in_flight for name in now.awake):
                return Stay("the keys of what waits have had more than the others")
            if rests and len(resting) == len(rests):
                until = now.time + max(min(rests.values()), LEAST)
                return WaitUntil(until, "the keys of what waits have had their part of the time for switches")
            return self._policy.decide(now)
        waiting.sort(key=lambda name: models[name].oldest_arrival or 0.0)
        due = order.due(now.awake, waiting)
        if due is not None:
            return SwitchTo(due, "its key has had less than those that are served")
        return self._policy.decide(FairSnapshot(now.time, models, now.awake, tuple(waiting)))


@dataclass(frozen=True, slots=True)
class FairSnapshot:
    """What a policy is shown of what counts; a ``Snapshot``."""

    time: float
    models: Mapping[str, Any]
    awake: tuple[str, ...]
    waiting: tuple[str, ...]


class FairView:
    """One model, with the waiters that count; a ``ModelView``."""

    def __init__(self, view: ModelView, arrivals: Sequence[float]) -> None:
        self._view = view
        self._arrivals = arrivals

    def __getattr__(self, name: str) -> Any:
        """Return what is the same whatever counts."""
        return getattr(self._view, name)

    @property
    def queued(self) -> int:
        """How many requests wait for it, and count."""
        return len(self._arrivals)

    @property
    def oldest_arrival(self) -> float | None:
        """When the oldest of them arrived, or None."""
        return self._arrivals[0] if self._arrivals else None

    def arrivals(self) -> Iterator[float]:
        """Return their arrival times, oldest first."""
        return iter(self._arrivals)
