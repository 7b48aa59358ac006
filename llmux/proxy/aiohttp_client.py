"""A request of aiohttp's server as a relay's client.

aiohttp parses the client's requests and runs the handler; the answer bypasses it. aiohttp only sees a
``RelayedResponse`` that counts as sent; from it aiohttp learns whether the client's connection may be used again.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, cast

from aiohttp import HttpVersion11, web

from llmux.aiohttp_internals import RelayedResponse, count_written, drain, feed
from llmux.proxy.relay import ClientGoneError, Tunnel
from llmux.upstream import ResponseHead


class Tap(Protocol):
    """Also gets the bytes that a client gets."""

    def took(self, data: bytes) -> None:
        """Handle bytes that were written to the client's transport."""

    def ended(self, body: bytes | None, **fields: Any) -> None:
        """Handle the outcome of the request; ``body`` is an answer made by llmux itself."""


TAP: web.RequestKey[Tap] = web.RequestKey("TAP", Tap)
"""The tap of a request, if it has one."""


class _Tapped:
    """A transport with a tap."""

    tapped = True  # for ``upstream.native``: nothing may bypass it

    def __init__(self, transport: asyncio.Transport, tap: Tap) -> None:
        self._transport = transport
        self._tap = tap

    def write(self, data: bytes) -> None:
        self._transport.write(data)
        self._tap.took(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


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
        tap = self._request.get(TAP)
        return transport if tap is None else cast("asyncio.Transport", _Tapped(transport, tap))

    def head_made(self, head: ResponseHead, *, keep_alive: bool) -> None:
        """Make the response that aiohttp sees."""
        self.response = RelayedResponse(self._request, head.status, head.reason, keep_alive=keep_alive)

    def bytes_written(self, count: int) -> None:
        """If anything fails from here on, aiohttp must not answer with an error of its own."""
        count_written(self._request, count)

    def force_close(self) -> None:
        """Do not use the client's connection again."""
        if self.response is not None:
            self.response.force_close()

    def tunnel(self, tunnel: Tunnel) -> None:
        """Put the tunnel where aiohttp has the reader of a WebSocket; what has come is fed to it first."""
        feed(self._request, tunnel)

    async def drain(self) -> None:
        """Wait until the client has read most of what was written."""
        await drain(self._request)
