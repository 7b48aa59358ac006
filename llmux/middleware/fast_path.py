"""The fast path through llmux, for most requests: small, and for a model that is awake.

Theory of operation
===================

Such a request has nothing to wait for, so it needs no future and none of aiohttp's objects. The server's
connection offers received bytes here before aiohttp sees them. ``match`` finds the requests which

- have arrived whole (or soon do), and have at most ``MOST`` bytes of body,
- are a plain POST on a forwarded path whose head needs no closer look (``fast_head``),
- and name, in valid JSON, a model that admits them at once.

``refusal`` answers a request without a valid key: a flood of these must cost less than the requests that they ask
for.

``start`` checks the limits of the request's key and sends it: to its engine (``engine_path``), or from a gateway
to a host. When there is no idle connection, a task opens one; nothing else needs a task. All other requests go
through aiohttp, untouched, to the model handler; both use the same ``RequestContext``, ``Exchange`` and ``Relay``,
and give the same bytes. A request that cannot end well here (its engine is gone or broke off before its answer, or
it was cut before the head) is *handed over*: aiohttp is given the request after all, and the handler continues
with its context: with the ticket, with the error, or with a fresh connection.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmux.errors import RequestError
from llmux.extract import BodyBudget
from llmux.extract.json_object import MOST, members_of
from llmux.middleware.authentication import Keys
from llmux.middleware.classes import Names
from llmux.middleware.context import Reporting, RequestContext, new_id, request_id
from llmux.middleware.fast_head import LENGTH, MOST_KNOWN, FastHead, KnownHead, Seen
from llmux.middleware.origin import Hosts
from llmux.middleware.paths import ForwardedPaths, Kind
from llmux.proxy import ClientGoneError, Exchange, ExtraFields, Forwarder
from llmux.proxy.envelope import refusal, refused_too_often
from llmux.proxy.heads import ACCEPT_ENCODING
from llmux.proxy.relay import Flow, Relay, Tunnel
from llmux.upstream import (
    EngineActivity,
    EngineConnection,
    EngineRefusedError,
    Framing,
    ResponseHead,
)

if TYPE_CHECKING:
    from llmux.accounts.gate import Gate, Grant

KNOWN = 256  # heads that are remembered
COPIED = 64 * 1024  # bytes of a body that goes out in one piece with its head; a larger one is held only once

_ANSWERED = frozenset({b"GET", b"POST"})
_REPLACED = frozenset({b"x-request-id", b"x-llmux-queue-seconds"})
_LENGTH = Framing.LENGTH
_USUAL = b"X-Request-ID: %b\r\nX-LLMux-Queue-Seconds: 0.000"
_FIELDS = b"X-Request-ID: %b%b\r\nX-LLMux-Queue-Seconds: %b"
_new = tuple.__new__  # ExtraFields(…) would be a call of Python's own


class Connection(Flow, Protocol):
    """The client's connection, as the fast path sees it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport | None
    fast_request: FastRequest | None  # the one in progress
    control: bool  # it came over the control socket
    refused: int  # requests without a valid key

    @property
    def address(self) -> str:
        """The address under which its wrong keys are counted."""

    def keep(self, data: bytes) -> None:
        """Hold bytes that arrive while a request is in progress."""

    def go_on(self, *, keep_alive: bool) -> None:
        """Handle the bytes that were held: the request is over."""

    def hand_over(self, context: RequestContext, raw: bytes) -> None:
        """Give the request to aiohttp after all."""

    async def drain(self) -> None:
        """Wait until the client has read most of what was written."""


# A request that the fast path can serve: the model as its client named it, the model, the head, the id, its
# arrival, the activity of the engine that takes it, its body, the size of all of it in bytes, and the digits of
# the body's length. The model is "" and there is no activity where one is chosen for each request.
Match = tuple[str, str, KnownHead, str, float, EngineActivity | None, bytes, int, bytes]

Pieces = tuple[bytes | memoryview, ...]  # of a request, for its engine

# A known head: the bytes before and after the digits of the body's length, and what is known. Valid as long as the
# first is the path's ``known``.
LastHead = tuple[dict[bytes, KnownHead], bytes, bytes, KnownHead]

NamesOf = Callable[[str | None, str], Names]
"""Which names the requests of a key (None: all are allowed) may use here on a path, and their models."""

Opening = Callable[[str], EngineActivity | None]
"""Returns the activity of the engine that admits a request for a model at once; None: it has to wait."""


