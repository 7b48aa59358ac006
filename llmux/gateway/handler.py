"""A request on its way through the gateway: its body, its host, and the answer back, byte for byte.

What may happen to a request, and what follows (this is the whole safety argument):

- no connection to its host could be opened: nothing was sent, another host may get it;
- the host answers with ``X-LLMux-Refused``: no engine has seen it, another host may get it;
- any other failure before the answer's head, once bytes were written, is final: 502. That includes a pooled
  connection that had died: the host may have passed the request on;
- once the head has passed, the answer can only end or break off.

The client's body is read completely before the first try, as on a host, so it can be sent again. Hosts report
their queues by informational responses (``X-LLMux-Progress: 1xx``): these do not begin an answer, and are passed
on in the form that the client wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from aiohttp import web

from llmux.config.gateway import GatewayConfig
from llmux.core.effects import CutReason
from llmux.errors import EngineError, PathRefusedError, RequestError, UnavailableError
from llmux.extract import Body, BodyBudget, BodyLimits
from llmux.fleet import events as ev
from llmux.gateway.dispatcher import Dispatcher, Trip
from llmux.gateway.hosts import Host, Hosts, words_of
from llmux.middleware.authentication import KEY_NAME
from llmux.middleware.context import QUEUE_SECONDS, Reporting, RequestContext
from llmux.middleware.model_handler import serve_with_body, unknown_model
from llmux.middleware.paths import Kind, Route
from llmux.middleware.progress import HEADER, INTERIM, InBody, Interim, dialect_of, wanted
from llmux.proxy import ClientGoneError, Exchange, ExtraFields, Forwarder
from llmux.proxy.aiohttp_client import AiohttpClient
from llmux.proxy.early_response import EarlyResponse, RefusedByEngineError, ResumedRelay
from llmux.proxy.heads import ACCEPT_ENCODING
from llmux.proxy.heads import REFUSED as REFUSED_FIELD
from llmux.proxy.relay import Relay
from llmux.runtime.requests import WITHDRAWN
from llmux.upstream import EngineConnection, EngineRefusedError, Framing, ResponseHead

if TYPE_CHECKING:
    from llmux.accounts.gate import Grant
    from llmux.gateway.shared_limits import Metered, SharedGate

HOST = "X-LLMux-Host"
_OURS = frozenset({HEADER.lower().encode(), KEY_NAME.lower().encode()})
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_PROGRESS = (HEADER.encode(), INTERIM.encode())
_SAID = re.compile(rb"(?i)\r\nX-LLMux-(Position|Expected-Seconds): *(\d{1,9})")
_WAITED = QUEUE_SECONDS.lower().encode()
_MOST = 64 * 1024  # bytes of a refusal that are kept


class RefusedByHostError(Exception):
    """A host refused a request before its admission: no engine has seen it."""

    def __init__(self, status: int, code: str, retry_after: float | None, said: bytes) -> None:
        super().__init__(code)
        self.code = code
        self.retry_after = retry_after
        self.message = RefusedByEngineError(status, said).message


class Ear:
    """What a host says besides the answer: its queue, a refusal, and that the answer has begun."""

    __slots__ = ("_code", "_retry_after", "_said", "_status", "began", "queued", "refused", "waiting")

    def __init__(self, waiting: Callable[[int, int], None], began: Callable[[], None]) -> None:
        self.waiting = waiting
        self.began = began
        self.refused = False
        self.queued = 0.0  # seconds that the request waited there
        self._status = 0
        self._code = ""
        self._retry_after: float | None = None
        self._said = b""

    def interim(self, head: bytes) -> None:
        """Handle an informational response."""
        found = {name.lower(): int(number) for name, number in _SAID.findall(head)}
        if b"position" in found and b"expected-seconds" in found:
            self.waiting(found[b"position"], found[b"expected-seconds"])

    def head(self, head: ResponseHead) -> bool:
        """Handle the answer's head; return whether it is that of a refusal, which is not passed on."""
        for lower, _, value in head.fields:
            if lower == REFUSED_FIELD:
                self.refused, self._code = True, value.decode("latin-1").strip()
            elif lower == b"retry-after" and value.isdigit():
                self._retry_after = float(value)
            elif lower == _WAITED:
                self.queued = _number(value)
        if self.refused:
            self._status = head.status
        else:
            self.began()
        return self.refused

    def hear(self, data: bytes) -> None:
        """Keep the body of a refusal."""
        if len(self._said) < _MOST:
            self._said += data[:_MOST]

    @property
    def error(self) -> RefusedByHostError:
        """The refusal."""
        return RefusedByHostError(self._status, self._code, self._retry_after, self._said)


