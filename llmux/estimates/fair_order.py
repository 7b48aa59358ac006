"""Which key is next, by the counters of ``Fairness``: what is admitted, held back, and shown to a policy. Pure.

``FairOrder`` sees every event and effect of a core, so it knows which request of which key is queued or in flight,
for how long, and what the GPU does meanwhile. ``FairPolicy`` wraps the configured policy, and shows it a snapshot
without the requests that do not count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from llmux.core import Core
from llmux.core.admission import HELD
from llmux.core.effects import Admit, Effect, Reject, RequestQueued, SwitchDrained, SwitchEnded, SwitchStarted
from llmux.core.events import Event, RequestAbandoned, RequestArrived, RequestFinished, RequestReturned
from llmux.core.model import Model, Request
from llmux.core.policy import Decision, ModelView, Policy, Snapshot, Stay, SwitchTo, WaitUntil
from llmux.core.state import Turns
from llmux.estimates.fairness import Fairness


@dataclass(slots=True)
class _Present:
    """A request that is queued or in flight."""

    key: str
    model: str
    since: float  # when it was queued
    began: float | None = None  # when it was admitted


@dataclass(slots=True)
class _Switch:
    """A switch, the keys with requests queued for its target, and the keys that it is charged to."""

    sources: tuple[str, ...]
    to: str | None
    causers: list[str]
    payers: list[str]
    drained: bool = False


class FairOrder(Turns):
    """Keeps the counters of ``Fairness`` by the core's events and effects, and orders the queued requests.

    Set it as ``State.turns``, with a ``FairPolicy`` as the core's policy. Call ``before`` with every event,
    ``after`` with the effects that the core returns for it, and ``served`` before the event that an answer ended;
    or let ``attach`` do so. ``max_wait`` is the core's, in seconds.
    """

    def __init__(self, fairness: Fairness, max_wait: float = math.inf) -> None:
        self.fairness = fairness
        self.max_wait = max_wait
        self._coming: dict[int, str] = {}  # requests that may yet be queued, and their keys
        self._present: dict[int, _Present] = {}
        self._waiting: dict[str, dict[str, dict[int, float]]] = {}  # queued since, by model, key and request
        self._running: dict[str, Counter[str]] = {}  # in flight: by model and key
        self._switch: _Switch | None = None  # the one under way
        self._woken: dict[str, _Switch] = {}  # the last one to each model
        self._let_in: dict[tuple[str, str], float] = {}  # when a model last admitted a key that was over
        self._known = 0.0  # the time up to which waiting was charged

    def admits(self, request: Request) -> bool:
        """Say whether a request that has just arrived is admitted if there is room."""
        entry = self._present.get(request.id)
        return entry is None or not self._holds(entry.model, entry.key, entry.since)

    def pick(self, model: Model) -> Request | None:
        """Return the queued request to admit now: the oldest of the key with the lowest rank."""
        waiting = self._waiting.get(model.name, {})
        # A request that has left in this step stays in these records until the step ends.
        found = {key: next(filter(model.queue.__contains__, waiters), None) for key, waiters in waiting.items()}
        firsts = {key: request for key, request in found.items() if request is not None}
        if not firsts:  # all arrived before these records began
            return super().pick(model)
        known = [key for key in firsts if not self._holds(model.name, key, waiting[key][firsts[key]])]
        if not known:
            return self._just_ridden(model)
        rank = self.fairness.rank
        chosen = firsts[min(known, key=lambda key: (rank(key), model.queue[firsts[key]].arrived))]
        self._start(chosen)
        return model.queue[chosen]

    def _just_ridden(self, model: Model) -> Request | None:
        """Return the ride-along request that was just queued, if admitted: the last one, not recorded here yet."""
        for request in reversed(model.queue.values()):
            if (key := self._coming.get(request.id)) is None:
                return None
            if not self._holds(model.name, key, request.arrived):
                return request
        return None

    def since(self, model: Model) -> float:
        """Return from when ``max_wait`` counts: per key its oldest waiter or last admission, the earliest."""
        waiting = self._waiting.get(model.name)
        return min(self._since(model.name, key) for key in waiting) if waiting else super().since(model)

    def _since(self, model: str, key: str) -> float:
        return max(next(iter(self._waiting[model][key].values())), self._let_in.get((model, key), -math.inf))

    def _holds(self, model: str, key: str, since: float) -> bool:
        """Say whether a key's queued request is held back though its model is awake."""
        fair, switch = self.fairness, self._switch
        if switch is not None and switch.to == model and key in switch.causers:
            # The model was woken for it; where answers are long, that entitles an over key to one at a time.
            return fair.over(key) and fair.long and self._running.get(model, Counter())[key] > 0
        overdue = max(since, self._let_in.get((model, key), since)) + self.max_wait
        return overdue > fair.now and fair.holds(key, answers=True)

    def _look_back(self, now: float) -> None:
        """Charge the time since the last step: which requests waited, and because of which keys."""
        past, self._known, fair = now - self._known, now, self.fairness
        fair.now = now
        if past <= 0.0 or not self._present:
            return
        waiting: Counter[str] = Counter()
        running: Counter[str] = Counter()
        for keys in self._waiting.values():
            waiting.update({key: len(waiters) for key, waiters in keys.items()})
        for counts in self._running.values():
            running.update(counts)
        users = [key for key, count in running.items() if count]
        fair.passed(past, waiting, running)
        switch = self._switch
        if switch is not None and switch.drained:
            fair.blame(self._guilty(switch.payers), past, waiting, answers=False)
        elif guilty := self._guilty(users):
            fair.blame(guilty, past, waiting, answers=True)
        elif switch is None:
            for model, counts in self._running.items():
                self._blame_here(past, model, counts)

    def _guilty(self, users: Collection[str]) -> Collection[str]:
        """Return the keys that alone cause what the GPU does, if there are any."""
        return users if len(users) == 1 or all(map(self.fairness.over, users)) else ()

    def _blame_here(self, past: float, model: str, counts: Counter[str]) -> None:
        """Charge waiting at a model that serves several keys: one waiter per request in flight of an over key."""
        over = self.fairness.over
        here = [key for key, count in counts.items() if count and over(key)]
        waiting = {key: len(waiters) for key, waiters in self._waiting.get(model, {}).items() if not over(key)}
        if here and waiting:
            share = min(1.0, sum(counts[key] for key in here) / sum(waiting.values()))
            self.fairness.blame(here, past * share, waiting, answers=True)

    def served(self, request: int, tokens: tuple[int, int]) -> None:
        """Record the tokens of an answer, before the core gets the event that it ended."""
        entry = self._present.get(request)
        if entry is not None:
            self.fairness.served(entry.key, tokens)

    def before(self, now: float, event: Event) -> None:
        """Record an event that the core is about to handle."""
        self._look_back(now)
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
        """Record the effects that the core returned."""
        self._look_back(now)
        for effect in effects:
            if isinstance(effect, Admit | RequestQueued):
                self._join(now, effect.request, effect.model)
                if isinstance(effect, Admit):
                    self._start(effect.request)
            elif isinstance(effect, Reject):
                self._leave(effect.request)
            elif isinstance(effect, SwitchStarted):
                causers = list(self._waiting.get(effect.to or "", ()))
                payers = self._left_for(effect) or causers
                self._switch = _Switch(effect.sources, effect.to, causers, payers)
            elif (switch := self._switch) is None:  # it was under way when these records began
                continue
            elif isinstance(effect, SwitchDrained):
                switch.drained = True
            elif isinstance(effect, SwitchEnded):
                self.fairness.switched(switch.payers, max(0.0, effect.duration - effect.drain))
                self._woken[switch.to or ""], self._switch = switch, None

    def _left_for(self, switch: SwitchStarted) -> list[str]:
        """Return the keys for which the target was left, if the GPU goes back to it; otherwise none."""
        before = [self._woken[name] for name in switch.sources if name in self._woken]
        return next((each.causers for each in before if switch.to in each.sources), [])

    def held(self, awake: Collection[str]) -> tuple[set[str], set[str]]:
        """Return the keys that may cause no switch, and the keys that are held back from the awake models."""
        if not awake:
            return set(), set()
        fair = self.fairness
        away = {key for name, keys in self._waiting.items() if name not in awake for key in keys}
        here = {key for name in awake for key in self._waiting.get(name, ())}
        resting = {key for key in away if fair.over(key)}
        if resting == away:
            resting = {key for key in away if fair.holds(key, answers=False)}
        return resting, {key for key in here if fair.holds(key, answers=True)}

    def again(self, waiting: Iterable[str]) -> float:
        """Return when to look again at what is held back: when the next is overdue, ``HELD`` seconds at most."""
        now = self.fairness.now
        due = [self._since(model, key) + self.max_wait for model in waiting for key in self._waiting[model]]
        return min([now + HELD, *(time for time in due if time > now)])

    def waiters(self, model: str, without: Collection[str] = ()) -> list[float]:
        """Return since when the requests which count for the policy are queued for a model, oldest first.

        Requests of the keys in ``without`` do not count.
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
        """Return the requests that are queued (False) or in flight (True)."""
        return {request: entry.began is not None for request, entry in self._present.items()}

    def due(self, awake: Collection[str], waiting: Sequence[str]) -> str | None:
        """Return the waiting model whose key ranks below all keys at the awake models, by more than the slack."""
        rank = self.fairness.rank
        here = [key for name in awake for key, count in self._running.get(name, {}).items() if count]
        here += [key for name in awake for key in self._waiting.get(name, ())]
        found = [(rank(key), place, name) for place, name in enumerate(waiting) for key in self._waiting[name]]
        lowest, _, model = min(found)
        return model if here and min(map(rank, here)) > lowest + self.fairness.slack else None

    def policy(self, policy: Policy) -> FairPolicy:
        """Return a policy that is shown only the requests that count."""
        return FairPolicy(policy, self)

    def attach(
        self, core: Core, key_of: Callable[[int], str], tokens_of: Callable[[int], tuple[int, int]]
    ) -> Callable[[Event, float], list[Effect]]:
        """Make a core fair that nothing else drives; return what to call instead of its ``handle``.

        ``key_of`` and ``tokens_of`` return the key of a request, and the tokens (input, output) of its answer.
        """
        handle = core.handle
        self.max_wait = core.state.rules.max_wait
        core.state.turns = self
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
        if entry.began is not None:
            self._running[entry.model][entry.key] -= 1
            self.fairness.stopped(entry.key, self.fairness.now - entry.began)
        else:
            self._waits_no_longer(request, entry)
        self.fairness.left(entry.key)

    def _start(self, request: int) -> None:
        entry = self._present.get(request)
        if entry is not None and entry.began is None:
            entry.began = self.fairness.now
            self._waits_no_longer(request, entry)
            self._running.setdefault(entry.model, Counter())[entry.key] += 1
            if self.fairness.over(entry.key):
                self._let_in[entry.model, entry.key] = self.fairness.now
            self.fairness.started(entry.key)

    def _waits_no_longer(self, request: int, entry: _Present) -> None:
        waiting = self._waiting[entry.model]
        del waiting[entry.key][request]
        if not waiting[entry.key]:
            del waiting[entry.key]


class FairPolicy:
    """Shows a policy only the queued requests that count: see ``Fairness.entitled``."""

    def __init__(self, policy: Policy, order: FairOrder) -> None:
        self._policy = policy
        self._order = order

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the policy, other than its decisions."""
        return getattr(self._policy, name)

    def decide(self, now: Snapshot) -> Decision:
        """Ask the policy about the requests that count; if none counts while requests are in flight, stay."""
        order = self._order
        resting, held = order.held(now.awake)
        models = {
            name: FairView(view, order.waiters(name, held if name in now.awake else resting))
            for name, view in now.models.items()
        }
        waiting = [name for name in now.waiting if models[name].queued]
        if not waiting:
            if any(now.models[name].in_flight for name in now.awake):
                return Stay("the keys of what waits have had more than the others")
            if resting:
                return WaitUntil(
                    order.again(now.waiting), "the keys of what waits have cost the others as much as they may"
                )
            return self._policy.decide(now)
        waiting.sort(key=lambda name: models[name].oldest_arrival or 0.0)
        due = order.due(now.awake, waiting)
        if due is not None:
            return SwitchTo(due, "its key has had less than those that are served")
        return self._policy.decide(FairSnapshot(now.time, models, now.awake, tuple(waiting)))


@dataclass(frozen=True, slots=True)
class FairSnapshot:
    """A ``Snapshot`` with only the requests that count."""

    time: float
    models: Mapping[str, Any]
    awake: tuple[str, ...]
    waiting: tuple[str, ...]


class FairView:
    """The ``ModelView`` of one model, with only the requests that count."""

    def __init__(self, view: ModelView, arrivals: Sequence[float]) -> None:
        self._view = view
        self._arrivals = arrivals

    def __getattr__(self, name: str) -> Any:
        """Return what does not depend on which requests count."""
        return getattr(self._view, name)

    @property
    def queued(self) -> int:
        """How many of its queued requests count."""
        return len(self._arrivals)

    @property
    def oldest_arrival(self) -> float | None:
        """When the oldest of them arrived, or None."""
        return self._arrivals[0] if self._arrivals else None

    def arrivals(self) -> Iterator[float]:
        """Return their arrival times, oldest first."""
        return iter(self._arrivals)
