"""Serving HTTP as production must, and answering in llmux's way what aiohttp would answer by itself."""

from __future__ import annotations

import asyncio
import heapq
import json
import math
import resource
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, cast

from aiohttp import web

from llmux.aiohttp_internals import ConnectionServer, ServerRunner, UnixSite, answer_has_begun
from llmux.app import FRONT, SWITCHER
from llmux.config import Config
from llmux.errors import INTERNAL_ERROR, BadRequestError, RequestError, SlowClientError, UnavailableError
from llmux.middleware.client_connection import ClientConnection
from llmux.middleware.context import REFUSED, request_id
from llmux.observability.notices import EventLog
from llmux.proxy import error_response
from llmux.proxy.envelope import error_body
from llmux.runtime.engine_locks import most_locks
from llmux.upstream import native

HEADER_LIMIT = 32 * 1024  # bytes of one header field, and of the request line
BACKLOG = 4096
CONTROL = 64  # connections over the control socket, beside those
RESERVED = 128  # open files for hooks, logs, spooled bodies
TELL_EVERY = 10.0  # seconds between two log lines about too many connections
LINGER = 1.0  # seconds to read on after an answer that came before the end of the request's body
RESERVE = 16  # connections beyond `max_connections`, for /health and operators
RESERVED_HEAD = 5.0  # seconds that a head may take on these
SETTLED = 1.0  # seconds that a connection waits before another may take its place
LOOK_EVERY = 1.0  # seconds between two looks for connections that wait for too long
SLICE = 500  # connections that are looked at in one turn of the loop
_PREFACE = "Pause on PRI"  # what the parser says of the first bytes of HTTP/2


