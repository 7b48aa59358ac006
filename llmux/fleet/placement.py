"""The placement: which request goes to which host. Events in, effects out.

Theory of operation
===================

A gateway has no state that matters: the hosts own their GPUs, queues and policies, and are the source of truth.
``Placement.handle(event, now)`` takes one event, updates the gateway's view, and returns the effects in order. It
does no I/O and reads no clock; ``next_deadline()`` says when it needs a ``DeadlineReached``.

A request goes through these stages::

    (arrives) ──▶ QUEUED ──▶ PLACED ──▶ BEGUN ──▶ (ended)
                    ▲          │ ▲
                    │ refused, │ │ taken back, for a better host
                    └──────────┘ └── WITHDRAWING

- **QUEUED**: no host can take it. It waits in the gateway, first come, first served per model, bounded in number
  and time; then it is rejected with ``Retry-After``.
- **PLACED**: it was sent. It may be sent again only on proof that no engine has seen it: no connection could be
  opened, or the host has refused it before its admission with a typed refusal. At most ``RETRIES`` times; then it
  is rejected with the host's own words.
- **WITHDRAWING**: it is in its host's queue, and the switch to its model has not begun there. It is asked back if
  another host wakes the model and has room for it (one wake is enough), or has been better for ``PATIENCE`` by
  more than a switch costs: each at most once. If the host has admitted it in the meantime, it stays.
- **BEGUN**: the host has admitted it. It goes to no other host, whatever happens: a connection that ends is a 502.

A host is *fresh* while its last report is within its lease; *ejected* from the first refused connection until a
probe is answered (after 1, 2, 4 … 30 s); *blocked* for a model after a refusal, until the time that the host gave
or a newer report. The route chooses among hosts that are neither ejected nor blocked, by fresh reports if there
are any; if there are none, by the gateway's own counts: it fails open.

Reports are fenced: a report is refused if a newer one has arrived, or if it comes from another instance of the
host while the known one's lease holds, unless that one was found unreachable.

A placement that wakes a model claims the wake: for 1.5 times its cost all requests for the model join it, here
and, through the store, at the other gateways. There is one claim per model at a time. A claim is advice; without a
store it holds only here, and gateways agree on ties by a hash.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from llmux.core.phases import InvalidEventError, Phase
from llmux.core.policy_calls import RAISED, spelled
from llmux.core.timers import Timers
from llmux.fleet import events as ev
from llmux.fleet.fleet_view import HELD, Fleet, Host
from llmux.fleet.routes import Route, least

RETRIES = 2  # after proof that no engine has seen the request
PATIENCE = 2.0  # seconds for which another host must have been better
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between probes
UNSAID = 5.0  # seconds: when to retry, if no host says it
CLAIM = 1.5  # switch costs for which a wake is claimed
SHORTEST_CLAIM = 1.0  # seconds


class Stage(enum.StrEnum):
    """How far a request has come."""

    QUEUED = "queued"
    PLACED = "placed"
    WITHDRAWING = "withdrawing"
    BEGUN = "begun"


@dataclass(slots=True, eq=False)
class Request:
    """One request, from its arrival to its end."""

    id: int
    model: str
    arrived: float
    stage: Stage = Stage.QUEUED
    host: Host | None = None  # where it was sent
    attempts: int = 0
    refused_by: set[str] = field(default_factory=set)
    refusal: ev.RequestRefused | None = None  # the last one
    soonest: float = math.inf  # when the first of these hosts may take it, as far as they said
    moved: bool = False  # it was taken back once, as another host was better
    joined: bool = False  # it was taken back once, as another host was waking its model
    better_since: float | None = None  # since when another host has been better


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds of the gateway's own queue."""

    max_queued: int = 1000  # requests a model
    max_wait: float = 30.0  # seconds


class Timer(enum.StrEnum):
    """What may be due; the key of a timer is the pair of this and a name."""

    LEASE = "lease"  # of a host's report
    PROBE = "probe"  # of a host
    BLOCK = "block"  # of a host: what it refused may be sent again
    QUEUE = "queue"  # of a model: its oldest waiter


