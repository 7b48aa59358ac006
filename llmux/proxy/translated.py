"""An answer that is translated on its way. Imported only where an engine lacks its client's dialect.

A stream is translated piece by piece, as it comes; an answer in one piece when all of it is there. The engine's
errors keep their status, in the envelope of the client. An answer that cannot be translated is an error of the
engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

from llmux.errors import EngineError
from llmux.proxy.aiohttp_client import AiohttpClient
from llmux.proxy.exchange import Exchange, ExtraFields
from llmux.proxy.heads import response_head
from llmux.proxy.relay import Relay
from llmux.proxy.token_usage import BLOCK
from llmux.targets.codecs import Translation
from llmux.targets.codecs.translation import StreamTranslator
from llmux.upstream import Framing, ResponseHead

MOST = 64 * 2**20
"""Bytes of an answer in one piece that are kept."""

_SUCCESS = range(200, 300)
_ERROR = 400
_MADE_HERE = frozenset({b"content-length", b"content-type"})
_OF_STREAMS = (b"data:", b"event:", b"id:", b":")
_BROKEN_OFF = "The engine's answer broke off."
# With these an engine keeps a connection open while it has nothing to say; a comment does so in every dialect.
_KEEPING_OPEN = (b":", b"event: ping")
_COMMENT = b": ping\n\n"


class TranslatingRelay(Relay):
    """The sink of an exchange whose answer the client gets in another dialect."""

    __slots__ = ("_engine_head", "_kept", "_opened", "_size", "_stream", "_translation", "_unusable")
    _passes_chunks = False

    def __init__(
        self,
        client: AiohttpClient,
        exchange: Exchange,
        loop: asyncio.AbstractEventLoop,
        translation: Translation,
    ) -> None:
        super().__init__(client, exchange, loop)
        self._translation = translation
        self._stream: StreamTranslator | None = None
        self._engine_head: ResponseHead | None = None
        self._kept: list[bytes] = []
        self._size = 0
        self._opened = b""  # set when the first event of the engine's stream is there
        self._unusable = ""

    def response_started(self, head: ResponseHead) -> None:
        """Begin the client's answer, if it is a stream; else wait for all of it."""
        assert self._connection is not None
        self._engine_head = head
        self.exchange.status = head.status
        if head.framing is Framing.CHUNKED:
            self._connection.unchunk()
        if head.encoded:
            self._unusable = "The engine compressed its answer, which it was not asked to do."
        elif head.event_stream and head.status in _SUCCESS and self._translation.streams:
            self._begin(head, b"text/event-stream; charset=utf-8")
            self._stream = self._translation.stream()

    def response_data(self, data: bytes) -> None:
        """Translate a piece, or keep it."""
        if self._transport.is_closing():
            self.client_closed()
            return
        exchange = self.exchange
        if exchange.answered_well:
            exchange.activity.last_byte = self._loop.time()
        if self._stream is None:
            self._size += len(data)
            if self._size <= MOST and not self._unusable:
                self._kept.append(data)
            return
        translated = self._stream.feed(data)
        if not translated and not self._stream.over and data.startswith(_KEEPING_OPEN):
            self._keep_open()
        else:
            self._send(translated)
        # Usage is read from what the engine said: its client need not be told.
        if not self._opened:
            first, self._opened, _ = (exchange.opening + data[:BLOCK]).partition(b"\n\n")
            exchange.opening = first[:BLOCK]
        exchange.keep(data[-BLOCK:])

    def response_ended(self) -> None:
        """Tell the end."""
        stream = self._stream
        if stream is None:
            self._whole()
            return
        end = stream.end()
        if stream.failed and end:  # the engine said nothing of an error, and nothing of an end
            self._break(EngineError(_BROKEN_OFF))
            return
        self._send(end)
        if stream.failed:
            self.exchange.broken = EngineError.code
        super().response_ended()

    def response_lost(self, error: EngineError) -> None:
        """Break off, if the stream is not over already."""
        if self._stream is not None and self._stream.over:
            super().response_ended()
        else:
            super().response_lost(error)

    def _break(self, error: EngineError) -> None:
        if self._started:
            self._break_off(error, between_chunks=True)
        else:
            self._settle(error)

    def _send(self, data: bytes) -> None:
        if not data:
            return
        exchange = self.exchange
        opening = exchange.opening
        super().response_data(data)
        exchange.tail.pop()  # what was translated is not where usage is looked for
        exchange.opening = opening

    def _keep_open(self) -> None:
        """Tell the client that the engine still works, or what lies between them loses patience."""
        TranslatingRelay._send(self, _COMMENT)

    def _begin(self, head: ResponseHead, kind: bytes, length: int | None = None) -> None:
        """Make the client's head."""
        modern, stream = self._client.modern, length is None
        self._chunked = self._chunk = stream and modern
        self._close_delimited = stream and not modern
        keep_alive = self._client.keep_alive and not self._close_delimited
        extra = self.exchange.extra_headers
        added = extra if isinstance(extra, ExtraFields) else ExtraFields.of(extra)
        lines = [added.lines] if added.lines else []
        lines.append(b"Content-Type: " + kind)
        if length is not None:
            lines.append(b"Content-Length: %d" % length)
        connection = None if keep_alive is modern else b"keep-alive" if keep_alive else b"close"
        self._begin_body(stream=stream)
        self._head = response_head(
            dataclasses.replace(head, event_stream=stream, written={}),
            b"",
            extra=ExtraFields(b"\r\n".join(lines), added.names | _MADE_HERE),
            chunked=self._chunked,
            connection=connection,
        )
        self._responding = True
        self._client.head_made(head, keep_alive=keep_alive)

    def _whole(self) -> None:
        """Translate an answer in one piece."""
        head = self._engine_head
        assert head is not None
        said = b"".join(self._kept)
        self._kept = []
        try:
            if self._unusable or self._size > MOST:
                raise ValueError(self._unusable or f"it is longer than {MOST} bytes")  # noqa: TRY301
            kind, body = self._translated(head.status, said)
        except ValueError as error:
            self._settle(EngineError(f"The engine's answer cannot be translated: {error}"))
            return
        streams = kind == b"text/event-stream; charset=utf-8"
        self._begin(head, kind, None if streams else len(body))
        super().response_data(body)
        self.exchange.tail.clear()
        self.exchange.tail.append(said[-BLOCK:])
        if said.startswith(_OF_STREAMS):
            self.exchange.opening = said[:BLOCK]
        super().response_ended()

    def _translated(self, status: int, said: bytes) -> tuple[bytes, bytes]:
        document = _parsed(said)
        if status >= _ERROR:
            told = said.decode(errors="replace").strip()[:1000] or f"The engine answered with status {status}."
            shown = self._translation.error(status, told if document is None else document)
            return b"application/json", _json(shown)
        if document is None and said.startswith(_OF_STREAMS):
            document = said  # some stream although they were not asked to, or do not say that they do
        elif not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        if self._translation.streams:
            return b"text/event-stream; charset=utf-8", self._translation.stream_of(document)
        return b"application/json", _json(self._translation.answer(document))


def _parsed(said: bytes) -> Any:
    try:
        return json.loads(said)
    except (ValueError, RecursionError):
        return None


def _json(document: Any) -> bytes:
    try:
        return json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(document).encode()
