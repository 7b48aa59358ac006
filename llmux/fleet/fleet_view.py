"""What a gateway knows of the hosts: their last reports, its own placements since, and their failures.

A report is plain values, taken at one instant; all durations are seconds. It is true when it is taken, and ages on
its way. ``instance`` names one run of a host's process, ``seq`` grows with each of its reports: a report that was
overtaken, or is from a process that has been replaced, is recognized and refused. Times on the wire are durations
(``age``, ``lease``): clocks of hosts may be wrong, but durations are the same everywhere.

``Host`` is one host as this gateway sees it, ``Fleet`` all of them, with indexes by model that make a placement
among a thousand hosts cheap:

- ``holders`` of a model: the hosts where it is awake, woken, or requested; most placements need no others;
- ``roomy``: the hosts by what a wake there would cost others, cheapest first: for a model that is awake nowhere,
  the first few are compared;
- ``serving``: the hosts which have the model at all.

What this gateway has placed since a report was taken is added to it (``since``), so that a gateway does not herd
onto the host whose report it has just read; what other gateways place is unknown until the next report. A report
past its lease does not count: the host leaves the indexes, and only its own counts remain.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmux.core.phases import Phase

LEASE = 6.0  # seconds for which a report counts, if it says nothing else
_MOST_MODELS = 10_000
_PHASES = {phase.value: phase for phase in Phase}
# In these phases a model answers, or is about to.
HELD = frozenset({Phase.AWAKE, Phase.WAKING})
# In these it takes room on the GPU which another model would need.
ON_GPU = frozenset({Phase.AWAKE, Phase.WAKING, Phase.DRAINING})


class ModelReport(NamedTuple):
    """One model on one host.

    ``expected_wait`` is the host's own forecast of how long a new request would wait for its admission (None: it
    would be refused). ``switch_cost`` is the cost of a wake from the present state, including what has to leave;
    ``sleep`` and ``wake`` are the model's own halves. ``slots`` is how many it serves at once (None: no limit).
    """

    phase: Phase = Phase.ASLEEP
    queued: int = 0
    in_flight: int = 0
    expected_wait: float | None = 0.0
    switch_cost: float = 0.0
    sleep: float = 0.0
    wake: float = 0.0
    arrival_rate: float = 0.0  # requests a second, on this host
    service: float = 0.0  # seconds of a mean answer; 0: none was measured
    slots: int | None = None
    awake_for: float = 0.0  # seconds; 0 while it is not awake
    idle_for: float = 0.0  # seconds since its last answer ended, 0 while it has requests; inf: it never had one
    evicts: tuple[str, ...] | None = None  # what its wake would put to sleep; None: all that is on the GPU


@dataclass(frozen=True, slots=True)
class HostReport:
    """A host at one instant."""

    host: str
    instance: str = ""
    seq: int = 0
    models: Mapping[str, ModelReport] = field(default_factory=dict)
    ready: bool = True  # False: it starts or stops
    leased: bool = False  # its GPU is lent to another job, which is also how a host is drained
    lease: float = LEASE  # seconds for which this report counts
    free_in: float = 0.0  # seconds until the switch under way, and the drains ahead of it, are over

    @property
    def load(self) -> int:
        """How many requests it serves or has queued."""
        return sum(each.in_flight + each.queued for each in self.models.values())


def read_report(host: str, document: Mapping[str, Any]) -> HostReport:
    """Parse a host's report. Raises ValueError, TypeError or LookupError if it is something else."""
    models = document["models"]
    if len(models) > _MOST_MODELS:
        raise ValueError(f"{len(models)} models")
    return HostReport(
        host=host,
        instance=str(document["instance"]),
        seq=int(document["seq"]),
        models={str(name): _model(each) for name, each in models.items()},
        ready=bool(document["ready"]),
        leased=bool(document["leased"]),
        lease=_seconds(document["lease"]),
        free_in=_seconds(document["free_in"]),
    )


def _model(each: Mapping[str, Any]) -> ModelReport:
    wait, slots, idle = each["expected_wait"], each["slots"], each["idle_for"]
    return ModelReport(
        phase=_PHASES.get(each["phase"], Phase.UNKNOWN),
        queued=int(each["queued"]),
        in_flight=int(each["in_flight"]),
        expected_wait=None if wait is None else _seconds(wait),
        switch_cost=_seconds(each["switch_cost"]),
        sleep=_seconds(each["sleep"]),
        wake=_seconds(each["wake"]),
        arrival_rate=_seconds(each["arrival_rate"]),
        service=_seconds(each["service"]),
        slots=None if slots is None else max(1, int(slots)),
        awake_for=_seconds(each["awake_for"]),
        idle_for=math.inf if idle is None else _seconds(idle),
        evicts=tuple(str(name) for name in each["evicts"]) if each.get("evicts") is not None else None,
    )


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0.0 <= seconds < math.inf:
        raise ValueError(f"{value!r} is not a duration")
    return seconds


