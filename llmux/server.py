"""Serving HTTP as production must, and answering in llmux's way what aiohttp would answer by itself."""

from __future__ import annotations

import asyncio
import json
import math
import resource
import socket
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from llmux.app import FRONT, SWITCHER
from llmux.errors import BadRequestError, RequestError, UnavailableError
from llmux.middleware.client_connection import ClientConnection
from llmux.middleware.context import request_id
from llmux.observability.notices import EventLog
from llmux.proxy import error_response
from llmux.proxy.envelope import error_body

HEADER_LIMIT = 32 * 1024  # bytes of one header field, and of the request line
BACKLOG = 4096
CONTROL = 64  # connections over the control socket, beside those
RESERVED = 128  # open files for hooks, logs, spooled bodies
TELL_EVERY = 10.0  # seconds between two log lines about too many connections
LINGER = 1.0  # seconds to read on after an answer that came before the end of the request's body


class Connection(ClientConnection):
    """One client's connection. It answers what aiohttp would answer by itself in llmux's way.

    ``control``: it came over the control socket, which only this host's user can open.
    """

    __slots__ = ("_event_log", "control")

    def __init__(self, *args: Any, event_log: EventLog, control: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._event_log = event_log
        self.control = control

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer malformed HTTP (400) and mistakes of llmux (500)."""
        error: RequestError
        if isinstance(exc, ConnectionError):  # the client has left; whoever noticed has told it
            raise exc
        if status == BadRequestError.status:
            reason = str(message or "").strip().partition("\n")[0].rstrip(":") or "malformed HTTP"
            self._event_log.emit("malformed_request", client=request.remote, error=reason)
            error = BadRequestError(f"Malformed HTTP: {reason}", code="malformed_request")
        else:
            self._event_log.emit("internal_error", error=repr(exc), exc_info=exc)
            error = RequestError("llmux made a mistake; its log says more.")
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer is under way already")
        headers = [
            ("X-Request-ID", request_id(request.headers.get("X-Request-ID"))),
            ("X-LLMux-Queue-Seconds", "0.000"),
        ]
        response = error_response(error, anthropic=False, headers=headers)
        response.force_close()
        return response

    def data_received(self, data: bytes) -> None:
        """Tell the reader of a body at once when its framing breaks in the middle."""
        before = len(self._messages)
        super().data_received(data)
        if len(self._messages) == before or not isinstance(self._messages[-1][0], _ErrInfo):
            return
        current = self._current_request
        payload = self._messages[-2][1] if before else current.content if current is not None else None
        if isinstance(payload, StreamReader) and not payload.is_eof():
            # The answer to that request says what was wrong, and is the last one on this connection.
            self._messages.pop()
            self._close = True
            payload.set_exception(BadRequestError("The body's framing is broken.", code="incomplete_body"))
            payload.feed_eof()


class Surplus(asyncio.Protocol):
    """A connection beyond ``max_connections``: told to come back, and closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Answer without waiting for the request."""
        error = UnavailableError("llmux has too many open connections.", code="too_many_connections")
        body = json.dumps(error_body(error, anthropic=False)).encode()
        transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            b"Retry-After: 1\r\nX-Request-ID: %b\r\nX-LLMux-Queue-Seconds: 0.000\r\nConnection: close\r\n\r\n%b"
            % (len(body), request_id(None).encode(), body)
        )
        # Closed at once it would be reset by what the client still sends, and the answer lost.
        asyncio.get_running_loop().call_later(LINGER, transport.close)


class Server(web.Server):
    """Makes our connections, ``limit`` of them at most."""

    def __init__(self, *args: Any, limit: int, event_log: EventLog, **kwargs: Any) -> None:
        super().__init__(*args, event_log=event_log, **kwargs)
        self._limit = limit
        self._event_log = event_log
        self._told = -math.inf

    def __call__(self) -> RequestHandler | Surplus:  # type: ignore[override]
        """Return the protocol for a new connection."""
        if len(self._connections) < self._limit:
            return Connection(self, loop=self._loop, **self._kwargs)
        now = self._loop.time()
        if now - self._told > TELL_EVERY:
            self._told = now
            self._event_log.emit("too_many_connections", limit=self._limit)
        return Surplus()


class Runner(web.AppRunner):
    """Serves the application as production must: clients that leave are noticed, bodies are left as they are."""

    def __init__(self, app: web.Application, log: EventLog) -> None:
        super().__init__(app)
        self._event_log = log
        # A request in flight needs a file for its client and one for its engine.
        self._limit = app[SWITCHER].config.max_connections or max(64, (open_files() - RESERVED) // 2)
        self._fast_path = app[FRONT].fast_path
        self._control: Server | None = None

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        self._control = self._serve(made, limit=CONTROL, control=True)
        return self._serve(made, limit=self._limit)

    async def serve_control(self, listener: socket.socket) -> None:
        """Take connections from the control socket, too, until the cleanup."""
        assert self._control is not None
        await ControlSite(self, listener, self._control).start()

    async def shutdown(self) -> None:
        """Close the control socket's connections with the others."""
        if self._control is not None:
            self._control.pre_shutdown()
        await super().shutdown()
        if self._control is not None:
            await self._control.shutdown(self._shutdown_timeout)

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
        )


class ControlSite(web.BaseSite):
    """The control socket, served by the same application."""

    def __init__(self, runner: Runner, listener: socket.socket, control: Server) -> None:
        super().__init__(runner)
        self._listener = listener
        self._control = control

    @property
    def name(self) -> str:
        """Where it listens."""
        return f"http://unix:{self._listener.getsockname()}:"

    async def start(self) -> None:
        """Take connections."""
        await super().start()
        self._server = await asyncio.get_running_loop().create_unix_server(self._control, sock=self._listener)


def open_files() -> int:
    """Return how many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
