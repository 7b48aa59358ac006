"""An answer that begins before its engine's: the head, and progress messages until the model is awake.

It fixes the status at 200, so later errors are reported inside: in a stream by an error event, in JSON by the
error in place of the answer. Either has no proper end, so no client takes it for an answer.

The engine's answer is then fitted in behind what was sent (``ResumedRelay``). The client reads a chunked body,
whatever the engine's framing is: chunks pass unchanged, everything else becomes chunks. The engine's head has no
place any more; if it does not match what was begun, it and its body become an error for the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from llmux.aiohttp_internals import RelayedResponse
from llmux.errors import EngineError, RequestError
from llmux.proxy.aiohttp_client import AiohttpClient
from llmux.proxy.envelope import error_body, event_of
from llmux.proxy.exchange import Exchange
from llmux.proxy.relay import ClientGoneError, Relay
from llmux.upstream import Framing, ResponseHead

PING = b'event: ping\ndata: {"type": "ping"}\n\n'
_MOST_UNREAD = 16 * 1024  # bytes; a client that does not read gets no further messages
_MOST_ERROR = 64 * 1024  # bytes of an engine's error that are kept
_SUCCESS = range(200, 300)
_BAD_GATEWAY = 502


class Dialect(enum.Enum):
    """What the client expects to read."""

    OPENAI_STREAM = "openai stream"
    ANTHROPIC_STREAM = "anthropic stream"
    JSON = "json"


class RefusedByEngineError(RequestError):
    """The engine's own error, which comes too late to be the response's status."""

    type = "engine_error"
    code = "engine_error"

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.document = _object(body)
        said = body.decode(errors="replace").strip() if self.document is None else _message(self.document)
        super().__init__((said or f"The engine answered with status {status}.")[:1000])


class EarlyResponse:
    """One client's answer, from its first byte to its engine's first."""

    def __init__(self, request: web.BaseRequest, dialect: Dialect) -> None:
        self._request = request
        self._client = AiohttpClient(request)
        self.dialect = dialect
        self.begun = False
        self.over = False  # the engine's answer has begun, or it has failed

    @property
    def stream(self) -> bool:
        """Whether the client expects server-sent events."""
        return self.dialect is not Dialect.JSON

    def begin(self, headers: Iterable[tuple[str, str]]) -> None:
        """Send the head. ``headers`` are llmux's own."""
        self.begun = True
        kind = "text/event-stream; charset=utf-8" if self.stream else "application/json"
        lines = [
            "HTTP/1.1 200 OK",
            f"Content-Type: {kind}",
            "Cache-Control: no-cache",
            "Transfer-Encoding: chunked",
            "X-Accel-Buffering: no",
            *(f"{name}: {value}" for name, value in headers),
        ]
        if not self._request.keep_alive:
            lines.append("Connection: close")
        self._write("\r\n".join([*lines, "\r\n"]).encode())

    def say(self, text: str) -> None:
        """Send a progress message; ``text`` is for people, on one line."""
        transport = self._request.transport
        if self.over or transport is None or transport.get_write_buffer_size() > _MOST_UNREAD:
            return
        if not self.stream:
            self._chunk(b"\n")
        elif self.dialect is Dialect.OPENAI_STREAM:
            self._chunk(f": {text}\n\n".encode())
        else:
            self._chunk(f": {text}\n".encode() + PING)

    def fail(self, error: RequestError, *, anthropic: bool, request_id: str) -> web.StreamResponse:
        """Send the error, and leave the answer without its end."""
        self.over = True
        document = error.document if isinstance(error, RefusedByEngineError) else None
        if document is None or (anthropic and document.get("type") != "error"):
            document = error_body(error, anthropic=anthropic, request_id=request_id)
        told = event_of(document, anthropic=anthropic) if self.stream else json.dumps(document).encode()
        with contextlib.suppress(ClientGoneError):
            self._chunk(told)
        response = RelayedResponse(self._request, 200, b"OK", keep_alive=False)
        response.force_close()
        return response

    def _chunk(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def _write(self, data: bytes) -> None:
        transport = self._client.open_transport()
        self._client.bytes_written(len(data))
        transport.write(data)


class ResumedRelay(Relay):
    """The sink of an exchange whose client has had bytes already."""

    __slots__ = ("_early", "_refusal", "_said")

    def __init__(
        self, client: AiohttpClient, exchange: Exchange, early: EarlyResponse, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(client, exchange, loop)
        self._early = early
        self._refusal: int | None = None  # the status of an answer that is not passed on
        self._said = b""

    def response_started(self, head: ResponseHead) -> None:
        """Continue after the early answer, if this one matches it."""
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
        if not self._chunk:
            self._pass_chunks(self._connection)
        self._begin_body(stream=self._early.stream)
        self.exchange.first_byte_at = self._loop.time()
        self._responding = True
        self._client.head_made(head, keep_alive=self._client.keep_alive)

    def response_data(self, data: bytes) -> None:
        """Pass the bytes on, or keep the engine's error."""
        if self._refusal is None:
            super().response_data(data)
        elif len(self._said) < _MOST_ERROR:
            self._said += data[:_MOST_ERROR]

    def response_ended(self) -> None:
        """Finish, or deliver the engine's error."""
        if self._refusal is None:
            super().response_ended()
            return
        said = self._said
        if self.exchange.status in _SUCCESS:
            wanted = "an event stream" if self._early.stream else "JSON as it is"
            said = f"The engine answered, but not with {wanted}, which was promised while it woke.".encode()
        self._settle(RefusedByEngineError(self._refusal, said))

    def response_lost(self, error: EngineError) -> None:
        """Break off, or deliver the part of the engine's error that there is."""
        if self._refusal is None:
            super().response_lost(error)
        else:
            self.response_ended()


def _object(body: bytes) -> dict[str, Any] | None:
    """Return an error's document if the engine's body is one that the SDKs understand."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and _message(document) else None


def _message(document: dict[str, Any]) -> str:
    error = document.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else ""