class FastPath:
    """Serves requests that need not wait. One for the whole application."""

    _context: type[RequestContext] = RequestContext

    def __init__(self, reporting: Reporting, forwarder: Forwarder, budget: BodyBudget, opening: Opening) -> None:
        self.reporting = reporting
        self.forwarder = forwarder
        self.budget = budget
        self._switcher = reporting.switcher
        self._opening = opening
        self._connecting: set[asyncio.Task[None]] = set()
        self.known: dict[bytes, KnownHead] = {}
        self._answered: list[tuple[RequestContext, int]] = []  # requests that are still to be finished
        self.open = False
        self.most = 0

    def configure(
        self,
        paths: ForwardedPaths,
        names: NamesOf,
        *,
        most: int,
        keys: Keys,
        hosts: Hosts,
        alone: bool,
        gate: Gate | None = None,
        is_silent: Callable[[str, Mapping[str, Any]], bool] | None = None,
    ) -> None:
        """Apply a configuration. Not ``alone``: requests are traced, and none is served here.

        ``gate`` checks what is limited.
        ``is_silent`` says of a path and a request whether it is for a stream that has to be asked for its usage;
        these are not served here, either.
        """
        self._is_silent = is_silent
        self._paths = paths
        self._names = names
        self._gate = gate
        self.most = min(most, MOST)
        self._keys = keys if keys.ring.any else None
        self._knows_host = hosts.knows
        self.known = {}
        self.open = alone

    def recall(self, data: bytes) -> tuple[KnownHead | None, bytes, int, bytes, LastHead | None]:
        """Return what is known of a request's head, the head without the body's length, its size, and the length.

        An unusual head gives b"" and nothing known. The last item is what a connection may remember of it.
        """
        found = LENGTH.search(data, 0, MOST_KNOWN)
        if found is None:
            return None, b"", 0, b"", None
        start, end = found.span(1)
        size = data.find(b"\r\n\r\n", end, MOST_KNOWN) + 4
        before, after = data[:start], data[end:size]
        if self._keys is not None:
            name = self._keys.ring.digest(before + after)  # keys are not kept
            return self.known.get(name), name, size, data[start:end], None
        name = before + after
        head = self.known.get(name)
        return head, name, size, data[start:end], None if head is None else (self.known, before, after, head)

    def match(self, data: bytes, seen: Seen) -> Match | None:
        """Return a request that can be served here. ``data`` may have more after it."""
        head, size, total, digits = seen
        known = self.judge(head)
        if known is None:
            return None
        if head.given_id is None:  # which is new with every request
            _, name, *same, _ = self.recall(data)
            if name and same == [size, digits]:
                if len(self.known) >= KNOWN:
                    self.known.clear()
                self.known[name] = known
        return self.match_known(data, known, size, total, digits)

    def judge(self, head: FastHead) -> KnownHead | None:
        """Return what is known of requests with a plain head. None if they cannot be served here."""
        route = self._paths.decide(head.target, "POST")
        if route.kind is not Kind.FORWARD or not self._knows_host(head.called):
            return None
        dropped: Sequence[int] = ()
        holder = None
        if self._keys is not None:
            let = self._keys.on_fast_path(head.lines, head.credentials)
            if let is None:
                return None
            dropped, holder = let
            if holder is not None and holder.captured:  # a gateway's, too, whosever key it names
                return None
        name = None if holder is None or holder.operator else holder.name
        grant = None if self._gate is None or name is None else self._grant(self._gate, name)
        without = ACCEPT_ENCODING if grant is not None or self._switcher.accounts is not None else frozenset()
        return KnownHead(head, route, dropped, holder, self._names(name, route.path), grant, without)

    def _grant(self, gate: Gate, key: str) -> Grant | None:
        """Return a key's grant if its requests have to pass the gate."""
        return gate.counted(key)

    def match_known(self, data: bytes, head: KnownHead, size: int, total: int, digits: bytes) -> Match | None:
        """Return a request that can be served here, by its known head and its body."""
        began = self._switcher.now()
        if not head.names:
            return None
        body = data[size:total]
        members = members_of(body)
        if members is None or (self._is_silent is not None and self._is_silent(head.route.path, members)):
            return None
        asked = members["model"]
        model = head.names.get(asked)
        if model is None:
            return None
        activity = self._opening(model)
        if (activity is None and model) or self.budget.held + total - size > self.budget.max_buffered:
            return None
        given = head.given_id
        if given is None:
            name = new_id()
        else:
            name = given.decode("ascii")
            if request_id(name) != name:
                return None
        return asked, model, head, name, began, activity, body, total, digits

    def refusal(self, client: Connection, head: FastHead) -> tuple[bytes, bool] | None:
        """Return the answer for a request without a valid key, and whether the connection can be used again.

        None if it has a valid key, or if that takes more than a look-up.
        """
        keys = self._keys
        if keys is None or client.control or head.method not in _ANSWERED:
            return None
        route = self._paths.decide(head.target, head.method.decode())
        if not route.for_clients or not self._knows_host(head.called):
            return None
        began = self._switcher.now()
        error = keys.refusal(head.lines, head.credentials, client.address)
        if error is None:
            return None
        given = request_id(None if head.given_id is None else head.given_id.decode("ascii"))
        self._switcher.metrics.request_rejected(None, error.code)
        if route.kind is Kind.FORWARD:
            RequestContext(self.reporting, given, route, began).finish(error.status, error.code)
        if self._switcher.audit is not None:
            self._switcher.audit.refused(
                "key_refused", method=head.method.decode(), path=route.path, status=error.status, error=error.code,
                request_id=given, **{"from": client.address},
            )  # fmt: skip
        last = refused_too_often(client) or head.last
        return refusal(error, given, anthropic=route.anthropic(""), close=last), not last

    def start(self, client: Connection, match: Match, data: bytes) -> None:
        """Check the limits of the request's key, admit it and send it; or hand it over."""
        head, total = match[2], match[7]
        if total < len(data):
            client.keep(data[total:])
            data = data[:total]
        context = self._context(self.reporting, match[3], head.route, match[4])
        context.asked, context.model, context.holder = match[0], match[1] or None, head.holder
        context.sent = len(match[6])
        try:
            passes = head.grant is None or self._passes(head.grant, context)
            sent = passes and self._admit(client, match, context, data)
        except Exception as error:  # noqa: BLE001 - nothing else would end the request, nor what is held for it
            sent = self._give_up(client, context, error)
        if not sent:
            client.hand_over(context, data)

    def _admit(self, client: Connection, match: Match, context: RequestContext, data: bytes) -> bool:
        """Admit a request and send it; return False if it has to be handed over.

        ``data`` is all of it, and nothing else.
        """
        raise NotImplementedError

    def _give_up(self, client: Connection, context: RequestContext, error: Exception) -> bool:
        """Take note of an error in llmux itself. Returns False if the model handler may serve the request.

        It may not if some of it may have been sent: then that error is its answer.
        """
        self._switcher.log.emit("internal_error", error=repr(error), exc_info=error, request_id=context.request_id)
        request = client.fast_request
        if request is None:
            return False
        request.give_up(error)
        return True

    def _passes(self, grant: Grant, context: RequestContext) -> bool:
        """Check the limits of a request's key. If they refuse it, the model handler says why."""
        assert self._gate is not None
        assert context.asked is not None
        headers = context.headers
        try:
            context.passed = self._gate.enter(
                grant, context.asked, context.model, context.sent, context.request_id, headers
            )
        except RequestError:
            headers.clear()
            return False
        return True

    def _send(
        self,
        request: FastRequest,
        connection: EngineConnection | None,
        first: bytes,
        sent: bytes | memoryview,
    ) -> None:
        """Send a request by its head and its body, on a fresh connection if there is none."""
        pieces = (first + sent,) if len(sent) <= COPIED else (first, sent)
        if connection is None:
            task = request.client.loop.create_task(
                self._connect(request, pieces), name="llmux: connect on the fast path"
            )
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        else:
            request.send(connection, pieces)

    async def _connect(self, request: FastRequest, pieces: Pieces) -> None:
        exchange = request.exchange
        try:
            connection = await self.forwarder.connect(exchange.address)
        except EngineRefusedError as error:
            request.response_lost(error)
            return
        except Exception as error:  # noqa: BLE001 - nothing else would end the request
            request.response_lost(
                EngineRefusedError(f"No connection to the engine at {exchange.address}: {error!r}.")
            )
            return
        exchange.activity.connected = True
        try:
            request.send(connection, pieces)
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(request.client, request.context, error)

    def finish_soon(self, loop: asyncio.AbstractEventLoop, context: RequestContext, status: int) -> None:
        """Finish a request whose answer is complete, with all others that end in this turn of the loop.

        In a row they cost less than each by itself: their data is in the processor's cache. It is done before
        anything more is read, so any query after that answer finds it counted.
        """
        self._answered.append((context, status))
        if len(self._answered) == 1:
            loop.call_soon(self._finish, loop)

    def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        answered, self._answered = self._answered, []
        one_by_one = iter(answered)
        try:
            for context, status in one_by_one:
                context.finish(status)
        finally:  # an error in one of them concerns no other
            self._answered += one_by_one
            if self._answered:
                loop.call_soon(self._finish, loop)