class FromHost(Relay):
    """A relay that listens to what its host says besides the answer."""

    __slots__ = ()
    ear: Ear

    def attach(
        self, connection: EngineConnection, on_end: Callable[[Exception | None], None] | None = None
    ) -> None:
        """Receive what comes before the answer, too."""
        connection.on_interim = self.ear.interim
        super().attach(connection, on_end)

    def detach(self) -> None:
        """Release everything."""
        if self._connection is not None:
            self._connection.on_interim = None
        super().detach()

    def response_started(self, head: ResponseHead) -> None:
        """Pass the head on, unless it is a refusal's."""
        if self.ear.head(head):
            if head.framing is Framing.CHUNKED and self._connection is not None:
                self._connection.unchunk()
            return
        self.exchange.extra_headers = _with_wait(self.exchange.extra_headers, self.ear.queued)
        self.begin(head)

    def begin(self, head: ResponseHead) -> None:
        """Begin the client's answer."""
        Relay.response_started(self, head)

    def response_data(self, data: bytes) -> None:
        """Pass bytes on, or keep the body of a refusal."""
        if self.ear.refused:
            self.ear.hear(data)
        else:
            super().response_data(data)

    def response_ended(self) -> None:
        """Finish, or deliver the refusal."""
        if self.ear.refused:
            self._settle(self.ear.error)
        else:
            super().response_ended()

    def response_lost(self, error: EngineError) -> None:
        """Break off; a refusal with an incomplete body is still a refusal."""
        if self.ear.refused:
            self._settle(self.ear.error)
        else:
            super().response_lost(error)


class HostRelay(FromHost):
    """The sink of an exchange with a host."""

    __slots__ = ("ear",)


class ResumedHostRelay(FromHost, ResumedRelay):
    """The same for a client whose answer may begin with progress messages, before the host's."""

    __slots__ = ("ear",)

    def begin(self, head: ResponseHead) -> None:
        """Continue the client's answer, or begin it."""
        begin = ResumedRelay.response_started if self._early.begun else Relay.response_started
        begin(self, head)


def _with_wait(
    fields: Sequence[tuple[str, str]] | ExtraFields, there: float
) -> Sequence[tuple[str, str]] | ExtraFields:
    """Return the fields with the time in the host's queue added to that in the gateway's."""
    if not there:
        return fields
    if isinstance(fields, ExtraFields):
        lines, _, here = fields.lines.rpartition(b" ")
        return fields._replace(lines=b"%b %.3f" % (lines, float(here) + there))
    return [(name, f"{float(value) + there:.3f}" if name == QUEUE_SECONDS else value) for name, value in fields]


def _number(value: bytes) -> float:
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return seconds if 0.0 <= seconds < math.inf else 0.0


class PlacedContext(RequestContext):
    """A request that the fast path has given to the placement."""

    __slots__ = ("trip",)

    def __init__(self, reporting: Reporting, request_id: str, route: Route, began: float) -> None:
        super().__init__(reporting, request_id, route, began)
        self.trip: Trip | None = None  # once the key's limits have let it pass

    def finish(self, status: int, failure: str | None = None) -> None:
        """Leave the placement, too."""
        if self.trip is not None:
            self.trip.leave()
        super().finish(status, failure)