class Placement:
    """The state machine of a gateway. ``dice`` returns numbers in [0, 1)."""

    def __init__(self, route: Route, dice: Callable[[], float], rules: Rules | None = None) -> None:
        self.route = route
        self.moves: bool = getattr(route, "moves", False)
        self.rules = rules or Rules()
        self.fleet = Fleet(dice)
        self.complete = True
        """Whether all hosts are known; the driver puts it to False where ``HostsKnown`` is still to come."""
        self.requests: dict[int, Request] = {}
        self.queues: dict[str, OrderedDict[int, Request]] = {}
        self.timers = Timers()
        self.next_deadline: Callable[[], float | None] = self.timers.next
        """Returns when the placement must be handed ``DeadlineReached``, or None."""
        self.out: list[ev.Effect] = []
        self._stale: set[str] = set()  # models for which that was reported
        self._overruled: set[str] = set()  # wrong answers of the route that were reported

    def handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Handle an event and return the effects, in order.

        Raises ``InvalidEventError`` for an event about a request that is unknown, or at an earlier stage.
        """
        self.fleet.time = max(self.fleet.time, now)
        out: list[ev.Effect] = []
        self.out = out
        self._handlers[event.__class__](self, event)
        return out

    # ---- requests

    def _arrived(self, event: ev.RequestArrived) -> None:
        if event.request in self.requests:
            raise InvalidEventError(f"request {event.request} arrived twice")
        request = Request(event.request, event.model, self.fleet.time)
        self.requests[request.id] = request
        if self.queues.get(event.model) or not self._place(request):
            self._hold_back(request)

    def _place(self, request: Request, but: str = "") -> bool:
        """Send the request to a host if there is one, other than ``but``."""
        fleet = self.fleet
        fleet.excluded = request.refused_by | {but} if but else request.refused_by
        host = self._choose(request.model)
        if host is not None:
            self._send(request, host)
        return host is not None

    def _choose(self, model: str) -> Host | None:
        """Ask the route, and check its answer."""
        fleet, invalid = self.fleet, ""
        if not any(True for _ in fleet.serving(model)):
            return None
        try:
            host = self.route.place(model, fleet)
        except RAISED as error:
            host, invalid = None, f"raised {spelled(error)}"
        if host is not None:
            invalid = self._wrong(host, model)
        if not invalid:
            return host
        if invalid not in self._overruled:
            self._overruled.add(invalid)
            self.out.append(ev.RouteOverruled(invalid))
        return least(fleet.candidates(model), fleet, model)

    def _wrong(self, host: Host, model: str) -> str:
        """Describe what is wrong with a route's choice; empty: nothing."""
        fleet = self.fleet
        known = isinstance(host, Host) and fleet.hosts.get(host.name) is host
        if not known or host.name in fleet.excluded or not host.usable(model, fleet.time):
            return "named a host that takes no requests for the model"
        if host.lease_until >= fleet.time:
            self._stale.discard(model)
        elif any(each.lease_until >= fleet.time for each in fleet.candidates(model)):
            return "named a host whose report is too old, while there are fresh ones"
        elif model not in self._stale:
            self._stale.add(model)
            self.out.append(ev.ViewStale(model))
        return ""

    def _send(self, request: Request, host: Host) -> None:
        fleet, model, now = self.fleet, request.model, self.fleet.time
        wakes = not host.holds(model) and host.lease_until >= now
        request.stage, request.host = Stage.PLACED, host
        request.attempts += 1
        request.better_since = None
        self.out.append(ev.Send(request.id, model, host.name, request.attempts, now - request.arrived))
        name, until = fleet.claims.get(model, ("", 0.0))
        if wakes and (name != host.name or until <= now) and fleet.claimed(model) is None:
            term = max(SHORTEST_CLAIM, CLAIM * host.of(model).switch_cost)
            fleet.claims[model] = host.name, now + term
            self.out.append(ev.ClaimWake(model, host.name, term, name if until > now else ""))
        fleet.placed(host, request.id, model)

    def _hold_back(self, request: Request) -> None:
        """Queue a request that no host can take now, or reject it."""
        model, fleet = request.model, self.fleet
        serving = [host for host in fleet.hosts.values() if host.serves(model)]
        if not serving and self.complete and all(host.report is not None for host in fleet.hosts.values()):
            self._reject(request, ev.Code.UNKNOWN_MODEL, f"model {model!r} not found", None)
            return
        if request.refusal is not None and not any(True for _ in fleet.candidates(model)):
            self._pass_on(request)
            return
        soonest = min((host.free_at(model) for host in serving), default=-math.inf)
        if soonest - fleet.time > self.rules.max_wait:
            message = f"every host that has {model!r} refuses it for now"
            self._reject(request, ev.Code.NO_HOST, message, soonest - fleet.time)
            return
        queue = self.queues.get(model, ())
        if len(queue) >= self.rules.max_queued:
            message = f"{len(queue)} requests already wait for a host that has {model!r}"
            self._reject(request, ev.Code.QUEUE_FULL, message, UNSAID)
            return
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        queue = self.queues.setdefault(request.model, OrderedDict())
        queue[request.id] = request
        if request.attempts:  # only such a request can be older than those in the queue
            queue = self.queues[request.model] = OrderedDict(
                sorted(queue.items(), key=lambda item: (item[1].arrived, item[0]))
            )
        request.stage = Stage.QUEUED
        self.out.append(ev.RequestQueued(request.id, request.model, len(queue)))
        self._watch(request.model)

    def _watch(self, model: str) -> None:
        """Keep the deadline of a queue: its oldest waiter's."""
        queue = self.queues.get(model)
        oldest = next(iter(queue.values())) if queue else None
        if oldest is None:
            self.queues.pop(model, None)
        self.timers.set((Timer.QUEUE, model), None if oldest is None else oldest.arrived + self.rules.max_wait)

    def _unqueue(self, request: Request) -> None:
        del self.queues[request.model][request.id]
        self._watch(request.model)

    def _dispatch(self, model: str) -> None:
        """Place the requests that are queued for a model, oldest first, as far as there are hosts."""
        while (queue := self.queues.get(model)) and self._place(oldest := next(iter(queue.values()))):
            self._unqueue(oldest)

    def _dispatch_all(self) -> None:
        for model in list(self.queues):
            self._dispatch(model)

    def _reject(self, request: Request, code: str, message: str, retry_after: float | None) -> None:
        del self.requests[request.id]
        waited = self.fleet.time - request.arrived
        self.out.append(ev.Reject(request.id, request.model, code, message, retry_after, waited))

    def _pass_on(self, request: Request) -> None:
        """Reject a request in the words of the host that refused it last, until the first one may take it."""
        refusal = request.refusal
        assert refusal is not None
        message = refusal.message or f"{request.model!r} was refused"
        again = refusal.retry_after
        if again is not None:
            again = min(again, max(0.0, request.soonest - self.fleet.time))
        self._reject(request, refusal.code, message, again)

    def _of(self, number: int, *stages: Stage) -> Request:
        request = self.requests.get(number)
        if request is None:
            raise InvalidEventError(f"no request {number}")
        if stages and request.stage not in stages:
            raise InvalidEventError(f"request {number} is {request.stage}")
        return request

    def _off(self, request: Request, *, arrived: bool = True) -> Host:
        """Remove a request from its host."""
        host = request.host
        assert host is not None
        request.host = None
        self.fleet.gone(host, request.id, arrived=arrived)
        return host

    def _abandoned(self, event: ev.RequestAbandoned) -> None:
        request = self._of(event.request)
        if request.stage is Stage.QUEUED:
            self._unqueue(request)
        else:
            self._off(request)
        del self.requests[request.id]

    def _waiting(self, event: ev.RequestWaiting) -> None:
        """Check whether the request should wait elsewhere: its model is woken there, or the host is better."""
        request = self._of(event.request)
        if not self.moves or request.stage is not Stage.PLACED or event.expected is None:
            return
        fleet, host, model = self.fleet, request.host, request.model
        assert host is not None
        if fleet.hosts.get(host.name) is not host:
            return  # it was removed: it keeps what is queued there
        here = host.of(model)
        if here.phase is Phase.WAKING or event.expected < here.switch_cost:  # the switch to the model has begun
            request.better_since = None
            return
        fleet.excluded = request.refused_by | {host.name}
        there, wait = fleet.shortest(model)
        other = None
        if here.phase is not Phase.AWAKE:
            other = self._wakes_elsewhere(model, there, event.expected)
        if other is not None:
            if not request.joined:
                request.joined = True
                self._take_back(request, other)
        elif not request.moved:
            self._see_better(request, host, there, wait, event.expected)

    def _wakes_elsewhere(self, model: str, holder: Host | None, expected: float) -> Host | None:
        """Return another host that wakes the model and has room: one wake is enough.

        Either the claiming host, if it is sooner than ``expected``, or ``holder``, which has the least wait.
        """
        fleet = self.fleet
        claimed = fleet.claimed(model)
        if claimed is not None and claimed.name not in fleet.excluded and fleet.wait(claimed, model) < expected:
            return claimed
        if holder is not None and holder.of(model).phase in HELD and not holder.full(model, fleet.time):
            return holder
        return None

    def _see_better(self, request: Request, host: Host, there: Host | None, wait: float, expected: float) -> None:
        """Take the request back if another host has been better, by more than a switch, for a while."""
        fleet, model = self.fleet, request.model
        cold, cost, burden = fleet.cheapest(model, fleet.weight(host, model))
        if cold is not None and cost + burden < wait and fleet.claimed(model) is None:
            there, wait = cold, cost + burden
        placed = host.waiting.get(model, {}).get(request.id)
        if placed is not None and host.of(model).phase is not Phase.AWAKE:
            expected = max(expected, fleet.time - placed)  # after a long wait as long a one is likely
        if there is None or expected - wait <= max(PATIENCE, host.of(model).switch_cost):
            request.better_since = None
        elif request.better_since is None:
            request.better_since = fleet.time
        elif fleet.time - request.better_since >= PATIENCE:
            request.moved = True
            self._take_back(request, there)

    def _take_back(self, request: Request, there: Host) -> None:
        assert request.host is not None
        request.stage, request.better_since = Stage.WITHDRAWING, None
        self.out.append(ev.Withdraw(request.id, request.host.name, there.name))

    def _withdrawn(self, event: ev.RequestWithdrawn) -> None:
        request = self._of(event.request, Stage.WITHDRAWING)
        host = self._off(request, arrived=False)
        if not self._place(request, but=host.name):
            self._again(request)

    def _began(self, event: ev.AnswerBegan) -> None:
        request = self._of(event.request, Stage.PLACED, Stage.WITHDRAWING)
        request.stage = Stage.BEGUN
        assert request.host is not None
        self.fleet.begun(request.host, request.id, request.model)

    def _ended(self, event: ev.RequestEnded) -> None:
        request = self._of(event.request, Stage.PLACED, Stage.WITHDRAWING, Stage.BEGUN)
        self._off(request)
        del self.requests[request.id]

    def _broken(self, event: ev.ConnectionBroken) -> None:
        request = self._of(event.request, Stage.PLACED, Stage.WITHDRAWING, Stage.BEGUN)
        host = self._off(request)
        message = f"{host.name} ended the connection without an answer; the request is not sent again"
        self._reject(request, ev.Code.HOST_LOST, message, None)

    def _connect_failed(self, event: ev.ConnectFailed) -> None:
        request = self._of(event.request, Stage.PLACED)
        host = self.fleet.hosts.get(self._off(request, arrived=False).name)
        if host is not None:
            self._eject(host, event.reason or "connection refused")
        self._again(request)

    def _refused(self, event: ev.RequestRefused) -> None:
        request = self._of(event.request, Stage.PLACED, Stage.WITHDRAWING)
        name = self._off(request, arrived=False).name
        request.refused_by.add(name)
        request.refusal = event
        host = self.fleet.hosts.get(name)
        if host is not None:
            now = self.fleet.time
            if event.retry_after is not None:
                request.soonest = min(request.soonest, now + event.retry_after)
            until = now + (UNSAID if event.retry_after is None else event.retry_after)
            host.blocked["" if event.code in ev.OF_THE_HOST else request.model] = now, until
            self.timers.set((Timer.BLOCK, name), until)
        self._again(request)

    def _again(self, request: Request) -> None:
        """Try another host, if it may be sent again."""
        if request.attempts > RETRIES + request.moved + request.joined:
            if request.refusal is not None:
                self._pass_on(request)
            else:
                message = f"no host that has {request.model!r} could be reached"
                self._reject(request, ev.Code.NO_HOST, message, UNSAID)
        elif self.queues.get(request.model) or not self._place(request):
            self._hold_back(request)

    # ---- hosts

    def _known(self, _event: ev.HostsKnown) -> None:
        self.complete = True
        for model in list(self.queues):
            self._give_up(model)

    def _host(self, name: str) -> Host:
        host = self.fleet.hosts.get(name)
        if host is None:
            host = self.fleet.hosts[name] = Host(name)
        return host

    def _added(self, event: ev.HostAdded) -> None:
        self._host(event.host)

    def _reported(self, event: ev.HostReported) -> None:
        report, fleet = event.report, self.fleet
        host, now = self._host(report.host), fleet.time
        known = host.report
        if known is not None:
            if known.instance != report.instance:
                if now <= host.lease_until and not host.ejected:
                    reason = "another instance holds the name"
                    self.out.append(ev.ReportRefused(report.host, report.instance, report.seq, reason))
                    return
                if host.ejected:  # it was restarted
                    self.timers.set((Timer.PROBE, host.name), now)
            elif report.seq <= known.seq:
                reason = "a later one is known"
                self.out.append(ev.ReportRefused(report.host, report.instance, report.seq, reason))
                return
        taken = now - event.age
        fleet.take(host, report, taken, taken + report.lease)
        if host.fresh(now):
            self.timers.set((Timer.LEASE, host.name), host.lease_until)
        else:
            fleet.unlist(host)
        for model in list(self.queues):
            if model in report.models:
                self._dispatch(model)
            elif known is None:
                self._give_up(model)

    def _eject(self, host: Host, reason: str) -> None:
        """Send no request there until a probe is answered."""
        if host.ejected and (Timer.PROBE, host.name) in self.timers:
            return
        host.ejected = True
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(host.failures, 30))
        host.failures += 1
        self.timers.set((Timer.PROBE, host.name), self.fleet.time + pause)
        self.out.append(ev.HostEjected(host.name, reason, pause))

    def _unreachable(self, event: ev.HostUnreachable) -> None:
        self._eject(self._host(event.host), event.reason)

    def _reachable(self, event: ev.HostReachable) -> None:
        host = self.fleet.hosts.get(event.host)
        if host is None or not host.ejected:
            return
        host.ejected = False
        host.failures = 0
        self.timers.cancel((Timer.PROBE, host.name))
        self.out.append(ev.HostRestored(host.name))
        self._dispatch_all()

    def _removed(self, event: ev.HostRemoved) -> None:
        host = self.fleet.hosts.get(event.host)
        if host is None:
            return
        self.fleet.remove(host)
        for timer in (Timer.LEASE, Timer.PROBE, Timer.BLOCK):
            self.timers.cancel((timer, host.name))
        for model in list(self.queues):
            self._give_up(model)

    def _give_up(self, model: str) -> None:
        """Reject the requests queued for a model that no host has any more."""
        hosts = self.fleet.hosts.values()
        if not self.complete or any(host.report is None or host.serves(model) for host in hosts):
            return
        for request in list(self.queues[model].values()):
            self._unqueue(request)
            self._reject(request, ev.Code.UNKNOWN_MODEL, f"model {model!r} not found", None)

    # ---- the store, and time

    def _claim_seen(self, event: ev.ClaimSeen) -> None:
        fleet = self.fleet
        fleet.claims[event.model] = event.host, fleet.time + event.remaining
        host = fleet.hosts.get(event.host)
        if host is not None and host.serves(event.model):
            fleet.arrives(host, event.model)

    def _load_seen(self, event: ev.LoadSeen) -> None:
        host = self.fleet.hosts.get(event.host)
        if host is not None:
            host.others = event.requests
            host.others_until = self.fleet.time + ev.FLIGHT

    def _deadline(self, _event: ev.DeadlineReached) -> None:
        while (key := self.timers.pop_due(self.fleet.time)) is not None:
            assert isinstance(key, tuple)
            timer, name = key
            self._timers[timer](self, name)

    def _queue_over(self, model: str) -> None:
        """Reject the queued requests whose time is up."""
        queue = self.queues[model]
        for request in list(queue.values()):
            if request.arrived + self.rules.max_wait > self.fleet.time:
                break
            del queue[request.id]
            if request.refusal is not None:
                self._pass_on(request)
            else:
                message = f"no host that has {model!r} could take it"
                self._reject(request, ev.Code.NO_HOST, message, UNSAID)
        self._watch(model)

    _handlers: ClassVar[Mapping[type[ev.Event], Callable[..., None]]] = {
        ev.RequestArrived: _arrived,
        ev.RequestAbandoned: _abandoned,
        ev.RequestWaiting: _waiting,
        ev.RequestWithdrawn: _withdrawn,
        ev.AnswerBegan: _began,
        ev.RequestEnded: _ended,
        ev.ConnectionBroken: _broken,
        ev.ConnectFailed: _connect_failed,
        ev.RequestRefused: _refused,
        ev.HostAdded: _added,
        ev.HostsKnown: _known,
        ev.HostReported: _reported,
        ev.HostUnreachable: _unreachable,
        ev.HostReachable: _reachable,
        ev.HostRemoved: _removed,
        ev.ClaimSeen: _claim_seen,
        ev.LoadSeen: _load_seen,
        ev.DeadlineReached: _deadline,
    }
    _timers: ClassVar[Mapping[Timer, Callable[..., None]]] = {
        Timer.LEASE: lambda self, name: self.fleet.unlist(self.fleet.hosts[name]),
        Timer.PROBE: lambda self, name: self.out.append(ev.Probe(name)),
        Timer.BLOCK: lambda self, _name: self._dispatch_all(),
        Timer.QUEUE: _queue_over,
    }
