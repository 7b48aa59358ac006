"""Many hosts in virtual time: the placement and the cores that run in production, side by side on one clock.

Each host is a ``Run`` of its own, with its own core, policy and engines; each gateway a ``Placement`` with its own
view. The hosts take reports in turn, each every ``stale`` seconds; a report reaches the gateways half as much
later, so that it is ``stale`` seconds old on average when it is read, between a half and one and a half of it. A
gateway's claims reach the others ``CLAIM_DELAY`` later, as through a store. A request in a host's queue gets its
forecast whenever that host reports.

The route ``clairvoyant`` exists only here: it is ``least_wait`` with reports of this very moment, which contain
the true ends of the answers in flight, and the arrivals of the next minutes.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmux.core.effects import CancelRequests, Effect, Reject, RunHook, SwitchEnded, SwitchStarted
from llmux.core.events import HookFinished, RequestAbandoned, RequestArrived
from llmux.core.phases import Phase
from llmux.core.policy import Policy
from llmux.core.spec import HookKind, ModelSpec, Rules
from llmux.fleet import events as ev
from llmux.fleet.fleet_view import LEASE, MEMORY, UNLIMITED, HostReport, ModelReport
from llmux.fleet.placement import Placement
from llmux.fleet.placement import Rules as GatewayRules
from llmux.fleet.routes import LeastWait, Route
from llmux.runtime import wait_estimate
from llmux.runtime.status_document import ModelFigures, figures, sets_may_be_awake
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import Engines, Serving
from llmux.simulator.run import NEVER, UNBOUNDED, Outcome, Run, Scene
from llmux.simulator.simulation import undisturbed
from llmux.simulator.statistics import percentile, waits_of
from llmux.simulator.trace import Trace

CLAIM_DELAY = 0.05  # seconds until the other gateways know of a claim
CLAIRVOYANT = "clairvoyant"
DEAD_FOR = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Deaths:
    """So many hosts die at ``at`` and are back, empty, ``back`` seconds later."""

    count: int
    at: float
    back: float = DEAD_FOR


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for all routes. Times in seconds."""

    trace: Trace
    hosts: int
    costs: CostMatrix
    engines: Engines
    make_policy: Callable[[], Policy]
    stale: float = 1.0
    gateways: int = 1
    horizon: float | None = None
    misjudge: float = 1.0  # factor by which the hosts' estimates of costs are wrong
    deaths: Deaths | None = None
    rules: Rules = field(default_factory=Rules)
    seed: int = 1


@dataclass(slots=True)
class FleetOutcome:
    """The result of a route."""

    requests: Outcome  # arrived, admitted, finished; times of all hosts
    wakes: int = 0
    duplicates: int = 0  # wakes of a model that another host had begun to wake less than a switch cost before
    crossed: int = 0  # of these, the ones that two gateways had begun
    cold: int = 0  # requests sent to a host where their model was not awake
    sent: int = 0
    lost: int = 0  # requests whose host died, and that got a 502
    rejected: int = 0
    moved: int = 0  # requests that were taken back from a queue
    retried: int = 0
    overruled: list[str] = field(default_factory=list)  # answers of the route that cannot be followed, once a kind
    work: list[int] = field(default_factory=list)  # answers, by host


@dataclass(frozen=True, slots=True)
class FleetStatistics:
    """Statistics of one route. Waits in seconds."""

    mean_wait: float
    p50_wait: float
    p95_wait: float
    p99_wait: float
    max_wait: float
    switches_per_hour: float  # of one host
    cold: float  # share of the requests sent to a host where their model was not awake
    duplicates: float  # share of the wakes
    crossed: float  # share of the wakes that were doubled because two gateways had begun them
    jain: float  # Jain's index of the answers by host: 1 is even, 1/hosts is all on one
    completed: int
    requests: int
    lost: int
    rejected: int
    moved: int
    retried: int


