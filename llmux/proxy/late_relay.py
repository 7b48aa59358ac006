"""The relay for a client whose answer has begun: the engine's is fitted in behind what was sent.

The client reads a chunked body, whatever the engine's framing is: chunks pass through as they are, all else
becomes chunks. The engine's head has no place any more; if it says something other than what was begun, it and its
body become an error for the caller to tell.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from llmux.errors import EngineError
from llmux.proxy.early import Early, RefusedByEngineError
from llmux.proxy.exchange import Exchange
from llmux.proxy.relay import Relay
from llmux.upstream import Framing, ResponseHead

_MOST = 64 * 1024  # bytes of an engine's error that are kept
_SUCCESS = range(200, 300)
_BAD_GATEWAY = 502


class LateRelay(Relay):
    """The sink of an exchange whose client has had bytes already."""

    __slots__ = ("_early", "_refusal", "_said")

    def __init__(
        self, request: web.BaseRequest, exchange: Exchange, early: Early, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(request, exchange, loop)
        self._early = early
        self._refusal: int | None = None  # the status of an answer that is not passed on
        self._said = b""

    def response_started(self, head: ResponseHead) -> None:
        """Go on where the early answer stands, if this one fits."""
        assert self._connection is not None
        self.exchange.status = head.status
        fits = head.status in _SUCCESS and not head.encoded and head.event_stream is self._early.stream
        if not fits:
            self._refusal = head.status if head.status not in _SUCCESS else _BAD_GATEWAY
            if head.framing is Framing.CHUNKED:
                self._connection.unchunk()
            return
        self._early.over = True
        self._chunked = True
        self._chunk = head.framing is not Framing.CHUNKED
        self._event_stream = self._early.stream
        self.exchange.first_byte_at = self._loop.time()
        self.response = self._answer(head, keep_alive=self._request.keep_alive)

    def response_data(self, data: bytes) -> None:
        """Pass the bytes on, or keep what the engine says of its error."""
        if self._refusal is None:
            super().response_data(data)
        elif len(self._said) < _MOST:
            self._said += data[:_MOST]

    def response_ended(self) -> None:
        """Finish, or hand over the engine's error."""
        if self._refusal is None:
            super().response_ended()
            return
        said = self._said
        if self.exchange.status in _SUCCESS:
            wanted = "an event stream" if self._early.stream else "JSON as it is"
            said = f"The engine answered, but not with {wanted}, which was promised while it woke.".encode()
        self._settle(RefusedByEngineError(self._refusal, said))

    def response_lost(self, error: EngineError) -> None:
        """Break off, or tell what there is of the engine's error."""
        if self._refusal is None:
            super().response_lost(error)
        else:
            self.response_ended()
