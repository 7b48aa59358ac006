"""Playbooks of a gateway's placement: given these events at these times, exactly these effects.

    play = given(h1=[awake("a"), asleep("b")], h2=[asleep("a", "b")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.1, refused(1, "pinned", 50.0), sent(1, "a", "h2", attempt=2, waited=0.1), claims("a", "h2", 9.0)),
    )

Every step goes through the ledger, which keeps its own books and holds the invariants against them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from llmux.core.phases import Phase
from llmux.fleet import events as ev
from llmux.fleet.fleet_view import Host, HostReport, ModelReport
from llmux.fleet.placement import RETRIES, Placement, Rules, Stage
from llmux.fleet.routes import SHIPPED, LeastWait, Route

COST, SLEEP, WAKE = 6.0, 1.0, 5.0
Models = dict[str, ModelReport]


class Ledger:
    """Feeds a placement and checks every step."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.now = 0.0
        self.model: dict[int, str] = {}  # of requests that have not ended
        self.at: dict[int, str] = {}  # requests that are on a host
        self.sends: dict[int, int] = {}
        self.proofs: dict[int, int] = {}  # that no engine has seen it
        self.refusers: dict[int, set[str]] = {}
        self.may_have_run: set[int] = set()
        self.withdrawn: list[int] = []
        self.done: set[int] = set()
        self.reports: dict[str, tuple[HostReport, float]] = {}  # taken in, with the end of the lease
        self.down: set[str] = set()
        self.claims: dict[str, tuple[str, float]] = {}  # host, end
        self.pages: list[tuple[float, ev.Event, list[ev.Effect]]] = []

    def feed(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Hand over an event and check what comes back."""
        assert now >= self.now
        self.now = now
        self._before(event)
        effects = self.placement.handle(event, now)
        self.pages.append((now, event, effects))
        if isinstance(event, ev.HostReported) and not any(isinstance(e, ev.ReportRefused) for e in effects):
            self.reports[event.report.host] = event.report, now - event.age + event.report.lease
        for effect in effects:
            self._effect(effect)
        self._after()
        return effects

    def _before(self, event: ev.Event) -> None:  # noqa: C901 - a list of cases
        match event:
            case ev.RequestArrived(request=request, model=model):
                self.model[request] = model
                self.sends[request] = self.proofs[request] = 0
                self.refusers[request] = set()
            case ev.RequestAbandoned(request=request) | ev.RequestEnded(request=request):
                self.at.pop(request, None)
                self._end(request)
            case ev.AnswerBegan(request=request):
                self.may_have_run.add(request)
            case ev.ConnectionBroken(request=request):
                self.may_have_run.add(request)
                del self.at[request]
            case ev.ConnectFailed(request=request):
                self.proofs[request] += 1
                host = self.at.pop(request)
                if host in self.placement.fleet.hosts:  # else it has been removed meanwhile
                    self.down.add(host)
            case ev.RequestRefused(request=request) | ev.RequestWithdrawn(request=request):
                self.proofs[request] += 1
                self.refusers[request].add(self.at.pop(request))
            case ev.HostRemoved(host=host):
                self.reports.pop(host, None)
                self.down.discard(host)
            case ev.HostReachable(host=host):
                self.down.discard(host)
            case ev.HostUnreachable(host=host):
                self.down.add(host)
            case ev.ClaimSeen(model=model, remaining=remaining):
                self.claims[model] = event.host, self.now + remaining

    def _end(self, request: int) -> None:
        del self.model[request]
        self.done.add(request)

    def _effect(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Send(request=request, model=model, host=host, attempt=attempt):
                assert request in self.model, "sent after its end"
                assert request not in self.may_have_run, "sent again to an engine that may have run it"
                assert request not in self.at, "in two places"
                assert attempt == self.sends[request] + 1 == self.proofs[request] + 1, "sent again without proof"
                assert attempt <= 1 + RETRIES + self.withdrawn.count(request), "too often"
                self._allowed(request, model, host)
                self.sends[request] = attempt
                self.at[request] = host
            case ev.Reject(request=request, code=code):
                assert request not in self.at
                assert code == ev.Code.HOST_LOST or request not in self.may_have_run
                self._end(request)
            case ev.Withdraw(request=request, host=host, to=to):
                assert self.at[request] == host != to
                assert self.withdrawn.count(request) < 2, "moved three times"
                phase = self.placement.fleet.hosts[host].of(self.model[request]).phase
                assert phase is not Phase.WAKING, "taken from a host that wakes its model"
                assert request not in self.may_have_run
                self.withdrawn.append(request)
            case ev.ClaimWake(model=model, host=host, term=term):
                assert not self._claimed(model), "two claims in one term"
                assert term > 0
                self.claims[model] = host, self.now + term
            case ev.RouteOverruled():
                assert type(self.placement.route) not in SHIPPED.values(), effect
            case ev.HostRestored(host=host):
                assert host not in self.down
            case _:
                pass

    def _claimed(self, model: str) -> bool:
        """Whether a claim holds: what its host cannot do is no claim, and one that is full is fulfilled."""
        name, until = self.claims.get(model, ("", 0.0))
        host = self.placement.fleet.hosts.get(name)
        if until <= self.now or host is None or not host.usable(model, self.now) or not host.fresh(self.now):
            return False
        return not host.full(model, self.now)

    def _allowed(self, request: int, model: str, host: str) -> None:
        """A request goes where a report says that it may, and to an old report only if there is no fresh one."""
        report, lease = self.reports[host]
        assert host not in self.down, "sent to a host that cannot be reached"
        assert report.ready
        assert not report.leased
        assert model in report.models
        if lease >= self.now:
            assert report.models[model].expected_wait is not None, "sent where it would be refused"
            return
        for name, (other, until) in self.reports.items():
            each = other.models.get(model)
            if each is None or until < self.now or name in self.down or name in self.refusers[request]:
                continue
            usable = other.ready and not other.leased and each.expected_wait is not None
            blocked = self.placement.fleet.hosts[name].free_at(model) > self.now
            assert not usable or blocked, f"{host} has an old report, {name} a fresh one"

    def _after(self) -> None:
        placement = self.placement
        assert placement.requests.keys() == self.model.keys(), "lost, or kept after its end"
        queued = {number for queue in placement.queues.values() for number in queue}
        assert queued == self.model.keys() - self.at.keys(), "neither queued nor placed"
        for number, request in placement.requests.items():
            assert (request.stage is Stage.QUEUED) == (number in queued)
            assert (request.host.name if request.host else None) == self.at.get(number)
            assert (request.stage is Stage.BEGUN) == (number in self.may_have_run)
        for queue in placement.queues.values():
            arrivals = [request.arrived for request in queue.values()]
            assert arrivals
            assert arrivals == sorted(arrivals), "not first come, first served"
        self._indexes()

    def _indexes(self) -> None:
        """What is counted and indexed is what a count of everything would say."""
        fleet = self.placement.fleet
        roomy = sorted((host.base, host.name) for host in fleet.hosts.values() if host.listed)
        assert fleet._roomy == roomy
        for host in fleet.hosts.values():
            assert {number for number, name in self.at.items() if name == host.name} >= set(host.own)
            for times, counts in ((host.recent, host.since), (host.ends, host.ended)):
                assert sum(counts.values()) == len(times)
                assert all(counts.values())
            assert host.load(self.now) >= len(host.own)
            assert host.listed or not host.held
            for model in host.held:
                assert fleet._holders[model][host.name] is host
            for model in host.report.models if host.report else ():
                assert fleet._serving[model][host.name] is host
        assert sum(len(host.held) for host in fleet.hosts.values()) == sum(map(len, fleet._holders.values()))
        assert all(fleet._serving.values())


# ---- the words of a playbook


def awake(*names: str, **fields: object) -> Models:
    """Models that are awake."""
    return {name: ModelReport(Phase.AWAKE, sleep=SLEEP, wake=WAKE, **fields) for name in names}


def asleep(*names: str, **fields: object) -> Models:
    given = {"expected_wait": COST, "switch_cost": COST, "sleep": SLEEP, "wake": WAKE, **fields}
    return {name: ModelReport(**given) for name in names}


def report(host: str, *models: Models, seq: int, instance: str = "1", age: float = 0.0, **fields: object):
    known = {name: each for part in models for name, each in part.items()}
    return ev.HostReported(HostReport(host, instance, seq, known, **fields), age)


def asks(request: int, model: str) -> ev.RequestArrived:
    return ev.RequestArrived(request, model)


def refused(request: int, code: str, retry_after: float | None = None, message: str = "") -> ev.RequestRefused:
    return ev.RequestRefused(request, code, retry_after, message)


def sent(request: int, model: str, host: str, attempt: int = 1, waited: float = 0.0) -> ev.Send:
    return ev.Send(request, model, host, attempt, waited)


def claims(model: str, host: str, term: float = 1.5 * COST, over: str = "") -> ev.ClaimWake:
    return ev.ClaimWake(model, host, term, over)


def rejected(
    request: int, model: str, code: str, message: str, retry_after: float | None = None, waited: float = 0.0
) -> ev.Reject:
    return ev.Reject(request, model, code, message, retry_after, waited)


def queued(request: int, model: str, depth: int = 1) -> ev.RequestQueued:
    return ev.RequestQueued(request, model, depth)


def ejected(host: str, pause: float = 1.0, reason: str = "connection refused") -> ev.HostEjected:
    return ev.HostEjected(host, reason, pause)


class Step(NamedTuple):
    time: float
    event: ev.Event
    effects: tuple[ev.Effect, ...]


def at(time: float, event: ev.Event, *effects: ev.Effect) -> Step:
    """One step of a playbook."""
    return Step(time, event, effects)


due = ev.DeadlineReached()


class Playbook:
    """A placement with its ledger, to be called with steps."""

    def __init__(self, route: Route | None = None, seed: int = 1, **rules: object) -> None:
        self.placement = Placement(route or LeastWait(), random.Random(seed).random, Rules(**rules))
        self.ledger = Ledger(self.placement)

    def host(self, name: str) -> Host:
        return self.placement.fleet.hosts[name]

    def __call__(self, *steps: Step) -> None:
        for number, step in enumerate(steps, 1):
            found = [rounded(effect) for effect in self.ledger.feed(step.event, step.time)]
            assert found == list(step.effects), (
                f"step {number}, {step.event} at {step.time}:\n  expected {list(step.effects)}\n  found    {found}"
            )


def rounded(effect: ev.Effect) -> ev.Effect:
    """Drop the noise of floating point."""
    for name in ("waited", "term", "retry_after", "pause"):
        if isinstance(getattr(effect, name, None), float):
            setattr(effect, name, round(getattr(effect, name), 6))
    return effect


def given(
    route: Route | None = None, rules: dict[str, object] | None = None, **hosts: Iterable[Models]
) -> Playbook:
    """Return a playbook at time 0; each host has reported once."""
    play = Playbook(route, **(rules or {}))
    for name, models in hosts.items():
        play(at(0.0, report(name, *models, seq=1)))
    return play
