"""An answer that begins before its engine's: the head, and signs of life until the model is awake.

It fixes the status at 200, so whatever goes wrong afterwards is told inside: in a stream by an error event, in
JSON by the error in place of the answer. Either is left without its proper end: nobody takes it for an answer.
"""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from llmux.errors import RequestError
from llmux.proxy.envelope import error_body, event_of
from llmux.proxy.relay import ClientGoneError, RelayedResponse
from llmux.upstream import ResponseHead

PING = b'event: ping\ndata: {"type": "ping"}\n\n'
_MOST_UNREAD = 16 * 1024  # bytes; a client that does not read is told nothing more


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


class Early:
    """One client's answer, from its first byte to its engine's first."""

    def __init__(self, request: web.BaseRequest, dialect: Dialect) -> None:
        self._request = request
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
        self._write("\r\n".join([*lines, "\r\n"]).encode("latin-1"))

    def say(self, text: str) -> None:
        """Send a sign of life; ``text`` is for people, on one line."""
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
        """Tell the error, and leave the answer without its end."""
        self.over = True
        document = error.document if isinstance(error, RefusedByEngineError) else None
        if document is None or (anthropic and document.get("type") != "error"):
            document = error_body(error, anthropic=anthropic, request_id=request_id)
        told = event_of(document, anthropic=anthropic) if self.stream else json.dumps(document).encode()
        with contextlib.suppress(ClientGoneError):
            self._chunk(told)
        response = RelayedResponse(self._request, ResponseHead(status=200, reason=b"OK"), keep_alive=False)
        response.force_close()
        return response

    def _chunk(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def _write(self, data: bytes) -> None:
        request = self._request
        if request.transport is None or request.transport.is_closing():
            raise ClientGoneError("The client has gone.")
        # If anything fails from here on, aiohttp must not answer with an error of its own.
        request.writer.output_size += len(data)
        request.transport.write(data)


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
