"""What the best schedule would be for one that knows the future.

A schedule is a sequence of visits: how many requests are admitted, then the drain, then the switch. After a drain
the engine is empty, so that all which matters of the past is which model is awake, how many of each were served,
the time and the waiting so far. Of two that agree in the first two, one that is neither earlier nor has waited
less can be dropped. All are kept of a small scenario: the schedule is the best one. Of a large one only the most
promising ``width`` are kept after each number of requests: the best may be better still.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from llmux.core.policy import Snapshot, SwitchTo, WaitUntil
from llmux.simulator import CostMatrix, EngineModel, Trace
from llmux.simulator.trace import TraceError

NEVER = math.inf
EPSILON = 1e-9  # seconds


@dataclass(frozen=True, slots=True)
class Rules:
    """What a schedule may do."""

    width: int | None = None  # schedules that are kept after each number of requests; None: all
    drains: bool = True  # leave while requests are in flight; otherwise only an idle engine is left
    oldest: bool = False  # always go to the model whose oldest request came first
    ahead: bool = False  # wake a model for which no request waits as yet


class Stop(NamedTuple):
    """A way to end a visit."""

    admitted: int  # requests of its model, from the start of the trace
    waited: float  # seconds, of those admitted in this visit
    drained: float  # when
    until: float  # before which it is decided: the next request would be admitted then


class Plan(NamedTuple):
    """A schedule so far: ``model`` is awake and idle at ``time``."""

    waited: float  # seconds, of all that were admitted
    time: float
    model: int
    served: tuple[int, ...]  # by model
    before: Plan | None


@dataclass(frozen=True, slots=True)
class Schedule:
    """The best that was found: what each visit serves."""

    waited: float  # seconds, of all requests
    visits: tuple[tuple[str, int], ...]  # model, and how many of its requests are admitted
    exact: bool  # nothing was dropped that might have been better


class Hindsight:
    """Looks for the schedule with the least waiting."""

    def __init__(self, trace: Trace, costs: CostMatrix, engine: EngineModel, rules: Rules | None = None) -> None:
        if trace.closed_loop:
            raise TraceError("a closed loop has no best schedule: its arrivals depend on its answers")
        self.names = trace.models
        self.engine, self.rules = engine, rules or Rules()
        self.rates = engine.rates()
        jobs = sorted(trace.jobs, key=lambda job: job.arrival or 0.0)
        self.arrivals = [[job.arrival or 0.0 for job in jobs if job.model == name] for name in self.names]
        self.works = [[engine.work(job) for job in jobs if job.model == name] for name in self.names]
        self.costs = [[0.0 if a == b else costs.of(a, b) for b in self.names] for a in self.names]
        self.sums = [list(accumulate(arrivals, initial=0.0)) for arrivals in self.arrivals]

    def best(self, at_most: float = NEVER) -> Schedule:
        """Return the best schedule. ``at_most``: the waiting of one that is known, in seconds; saves work."""
        total = sum(map(len, self.arrivals))
        layers: list[dict[tuple[int, tuple[int, ...]], list[Plan]]] = [{} for _ in range(total + 1)]
        start = Plan(0.0, 0.0, 0, (0,) * len(self.names), None)
        layers[0][0, start.served] = [start]
        best: Plan | None = None
        bound, exact = at_most + EPSILON, True
        for layer in layers:
            plans = [plan for kept in layer.values() for plan in kept]
            layer.clear()
            if self.rules.width is not None and len(plans) > self.rules.width:
                plans = heapq.nsmallest(self.rules.width, plans, key=self._promise)
                exact = False
            for plan in plans:
                if self._promise(plan) >= bound:
                    continue
                for stop, following in self._follow(plan):
                    if following is None:
                        waited = plan.waited + stop.waited
                        if waited < bound:
                            bound = waited
                            best = Plan(waited, stop.drained, plan.model, self._with(plan, stop), plan)
                    elif self._promise(following) < bound:
                        _keep(layers[sum(following.served)], following)
        if best is None:
            raise TraceError("no schedule is as good as that")
        return Schedule(best.waited, tuple(self._visits(best)), exact)

    # ---- visits

    def _follow(self, plan: Plan) -> Iterator[tuple[Stop, Plan | None]]:
        """Yield what may come next; None: nothing is left to be served."""
        for stop in self._stops(plan):
            served = self._with(plan, stop)
            others = [m for m, count in enumerate(served) if count < len(self.arrivals[m]) and m != plan.model]
            if self.rules.oldest and others:
                others = [min(others, key=lambda model: self.arrivals[model][served[model]])]
            if not others and stop.until == NEVER:
                yield stop, None
            for other in others:
                asked = self.arrivals[other][served[other]]
                if self.rules.ahead:
                    asked = -NEVER
                elif asked >= stop.until:
                    continue
                time = max(stop.drained, asked) + self.costs[plan.model][other]
                yield stop, Plan(plan.waited + stop.waited, time, other, served, plan)

    def _stops(self, plan: Plan) -> Iterator[Stop]:
        """Serve a model from a wake on; yield each way to end the visit."""
        arrivals, works = self.arrivals[plan.model], self.works[plan.model]
        first = served = plan.served[plan.model]
        rates, slots = self.rates, self.engine.slots
        time, made, waited = plan.time, 0.0, 0.0
        running: list[float] = []  # progress at which each ends, ascending
        while True:
            asked = arrivals[served] if served < len(arrivals) else NEVER
            # Whatever ends before the next one is admitted, or because that needs its slot.
            moment, progress = time, made
            ends, count = 0, len(running)
            while ends < count:
                end = moment + (running[ends] - progress) / rates[count - ends]
                if end > max(moment, asked) and count - ends < slots:
                    break
                moment, progress = end, running[ends]
                ends += 1
            following = max(moment, asked)
            drained, at = moment, progress
            for index in range(ends, count):
                drained += (running[index] - at) / rates[count - index]
                at = running[index]
            busy = drained > following + EPSILON and not self.rules.drains
            if (served > first or plan.before is None) and not busy:
                yield Stop(served, waited, drained, following)
            if served == len(arrivals):
                return
            if ends < count:
                progress += (following - moment) * rates[count - ends]
            running = running[ends:]
            time, made = following, progress
            running.append(made + works[served])
            running.sort()
            waited += time - arrivals[served]
            served += 1

    def _with(self, plan: Plan, stop: Stop) -> tuple[int, ...]:
        return (*plan.served[: plan.model], stop.admitted, *plan.served[plan.model + 1 :])

    def _visits(self, plan: Plan) -> Iterator[tuple[str, int]]:
        path = []
        while (before := plan.before) is not None:
            path.append((self.names[before.model], plan.served[before.model] - before.served[before.model]))
            plan = before
        return reversed(path)

    # ---- bounds

    def _promise(self, plan: Plan) -> float:
        """Return the least that all will have waited: each model is awake no sooner than by a switch from here."""
        waited = plan.waited
        costs = self.costs[plan.model]
        for model, served in enumerate(plan.served):
            waited += self._owed(model, served, plan.time + costs[model])
        return waited

    def _owed(self, model: int, served: int, time: float) -> float:
        """Return how long those that came before ``time`` will have waited by then."""
        arrivals, sums = self.arrivals[model], self.sums[model]
        count = max(bisect_left(arrivals, time), served)
        return (count - served) * time - (sums[count] - sums[served])


def _keep(layer: dict[tuple[int, tuple[int, ...]], list[Plan]], plan: Plan) -> None:
    """Add a plan, unless one that is there is as good; drop those that it makes needless."""
    plans = layer.setdefault((plan.model, plan.served), [])
    if any(other.time <= plan.time and other.waited <= plan.waited for other in plans):
        return
    plans[:] = [other for other in plans if other.time < plan.time or other.waited < plan.waited]
    plans.append(plan)


class Scripted:
    """Plays a schedule: a policy that knows what to do."""

    def __init__(self, schedule: Schedule) -> None:
        self._visits = schedule.visits
        self._place = 0
        self._since: float | None = 0.0

    def decide(self, now: Snapshot) -> SwitchTo | WaitUntil:
        """Leave once the visit has served what it was to serve, and a request waits for the next model."""
        (home,) = (now.models[name] for name in now.awake)
        while self._visits[self._place][0] != home.name:
            self._place += 1
        following = self._visits[self._place + 1 : self._place + 2]
        if home.admissions >= self._visits[self._place][1] and following and following[0][0] in now.waiting:
            self._place += 1
            return SwitchTo(following[0][0])
        return WaitUntil(now.time + 1e4)