MEMORY = 120.0  # seconds within which a model that leaves is likely to be needed again
UNSEEN_SERVICE = 3.0  # seconds of an answer, until a host has measured one
UNLIMITED = 64  # slots of a model without a limit
NOTHING = ModelReport()
LOOKED_AT = 16  # hosts of each kind compared for a request, at most: more would cost more than they bring
QUIET = 1.5  # mean distances between arrivals: a model without any for so long is in less demand
NEVER = math.inf


@dataclass(slots=True, eq=False)
class Host:
    """One host, as this gateway sees it."""

    name: str
    report: HostReport | None = None
    taken: float = -NEVER  # when, on the gateway's clock
    lease_until: float = -NEVER
    ejected: bool = False
    failures: int = 0  # of probes, in a row
    blocked: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # model ("": any) → since when, until when
    own: dict[int, tuple[float, str]] = field(default_factory=dict)  # requests of this gateway: placed when, model
    recent: deque[tuple[float, str]] = field(default_factory=deque)  # placed since the report: when, model
    waiting: dict[str, dict[int, float]] = field(default_factory=dict)  # own ones, not admitted yet: placed when
    since: dict[str, int] = field(default_factory=dict)  # the same, counted
    ends: deque[tuple[float, str]] = field(default_factory=deque)  # of this gateway's requests, since the report
    ended: dict[str, int] = field(default_factory=dict)  # the same, counted
    arriving: dict[str, float] = field(default_factory=dict)  # models whose wake was begun since the report: when
    others: Mapping[str, int] = field(default_factory=dict)  # requests of other gateways, as the store says
    others_until: float = -NEVER
    base: float = 0.0  # its place in ``Fleet.roomy``
    held: tuple[str, ...] = ()  # models that it is in ``holders`` of, by its report
    listed: bool = False  # whether it is in the indexes
    free_in: float = 0.0  # seconds until a switch could begin, when the report was taken
    leaving: float = 0.0  # what a wake costs those which would have to leave

    def of(self, model: str) -> ModelReport:
        """Return what it said of a model last."""
        return self.report.models.get(model, NOTHING) if self.report is not None else NOTHING

    def serves(self, model: str) -> bool:
        """Whether it has the model."""
        return self.report is not None and model in self.report.models

    def fresh(self, now: float) -> bool:
        """Whether its report counts."""
        return now <= self.lease_until

    def usable(self, model: str, now: float) -> bool:
        """Whether a request for the model may go there, whatever the age of its report."""
        report = self.report
        if report is None or self.ejected or not report.ready or report.leased:
            return False
        each = report.models.get(model)
        if each is None or (each.expected_wait is None and now <= self.lease_until):
            return False
        return not self.blocked or self.free_at(model) <= now

    def free_at(self, model: str) -> float:
        """Return until when it refuses requests for the model, as it has said; -inf: it has not."""
        return max([until for name, (_, until) in self.blocked.items() if name in ("", model)], default=-NEVER)

    def holds(self, model: str) -> bool:
        """Whether the model is awake there, or about to be."""
        return model in self.since or model in self.arriving or self.holds_by_report(model)

    def holds_by_report(self, model: str) -> bool:
        """The same, without this gateway's placements since the report."""
        each = self.of(model)
        return each.phase in HELD or each.queued > 0

    def displaced(self, model: str) -> bool:
        """Whether the model was awake at the report, and another's wake has been started there since."""
        for other in self.arriving:
            evicts = self.of(other).evicts
            if other != model and (evicts is None or model in evicts):
                return True
        return False

    def load(self, now: float) -> int:
        """How many requests it has: this gateway's own, and the others as reported, if the report counts."""
        own = len(self.own)
        if self.report is None or not self.fresh(now):
            return own
        return own + max(0, self.report.load - (own - len(self.recent) + len(self.ends)))

    def ahead(self, model: str, now: float) -> int:
        """How many more requests for the model it has than at its report, as far as is known."""
        change = self.since.get(model, 0) - self.ended.get(model, 0)
        if not self.others or self.others_until < now:
            return change
        each = self.of(model)
        own = sum(1 for _, name in self.own.values() if name == model)
        return change + max(0, self.others.get(model, 0) - max(0, each.in_flight + each.queued - (own - change)))

    def full(self, model: str, now: float) -> bool:
        """Whether it has, as far as is known, as many requests for the model as it serves at once."""
        each = self.of(model)
        return each.in_flight + each.queued + self.ahead(model, now) >= (each.slots or UNLIMITED)