class GatewayHandler:
    """Serves the requests that name a model."""

    gate: SharedGate | None = None
    store_trouble: Callable[[], str] = staticmethod(lambda: "")
    """Why the store, which knows hosts, cannot be used; empty: it can, or has not been asked yet."""

    def __init__(
        self,
        config: GatewayConfig,
        hosts: Hosts,
        dispatcher: Dispatcher,
        forwarder: Forwarder,
        now: Callable[[], float],
    ) -> None:
        self.hosts = hosts
        self.dispatcher = dispatcher
        self._forwarder = forwarder
        self._now = now
        self.budget = BodyBudget(config.max_buffered)
        self.under_way: set[Exchange] = set()
        self.idle = asyncio.Event()  # set: nothing is in progress
        self.idle.set()
        self.configure(config)

    def configure(self, config: GatewayConfig) -> None:
        """Apply the limits of a configuration."""
        self._limits = BodyLimits(config.max_body, config.max_buffered, config.body_idle_timeout)
        self.budget.max_buffered = config.max_buffered
        self.progress = config.progress

    async def serve(self, request: web.Request, context: RequestContext) -> web.StreamResponse:
        """Read the request, find a host for it, relay the answer.

        Raises a RequestError for what is refused, ClientGoneError when the client went away.
        """
        if context.route.kind is not Kind.FORWARD:
            raise PathRefusedError("A gateway has no /upstream: ask the host itself.")
        return await serve_with_body(request, context, self._limits, self.budget, self._placed)

    async def _placed(
        self, request: web.Request, context: RequestContext, body: Body | None, name: str
    ) -> web.StreamResponse:
        trip = context.trip if isinstance(context, PlacedContext) else None
        if trip is None:
            self._let_in(context, name)
        teller = Teller(request, context, self._now)
        await teller.prepare(body, default=self.progress)
        if trip is None:
            assert context.model is not None
            trip = self.dispatcher.enter(context.model)
            trip.request_id = context.request_id
        try:
            while True:
                if context.first_error is None:
                    order = await trip.order()
                    self._take_name(context, trip.model)
                    context.rode = order.waited
                try:
                    return await self._attempt(request, context, trip, teller, body)
                except EngineRefusedError as error:
                    _charge_nothing(context)
                    self.dispatcher.post(ev.ConnectFailed(trip.id, words_of(error)))
                except RefusedByHostError as error:
                    _charge_nothing(context)
                    self._refused(trip, error)
                except EngineError as error:
                    if context.exchange is not None and context.exchange.cut_off is not None:
                        raise
                    self.dispatcher.broken(trip, error)
        finally:
            self.dispatcher.leave(trip)

    def _let_in(self, context: RequestContext, name: str) -> None:
        """Find out which model a request is for, and whether its key may send it now. Raises RequestError."""
        gate = self.gate
        grant = None if gate is None else gate.grants.get(context.key)
        model = self._known(name, grant)
        context.asked, context.model = name, model
        if gate is not None and grant is not None:
            context.passed = gate.enter(grant, name, model, context.sent, context.request_id, context.headers)

    def _known(self, name: str, grant: Grant | None) -> str:
        """Return the model that a name stands for. Raises UnknownModelError and UnavailableError."""
        model = self.hosts.model_of(name)
        if model is not None:
            return model
        silent = [host for host in self.hosts.all() if host.heard is None]
        complete = self.dispatcher.placement.complete
        if not complete and (trouble := self.store_trouble()):
            raise UnavailableError(
                f"No host that is known has a model {name[:100]!r}; the store, which knows more, cannot be used:"
                f" {trouble}.",
                code=ev.Code.NO_HOST,
                retry_after=LOOK_AGAIN,
            )
        if not silent and complete:
            names = self.hosts.listed()
            raise unknown_model(name, sorted(filter(grant.allows, names) if grant is not None else names))
        if complete and all(host.lost for host in silent):
            shown = ", ".join(host.name for host in silent)
            raise UnavailableError(
                f"No host that answers has a model {name[:100]!r}; not reached so far: {shown}.",
                code=ev.Code.NO_HOST,
                retry_after=LOOK_AGAIN,
            )
        return name  # queue it until their first reports

    @staticmethod
    def _take_name(context: RequestContext, model: str) -> None:
        """Apply what the request's name stands for, if a host reported that only while it was queued."""
        if context.model != model:
            context.model = model
            if context.passed is not None:
                context.passed.served = model

    def _refused(self, trip: Trip, error: RefusedByHostError) -> None:
        if trip.withdrawing and error.code == WITHDRAWN:
            trip.withdrawing = False
            self.dispatcher.post(ev.RequestWithdrawn(trip.id))
        else:
            self.dispatcher.refused(trip, error.code, error.retry_after, error.message)

    async def _attempt(
        self, request: web.Request, context: RequestContext, trip: Trip, teller: Teller, body: Body | None
    ) -> web.StreamResponse:
        assert trip.host is not None
        if (error := context.first_error) is not None:  # it has been sent on the fast path
            context.first_error = None
            if isinstance(error, RequestError) and not isinstance(error, EngineError):
                self.dispatcher.ended(trip)
            raise error
        if trip.host not in self.hosts:  # a reload removed it meanwhile
            raise EngineRefusedError(f"{trip.host} is no longer configured.")
        host, channel = self.hosts[trip.host], context.channel
        teller.host = host.name
        exchange = context.exchange = _exchange(request, context, host, body)
        metered = cast("Metered | None", context.passed)

        def waiting(position: int, seconds: int) -> None:
            teller.tell(position, seconds)
            self.dispatcher.waiting(trip, float(seconds))

        def relay(client: AiohttpClient, exchange: Exchange, loop: asyncio.AbstractEventLoop) -> Relay:
            made: HostRelay | ResumedHostRelay
            if isinstance(channel, InBody):
                made = ResumedHostRelay(client, exchange, channel.early, loop)
            else:
                made = HostRelay(client, exchange, loop)
            made.ear = Ear(waiting, lambda: self.dispatcher.began(trip))
            if metered is not None:
                metered.sent_at, metered.ear = self._now(), made.ear
                host.activity.counting = True  # a stream that reports no tokens is estimated by its events
            return made

        self.begin(exchange)
        try:
            response = await self._forwarder.forward(request, exchange, relay)
        except EngineError:
            raise
        except RequestError:
            self.dispatcher.ended(trip)
            raise
        finally:
            self.end(exchange)
        self.dispatcher.ended(trip)
        return response

    def begin(self, exchange: Exchange) -> None:
        """Record that an exchange is under way."""
        self.under_way.add(exchange)
        self.idle.clear()

    def end(self, exchange: Exchange) -> None:
        """Record that it has ended."""
        self.under_way.discard(exchange)
        if not self.under_way:
            self.idle.set()

    def cut(self) -> None:
        """End what is still in progress."""
        for exchange in list(self.under_way):
            exchange.cut(CutReason.STOPPING)