def statistics_of_fleet(outcome: FleetOutcome) -> FleetStatistics:
    """Summarize a run."""
    waits = sorted(waits_of(outcome.requests))
    count, work = len(waits), outcome.work
    squares = sum(each * each for each in work)
    return FleetStatistics(
        mean_wait=sum(waits) / count if count else 0.0,
        p50_wait=percentile(waits, 0.50),
        p95_wait=percentile(waits, 0.95),
        p99_wait=percentile(waits, 0.99),
        max_wait=waits[-1] if waits else 0.0,
        switches_per_hour=outcome.wakes / len(work) / (outcome.requests.end or 1.0) * 3600.0,
        cold=outcome.cold / outcome.sent if outcome.sent else 0.0,
        duplicates=outcome.duplicates / outcome.wakes if outcome.wakes else 0.0,
        crossed=outcome.crossed / outcome.wakes if outcome.wakes else 0.0,
        jain=sum(work) ** 2 / (len(work) * squares) if squares else 1.0,
        completed=sum(finished is not None for finished in outcome.requests.finished),
        requests=count,
        lost=outcome.lost,
        rejected=outcome.rejected,
        moved=outcome.moved,
        retried=outcome.retried,
    )


class HostRun(Run):
    """One host of a fleet: the fleet gives it its requests and its clock."""

    def __init__(self, fleet: FleetRun, number: int, instance: int) -> None:
        setting = fleet.setting
        scene = Scene(fleet.specs, frozenset())
        empty = Trace("", [])
        super().__init__(empty, setting.make_policy(), setting.costs, setting.engines, fleet.rules, None, scene)
        self.fleet, self.number, self.instance = fleet, number, str(instance)
        self.name = fleet.names[number]
        self.jobs, self.outcome = setting.trace.jobs, fleet.outcome.requests
        self.serving = {spec.name: Serving(setting.engines.of(spec.name)) for spec in fleet.specs}
        if fleet.timed_jobs:
            self.heaps = (*self.heaps, (5, self.timed))
        self.core.state.costs.guesses = fleet.guesses
        self.noted = frozenset({Reject, SwitchStarted, SwitchEnded, CancelRequests})
        self.handlers = (
            self._arrive,
            self._finish,
            self._hook_ended,
            self._follow,
            self._deadline,
            self._served,
        )
        self.grouped = sets_may_be_awake(self.core.state)
        self.events = 0
        self.seq = 0
        self.last: tuple[int, Mapping[str, ModelReport]] = (-1, {})
        self.feed(self.started)

    def turn(self) -> None:
        """Do what is due next, at ``fleet.time``."""
        _, what = self._next()
        self.time = self.fleet.time
        self.handlers[what]()

    def ask(self, job: int) -> None:
        """Receive a request."""
        self.time = self.fleet.time
        model = self.jobs[job].model
        if self.core.state.models[model].phase is not Phase.AWAKE:
            self.fleet.outcome.cold += 1
        self.feed(RequestArrived(job, model))

    def report(self, *, truth: bool = False) -> HostReport:
        """Take a report; if nothing has happened since, it is the last one."""
        self.seq += 1
        now, s = self.fleet.time, self.core.state
        if self.last[0] != self.events or self.busy or s.queued:
            models = {name: _as_reported(each, grouped=self.grouped) for name, each in figures(s, now).items()}
            if self.fleet.setting.misjudge != 1.0:
                models = {name: misjudged(each, self.fleet.setting.misjudge) for name, each in models.items()}
            if truth:
                models = {name: self._true(name, each) for name, each in models.items()}
            self.last = self.events, models
        stale = self.fleet.setting.stale
        lease = NEVER if self.fleet.live else LEASE * max(1.0, stale)
        return HostReport(self.name, self.instance, self.seq, self.last[1], lease=lease)

    def _true(self, name: str, each: ModelReport) -> ModelReport:
        """Put in the true end of the answers in flight, and how many requests really arrive."""
        rate = self.fleet.coming(name) / MEMORY
        expected = each.expected_wait
        s = self.core.state
        if each.phase is not Phase.AWAKE and not s.queued and s.switch is None:
            drain = max((self._until_idle(serving) for serving in self.busy), default=0.0)
            expected = drain + each.switch_cost
        return each._replace(expected_wait=expected, arrival_rate=rate)

    def _until_idle(self, serving: Serving) -> float:
        longest = max(work for work, _ in serving.streams)
        return (longest - serving.made) / serving.speed - (self.fleet.time - serving.time)

    # ---- what the fleet is told

    def feed(self, event: object) -> None:
        """Pass an event to the core, and note when the host has to be looked at again."""
        self.events += 1
        super().feed(event)  # type: ignore[arg-type]

    def _admit(self, index: int) -> None:
        super()._admit(index)
        self.fleet.told.append(ev.AnswerBegan(index + 1))

    def _answered(self, index: int) -> None:
        self.fleet.outcome.work[self.number] += 1
        super()._answered(index)
        self.fleet.told.append(ev.RequestEnded(index + 1))

    def _follow_up(self, index: int) -> None:
        self.fleet.follow_up(index)

    def _run_hook(self, effect: RunHook, pending: list[object]) -> None:  # type: ignore[override]
        if effect.kind is not HookKind.WAKE:
            pending.append(HookFinished(effect.hook, ok=effect.kind is not HookKind.ALIVE))
            return
        cost = self.fleet.cost(effect.sources, effect.model)
        heapq.heappush(self.hooks, (self.time + cost, effect.hook))

    def _note(self, effect: Effect) -> None:
        if isinstance(effect, SwitchStarted):
            if effect.to is not None:
                self.fleet.woken(self, effect.sources, effect.to)
        elif isinstance(effect, Reject):
            refused = ev.RequestRefused(effect.request + 1, effect.refusal, effect.retry_after, effect.message)
            self.fleet.told.append(refused)


