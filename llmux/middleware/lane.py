"""The short way through llmux, for most requests: small, and for a model that is awake.

Theory of operation
===================

Such a request has nothing to wait for, so it needs no future and none of aiohttp's objects. The
server's connection offers what arrives to the lane before aiohttp sees it. The lane takes a request that

- has arrived whole (or soon does), and has at most ``MOST`` bytes of body,
- is a plain POST on a forwarded path whose head has nothing that needs judging (``plain_request``),
- and names, in valid JSON, a model that would be let through at once.

When its engine has no idle connection for it, a task opens one; nothing else needs a task. Everything else takes
the long way through aiohttp, untouched; the two give the same bytes. A ride is a ``Relay``: back-pressure, cuts
and ends are the same code on both ways. What cannot end well on the lane (an engine that is not there or broke
off before its answer, a cut before the head) is *handed over*: aiohttp is given the request after all, and the
long way goes on with its ticket, with the error, or with a fresh connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Protocol, cast

from aiohttp import HttpVersion11
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_protocol import RequestHandler

from llmux.config import EngineDefinition
from llmux.extract import BodyBudget
from llmux.middleware.endpoint import Handover, engine_address
from llmux.middleware.hosts import Hosts
from llmux.middleware.identity import new_id
from llmux.middleware.identity import request_id as usable_id
from llmux.middleware.keys import Keys
from llmux.middleware.paths import ForwardedPaths, Kind
from llmux.middleware.plain_request import Read
from llmux.proxy import Exchange, ExtraFields, Forwarder
from llmux.proxy.relay import ClientGoneError, Relay
from llmux.runtime import Switcher, Ticket
from llmux.upstream import EngineConnection, EngineLostError, EngineRefusedError, ResponseHead

MOST = 64 * 1024  # bytes of body
GONE = 499

_REPLACED = frozenset({b"x-request-id", b"x-llmux-queue-seconds"})


class Client(Protocol):
    """The server's connection, as a ride sees it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport | None
    output_size: int
    ride: Ride | None

    @property
    def writing_paused(self) -> bool:
        """Whether the client reads too slowly."""

    def keep(self, data: bytes) -> None:
        """Hold what comes while a request is on the lane."""

    def ride_over(self, *, keep_alive: bool) -> None:
        """Look at what comes next."""

    def hand_over(self, handover: Handover, raw: bytes) -> None:
        """Give the request to aiohttp after all."""