def usual_fields(request_id: bytes) -> ExtraFields:
    """Return llmux's own fields for a client's answer."""
    return _new(ExtraFields, (_USUAL % request_id, _REPLACED))


def extra_fields(request_id: bytes, told: Sequence[tuple[str, str]], waited: bytes = b"0.000") -> ExtraFields:
    """Return the same with those beside the usual."""
    lines = "".join([f"\r\n{name}: {value}" for name, value in told]).encode()
    replaced = _replaced(tuple([name for name, _ in told]))
    return ExtraFields(_FIELDS % (request_id, lines, waited), replaced)


@functools.cache
def _replaced(names: tuple[str, ...]) -> frozenset[bytes]:
    return _REPLACED.union(name.lower().encode() for name in names)


class FastRequest(Relay):
    """One request on the fast path: the relay of its answer, and its client's side."""

    __slots__ = ("_path", "_raw", "_size", "client", "context", "flow", "keep_alive")

    modern = True

    def __init__(
        self,
        path: FastPath,
        client: Connection,
        context: RequestContext,
        exchange: Exchange,
        raw: bytes,
        size: int,
    ) -> None:
        self.client = client
        self.flow: Flow = client
        self.context = context
        self.keep_alive = True
        self._path = path
        self._raw = raw
        self._size = size
        super().__init__(self, exchange, client.loop, self._ended)

    def send(self, connection: EngineConnection, pieces: Pieces) -> None:
        """Send the request, unless it is over."""
        if self.over:
            connection.abort()
            return
        self._connection = connection
        connection.begin(self, whole=pieces, told=self.exchange.request_id)

    def give_up(self, error: Exception) -> None:
        """End the request with an error in llmux itself, if it is not over."""
        self._settle(error)

    # ---- the relay

    def response_started(self, head: ResponseHead) -> None:
        """Make the client's head; usually it is the same as the last one."""
        usual = head.framing is _LENGTH and not head.event_stream and self.keep_alive
        added: ExtraFields = self.exchange.extra_headers  # type: ignore[assignment]
        # The usual answers: with a length, and no further fields.
        written = head.written.get(added.names) if usual else None
        if written is None:
            super().response_started(head)
            return
        assert self._connection is not None
        before, has_length, after = written
        length = self._connection.length if has_length else b""
        self._head = b"%b%b%b%b\r\n\r\n" % (before, length, after, added.lines)
        self.exchange.status = head.status
        self._responding = True

    # ---- the relay's client

    def open_transport(self) -> asyncio.Transport:
        """Return the transport."""
        transport = self.client.transport
        assert transport is not None
        return transport

    def head_made(self, head: ResponseHead, *, keep_alive: bool) -> None:  # noqa: ARG002
        """Record whether the connection can be used again."""
        self.keep_alive = keep_alive

    def bytes_written(self, count: int) -> None:
        """Do nothing: aiohttp knows nothing of this request."""

    def force_close(self) -> None:
        """Do not use the client's connection again."""
        self.keep_alive = False

    def tunnel(self, tunnel: Tunnel) -> None:
        """Never called: a request for an upgrade does not come here."""
        raise NotImplementedError

    async def drain(self) -> None:
        """Wait until the client has read most of what was written."""
        await self.client.drain()

    # ---- the end

    def _ended(self, error: Exception | None) -> None:
        path, context, exchange, connection = self._path, self.context, self.exchange, self._connection
        self.detach()
        exchange.on_cut = None
        exchange.ended_at = path.reporting.switcher.now()
        path.budget.held -= self._size
        if error is None:
            assert connection is not None
            assert exchange.status is not None
            path.forwarder.pool.release(connection, exchange.activity)
            self._answered()
            path.finish_soon(self.client.loop, context, exchange.status)
            self.client.go_on(keep_alive=self.keep_alive)
            return
        if connection is not None:
            connection.abort()
        self._failed(error, connection)
        if isinstance(error, ClientGoneError):
            context.client_left()
            self.client.go_on(keep_alive=False)
        else:
            self.client.hand_over(context, self._raw)

    def _answered(self) -> None:
        """Record that the answer is complete, or broken off."""

    def _failed(self, error: Exception, connection: EngineConnection | None) -> None:
        """Record an error before the answer, for the model handler, or that the client has gone."""