class Connection(ClientConnection):
    """One client's connection. It answers what aiohttp would answer by itself in llmux's way."""

    __slots__ = ("_event_log",)

    def __init__(self, *args: Any, event_log: EventLog, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._event_log = event_log

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer malformed HTTP (400) and mistakes of llmux (500)."""
        error: RequestError
        if isinstance(exc, ConnectionError):  # the client has left, which is logged already
            raise exc
        if status == BadRequestError.status:
            reason = str(message or "").strip().partition("\n")[0].rstrip(":") or "malformed HTTP"
            if reason.startswith(_PREFACE):
                reason = "the client begins with HTTP/2, which llmux does not speak"
            self._event_log.emit("malformed_request", client=request.remote, error=reason)
            error = BadRequestError(f"Malformed HTTP: {reason}", code="malformed_request")
        else:
            self._event_log.emit("internal_error", error=repr(exc), exc_info=exc)
            error = RequestError(INTERNAL_ERROR)
        if answer_has_begun(request):
            raise ConnectionResetError("the answer is under way already")
        headers = [
            ("X-Request-ID", request_id(request.headers.get("X-Request-ID"))),
            ("X-LLMux-Queue-Seconds", "0.000"),
        ]
        response = error_response(error, anthropic=False, headers=headers)
        response.force_close()
        return response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a place, or say that there is none."""
        assert isinstance(self.server, Server)
        if self.server.place_for(self):
            super().connection_made(transport)
            return
        transport = cast("asyncio.Transport", transport)
        transport.set_protocol(asyncio.Protocol())
        transport.write(
            _answer(UnavailableError("llmux has too many open connections.", code="too_many_connections"))
        )
        # Closed at once it would be reset by what the client still sends, and the answer lost.
        self.loop.call_later(LINGER, transport.close)

    def look(self, transport: asyncio.Transport, now: float, header: float, keepalive: float) -> None:
        """Close it if it waits for too long: ``header`` seconds for a head, ``keepalive`` for anything."""
        closing = transport.is_closing()
        if not closing and not self.waits:
            return
        unsent = transport.get_write_buffer_size()
        if unsent:
            if unsent != self.unsent:  # the client takes it, if slowly
                self.unsent, self.since = unsent, now
            elif now - self.since > keepalive:
                transport.abort()
        elif closing:
            return
        elif self.head_since:
            if now - self.head_since > (min(header, RESERVED_HEAD) if self.reserved else header):
                if self.begun:
                    transport.write(_answer(SlowClientError(f"The request's head took more than {header:g} s.")))
                self.force_close()
        elif self.reserved or now - self.since > keepalive:
            self.force_close()


class Server(ConnectionServer):
    """Makes our connections, ``limit`` of them at most, and closes those of which nothing comes.

    Theory of operation. A connection *waits* when no request is under way on it: it has not begun with one, it is
    in the midst of a head, or it is idle after an answer. Nothing else is ever closed here: bodies have a limit of
    their own, and answers, streams and tunnels take as long as they take.

    Once a second all connections are looked at, in slices; a request costs no more than the moment that is noted
    at its end. A head that takes too long is answered with 408, a connection that was silent is closed. A client
    that does not take the end of its answer counts as idle from the last byte that it took.

    When ``limit`` connections are open, a new one takes the place of the one that has waited longest, for a second
    at least: idle ones and silent ones first, then those in the midst of a head. When none waits, the new one is
    *reserved*: it may ask after llmux's health, and operators may act (see ``Front``); then it is closed. Of these
    there are ``RESERVE``, and the newest is always let in while one of them waits.
    """

    def __init__(
        self, *args: Any, limit: int, event_log: EventLog, config: Callable[[], Config], **kwargs: Any
    ) -> None:
        super().__init__(*args, event_log=event_log, **kwargs)
        self._limit = limit
        self._event_log = event_log
        self._config = config
        self._told = -math.inf
        self._reserved: set[Connection] = set()
        self._in_vain = -math.inf  # until then another search for a connection that waits is not worth it
        self._timer = self.loop.call_later(LOOK_EVERY, self._look)

    def __call__(self) -> Connection:
        """Return the protocol for a new connection."""
        return Connection(self, loop=self.loop, **self.handler_settings)

    def place_for(self, connection: Connection) -> bool:
        """Find a place for a new connection, reserved or not; False when there is none."""
        if self.open_count - len(self._reserved) < self._limit:
            return True
        now = self.loop.time()
        if now - self._told > TELL_EVERY:
            self._told = now
            self._event_log.emit("too_many_connections", limit=self._limit)
        if self._make_room(now):
            return True
        if len(self._reserved) >= RESERVE:
            silent = min((one for one in self._reserved if one.waits), key=_waits_since, default=None)
            if silent is None:
                return False
            self._reserved.discard(silent)
            silent.force_close()
        connection.reserved = True
        self._reserved.add(connection)
        return True

    def _make_room(self, now: float) -> bool:
        if now < self._in_vain:
            return False
        waiting = [
            one
            for one in self._ours()
            if one.waits and not one.reserved and now - _waits_since(one) >= SETTLED and not _unsent(one)
        ]
        took = self.loop.time() - now
        if not waiting:
            self._in_vain = now + 20 * took
            return False
        # With many connections the search takes a while: more than one place is made then.
        for one in heapq.nsmallest(
            1 + self._limit // 256, waiting, key=lambda one: (one.begun, _waits_since(one))
        ):
            one.force_close()
        return True

    def _ours(self) -> Iterator[Connection]:
        return (one for one, _ in self.open_connections() if isinstance(one, Connection))

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Take note that a connection has ended."""
        super().connection_lost(handler, exc)
        if isinstance(handler, Connection):
            self._reserved.discard(handler)

    def _look(self, rest: list[tuple[web.RequestHandler, asyncio.Transport]] | None = None) -> None:
        """Close the connections that have waited for too long."""
        if rest is None:
            rest = list(self.open_connections())
        config, now = self._config(), self.loop.time()
        for one, transport in rest[-SLICE:]:
            if isinstance(one, Connection):
                one.look(transport, now, config.header_timeout, config.keepalive_timeout)
        del rest[-SLICE:]
        if rest:
            self._timer = self.loop.call_later(0, self._look, rest)
        else:
            pause = min(LOOK_EVERY, config.header_timeout / 4, config.keepalive_timeout / 4)
            self._timer = self.loop.call_later(pause, self._look)

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's
        """Close all connections."""
        self._timer.cancel()
        await super().shutdown(timeout)


def _waits_since(connection: Connection) -> float:
    return connection.head_since or connection.since


def _unsent(connection: Connection) -> int:
    transport = connection.transport
    return 0 if transport is None else transport.get_write_buffer_size()


def _answer(error: RequestError) -> bytes:
    """Return an answer that is given without a request."""
    body = json.dumps(error_body(error, anthropic=False)).encode()
    retry = b""
    if isinstance(error, UnavailableError):  # of a request that was not even read
        retry = b"Retry-After: 1\r\n%b: %b\r\n" % (REFUSED.encode(), error.code.encode())
    return (
        b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b"
        b"X-Request-ID: %b\r\nX-LLMux-Queue-Seconds: 0.000\r\nConnection: close\r\n\r\n%b"
        % (
            error.status,
            HTTPStatus(error.status).phrase.encode(),
            len(body),
            retry,
            request_id(None).encode(),
            body,
        )
    )


class Runner(ServerRunner):
    """Serves the application as production must: clients that leave are noticed, bodies are left as they are."""

    def __init__(self, app: web.Application, log: EventLog) -> None:
        super().__init__(app)
        self._event_log = log
        # A request in flight needs a file for its client and one for its engine; a stream that is lent to the
        # native relay needs two more, and the lock of an engine one. They get no others: where hooks cannot be
        # started, models count as lost.
        self._switcher = app[SWITCHER]
        config = self._switcher.config
        # A gateway has no engines to lock.
        locks = most_locks(len(config.models)) if isinstance(config, Config) else 0
        lent = native.most_streams()
        files = open_files()
        reserved = min(RESERVED, files // 2)
        self._limit = config.max_connections or max(16, (files - reserved - locks) // 2 - lent)
        native.NativeRelay.left = RESERVED + 2 * self._limit
        self._fast_path = app[FRONT].fast_path
        self._control: Server | None = None

    def make_server(self, made: web.Server) -> web.Server:
        """Return our server; another one is for the control socket."""
        self._control = self._serve(made, limit=CONTROL, control=True)
        return self._serve(made, limit=self._limit)

    async def serve_control(self, listener: socket.socket) -> None:
        """Take connections from the control socket, too, until the cleanup."""
        assert self._control is not None
        await UnixSite(self, listener, self._control).start()

    async def shutdown(self) -> None:
        """Close the control socket's connections with the others."""
        if self._control is not None:
            self._control.pre_shutdown()
        await super().shutdown()
        if self._control is not None:
            await self._control.shutdown(self.shutdown_timeout)

    def _serve(self, made: web.Server, *, limit: int, control: bool = False) -> Server:
        front = self.app.get(FRONT)
        return Server(
            made.request_handler if front is None else front.server_handler(made.request_handler),
            request_factory=made.request_factory,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
            lingering_time=LINGER,
            event_log=self._event_log,
            fast_path=self._fast_path,
            limit=limit,
            control=control,
            config=lambda: self._switcher.config,
        )


def open_files() -> int:
    """Return how many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