LOOK_AGAIN = 5.0  # seconds


def _charge_nothing(context: RequestContext) -> None:
    """Have its key not pay for a host that has not taken the request, nor for the wait for another one."""
    if context.passed is not None:
        cast("Metered", context.passed).sent_at = None


def _exchange(request: web.Request, context: RequestContext, host: Host, body: Body | None) -> Exchange:
    """Return a request as it goes to a host."""
    drop, added = changes_for(host, context.key)
    drop |= context.drop_headers
    if isinstance(context.channel, InBody) or context.counted:  # as on a host
        drop |= ACCEPT_ENCODING
    return Exchange(
        address=host.address,
        method=request.method,
        target=context.route.target.encode("utf-8", "surrogateescape"),
        raw_headers=request.raw_headers,
        body=body,
        request_id=context.request_id,
        activity=host.activity,
        drop_headers=drop,
        added_headers=added,
        extra_headers=[*context.headers, (HOST, host.name), (QUEUE_SECONDS, f"{context.waited:.3f}")],
        anthropic=context.route.anthropic(request.raw_path),
        once=True,
    )


def changes_for(host: Host, key: str) -> tuple[frozenset[bytes], list[tuple[bytes, bytes]]]:
    """Return the headers, in lower case, that a host does not get, and those that the gateway adds for it.

    These are the gateway's own key, and the name of the client's ``key``, never that key.
    """
    if host.key is None:
        return _OURS, [_PROGRESS]
    added = [_PROGRESS, (b"Authorization", b"Bearer " + host.key)]
    if key and key.isprintable():
        added.append((KEY_NAME.encode(), key.encode("utf-8", "surrogateescape")))
    return _OURS | _CREDENTIALS, added


class Teller:
    """Tells a queued client its position, in the form that it wants."""

    def __init__(self, request: web.Request, context: RequestContext, now: Callable[[], float]) -> None:
        self._request = request
        self._context = context
        self._now = now
        self.host = ""  # where the request waits

    async def prepare(self, body: Body | None, *, default: bool) -> None:
        """Find out whether to tell the client, and how. Raises BadRequestError."""
        request, context = self._request, self._context
        word = wanted(request, default=context.wants_progress(default))
        if word == INTERIM:
            context.channel = Interim(request)
        elif word == "on" and (dialect := await dialect_of(request, context.route, body)) is not None:
            context.channel = InBody(EarlyResponse(request, dialect), self._headers)

    def tell(self, position: int, seconds: int) -> None:
        """Send the position and the expected seconds."""
        channel = self._context.channel
        if channel is not None:
            with contextlib.suppress(ClientGoneError):  # the handler notices
                channel.waiting(position, seconds)

    def _headers(self) -> list[tuple[str, str]]:
        waited = self._now() - self._context.began
        return [*self._context.headers, (HOST, self.host), (QUEUE_SECONDS, f"{waited:.3f}")]
