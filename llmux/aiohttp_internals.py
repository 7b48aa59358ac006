"""All that llmux uses of aiohttp beyond its documented interface. No other file does.

aiohttp's server makes a protocol for each connection, whose parser turns bytes into messages which a task answers
one by one. llmux has that protocol take bytes only when no one else wants them (``pass_on``), writes most answers
on the transport itself, and tells aiohttp afterwards (``RelayedResponse``, ``count_written``).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.base_protocol import BaseProtocol
from aiohttp.web_protocol import RequestHandler, _ErrInfo


class ServerConnection(RequestHandler):
    """A client's connection."""

    __slots__ = ("_answering", "_arriving", "loop", "writing_paused")

    writing_paused: bool  # not aiohttp's property: it is read with every event of a stream

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loop = self._loop
        self.writing_paused = False
        self._arriving: StreamReader | None = None  # the last request's body, until that is answered
        self._answering = False  # aiohttp's task, which answers requests, runs

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport. aiohttp begins when it is given the first bytes; many connections never need it."""
        assert self._manager is not None
        BaseProtocol.connection_made(self, transport)
        self._manager.connection_made(self, cast("asyncio.Transport", transport))

    async def start(self) -> None:
        """Answer requests."""
        self._answering = True
        await super().start()

    def pause_writing(self) -> None:
        """Take note that the transport's buffer is full."""
        super().pause_writing()
        self.writing_paused = True

    def resume_writing(self) -> None:
        """Take note that the transport's buffer has drained."""
        super().resume_writing()
        self.writing_paused = False

    @property
    def server(self) -> web.Server | None:
        """The server that has made it; None once it is closed."""
        return self._manager

    @property
    def ends(self) -> bool:
        """Whether no further request will be answered."""
        return self._close or self._force_close

    @property
    def awaits_request(self) -> bool:
        """Whether aiohttp has no request to answer."""
        if not self._answering:
            return not self._messages
        waiter = self._waiter
        return waiter is not None and not waiter.done()

    def pass_on(self, data: bytes, broken: Callable[[], Exception]) -> int:
        """Give bytes to aiohttp; return how many requests have begun in them.

        The reader of a body whose framing breaks gets what ``broken`` makes at once, in mid-request too.
        """
        if self._task_handler is None and self.transport is not None:
            super().connection_made(self.transport)
        messages = self._messages
        before = len(messages)
        super().data_received(data)
        added = len(messages) - before
        if not added:
            return 0
        if not isinstance(messages[-1][0], _ErrInfo):
            self._arriving = messages[-1][1]
            return added
        payload = messages[-2][1] if added > 1 else self._arriving
        if payload is not None and not payload.is_eof():
            # The answer to that request says what was wrong, and is the last one on this connection.
            messages.pop()
            self._close = True
            payload.set_exception(broken())
            payload.feed_eof()
            return added - 1
        return added

    def end_body(self, error: Exception) -> None:
        """Have whatever reads the last request's body get this error, if some of that body is still to come."""
        payload = self._arriving
        if payload is not None and not payload.is_eof():
            payload.set_exception(error)
            payload.feed_eof()

    async def drain(self) -> None:
        """Wait until the client has read most of what it was sent."""
        await self._drain_helper()

    def request_answered(self, *, keep_alive: bool) -> None:
        """Take note that aiohttp has answered a request; called before it looks at the next one."""
        raise NotImplementedError

    async def _handle_request(self, request: web.BaseRequest, *args: Any) -> Any:
        keep_alive = True
        try:
            response, reset = await super()._handle_request(request, *args)
            keep_alive = not reset and bool(response.keep_alive)
            return response, reset
        finally:
            if request.content is self._arriving:
                self._arriving = None
            self.request_answered(keep_alive=keep_alive)

    def _process_keepalive(self) -> None:
        """Do nothing: the server looks after all its connections."""


class ConnectionServer(web.Server):
    """Makes the connections."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that it serves on."""
        return self._loop

    @property
    def handler_settings(self) -> dict[str, Any]:
        """What every connection is made with."""
        return self._kwargs

    def open_connections(self) -> Iterator[tuple[RequestHandler, asyncio.Transport]]:
        """Return them with their transports, the oldest first."""
        return iter(self._connections.items())

    @property
    def open_count(self) -> int:
        """How many there are."""
        return len(self._connections)


class ServerRunner(web.AppRunner):
    """Serves an application with a server of our own."""

    @property
    def shutdown_timeout(self) -> float:
        """How long the requests under way may take at the end, in seconds."""
        return self._shutdown_timeout

    def make_server(self, made: web.Server) -> web.Server:
        """Return the server, in place of the one which aiohttp has made."""
        raise NotImplementedError

    async def _make_server(self) -> web.Server:
        return self.make_server(await super()._make_server())


class UnixSite(web.BaseSite):
    """A listening Unix socket of a runner's, with a server of its own."""

    def __init__(self, runner: web.BaseRunner, listener: socket.socket, server: web.Server) -> None:
        super().__init__(runner)
        self._listener = listener
        self._own = server

    @property
    def name(self) -> str:
        """Where it listens."""
        return f"http://unix:{self._listener.getsockname()}:"

    async def start(self) -> None:
        """Take connections."""
        await super().start()
        self._server = await asyncio.get_running_loop().create_unix_server(self._own, sock=self._listener)


class RelayedResponse(web.StreamResponse):
    """A response that is on the client's transport already. aiohttp only learns what became of it."""

    def __init__(self, request: web.BaseRequest, status: int, reason: bytes, *, keep_alive: bool) -> None:
        super().__init__(status=status, reason=reason.decode("latin-1"))
        self._request = request
        self._keep_alive = keep_alive
        self._eof_sent = True
        self.bytes_out = 0

    @property
    def body_length(self) -> int:
        """The bytes handed to the client's transport."""
        return self.bytes_out

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:  # noqa: ARG002
        """Do nothing: the head went out with the first bytes."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:  # noqa: ARG002
        """Wait until the client has read most of it, before its next request is looked at."""
        if self._request.protocol.writing_paused:
            await drain(self._request)


def count_written(request: web.BaseRequest, count: int) -> None:
    """If anything fails from here on, aiohttp must not answer with an error of its own."""
    request.writer.output_size += count


def answer_has_begun(request: web.BaseRequest) -> bool:
    """Whether bytes of the answer went out: no other may begin."""
    return request.writer.output_size > 0


def feed(request: web.BaseRequest, parser: Any) -> None:
    """Put a parser where aiohttp has the reader of a WebSocket; what has come is fed to it first."""
    request.protocol.set_parser(parser)


async def drain(request: web.BaseRequest) -> None:
    """Wait until the client has read most of what was written."""
    await request.writer.drain()


def cancels_handlers(request: web.BaseRequest) -> bool | None:
    """Whether the server cancels the handler of a client that leaves; None when it has left already."""
    manager = request.protocol._manager  # noqa: SLF001 - it alone knows
    return None if manager is None else bool(manager.handler_cancellation)
