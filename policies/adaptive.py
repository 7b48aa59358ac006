"""Adaptive: leave when staying is worth less than going, and go where most waiting ends per second.

- **Gate**: requests that waited when the model came are served before it is left (see ``exhaustive`` for why).
- **Price**: leaving shuts out the requests which come during the drain and the time away; staying until the engine
  falls idle keeps the others waiting. It is an M/G/inf system, whose busy periods grow exponentially with its load
  (L. Takacs, 1962): a lightly loaded engine is soon idle, a loaded one practically never. The model is left once
  the number of waiters elsewhere outweighs those which would be shut out.
- **Without a limit**: the service time of a model without ``max_in_flight`` includes the queue inside its engine,
  and grows with every second of staying. Its busy period is computed from measurements (``engine`` in the
  snapshot). An engine that receives more than it can answer never falls idle; it is left as soon as its gate is
  open and a few requests wait elsewhere.
- **Limit**: past the gate no request waits longer than ``patience`` times the drain and the switches there and
  back. So a visit lasts in proportion to the cost of coming and going, however long the queues are. Without a
  limit there is no gate, as waiting requests enter the engine at once; the time of an answer counts instead.
- **Route**: the waiting that a visit ends, over the time that it takes (W. E. Smith, 1956). It is the sum of its
  requests' waits, not their number: a queue that fills n times as fast is then visited sqrt(n) times as often,
  which is best for the mean (O. J. Boxma, H. Levy and J. A. Weststrate, 1991). It weighs more when its oldest
  waiter is about to outwait a tour of all queues. Close to the usual ``max_wait`` the oldest comes first: past it
  visits are cut short, and once that has begun it does not end.

Averages can be wrong: the policy's own observations bound them. Until it has seen a switch it serves the awake
model until that is idle or a request has waited for three drains, or 15 seconds if that is more; a model without
``max_in_flight``, which may never be idle, it leaves at once.
"""

from __future__ import annotations

import math
from typing import TypeVar

from pydantic import BaseModel, Field

from llmux.core.policy import Decision, EngineView, ModelView, Snapshot, Stay, SwitchRecord, SwitchTo, WaitUntil

STEEP = 4.0  # power with which a queue's weight grows as its oldest waiter outwaits the tour
MAX_LOAD = 3.0  # streams: a busier engine never falls idle anyway
AGEING = 0.3  # weight that a waiter gains for each way there and back that it has waited
OTHERS = 0.5  # share of the other queues that are served before the return
OVERDUE = 480.0  # seconds of waiting that take precedence: ``max_wait`` has no gate, and is 600 s by default
UNLIMITED = 1000  # requests that an engine without max_in_flight serves at once
UNSEEN_COST = 0.35  # of the estimate: a direction whose estimate is too high is never tried, and never measured
UNSEEN_WAIT, UNSEEN_DRAINS = 15.0, 3.0  # seconds, and drains, for which a request waits for the first switch
UNSEEN_SERVICE = 4.0  # seconds
AGE_LEFT = 1.0  # long answers tend to stay long: one that has run for t will run for at least this times t more
SAMPLES = 3  # fewer observations of its own are ignored
RATE_OFF, SERVICE_OFF = 1.5, 1.25  # how far an average may be from what was observed
AHEAD = 32  # requests: an engine whose throughput does not rise with so many more is full
STABLE = 1.02  # answers a second for each arrival, below which an engine never falls idle
LEAST = 1e-3  # seconds
MEMORY = 100  # answers, after which older ones count half
COST_ALPHA, DRAIN_ALPHA = 0.3, 0.2

Key = TypeVar("Key")