class Fleet:
    """All hosts. ``dice`` returns numbers in [0, 1); it is the only randomness here, and it is injected.

    Routes get this read-only. ``time`` is now; ``excluded`` are the hosts that have refused the present request,
    which no method returns.
    """

    def __init__(self, dice: Callable[[], float]) -> None:
        self.time = 0.0
        self.dice = dice
        self.hosts: dict[str, Host] = {}
        self.excluded: set[str] = set()
        self.claims: dict[str, tuple[str, float]] = {}  # model → the host that wakes it, until when
        self._holders: dict[str, dict[str, Host]] = {}
        self._listed: dict[str, list[Host]] = {}  # the same as lists, made when asked for
        self._serving: dict[str, dict[str, Host]] = {}
        self._roomy: list[tuple[float, str]] = []  # (base, name)
        self._services: dict[str, float] = {}  # model → seconds of an answer, as a host has said last

    # ---- for routes

    def candidates(self, model: str) -> list[Host]:
        """Return the hosts that may be given a request for the model: with fresh reports, if there are any."""
        now = self.time
        usable = [host for host in self.serving(model) if host.usable(model, now)]
        return [host for host in usable if host.lease_until >= now] or usable

    def holders(self, model: str, most: int | None = None) -> list[Host]:
        """Return the candidates where it is awake, being woken or requested, with fresh reports.

        If there are more than ``most``, return about so many, drawn at random.
        """
        now, excluded = self.time, self.excluded
        known = self._listed.get(model)
        if known is None:
            known = self._listed[model] = list(self._holders.get(model, {}).values())
        if most is not None and len(known) > most:
            count, dice = len(known), self.dice
            known = list({id(host): host for host in (known[int(dice() * count)] for _ in range(most))}.values())
        return [
            host
            for host in known
            if host.lease_until >= now and host.usable(model, now) and host.name not in excluded
        ]

    def serving(self, model: str) -> Iterator[Host]:
        """Yield the hosts that have the model, whatever state they are in."""
        excluded = self.excluded
        for host in self._serving.get(model, {}).values():
            if host.name not in excluded:
                yield host

    def roomiest(self, model: str, most: int) -> list[Host]:
        """Return up to ``most`` hosts with fresh reports where a wake would cost the others least, best first."""
        now, excluded = self.time, self.excluded
        found: list[Host] = []
        serving = self._serving.get(model, {})
        if len(serving) <= 2 * most:
            few = [h for h in self.serving(model) if h.lease_until >= now and h.usable(model, now)]
            return sorted(few, key=lambda host: (host.base, host.name))[:most]
        for _, name in self._roomy:
            host = serving.get(name)
            if host is not None and host.lease_until >= now and name not in excluded and host.usable(model, now):
                found.append(host)
                if len(found) == most:
                    break
        return found

    def claimed(self, model: str) -> Host | None:
        """Return the host for which a gateway has claimed the model's wake, while that claim counts.

        It no longer counts once as many requests wait there as it serves at once: the next may need another host.
        """
        name, until = self.claims.get(model, ("", 0.0))
        host = self.hosts.get(name)
        if until <= self.time or host is None or not host.usable(model, self.time):
            return None
        if host.lease_until < self.time or host.full(model, self.time):
            return None
        return host

    @staticmethod
    def tie(model: str, host: Host) -> int:
        """Return the host's rank for a model (rendezvous hashing): all gateways compute the same."""
        mixed = zlib.crc32(f"{model}\0{host.name}".encode())
        for _ in range(2):  # a checksum is linear: alone it would rank the hosts alike for many models
            mixed = ((mixed >> 16) ^ mixed) * 0x45D9F3B & 0xFFFFFFFF
        return (mixed >> 16) ^ mixed

    def missed(self, host: Host, model: str) -> float:
        """Return the cost, in seconds of waiting, if ``model`` leaves ``host``.

        Its requests of the next two minutes wait for its return, unless it is awake elsewhere, where they go then.
        A model that arrived less than its own switch ago does not leave yet, if another can.
        """
        each = host.of(model)
        way = each.sleep + each.wake
        elsewhere = len(self._holders.get(model, ())) - (1 if model in host.held else 0)
        rate = each.arrival_rate
        if each.idle_for > 0.0:
            rate = min(rate, QUIET / each.idle_for)
        share = 1.0
        if elsewhere > 0:
            load = rate * (1.0 + 1.0 / elsewhere) * self.service(host, model) / (each.slots or UNLIMITED)
            share = min(1.0, load) ** 2
        stay = max(0.0, way - each.awake_for)
        return way * (each.queued + each.in_flight + share * min(rate * MEMORY, 1.0 + rate * way)) + stay

    def service(self, host: Host, model: str) -> float:
        """Return the seconds of an answer, measured by the host, else by another."""
        return host.of(model).service or self._services.get(model, UNSEEN_SERVICE)

    def wait(self, host: Host, model: str) -> float:
        """Return the seconds that a request placed now would wait on the host; inf if it would be refused.

        It is the host's forecast at its report, adjusted by what has changed since, as far as this gateway knows.
        """
        now, each = self.time, host.of(model)
        expected = each.expected_wait
        if expected is None:
            return NEVER
        slots, service = each.slots or UNLIMITED, self.service(host, model)
        there = each.queued + host.ahead(model, now)
        if each.phase is Phase.AWAKE and not (host.arriving and host.displaced(model)):
            over = each.in_flight + there - slots
            return (over + 1) * service / slots if over >= 0 else 0.0
        if each.phase is Phase.AWAKE:  # it has to be woken again
            seconds = each.sleep + each.wake + max(0, there) // slots * service
            return seconds + self._turns(host, model)
        until_awake = expected - each.queued // slots * each.service
        seconds = max(0.0 if each.queued else each.switch_cost, until_awake - (now - host.taken))
        if each.phase is not Phase.WAKING and model in host.waiting:
            # A wait that has been long without a switch is likely to last as long again.
            seconds = max(seconds, now - next(iter(host.waiting[model].values())))
        return seconds + max(0, there) // slots * service + self._turns(host, model)

    def _turns(self, host: Host, model: str | None = None) -> float:
        """Return the seconds of the wakes begun since the report, ahead of ``model``."""
        return sum(
            host.of(other).switch_cost + self.service(host, other) for other in host.arriving if other != model
        )

    def burden(self, host: Host, model: str) -> float:
        """Return what a wake of the model there costs the others, in seconds of waiting."""
        evicts = host.of(model).evicts
        return host.leaving if evicts is None else sum(self.missed(host, each) for each in evicts)

    def shortest(self, model: str) -> tuple[Host | None, float]:
        """Return the holder with the least wait, and that wait."""
        now, best, least_wait, least_load = self.time, None, NEVER, NEVER
        for host in self.holders(model, LOOKED_AT):
            wait = self.wait(host, model)
            if wait < least_wait or (wait == least_wait < NEVER and host.load(now) < least_load):
                best, least_wait, least_load = host, wait, host.load(now)
        return best, least_wait

    def weight(self, host: Host | None, model: str) -> float:
        """Return how many requests gain if the model is awake elsewhere: one, those on ``host``, future ones."""
        if host is None:
            return 1.0
        each = host.of(model)
        way = each.sleep + each.wake
        gains = min(each.queued, each.slots or UNLIMITED) + each.arrival_rate * min(MEMORY, way)
        return 1.0 + gains

    def cheapest(self, model: str, weight: float) -> tuple[Host | None, float, float]:
        """Return the host where a wake is cheapest in total, the wait there, and its cost to the others.

        The cost to the others is divided by ``weight``, the number of requests that gain.
        """
        best, least_sum, best_rank = None, NEVER, 0
        found = (NEVER, NEVER)
        for host in self.roomiest(model, LOOKED_AT):
            if host.holds(model):
                continue
            wait, burden = self.wait(host, model), self.burden(host, model) / weight
            total = wait + burden
            if total > least_sum or total == NEVER:
                continue
            rank = self.tie(model, host)
            if total < least_sum or rank < best_rank:
                best, least_sum, best_rank, found = host, total, rank, (wait, burden)
        return best, *found

    # ---- for the placement

    def take(self, host: Host, report: HostReport, taken: float, lease_until: float) -> None:
        """Apply a report."""
        before = host.report
        host.report, host.taken, host.lease_until = report, taken, lease_until
        for times, counts in ((host.recent, host.since), (host.ends, host.ended)):
            while times and times[0][0] <= taken:
                self._count_down(counts, times.popleft()[1])
        if host.blocked:  # what it reports now replaces what it said before
            host.blocked = {
                name: (since_, until)
                for name, (since_, until) in host.blocked.items()
                if since_ >= taken
                or (name and name in report.models and report.models[name].expected_wait is None)
            }
        if host.arriving:
            host.arriving = {model: when for model, when in host.arriving.items() if when > taken}
        if before is None or before.models.keys() != report.models.keys():
            self._serve(host, before)
        self.list(host)

    def list(self, host: Host) -> None:
        """Put the host into the indexes, at its place."""
        report = host.report
        assert report is not None
        held = tuple(
            [
                name
                for name, each in report.models.items()
                if each.phase in HELD or each.queued or name in host.since or name in host.arriving
            ]
        )
        if held != host.held:
            self._hold(host, held)
        leaving, free_in = 0.0, NEVER
        for name, each in report.models.items():
            if each.service:
                self._services[name] = each.service
            if each.phase in ON_GPU:
                leaving += self.missed(host, name)
            elif each.expected_wait is not None:
                free_in = min(free_in, each.expected_wait - each.switch_cost)
        host.leaving, host.free_in = leaving, max(0.0, free_in) if free_in < NEVER else 0.0
        self._place(host)

    def unlist(self, host: Host) -> None:
        """Remove the host from the indexes by state: its report no longer counts."""
        self._hold(host, ())
        for counted in (host.recent, host.since, host.ends, host.ended, host.arriving):
            counted.clear()
        if host.listed:
            self._remove(host)

    def remove(self, host: Host) -> None:
        """Forget a host."""
        self.unlist(host)
        if host.report is not None:
            for model in host.report.models:
                self._unserve(host, model)
        del self.hosts[host.name]

    def placed(self, host: Host, request: int, model: str) -> None:
        """Count a request that goes to the host now."""
        host.own[request] = entry = (self.time, model)
        host.waiting.setdefault(model, {})[request] = self.time
        if not host.listed:
            return
        host.recent.append(entry)
        host.since[model] = host.since.get(model, 0) + 1
        if model not in host.held:
            self.arrives(host, model)

    def arrives(self, host: Host, model: str) -> None:
        """Record that a wake was started there: what its report says of the others no longer holds."""
        if not host.listed or host.holds_by_report(model):
            return
        host.arriving.setdefault(model, self.time)
        self._hold(host, (*host.held, model) if model not in host.held else host.held)
        self._place(host)

    def gone(self, host: Host, request: int, *, arrived: bool = True) -> None:
        """Remove a request that was placed there. One that has not ``arrived`` there was no load either."""
        entry = host.own.pop(request)
        self.begun(host, request, entry[1])
        if arrived:
            if host.listed:
                host.ends.append((self.time, entry[1]))
                host.ended[entry[1]] = host.ended.get(entry[1], 0) + 1
        elif entry in host.recent:
            host.recent.remove(entry)
            self._count_down(host.since, entry[1])
            if entry[1] not in host.since:
                host.arriving.pop(entry[1], None)
            self.list(host)

    @staticmethod
    def begun(host: Host, request: int, model: str) -> None:
        """Remove a request from those queued there."""
        known = host.waiting.get(model)
        if known is not None and known.pop(request, None) is not None and not known:
            del host.waiting[model]

    def _place(self, host: Host) -> None:
        if host.listed:
            self._remove(host)
        host.base = host.free_in + host.leaving + self._turns(host)
        insort(self._roomy, (host.base, host.name))
        host.listed = True

    def _remove(self, host: Host) -> None:
        del self._roomy[bisect_left(self._roomy, (host.base, host.name))]
        host.listed = False

    def _hold(self, host: Host, held: tuple[str, ...]) -> None:
        for model in host.held:
            if model not in held:
                known = self._holders[model]
                del known[host.name]
                if not known:
                    del self._holders[model]
                self._listed.pop(model, None)
        for model in held:
            if model not in host.held:
                self._holders.setdefault(model, {})[host.name] = host
                self._listed.pop(model, None)
        host.held = held

    def _serve(self, host: Host, before: HostReport | None) -> None:
        assert host.report is not None
        models = host.report.models
        for model in before.models if before is not None else ():
            if model not in models:
                self._unserve(host, model)
        for model in models:
            self._serving.setdefault(model, {})[host.name] = host

    def _unserve(self, host: Host, model: str) -> None:
        known = self._serving[model]
        del known[host.name]
        if not known:
            del self._serving[model]

    @staticmethod
    def _count_down(since: dict[str, int], model: str) -> None:
        left = since[model] - 1
        if left:
            since[model] = left
        else:
            del since[model]