class Lane:
    """Takes the requests that need not wait. One for the whole application."""

    def __init__(self, switcher: Switcher, forwarder: Forwarder, budget: BodyBudget) -> None:
        self._switcher = switcher
        self._forwarder = forwarder
        self._budget = budget
        self._loads = json.JSONDecoder().decode
        self._connecting: set[asyncio.Task[None]] = set()
        self.open = False
        self.most = 0

    def configure(
        self,
        paths: ForwardedPaths,
        names: Mapping[str, str],
        *,
        most: int,
        access_log: bool,
        keys: Keys,
        hosts: Hosts,
        alone: bool,
    ) -> None:
        """Take over a configuration. Not ``alone``: what is traced takes the long way."""
        self._paths = paths
        self._names = names
        self._access_log = access_log
        self.most = min(most, MOST)
        self._keys = keys if keys.ring.any else None
        self._called_well = hosts.knows
        self.open = alone and (self._keys is None or not access_log)  # the log says whose key it was

    def offer(self, client: Client, data: bytes, seen: Read) -> bool:  # noqa: C901, once for every request
        """Take a request that has arrived whole, if everything it needs is there.

        ``data`` may have more after it.
        """
        switcher = self._switcher
        began = switcher.now()
        route = self._paths.decide(seen.target, "POST")
        if route.kind is not Kind.FORWARD or not self._called_well(seen.called):
            return False
        dropped = () if self._keys is None else self._keys.on_lane(seen.lines, seen.shown)
        head = seen.head
        body = data[head : seen.total]
        model = self._model(body)
        if model is None or dropped is None:
            return False
        activity = switcher.open_activity(model)
        if activity is None or self._budget.held + len(body) > self._budget.max_buffered:
            return False
        given = seen.given_id
        request_id = new_id() if given is None else usable_id(given.decode("ascii"))
        ident = request_id.encode()
        if given is not None and ident != given:
            return False
        connection = self._forwarder.pool.take(activity)
        if seen.total < len(data):
            client.keep(data[seen.total :])
            data = data[: seen.total]
        ticket = switcher.enter(model)
        admission = ticket.admission
        definition = admission.definition if admission is not None else None
        if (
            not isinstance(definition, EngineDefinition)
            or definition.upstream_model is not None
            or definition.base_path
            or admission is None
            or switcher.activity(admission) is not activity
        ):
            if connection is not None:
                self._forwarder.pool.release(connection, activity)
            client.hand_over(Handover(ticket, request_id, began), data)
            return True
        self._budget.take(len(body))
        address = engine_address(definition.host, definition.port, definition.tls, definition.base_path)
        exchange = Exchange(
            address=address,
            method=b"POST",
            target=seen.target.encode("ascii"),
            raw_headers=(),
            body=None,
            request_id=request_id,
            activity=activity,
            extra_headers=ExtraFields(b"X-Request-ID: %b\r\nX-LLMux-Queue-Seconds: 0.000" % ident, _REPLACED),
        )
        lines = seen.lines
        lines[seen.host] += b": " + address.host_header
        for at in dropped:
            del lines[at]
        if seen.given_id is None:
            lines.append(b"X-Request-ID: " + ident)
        lines.append(b"\r\n")
        loop = client.loop
        ride = client.ride = Ride(self, client, exchange, connection, ticket, data, began, len(body), loop)
        ticket.attach(exchange.cut)
        exchange.on_cut = ride.cut
        message = b"\r\n".join(lines) + body
        if connection is None:
            task = loop.create_task(self._connect(ride, message), name="llmux: connect for the lane")
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        else:
            connection.begin(ride)
            connection.write_whole(message)
        return True

    async def _connect(self, ride: Ride, message: bytes) -> None:
        exchange = ride.exchange
        try:
            connection = await self._forwarder.connect(exchange.address)
        except EngineRefusedError as error:
            ride.response_lost(error)
            return
        except Exception as error:  # noqa: BLE001 - nobody else would end the ride
            ride.response_lost(
                EngineRefusedError(f"No connection to the engine at {exchange.address}: {error!r}.")
            )
            return
        exchange.activity.connected = True
        ride.go_on(connection, message)

    def _model(self, body: bytes) -> str | None:
        # What is valid JSON names the same model to the scanner of the long way; the rest is for that to judge.
        try:
            value = self._loads(body.decode())
        except (ValueError, RecursionError):
            return None
        if type(value) is not dict:
            return None
        for key in value:
            if len(key) == 5 and key != "model" and key.lower() == "model":  # noqa: PLR2004 - another model to some
                return None
        name = value.get("model")
        return self._names.get(name) if type(name) is str else None

    def finish(self, ride: Ride, connection: EngineConnection | None, error: Exception | None) -> None:
        """Do what is due when a ride is over. Without a connection, it was over before there was one."""
        switcher = self._switcher
        exchange, ticket = ride.exchange, ride.ticket
        exchange.on_cut = None
        exchange.ended_at = switcher.now()
        self._budget.give_back(ride.held)
        if error is None:
            assert connection is not None
            self._forwarder.pool.release(connection, exchange.activity)
            if exchange.broken is not None and exchange.cut_off is None:
                switcher.suspect(ticket.model, refused=False)
            assert exchange.status is not None
            self._account(ride, exchange.status)
            switcher.leave(ticket)
            if switcher.recorder is not None:
                self._record(ride, exchange.status)
            ride.client.ride_over(keep_alive=ride.keep_alive)
            return
        if connection is not None:
            connection.abort()
        if isinstance(error, ClientGoneError):
            switcher.log.emit("client_left", model=ticket.model, request_id=exchange.request_id)
            self._account(ride, GONE)
            switcher.leave(ticket)
            if switcher.recorder is not None:
                self._record(ride, GONE)
            ride.client.ride_over(keep_alive=False)
            return
        # Whatever was written to a pooled connection that died without a byte of an answer counts as not sent.
        stale = ride.pooled and connection is not None and not connection.received
        stale = stale and isinstance(error, EngineLostError)
        handover = Handover(ticket, exchange.request_id, ride.began, None if stale else error, fresh_only=stale)
        ride.client.hand_over(handover, ride.raw)

    def abandon(self, handover: Handover) -> None:
        """Forget a request that was handed over: its client has left before anybody went on with it."""
        ticket = handover.ticket
        self._switcher.log.emit("client_left", model=ticket.model, request_id=handover.request_id)
        whole = self._switcher.requests.add(
            ticket.model,
            GONE,
            began=handover.began,
            waited=ticket.waited,
            first_byte=None,
            request_id=handover.request_id,
        )
        self._switcher.metrics.request_ended(ticket.model, GONE, ticket.waited, None, whole)
        self._switcher.leave(ticket)
        if self._switcher.recorder is not None:
            self._switcher.recorder.request(ticket, GONE)

    def _record(self, ride: Ride, status: int) -> None:
        exchange, recorder = ride.exchange, self._switcher.recorder
        assert recorder is not None
        recorder.request(
            ride.ticket,
            status,
            sent=ride.held,
            got=exchange.bytes_out,
            first=exchange.first_byte_at,
            broken=exchange.broken is not None,
        )

    def _account(self, ride: Ride, status: int) -> None:
        switcher, ticket, exchange = self._switcher, ride.ticket, ride.exchange
        first = exchange.first_byte_at
        if first is not None:
            first -= ride.began
        tokens = exchange.usage
        whole = switcher.requests.add(
            ticket.model,
            status,
            began=ride.began,
            waited=ticket.waited,
            first_byte=first,
            request_id=exchange.request_id,
            tokens=tokens,
            error=exchange.broken,
        )
        switcher.metrics.request_ended(ticket.model, status, ticket.waited, first, whole, tokens)
        if self._access_log:
            switcher.log.emit(
                "request_finished",
                model=ticket.model,
                status=status,
                waited_secs=round(ticket.waited, 3),
                duration_secs=round(switcher.now() - ride.began, 3),
                request_id=exchange.request_id,
            )