class Adaptive:
    """Weighs the waiting requests against those which would be shut out."""

    class Options(BaseModel):
        """Larger values make visits longer, except of ``tour``."""

        patience: float = Field(default=2.0, gt=0, description="Longest wait past the gate, in ways.")
        price: float = Field(default=4.0, ge=0, description="Weight of requests shut out by a drain.")
        reluctance: float = Field(default=0.1, ge=0, description="Weight of requests that come while it is away.")
        tour: float = Field(default=0.5, gt=0, description="Tours after which a small queue takes precedence.")

    def __init__(self, options: Options) -> None:
        self._options = options
        self._seen = Memory()
        self.on_switch_completed = self._seen.learn
        self._gate = (-1.0, 0.0)  # visit, when its gate opened

    def anticipate(self, now: Snapshot) -> Stay | SwitchTo:
        """Wake, if the user allows it, the model that is likely to be requested next."""
        return foresee(now, self._seen)

    def observe(self, now: Snapshot, decision: Decision) -> None:
        """Observe the decision of another policy that is in force instead of this one.

        What came since a model was left is counted from there. Without it the policy would take the requests of a
        visit for those of a second or of an hour, and stay far too long or leave far too soon.
        """
        if now.awake:
            home = _home(now)
            self._seen.watch(home, now.time)
            if isinstance(decision, SwitchTo):
                self._seen.left(home, now.time)

    def decide(self, now: Snapshot) -> Stay | SwitchTo | WaitUntil:
        """Compare staying with going, once the gate is open."""
        if not now.awake:
            return SwitchTo(now.waiting[0], reason="nothing is awake")
        home = _home(now)
        self._seen.watch(home, now.time)
        if self._gated(home, now.time):
            return Stay("the requests that it was woken for come first")
        if not self._seen.costs:
            return self._first(now, home)
        waiting = [(model, _age(model, now.time)) for model in map(now.models.__getitem__, now.waiting)]
        target, travel, away = self._route(home, waiting)
        drain = self._seen.drain(home, now.time)
        way = drain + away
        weight = sum(model.queued * (1.0 + AGEING * age / (way or 1.0)) for model, age in waiting)
        ungated = self._seen.service(home) if home.limit is None else 0.0
        since = max(self._gate[1], now.time - waiting[0][1])
        limit = since + self._options.patience * (drain + travel + ungated)
        if limit > now.time and (home.queued or weight < self._price(home, now.time, drain, away)):
            return WaitUntil(limit + 0.001, reason="leaving would delay more requests than wait elsewhere")
        if home.queued >= weight:
            return Stay("more requests wait here than elsewhere")
        self._seen.left(home, now.time)
        return SwitchTo(target.name, reason="it ends the most waiting per second")

    def _first(self, now: Snapshot, home: ModelView) -> SwitchTo | WaitUntil:
        """Decide while no switch has been seen, so that it is unknown when leaving a busy engine pays."""
        oldest = now.models[now.waiting[0]]
        patience = max(UNSEEN_WAIT, UNSEEN_DRAINS * self._seen.drain(home, now.time))
        limit = now.time - _age(oldest, now.time) + patience
        if limit > now.time and home.limit is not None and (home.in_flight or home.queued):
            return WaitUntil(limit, reason="no switch has been seen yet: it is served until it is idle")
        self._seen.left(home, now.time)
        return SwitchTo(oldest.name, reason="no switch has been seen yet: first come, first served")

    def _gated(self, home: ModelView, time: float) -> bool:
        """Return whether a request which waited at the wake still waits."""
        since = home.awake_since or 0.0
        gated = home.in_flight > 0 and home.oldest_arrival is not None and home.oldest_arrival <= since
        if gated or self._gate[0] != since:
            self._gate = since, time if gated else since
        return gated

    def _route(self, home: ModelView, waiting: list[tuple[ModelView, float]]) -> tuple[ModelView, float, float]:
        """Return where to go, the seconds of the switches there and back, and how long home would be away.

        ``waiting`` has the wait of the oldest request of each, the longest first.
        """
        ways = [(model, age, self._seen.cost(home, model), self._visit(model)) for model, age in waiting]
        tour = sum(cost + visit for _, _, cost, visit in ways)
        best, age, cost, visit = ways[0]
        least = cost  # the others all wait that much longer, whichever is next
        span = self._options.tour * (tour + cost) or 1.0

        def worth(way: tuple[ModelView, float, float, float]) -> float:
            model, age, cost, visit = way
            urgency: float = ((age + cost) / span) ** STEEP
            # The total wait of its requests, which came one after the other.
            waited = model.queued * (age / 2.0 + least)
            return waited * (1.0 + urgency) / (1.0 + cost + visit)

        if age + cost < OVERDUE:
            best, _, cost, visit = max(ways, key=worth)
        serving = self._seen.service(best) * (1.0 + best.queued / (best.limit or UNLIMITED))
        travel = cost + self._seen.costs.get((best.name, home.name), cost)
        return best, travel, travel + serving + OTHERS * (tour - cost - visit)

    def _visit(self, model: ModelView) -> float:
        """Return the seconds in which its waiters would be served."""
        queued, slots = model.queued, model.limit or UNLIMITED
        return self._seen.service(model) * (longest(min(queued, slots)) + queued / slots)

    def _price(self, home: ModelView, time: float, drain: float, away: float) -> float:
        """Return how many must wait elsewhere for home to be left: those shut out, over those kept waiting."""
        rate = self._seen.rate(home, time)
        reluctance = self._options.reluctance * rate * (drain + away)
        # Without a limit its service time includes the queue inside the engine; only measurements count.
        longer = self._seen.longer(home, rate)
        if longer is None:
            load = rate * self._seen.after_drain(home)
            if not drain or not load:
                return reluctance
            # The seconds by which arrivals prolong the busy period, once everything that runs now has ended.
            capped = min(load, MAX_LOAD)
            longer = (1.0 - math.exp(-capped)) * math.expm1(capped) * load / (capped * rate)
        shut_out = rate * drain * (drain / 2.0 + away)
        return max(reluctance, self._options.price * shut_out / max(longer, LEAST))


