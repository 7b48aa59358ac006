"""Sends an exchange to its engine and relays the answer."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Awaitable, Callable, Iterator

from aiohttp import web

from llmux.aiohttp_internals import RelayedResponse
from llmux.core.effects import CutReason
from llmux.errors import EngineError
from llmux.proxy.aiohttp_client import AiohttpClient
from llmux.proxy.early_response import ResumedRelay
from llmux.proxy.exchange import Exchange, RequestBody
from llmux.proxy.heads import RequestHead, request_head
from llmux.proxy.relay import Relay, cut_error
from llmux.upstream import (
    ConnectionPool,
    EngineActivity,
    EngineAddress,
    EngineConnection,
    EngineRefusedError,
)
from llmux.upstream.pool import CONNECT_TIMEOUT, IDLE_TIMEOUT

# A head and a body up to this size are written at once; larger bodies in pieces of at most _PIECE.
_WHOLE = 1 << 16
_PIECE = 1 << 18


RelayFactory = Callable[[AiohttpClient, Exchange, asyncio.AbstractEventLoop], Relay]


class Forwarder:
    """Sends requests to engines. Owns the connections."""

    def __init__(
        self,
        *,
        idle_timeout: float = IDLE_TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.pool = ConnectionPool(
            idle_timeout=idle_timeout, connect_timeout=connect_timeout, ssl_context=ssl_context
        )
        self.beside: list[Callable[[], Awaitable[None]]] = []
        """Closed along with it."""

    async def forward(
        self, request: web.BaseRequest, exchange: Exchange, make_relay: RelayFactory | None = None
    ) -> RelayedResponse:
        """Send the request and relay the answer; return when its last byte is on the client's transport.

        ``make_relay`` makes a relay that does more than that.

        Also returns, with ``exchange.broken`` set, when the answer broke off after its head had gone out.

        Raises EngineRefusedError when nothing was sent, EngineError when the engine broke off before its
        head, UnavailableError when the exchange was cut before the head, ClientGoneError when the client
        went away; CancelledError passes through, with the engine's connection closed.
        """
        loop = asyncio.get_running_loop()
        try:
            if exchange.cut_off is not None:
                raise cut_error(*exchange.cut_off)
            early = exchange.early
            client = AiohttpClient(request)
            if make_relay is not None:
                relay = make_relay(client, exchange, loop)
            elif early is None:
                relay = Relay(client, exchange, loop)
            else:
                relay = ResumedRelay(client, exchange, early, loop)
            head = request_head(exchange, may_upgrade=client.modern)
            try:
                await self.attempt(exchange, lambda connection: self._relayed(connection, relay, head))
            finally:
                exchange.on_cut = None
                relay.detach()
                if client.response is not None:
                    client.response.bytes_out = exchange.bytes_out
            assert client.response is not None
            return client.response
        finally:
            exchange.ended_at = loop.time()

    async def attempt(self, exchange: Exchange, attempt: Callable[[EngineConnection], Awaitable[None]]) -> None:
        """Attempt an exchange on a kept connection; if there is none or it had died, on a fresh one.

        ``attempt`` gives its connection back, or aborts it. Raises like ``forward``.
        """
        if not exchange.fresh_only:
            connection = self.pool.take(exchange.activity)
            if connection is not None:
                try:
                    await attempt(connection)
                except EngineError as error:
                    if exchange.once or not connection.was_stale(error):
                        raise
                    if connection.taken:
                        exchange.lost = error
                    # Once more, on a connection that cannot be stale.
                else:
                    return
        try:
            connection = await self._connect(exchange)
        except EngineRefusedError as error:
            if exchange.lost is not None:  # the connection did not die of age, but with its engine
                raise exchange.lost from error
            raise
        exchange.activity.connected = True
        await attempt(connection)

    async def connect(self, address: EngineAddress) -> EngineConnection:
        """Open a connection. EngineRefusedError when there is none in time."""
        try:
            async with self.pool.interruptible():
                return await self.pool.connect(address)
        except TimeoutError as error:
            raise _too_late(address) from error

    async def _connect(self, exchange: Exchange) -> EngineConnection:
        limit = self.pool.interruptible()

        def interrupt(_reason: CutReason, _retry_after: float | None) -> None:
            if not limit.expired():
                limit.reschedule(0)

        try:
            async with limit:
                exchange.on_cut = interrupt
                return await self.pool.connect(exchange.address)
        except TimeoutError as error:
            if exchange.cut_off is None:
                raise _too_late(exchange.address) from error
            raise cut_error(*exchange.cut_off) from None
        finally:
            exchange.on_cut = None

    async def _relayed(self, connection: EngineConnection, relay: Relay, head: RequestHead) -> None:
        done: asyncio.Future[None] = connection.loop.create_future()
        relay.attach(connection, functools.partial(_resolve, done))
        exchange = relay.exchange
        exchange.on_cut = relay.cut
        try:
            if exchange.cut_off is not None:  # in the moment before there was anything to cut
                raise cut_error(*exchange.cut_off)  # noqa: TRY301
            connection.begin(relay, head_request=head.is_head, upgrade=head.upgrade)
            body = exchange.body
            whole = None if body is None else body.single
            if body is None or not body.size:
                connection.write_whole(head.data)
            elif whole is not None and len(whole) <= _WHOLE:
                connection.write_whole(head.data + whole)
            else:
                await connection.send(_pieces(head.data, body))
            await done
        except BaseException:
            connection.abort()
            if done.done() and not done.cancelled():
                done.exception()  # retrieved, even if the task was cancelled before it could look
            raise
        self.pool.release(connection, exchange.activity)

    def discard_idle(self, activity: EngineActivity) -> None:
        """Close the idle connections to an engine that is about to sleep."""
        self.pool.discard(activity)

    async def close(self) -> None:
        """Close the idle connections. Exchanges under way go on, and close theirs when they end."""
        await self.pool.close()
        for close in self.beside:
            await close()


def _resolve(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():  # the task that waited was cancelled
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _too_late(address: EngineAddress) -> EngineRefusedError:
    return EngineRefusedError(f"The engine at {address} did not accept a connection in time.")


def _pieces(head: bytes, body: RequestBody) -> Iterator[bytes | memoryview]:
    yield head
    single = body.single
    for part in body.slices() if single is None else (single,):
        if len(part) <= _PIECE:
            yield part
        else:
            view = memoryview(part)
            for start in range(0, len(view), _PIECE):
                yield view[start : start + _PIECE]