class _Request:
    """What a relay asks of a request; on the lane they are all alike."""

    version = HttpVersion11
    keep_alive = True


_PLAIN: Any = _Request()


class Ride(Relay):
    """One request on the lane, and its answer."""

    __slots__ = ("_lane", "began", "bytes_out", "client", "held", "keep_alive", "pooled", "raw", "ticket")

    def __init__(
        self,
        lane: Lane,
        client: Client,
        exchange: Exchange,
        connection: EngineConnection | None,
        ticket: Ticket,
        raw: bytes,
        began: float,
        held: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        transport = client.transport
        assert transport is not None
        self.exchange = exchange
        self.response = None
        self.over = False
        self.client = client
        self.ticket = ticket
        self.raw = raw
        self.began = began
        self.held = held
        self.keep_alive = True
        self.bytes_out = 0
        self._lane = lane
        self._loop = loop
        self._protocol = cast("RequestHandler", client)
        self._transport = transport
        self._writer = cast("AbstractStreamWriter", client)
        self._request = _PLAIN
        self._connection = connection
        self.pooled = connection is not None
        self._head = b""
        self._chunked = self._chunk = self._close_delimited = self._event_stream = False
        self._draining = None
        self._look = None
        self._tunnel = None

    def _answer(self, head: ResponseHead, *, keep_alive: bool) -> Ride:  # noqa: ARG002
        self.keep_alive = keep_alive
        return self

    def force_close(self) -> None:
        """Do not use the client's connection again."""
        self.keep_alive = False

    def client_closed(self) -> None:
        """Take note that the client has closed its connection."""
        self._client_closed()

    def go_on(self, connection: EngineConnection, message: bytes) -> None:
        """Send the request: there is a connection."""
        if self.over:
            connection.abort()
            return
        self._connection = connection
        connection.begin(self)
        connection.write_whole(message)

    def _settle(self, error: Exception | None) -> None:
        if self.over:
            return
        self.over = True
        connection = self._connection
        if self._look is not None:
            self._look.cancel()
        self._lane.finish(self, connection, error)
        self._connection = None