def _engine(model: ModelView) -> EngineView | None:
    """Return the measurements of its engine; None for views that were written for an earlier llmux."""
    return getattr(model, "engine", None)


def _home(now: Snapshot) -> ModelView:
    """Return the model which is likely to leave: of several that are awake, the least busy."""
    return min((now.models[name] for name in now.awake), key=lambda model: model.in_flight + model.queued)


def _age(model: ModelView, time: float) -> float:
    arrival = model.oldest_arrival
    return 0.0 if arrival is None else time - arrival


# ---- its own observations


def longest(streams: int) -> float:
    """Return the longest of so many service times, in means (for exponential ones, about)."""
    return 0.5 + math.log(1 + streams)


class Memory:
    """The policy's own observations: coarse but true, they bound averages that are old or of another load.

    Call ``watch`` at every decision, ``left`` and ``learn`` at every switch.
    """

    def __init__(self) -> None:
        self.costs: dict[tuple[str, str], float] = {}
        self._guesses: dict[str, float] = {}  # unmeasured costs from here
        self._drains: dict[str, float] = {}  # seconds, of one stream
        self._left: dict[str, float] = {}  # when
        self._leaving = ("", 0)  # model, streams in flight
        self._work: dict[str, tuple[float, float]] = {}  # stream-seconds, answers
        self._began = -1.0  # the time of the first decision
        self._last = (-1.0, 0.0, 0, 0)  # at the last decision: visit, time, admissions, in flight

    def watch(self, home: ModelView, time: float) -> None:
        """Count the work that the awake model has done since the last decision of this visit."""
        if self._began < 0.0:
            self._began = time
        visit, then, admissions, streams = self._last
        if visit == home.awake_since:
            work, answers = self._work.get(home.name, (0.0, 0.0))
            keep = 0.5 if answers > MEMORY else 1.0
            work = work * keep + (time - then) * (streams + home.in_flight) / 2.0
            answers = answers * keep + home.admissions - admissions + streams - home.in_flight
            self._work[home.name] = work, answers
        self._last = home.awake_since or 0.0, time, home.admissions, home.in_flight

    def left(self, home: ModelView, time: float) -> None:
        """Record that the awake model is about to be left."""
        self._leaving = home.name, home.in_flight
        self._left[home.name] = time

    def learn(self, record: SwitchRecord) -> None:
        """Record the duration of a direction and of its drain."""
        self._guesses.clear()
        if record.cost is None or record.to is None or len(record.from_models) != 1:
            return
        source = record.from_models[0]
        _average(self.costs, (source, record.to), record.cost, COST_ALPHA)
        name, streams = self._leaving
        if name == source and streams:
            _average(self._drains, name, record.drain / longest(streams), DRAIN_ALPHA)

    def cost(self, home: ModelView, model: ModelView) -> float:
        """Return the seconds of a switch."""
        known = self.costs.get((home.name, model.name))
        if known is None:
            known = self._guesses.get(model.name)
        if known is None:
            known = self._guesses[model.name] = UNSEEN_COST * model.switch_cost
        return known

    def service(self, model: ModelView) -> float:
        """Return the mean seconds of an answer."""
        seconds = model.service_time or UNSEEN_SERVICE
        work, answers = self._work.get(model.name, (0.0, 0.0))
        return _near(seconds, work / answers, SERVICE_OFF) if answers >= SAMPLES else seconds

    def after_drain(self, model: ModelView) -> float:
        """Return the mean seconds of an answer while few are served, as after a drain.

        The measured mean is that of an engine in which streams slow each other down. This is midway between it and
        that of one alone: few are not one, and few answers were served alone.
        """
        seconds, engine = self.service(model), _engine(model)
        under_load = engine.throughput(1) * model.service_time if engine is not None else 0.0
        return seconds / math.sqrt(under_load) if under_load > 1.0 else seconds

    def rate(self, home: ModelView, time: float) -> float:
        """Return arrivals per second; everything that came since home was left has been admitted or waits."""
        count = home.admissions + home.queued
        seconds = max(time - self._left.get(home.name, self._began), 1.0)
        return _near(home.arrival_rate, count / seconds, RATE_OFF) if count >= SAMPLES else home.arrival_rate

    def drain(self, home: ModelView, time: float) -> float:
        """Return the seconds until what is in flight has ended."""
        if not home.in_flight:
            return 0.0
        engine, age = _engine(home), time - (time if home.oldest_admission is None else home.oldest_admission)
        measured = engine.drain(home.in_flight) if engine is not None and home.limit is None else 0.0
        one = self._drains.get(home.name, self.service(home))
        return measured or max(one * longest(home.in_flight), AGE_LEFT * age)

    def longer(self, model: ModelView, rate: float) -> float | None:
        """Return the seconds by which arrivals delay that it falls idle; inf: for ever, None: unknown.

        A birth-death process over the measurements: from k in flight to k - 1 takes one answer's time, and that of
        everything that comes meanwhile.
        """
        engine = _engine(model)
        if model.limit is not None or engine is None or not engine.throughput(1):
            return None
        count = model.in_flight
        most = count + AHEAD
        if engine.throughput(most) <= rate * STABLE:
            return math.inf
        step = 1.0 / (engine.throughput(most) - rate)
        seconds = 0.0
        for streams in range(most - 1, 0, -1):
            step = (1.0 + rate * step) / engine.throughput(streams)
            if streams <= count:
                seconds += step
        return max(0.0, seconds - engine.drain(count))


