"""Carries out the placement's decisions: requests enter and leave here, and learn which host they go to.

One owner: every event goes through ``post``, in the event loop's thread. Listeners get the effects for hosts
(a probe) and the notices (a host is ejected).
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from llmux.core.effects import Refusal
from llmux.errors import (
    INTERNAL_ERROR,
    EngineError,
    QueueFullError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from llmux.fleet import events as ev
from llmux.fleet.placement import Placement, Rules, Stage
from llmux.fleet.routes import Route
from llmux.observability.notices import EventLog

_CODES = frozenset(
    {*Refusal, "too_many_connections", "bodies_full", "asleep", "deadline"}
)  # others are counted as one
_RESTART = 5.0  # seconds until another gateway may be available
_STATUSES: dict[str, type[RequestError]] = {
    ev.Code.UNKNOWN_MODEL: UnknownModelError,
    ev.Code.QUEUE_FULL: QueueFullError,
    ev.Code.HOST_LOST: EngineError,
}


class Trip:
    """One request, as the placement sees it. Made by ``Dispatcher.enter``, ended by ``Dispatcher.leave``."""

    __slots__ = ("_dispatcher", "_orders", "_waiter", "host", "id", "model", "over", "request_id", "withdrawing")

    def __init__(self, dispatcher: Dispatcher, number: int, model: str) -> None:
        self._dispatcher = dispatcher
        self.id = number
        self.model = model
        self.host: str | None = None  # where it was sent
        self.over = False  # the placement no longer knows it
        self.request_id = ""  # as its client knows it
        self.withdrawing = False  # it was asked back from its host
        self._orders: deque[ev.Send | RequestError] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def give(self, order: ev.Send | RequestError) -> None:
        """Set what happens to it next."""
        self._orders.append(order)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, error: RequestError) -> None:
        """Reject it: the placement no longer knows it."""
        self.over = True
        self.give(error)

    def leave(self) -> None:
        """End it, wherever it stands."""
        self._dispatcher.leave(self)

    @property
    def next_host(self) -> str | None:
        """The host to which it may be sent at once."""
        order = self._orders[0] if self._orders else None
        return order.host if isinstance(order, ev.Send) else None

    def go(self) -> ev.Send:
        """Take the next order, which is there. Raises the RequestError with which the request is rejected."""
        order = self._orders.popleft()
        if isinstance(order, RequestError):
            raise order
        self.host = order.host
        return order

    async def order(self) -> ev.Send:
        """Wait until the request has a host. Raises the RequestError with which it is rejected."""
        if not self._orders:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.go()


def _stopping() -> UnavailableError:
    return UnavailableError("llmux is stopping", code="stopping", retry_after=_RESTART)


class Dispatcher:
    """Runs the placement. ``now`` is the loop's clock, once ``start`` was called."""

    def __init__(self, route: Route, rules: Rules, log: EventLog) -> None:
        self.now: Callable[[], float] = time.monotonic
        self.placement = Placement(route, random.random, rules)
        self.on_probe: Callable[[str], None] = lambda _host: None
        self.on_claim: Callable[[ev.ClaimWake], None] = lambda _effect: None
        self.on_withdraw: Callable[[Trip, str], None] = lambda _trip, _host: None
        self.counts: Counter[tuple[str, ...]] = Counter()  # what has happened, for the metrics
        self._log = log
        self._out: set[str] = set()  # hosts that are ejected
        self._trips: dict[int, Trip] = {}
        self._serial = 0
        self._timer: asyncio.TimerHandle | None = None
        self._armed = math.inf  # when it is due
        self._closed = False
        self._tellers: dict[type, Callable[[Any], None]] = {
            ev.Send: self._send,
            ev.Reject: self._reject,
            ev.RequestQueued: self._queued,
            ev.Withdraw: self._withdraw,
            ev.ClaimWake: self._claim,
            ev.Probe: lambda effect: self.on_probe(effect.host),
            ev.HostEjected: self._ejected,
            ev.HostRestored: self._restored,
            ev.ReportRefused: lambda it: log.emit(
                "report_refused", host=it.host, instance=it.instance, reason=it.reason
            ),
            ev.ViewStale: lambda it: log.emit("view_stale", model=it.model),
            ev.RouteOverruled: lambda it: log.emit("route_overruled", answer=it.answer),
        }

    def start(self) -> None:
        """Take the loop's clock."""
        self.now = asyncio.get_running_loop().time

    def close(self) -> None:
        """Stop the clock."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    # ---- requests

    def enter(self, model: str) -> Trip:
        """Tell the placement of a request for ``model``. The trip must be given to ``leave``."""
        self._serial += 1
        trip = self._trips[self._serial] = Trip(self, self._serial, model)
        if self._closed:
            trip.end(_stopping())
        else:
            self.post(ev.RequestArrived(trip.id, model))
        return trip

    def rename(self, names: Mapping[str, str]) -> None:
        """Record what names stand for; requests for them may have arrived before any host reported that."""
        queues = self.placement.queues
        for name in [name for name in queues if names.get(name, name) != name]:
            for number in list(queues[name]):
                trip = self._trips[number]
                trip.model = names[name]
                self.post(ev.RequestAbandoned(number))
                self.post(ev.RequestArrived(number, trip.model))

    def leave(self, trip: Trip) -> None:
        """End a request, wherever it stands."""
        if self._trips.pop(trip.id, None) is not None and not trip.over and trip.id in self.placement.requests:
            trip.over = True
            self.post(ev.RequestAbandoned(trip.id))

    def ended(self, trip: Trip) -> None:
        """Record that the last byte of its answer has arrived."""
        if trip.id in self.placement.requests:
            trip.over = True
            self.post(ev.RequestEnded(trip.id))

    def began(self, trip: Trip) -> None:
        """Record that its answer has begun."""
        request = self.placement.requests.get(trip.id)
        if request is not None and request.stage is not Stage.BEGUN:
            self.post(ev.AnswerBegan(trip.id))

    def waiting(self, trip: Trip, expected: float) -> None:
        """Record what the host reports of its queue."""
        if trip.id in self.placement.requests:
            self.post(ev.RequestWaiting(trip.id, expected))

    def refused(self, trip: Trip, code: str, retry_after: float | None, message: str) -> None:
        """Record that the host refused it before its admission."""
        assert trip.host is not None
        self.counts["refused", trip.host, code if code in _CODES else "other"] += 1
        self.post(ev.RequestRefused(trip.id, code, retry_after, message))

    def broken(self, trip: Trip, error: EngineError) -> None:
        """Record that its host ended the connection, or broke HTTP, after bytes of it were sent."""
        assert trip.host is not None
        self.counts["broken", trip.host] += 1
        self._log.emit("host_broke_off", host=trip.host, model=trip.model, error=error.message)
        self.post(ev.ConnectionBroken(trip.id))

    def queued(self) -> dict[str, int]:
        """Return how many requests are queued here, by model."""
        return {model: len(queue) for model, queue in self.placement.queues.items() if queue}

    def stop(self) -> None:
        """Reject the requests that are queued here: nothing more is sent."""
        for queue in list(self.placement.queues.values()):
            for number in list(queue):
                self._drop(number)
        self._closed = True

    def _drop(self, number: int) -> None:
        """Reject a request that is queued here, as this gateway stops."""
        trip = self._trips.get(number)
        if trip is not None:
            trip.end(_stopping())
        self.post(ev.RequestAbandoned(number))

    # ---- the placement

    def post(self, event: ev.Event) -> None:
        """Hand an event to the placement, and carry out its answer."""
        try:
            effects = self.placement.handle(event, self.now())
        except Exception as error:  # noqa: BLE001 - one error must not affect all other requests
            self._log.emit("internal_error", error=repr(error), exc_info=error)
            trip = self._trips.get(getattr(event, "request", 0))
            if trip is not None and not trip.over:
                trip.end(RequestError(INTERNAL_ERROR))
            return
        for effect in effects:
            tell = self._tellers.get(type(effect))
            if tell is not None:
                tell(effect)
        self._arm()

    def _arm(self) -> None:
        due = self.placement.next_deadline()
        if due is None or self._closed or due >= self._armed:  # a timer that comes too early is set anew
            return
        if self._timer is not None:
            self._timer.cancel()
        self._armed = due
        self._timer = asyncio.get_running_loop().call_at(due, self._due)

    def _due(self) -> None:
        self._timer, self._armed = None, math.inf
        self.post(ev.DeadlineReached())

    # ---- effects

    def _send(self, effect: ev.Send) -> None:
        self.counts["placed", effect.host] += 1
        if effect.attempt > 1:
            self.counts["retried", effect.host] += 1
        if (trip := self._trips.get(effect.request)) is not None:
            trip.give(effect)

    def _reject(self, effect: ev.Reject) -> None:
        if (trip := self._trips.get(effect.request)) is not None:
            kind = _STATUSES.get(effect.code, UnavailableError)
            param = "model" if kind is UnknownModelError else None
            trip.end(kind(effect.message, code=effect.code, param=param, retry_after=effect.retry_after))

    def _queued(self, effect: ev.RequestQueued) -> None:
        if self._closed:  # it has lost its host meanwhile, and would wait for ever
            self._drop(effect.request)

    def _withdraw(self, effect: ev.Withdraw) -> None:
        self.counts["withdrawn", effect.host] += 1
        if (trip := self._trips.get(effect.request)) is not None:
            trip.withdrawing = True
            self.on_withdraw(trip, effect.host)

    def _claim(self, effect: ev.ClaimWake) -> None:
        self.on_claim(effect)

    def _ejected(self, effect: ev.HostEjected) -> None:
        if effect.host in self._out:  # another probe has failed
            return
        self._out.add(effect.host)
        self.counts["ejected", effect.host] += 1
        self._log.emit("host_ejected", host=effect.host, reason=effect.reason, pause_secs=round(effect.pause, 3))

    def _restored(self, effect: ev.HostRestored) -> None:
        self._out.discard(effect.host)
        self._log.emit("host_restored", host=effect.host)