def _as_reported(each: ModelFigures, *, grouped: bool) -> ModelReport:
    """Return a model as a gateway knows it; if one at a time is awake, ``evicts`` is left out."""
    return ModelReport(
        phase=each.phase,
        queued=each.queued,
        in_flight=each.in_flight,
        expected_wait=each.expected_wait,
        switch_cost=each.switch_cost,
        sleep=each.sleep,
        wake=each.wake,
        arrival_rate=each.arrival_rate,
        service=each.service,
        slots=each.slots,
        awake_for=each.awake_for,
        idle_for=math.inf if each.idle_for is None else each.idle_for,
        evicts=each.evicts if grouped and each.phase is not Phase.AWAKE else None,
    )


def misjudged(each: ModelReport, factor: float) -> ModelReport:
    """Return a report whose costs are wrong by a factor."""
    expected = each.expected_wait
    if expected is not None and each.phase is not Phase.AWAKE:
        expected += (factor - 1.0) * each.switch_cost
    return each._replace(
        expected_wait=expected,
        switch_cost=each.switch_cost * factor,
        sleep=each.sleep * factor,
        wake=each.wake * factor,
    )


class FleetRun:
    """The clock, the hosts, the gateways, and what is due between them."""

    def __init__(self, setting: Setting, route: Callable[[], Route] | None) -> None:
        trace = setting.trace
        names = trace.models
        self.setting = setting
        self.time = 0.0
        self.until = NEVER if setting.horizon is None else setting.horizon
        self.names = [f"gpu{number}" for number in range(setting.hosts)]
        self.number = {name: number for number, name in enumerate(self.names)}
        self.specs = [
            ModelSpec(name, max_in_flight=setting.engines.of(name).slots, max_queued=UNBOUNDED) for name in names
        ]
        self.rules = replace(setting.rules, request_timeout=None, drain_timeout=None, alive_every=0.0)
        self.guesses = {name: (self.cost((), name), setting.costs.sleeps.get(name, 0.0)) for name in names}
        self.timed_jobs = any(job.service is not None for job in trace.jobs)
        count = len(trace.jobs)
        self.outcome = FleetOutcome(
            Outcome(trace, 0.0, [None] * count, [None] * count, [None] * count, [None] * count),
            work=[0] * setting.hosts,
        )
        self.clairvoyant = route is None
        self.live = self.clairvoyant or not setting.stale  # reports are of the moment: none is old
        dice = random.Random(setting.seed)  # noqa: S311 - a simulation, no secret
        self.dice = dice
        make = route or LeastWait
        self.moves = getattr(make, "moves", False)
        bounds = GatewayRules(max_queued=UNBOUNDED)
        self.gateways = [Placement(make(), dice.random, bounds) for _ in range(setting.gateways)]
        self.at: dict[int, int] = {}  # requests that are placed → host
        self.open = 0  # requests that have arrived and not ended
        self.told: deque[ev.Event] = deque()  # events for the gateway of their request
        self.said: deque[tuple[Placement, ev.Event]] = deque()
        self.due: list[tuple[float, int, int]] = []  # heap of (time, host, version)
        self.versions = [0] * setting.hosts
        self.reported = [-1] * setting.hosts  # for the clairvoyant: the events of a host at its last report
        self.deliveries: deque[tuple[float, HostReport, float]] = deque()  # when, what, taken when
        self.claims: dict[str, tuple[str, float]] = {}  # the store's: model → host, until
        self.claim_news: deque[tuple[float, Placement, str]] = deque()  # when, the claiming host, model
        self.starters: dict[tuple[int, str], int] = {}  # host, model → the gateway that had it woken there
        self.last_wakes: dict[str, list[tuple[float, int]]] = {}
        self.spawned: list[tuple[float, int]] = []
        self.deaths: list[tuple[float, int, bool]] = []
        if setting.deaths is not None:
            dying = dice.sample(range(setting.hosts), min(setting.deaths.count, setting.hosts))
            at, back = setting.deaths.at, setting.deaths.at + setting.deaths.back
            self.deaths = sorted([(at, host, False) for host in dying] + [(back, host, True) for host in dying])
        arrivals = [(job.arrival, index) for index, job in enumerate(trace.jobs) if job.arrival is not None]
        self.arrivals = [(NEVER, -1), *sorted(arrivals, reverse=True)]  # the next one last
        self.times: dict[str, list[float]] = {}
        for time, index in reversed(self.arrivals[1:]):
            self.times.setdefault(trace.jobs[index].model, []).append(time)
        self.hosts: list[HostRun | None] = [HostRun(self, number, 0) for number in range(setting.hosts)]

    # ---- what hosts ask

    def cost(self, sources: Sequence[str], target: str) -> float:
        """Return the seconds of a wake after ``sources`` have left."""
        costs = self.setting.costs
        if sources:
            return costs.of(sources[0], target)
        known = costs.wakes.get(target, costs.default)
        if known is not None:
            return known
        seen = [seconds for (_, to), seconds in costs.pairs.items() if to == target]
        return sum(seen) / len(seen) if seen else 0.0

    def coming(self, model: str) -> float:
        """Return how many requests for the model arrive in the time that a placement remembers."""
        times = self.times.get(model, [])
        return bisect_left(times, self.time + MEMORY) - bisect_left(times, self.time)

    def woken(self, host: HostRun, sources: Sequence[str], model: str) -> None:
        """Count a wake."""
        self.outcome.wakes += 1
        cost = self.cost(sources, model)
        last = [(time, number) for time, number in self.last_wakes.get(model, ()) if time > self.time - cost]
        others = [number for _, number in last if number != host.number and self._has_room(number, model)]
        self.outcome.duplicates += bool(others)
        starter = self.starters.get((host.number, model))
        self.outcome.crossed += any(self.starters.get((number, model)) != starter for number in others)
        self.last_wakes[model] = [*last, (self.time, host.number)]

    def _has_room(self, number: int, model: str) -> bool:
        """Whether a host that wakes a model has fewer requests for it than it will serve at once."""
        host = self.hosts[number]
        if host is None:
            return False
        found = host.core.state.models[model]
        return len(found.queue) + len(found.in_flight) < (found.spec.max_in_flight or UNLIMITED)

    def follow_up(self, index: int) -> None:
        """Start the job that waits for the end of this one."""
        job = self.setting.trace.jobs[index]
        if job.successor is not None:
            heapq.heappush(self.spawned, (self.time + job.think, job.successor))

    # ---- the clock

    def go(self, progress: Callable[[float], None] | None = None) -> FleetOutcome:
        """Run to the end."""
        for host in range(len(self.hosts)):
            self._report(host)
            self._schedule(host)
        while self.deliveries:
            self._deliver()
        period = self.setting.stale / len(self.hosts)
        reports, turns = 0, 0
        looks = period > 0
        while True:
            self._forget_old()
            report_at = (reports + 1) * period if looks else NEVER
            time, act = self._next(report_at)
            if time >= self.until or (self.arrivals[-1][0] == NEVER and not self.open and not self.spawned):
                break
            self.time = max(time, self.time)
            if act is None:
                self._report(reports % len(self.hosts))
                reports += 1
            else:
                act()
            if self.told or self.said:
                self._tell()
            turns += 1
            if progress is not None and not turns % 1024:
                progress(self.time)
        self.outcome.requests.end = self.until if self.until < NEVER else self.time
        return self.outcome

    def _forget_old(self) -> None:
        due, versions = self.due, self.versions
        while due and due[0][2] != versions[due[0][1]]:
            heapq.heappop(due)

    def _next(self, report_at: float) -> tuple[float, Callable[[], None] | None]:
        time = report_at
        best: Callable[[], None] | None = None
        if self.arrivals[-1][0] < time:
            time, best = self.arrivals[-1][0], self._arrive
        if self.due and self.due[0][0] < time:
            time, best = self.due[0][0], self._turn
        if self.deliveries and self.deliveries[0][0] <= time:
            time, best = self.deliveries[0][0], self._deliver
        if self.spawned and self.spawned[0][0] < time:
            time, best = self.spawned[0][0], self._follow
        if self.claim_news and self.claim_news[0][0] <= time:
            time, best = self.claim_news[0][0], self._claim
        if self.deaths and self.deaths[0][0] <= time:
            time, best = self.deaths[0][0], self._die
        for gateway in self.gateways:
            deadline = gateway.next_deadline()
            if deadline is not None and deadline < time:
                time, best = deadline, lambda gateway=gateway: self._say(gateway, ev.DeadlineReached())
        return time, best

    def _arrive(self) -> None:
        self._ask(self.arrivals.pop()[1])

    def _follow(self) -> None:
        self._ask(heapq.heappop(self.spawned)[1])

    def _ask(self, index: int) -> None:
        self.outcome.requests.arrived[index] = self.time
        self.open += 1
        if self.live:
            self._look_everywhere()
        self._say(self._gateway(index), ev.RequestArrived(index + 1, self.setting.trace.jobs[index].model))

    def _turn(self) -> None:
        _, number, _ = heapq.heappop(self.due)
        host = self.hosts[number]
        assert host is not None
        host.turn()
        self._schedule(number)

    def _schedule(self, number: int) -> None:
        host = self.hosts[number]
        self.versions[number] += 1
        if host is not None:
            time, _ = host._next()  # noqa: SLF001 - it is a Run of this module's
            if time < NEVER:
                heapq.heappush(self.due, (time, number, self.versions[number]))

    # ---- reports

    def _report(self, number: int) -> None:
        host = self.hosts[number]
        if host is None:
            return
        if not self.clairvoyant or not self.time:
            report = host.report(truth=self.clairvoyant)
            self.deliveries.append((self.time + self.setting.stale / 2.0, report, self.time))
        if host.core.state.queued and self.moves:
            if self.clairvoyant:
                self._look_everywhere()
            self._forecast(host)

    def _forecast(self, host: HostRun) -> None:
        """Send the requests in a host's queue their forecasts."""
        s = host.core.state
        for model in s.models.values():
            if not model.queue:
                continue
            awake = wait_estimate.until_awake(s, model, self.time)
            for position, request in enumerate(model.queue, 1):
                expected = awake + wait_estimate.in_queue(model, position)
                self.told.append(ev.RequestWaiting(request + 1, expected))

    def _deliver(self) -> None:
        _, report, taken = self.deliveries.popleft()
        for gateway in self.gateways:
            self._say(gateway, ev.HostReported(report, self.time - taken))

    def _look_everywhere(self) -> None:
        """Show every gateway the present state of all hosts."""
        for number, host in enumerate(self.hosts):
            if host is not None and host.events != self.reported[number]:
                self.reported[number] = host.events
                report = host.report(truth=self.clairvoyant)
                for gateway in self.gateways:
                    self._say(gateway, ev.HostReported(report))

    # ---- gateways

    def _gateway(self, index: int) -> Placement:
        return self.gateways[index % len(self.gateways)]

    def _tell(self) -> None:
        told, said = self.told, self.said
        while told or said:
            if said:
                self._say(*said.popleft())
                continue
            event = told.popleft()
            index = event.request - 1  # type: ignore[attr-defined]
            kind = event.__class__
            if kind is ev.RequestEnded:
                self._over(index)
            elif kind is ev.RequestWaiting and index not in self.at:
                continue
            self._say(self._gateway(index), event)

    def _over(self, index: int) -> None:
        self.open -= 1
        self.at.pop(index, None)

    def _say(self, gateway: Placement, event: ev.Event) -> None:
        for effect in gateway.handle(event, self.time):
            kind = effect.__class__
            if kind is ev.Send:
                self._send(effect)  # type: ignore[arg-type]
            elif kind is ev.ClaimWake:
                self._claim_wake(gateway, effect)  # type: ignore[arg-type]
            elif kind is ev.Reject:
                self._rejected(effect)  # type: ignore[arg-type]
            elif kind is ev.Withdraw:
                self._withdraw(effect)  # type: ignore[arg-type]
            elif kind is ev.RouteOverruled:
                self.outcome.overruled.append(effect.answer)  # type: ignore[union-attr]
            elif kind is ev.Probe:
                self._probe(gateway, effect.host)  # type: ignore[union-attr]

    def _send(self, effect: ev.Send) -> None:
        number, index = self.number[effect.host], effect.request - 1
        host = self.hosts[number]
        self.outcome.sent += 1
        self.outcome.retried += effect.attempt > 1
        if host is None:
            self.told.append(ev.ConnectFailed(effect.request, "connection refused"))
            return
        self.at[index] = number
        model = host.core.state.models[effect.model]
        if model.phase is not Phase.AWAKE and not model.queue:
            self.starters[number, effect.model] = index % len(self.gateways)
        host.ask(index)
        self._schedule(number)

    def _rejected(self, effect: ev.Reject) -> None:
        index = effect.request - 1
        if effect.code == ev.Code.HOST_LOST:
            self.outcome.lost += 1
        else:
            self.outcome.rejected += 1
        if self.outcome.requests.admitted[index] is None:
            self.outcome.requests.arrived[index] = None
        self._over(index)

    def _withdraw(self, effect: ev.Withdraw) -> None:
        number, index = self.number[effect.host], effect.request - 1
        host = self.hosts[number]
        if host is None or index not in host.core.state.requests:
            return
        request = host.core.state.requests[index]
        if request.admitted is None:
            host.time = self.time
            host.feed(RequestAbandoned(index))
            self._schedule(number)
            self.at.pop(index)
            self.outcome.moved += 1
            self.told.append(ev.RequestWithdrawn(effect.request))

    def _claim_wake(self, gateway: Placement, effect: ev.ClaimWake) -> None:
        claimed, until = self.claims.get(effect.model, ("", 0.0))
        if until <= self.time or claimed == effect.over:
            self.claims[effect.model] = effect.host, self.time + effect.term
        if len(self.gateways) > 1:
            self.claim_news.append((self.time + CLAIM_DELAY, gateway, effect.model))

    def _claim(self) -> None:
        _, claimant, model = self.claim_news.popleft()
        host, until = self.claims[model]
        for gateway in self.gateways:
            if gateway is not claimant or gateway.fleet.claims[model][0] != host:
                self._say(gateway, ev.ClaimSeen(model, host, until - self.time))

    def _probe(self, gateway: Placement, name: str) -> None:
        alive = self.hosts[self.number[name]] is not None
        self.said.append((gateway, ev.HostReachable(name) if alive else ev.HostUnreachable(name, "refused")))

    # ---- deaths

    def _die(self) -> None:
        _, number, back = self.deaths.pop(0)
        if back:
            self.hosts[number] = HostRun(self, number, self.versions[number])
            self._report(number)
        else:
            host = self.hosts[number]
            assert host is not None
            self.hosts[number] = None
            for index in sorted(host.core.state.requests):
                self.told.append(ev.ConnectionBroken(index + 1))
        self._schedule(number)


def simulate_fleet(
    setting: Setting, route: Callable[[], Route] | None, progress: Callable[[float], None] | None = None
) -> FleetOutcome:
    """Run a route; None is the clairvoyant. ``progress`` is called now and then with the virtual time."""
    setting.costs.check(setting.trace.models)
    with undisturbed():
        return FleetRun(setting, route).go(progress)