def foresee(now: Snapshot, seen: Memory) -> Stay | SwitchTo:
    """Return the model that is worth waking before it is requested: less waiting on average, whatever comes next.

    If its request comes after ``delay``, that much of the switch is over; if the next request is for the awake
    model after all, it waits for the whole switch and the one back.
    """
    awake = [now.models[name] for name in now.awake]
    if len(awake) != 1 or (awake[0].last_served or 0.0) <= (awake[0].awake_since or 0.0):
        return Stay("the awake model has not been asked yet")
    home = awake[0]
    again = home.successors.get(home.name)
    best, most = "", 0.0
    for name, next_one in home.successors.items():
        if name not in now.models or name == home.name or next_one.seen < SAMPLES:
            continue
        there = seen.cost(home, now.models[name])
        back = seen.costs.get((name, home.name), there)
        saved = next_one.share * min(there, next_one.delay) - (again.share * (there + back) if again else 0.0)
        if saved > most:
            best, most = name, saved
    return SwitchTo(best, reason="likely to be asked next") if best else Stay("no model is likely enough")


def _near(value: float, own: float, factor: float) -> float:
    return min(max(value, own / factor), own * factor)


def _average(averages: dict[Key, float], key: Key, value: float, alpha: float) -> None:
    old = averages.setdefault(key, value)
    averages[key] = old + alpha * (value - old)
