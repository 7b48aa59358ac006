"""A request of aiohttp's server as a relay's client.

aiohttp parses the client's requests and runs the handler; the answer bypasses it. What aiohttp gets to see is a
``RelayedResponse`` that counts as sent; from it aiohttp learns whether the client's connection may be used again.
"""

from __future__ import annotations

import asyncio

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from llmux.proxy.relay import ClientGoneError
from llmux.proxy.tunnel import Tunnel
from llmux.upstream import ResponseHead


class RelayedResponse(web.StreamResponse):
    """A response that is on the client's transport already. aiohttp only learns what became of it."""

    def __init__(self, request: web.BaseRequest, head: ResponseHead, *, keep_alive: bool) -> None:
        super().__init__(status=head.status, reason=head.reason.decode("latin-1"))
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
            await self._request.writer.drain()


def answer_has_begun(request: web.BaseRequest) -> bool:
    """Whether bytes of the answer went out: no other may begin."""
    return request.writer.output_size > 0


def cancels_handlers(request: web.BaseRequest) -> bool:
    """Whether the server cancels the handler of a client that leaves. Raises ClientGoneError when it has left."""
    manager = request.protocol._manager  # noqa: SLF001 - it alone knows; None: the client has left already
    if manager is None:
        raise ClientGoneError("The client has left.")
    return bool(manager.handler_cancellation)


class AiohttpClient:
    """The client of one request."""

    __slots__ = ("_request", "flow", "keep_alive", "modern", "response")

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self.modern = request.version >= HttpVersion11
        self.keep_alive = request.keep_alive
        self.flow = request.protocol
        self.response: RelayedResponse | None = None

    def open_transport(self) -> asyncio.Transport:
        """Return the transport. Raises ClientGoneError when it is closed."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ClientGoneError("The client has gone.")
        return transport

    def response_started(self, head: ResponseHead, *, keep_alive: bool) -> None:
        """Make what aiohttp gets to see of it."""
        self.response = RelayedResponse(self._request, head, keep_alive=keep_alive)

    def bytes_written(self, count: int) -> None:
        """If anything fails from here on, aiohttp must not answer with an error of its own."""
        self._request.writer.output_size += count

    def force_close(self) -> None:
        """Do not use the client's connection again."""
        if self.response is not None:
            self.response.force_close()

    def tunnel(self, tunnel: Tunnel) -> None:
        """Put the tunnel where aiohttp has the reader of a WebSocket; what has come is fed to it first."""
        self._request.protocol.set_parser(tunnel)  # type: ignore[arg-type]

    async def drain(self) -> None:
        """Wait until the client has read most of what was written."""
        await self._request.writer.drain()
