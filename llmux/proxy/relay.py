"""The answer on its way from the engine's connection to the client's.

Theory of operation
===================

The relay is the sink of the engine's connection: it makes the response's head, and writes it, and every block
of body bytes after it, on the client's transport in the very callback that delivered them. The client's side is a
``Client``: the connection of the fast path, or a request of aiohttp's (``aiohttp_client``).

What flows how:

    engine's framing    HTTP/1.1 client                  HTTP/1.0 client
    length, none        the same bytes                   the same bytes
    chunked             the same bytes                   contents only, then close
    until close         each block as one chunk          the same bytes, then close
    tunnel (101)        the same bytes, then close       (never asked for)

Back-pressure: the client's protocol is told by its transport when the buffer is full; then the engine's
connection is not read until it has drained. At most the transport's high-water mark and one block, or a few
chunks, are held.

Most of what is relayed is one event in one chunk, thousands of times a second. The engine's connection gives such
a chunk to the client's transport by itself (``pass_chunks``); it is counted, and the client looked after, for
several of them at once (``chunks_passed``, ``check_client``). ``EngineActivity.look`` has what has passed told. Of
what the native relay passes it is told the sums (``passed_natively``).

An answer ends in exactly one way, which ``on_end`` is called with (None, or the error):

- complete: the last byte has been handed to the client's transport;
- before the head went out: an error, which the caller turns into a response (``EngineError``, or
  ``UnavailableError`` when the exchange was cut);
- after that: *broken off*. The body is left without its proper end and the client's connection is closed, so
  that the client cannot take it for complete. An event stream is given an error event first, where that can
  be done without falling into the middle of a chunk;
- the client has gone: ``ClientGoneError``.

After 101 (``Tunnel``) bytes go both ways, unparsed, until either side closes. From the engine to the client the
bytes take the relay's path, as any response's do. From the client to the engine they come through aiohttp's
protocol, which after an upgrade feeds what arrives to a *payload parser* (meant for its own WebSocket reader):
the tunnel takes that place and parses nothing. Bytes that came in one segment with the handshake are fed first,
by ``set_parser``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from llmux.core.effects import CutReason
from llmux.errors import CancelledRequestError, EngineError, RequestError, UnavailableError
from llmux.proxy.envelope import error_event
from llmux.proxy.exchange import ERROR, Exchange
from llmux.proxy.heads import fields_of_redirect, response_head
from llmux.proxy.token_usage import BLOCK, BLOCKS, EVENT, ends_of
from llmux.upstream import EngineConnection, Framing, ResponseHead
from llmux.upstream.native import Passed
from llmux.upstream.sockets import reset


class Tunnel:
    """The client's direction of a tunnel, in the shape of aiohttp's payload parsers."""

    __slots__ = ("_connection", "_on_close", "_paused", "_transport")

    def __init__(
        self,
        connection: EngineConnection,
        transport: asyncio.Transport,
        on_close: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._transport = transport
        self._on_close = on_close
        self._paused = False
        connection.watch_upload(self)

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Pass bytes on to the engine. True would tell aiohttp to close, which the relay does."""
        if self._paused and self._transport.is_reading():
            # aiohttp had paused too, for the bytes that came before the 101, and has resumed since.
            self._transport.pause_reading()
        if not self._connection.transport.is_closing():
            self._connection.transport.write(data)
        return False, b""

    def feed_eof(self) -> None:
        """Close the engine's side too: the client has gone."""
        self._on_close()

    def upload_paused(self) -> None:
        """Stop reading from the client until the engine has read."""
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def upload_resumed(self) -> None:
        """Read from the client again."""
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()


# After breaking off, how long a client may take to read what it was sent.
_FLUSH_TIMEOUT = 10.0
# How often to look whether a client that does not read is still there. A transport that closes with bytes
# in its buffer, as after a half-close, reports nothing before they are gone.
_LOOK_EVERY = 1.0
# Module constants: reading a member off its enum costs more.
_CHUNKED = Framing.CHUNKED
_UNTIL_CLOSE = Framing.UNTIL_CLOSE
_TUNNEL = Framing.TUNNEL
_REDIRECTION = 3  # hundred
_OPENING = 64  # bytes of an event stream's beginning within which no event is whole

_CUT_MESSAGES = {
    CutReason.DRAIN_DEADLINE: "The model had to make room for another one before this request was done.",
    CutReason.STOPPING: "llmux is stopping.",
    CutReason.CANCELLED: "An operator has cancelled this request.",
}


class ClientGoneError(ConnectionResetError):
    """The client closed its connection before the end of the response."""


class Flow(Protocol):
    """Where the client's transport says whether the client reads."""

    @property
    def writing_paused(self) -> bool:
        """Whether the transport's buffer is full."""


class Client(Protocol):
    """The client's side of one exchange, as a relay sees it."""

    modern: bool  # it speaks HTTP/1.1: chunks are understood
    keep_alive: bool  # it would use its connection again

    @property
    def flow(self) -> Flow:
        """Where the client's transport says whether the client reads."""

    def open_transport(self) -> asyncio.Transport:
        """Return the transport. Raises ClientGoneError when it is closed."""

    def head_made(self, head: ResponseHead, *, keep_alive: bool) -> None:
        """Take note of the response that the relay is about to write."""

    def bytes_written(self, count: int) -> None:
        """Take note that the first ``count`` bytes of the response went out: no other may begin."""

    def force_close(self) -> None:
        """Do not use the client's connection again."""

    def tunnel(self, tunnel: Tunnel) -> None:
        """Feed what the client sends from now on to ``tunnel``."""

    async def drain(self) -> None:
        """Wait until the client has read most of what was written."""


class Relay:
    """The sink of one exchange."""

    __slots__ = (
        "_chunk",
        "_chunked",
        "_client",
        "_close_delimited",
        "_connection",
        "_counted",
        "_draining",
        "_event_stream",
        "_flow",
        "_head",
        "_look",
        "_loop",
        "_on_end",
        "_responding",
        "_transport",
        "_tunnel",
        "exchange",
        "over",
    )

    _passes_chunks = True  # past what looks at each

    def __init__(
        self,
        client: Client,
        exchange: Exchange,
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[[Exception | None], None] | None = None,
    ) -> None:
        """Raise ClientGoneError when the client has left. Without ``on_end``, ``attach`` must give one."""
        self.exchange = exchange
        self.over = False
        self._client = client
        self._flow = client.flow
        self._transport = client.open_transport()
        self._loop = loop
        self._on_end = on_end
        self._connection: EngineConnection | None = None
        self._responding = False  # the head is made
        self._head = b""  # made, and waiting for the first bytes
        self._chunked = False  # the client gets a chunked body
        self._chunk = False  # and it is made here, from one that ends with the engine's connection
        self._close_delimited = False  # the client can tell the body's end by the connection's end only
        self._event_stream = False
        self._counted = False  # its events are counted, though no one looks at them
        self._draining: asyncio.Task[None] | None = None
        self._look: asyncio.TimerHandle | None = None
        self._tunnel: Tunnel | None = None

    def attach(
        self, connection: EngineConnection, on_end: Callable[[Exception | None], None] | None = None
    ) -> None:
        """Use this connection for the exchange, which goes on if it was over."""
        self._connection = connection
        self.over = False
        if on_end is not None:
            self._on_end = on_end

    # ---- the engine's connection calls these

    def response_started(self, head: ResponseHead) -> None:
        """Make the client's head, to be written together with the first bytes."""
        assert self._connection is not None
        framing, client = head.framing, self._client
        modern, keep_alive = client.modern, client.keep_alive
        if framing is _CHUNKED:
            if modern:
                self._chunked = True
                self._pass_chunks(self._connection)
            else:
                self._connection.unchunk()
                self._close_delimited = True
        elif framing is _UNTIL_CLOSE:
            self._chunked = self._chunk = modern
            self._close_delimited = not modern
        if self._close_delimited or framing is _TUNNEL:
            keep_alive = False
        connection = None
        if keep_alive is not modern and framing is not _TUNNEL:
            connection = b"keep-alive" if keep_alive else b"close"
        if head.event_stream and not head.encoded:
            self._begin_body(stream=True)
        extra = self.exchange.extra_headers
        if head.status // 100 == _REDIRECTION:
            extra = fields_of_redirect(head, self.exchange)
        self._head = response_head(
            head,
            self._connection.length,
            extra=extra,
            chunked=self._chunked,
            connection=connection,
        )
        self.exchange.status = head.status
        self._responding = True
        client.head_made(head, keep_alive=keep_alive)
        if framing is _TUNNEL:
            self._tunnel = Tunnel(self._connection, self._transport, self.client_closed)

    def response_data(self, data: bytes) -> None:  # noqa: C901, with each block of an answer
        """Hand the bytes to the client's transport."""
        exchange = self.exchange
        transport = self._transport
        if transport.is_closing():
            self.client_closed()
            return
        if self._chunk and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        now = self._loop.time()
        size = len(data)
        exchange.tail.append(data if size <= BLOCK else ends_of(data))
        if len(exchange.tail) >= 2 * BLOCKS:
            del exchange.tail[0 if self._event_stream else 1 : BLOCKS]
        head = self._head
        if head:
            if self._event_stream:
                exchange.opening = data[:BLOCK]
            data = head + data
            self._head = b""
            exchange.first_byte_at = now
            self._client.bytes_written(len(data))
        elif self._event_stream and len(exchange.opening) < _OPENING:
            exchange.opening += data[:BLOCK]  # the head, or a chunk's size, came alone
        if size and self._chunked:
            assert self._connection is not None
            self._connection.write_block(transport, data)
        else:
            transport.write(data)
        if head and self._tunnel is not None:
            self._client.tunnel(self._tunnel)
        exchange.bytes_out += len(data)
        activity = exchange.activity
        if exchange.status < ERROR:  # type: ignore[operator]
            activity.last_byte = now
        if self._counted or (activity.counting and self._event_stream):
            self._count(data.count(EVENT))
        if self._flow.writing_paused and self._draining is None:
            self._hold()

    def _pass_chunks(self, connection: EngineConnection) -> None:
        """Have whole chunks go to the client at once."""
        if self._passes_chunks:
            self.exchange.activity.untold.add(connection)
            connection.pass_chunks(self._transport, self)

    def chunks_passed(self, chunks: list[bytes]) -> None:
        """Take note of whole chunks that were written."""
        exchange = self.exchange
        exchange.bytes_out += sum(map(len, chunks))
        exchange.tail = [*exchange.tail, *chunks][-BLOCKS:]
        activity = exchange.activity
        activity.last_byte = self._loop.time()
        if self._counted or (activity.counting and self._event_stream):
            self._count(b"".join(chunks).count(EVENT))

    def passed_natively(self, passed: Passed) -> None:
        """Take note of whole chunks that the native relay has passed."""
        exchange = self.exchange
        exchange.bytes_out += passed.size
        exchange.tail = [*exchange.tail, *passed.tail][-BLOCKS:]
        activity = exchange.activity
        if passed.last:
            activity.last_byte = max(activity.last_byte or 0.0, passed.last)
        if self._counted or (activity.counting and self._event_stream):
            self._count(passed.events)

    def check_client(self) -> None:
        """Go on only if the client takes what it is given."""
        if self._transport.is_closing():
            self.client_closed()
        elif self._flow.writing_paused and self._draining is None:
            self._hold()

    def _begin_body(self, *, stream: bool) -> None:
        self._event_stream = stream
        self._counted = stream and self.exchange.counted

    def _count(self, events: int) -> None:
        """Take note of events that have begun in what was written."""
        self.exchange.activity.streamed += events
        self.exchange.events += events

    def response_ended(self) -> None:
        """Finish: the last byte has been handed over."""
        if self._chunk:
            if self._transport.is_closing():
                self.client_closed()
                return
            self._transport.write(b"0\r\n\r\n")
        self._settle(None)

    def response_lost(self, error: EngineError) -> None:
        """Turn it into an error, or break the response off if some of it has gone out."""
        if self._started:
            self._break_off(error)
        else:
            self._settle(error)

    # ---- the client's side

    @property
    def _started(self) -> bool:
        return self._responding and not self._head

    def client_closed(self) -> None:
        """Take note that the client has closed its connection."""
        if self._connection is not None:
            self._connection.abort()
        self._transport.abort()
        self._settle(ClientGoneError("The client closed its connection."))

    def _hold(self) -> None:
        """Stop reading from the engine until the client has read."""
        assert self._connection is not None
        self._connection.pause_reading()
        self._draining = self._loop.create_task(self._client.drain(), name="llmux: wait for a slow client")
        self._draining.add_done_callback(self._drained)
        self._look = self._loop.call_later(_LOOK_EVERY, self._look_after_client)

    def _look_after_client(self) -> None:
        if self.over:
            return
        if self._transport.is_closing():
            self.client_closed()
        else:
            self._look = self._loop.call_later(_LOOK_EVERY, self._look_after_client)

    def _drained(self, task: asyncio.Task[None]) -> None:
        self._draining = None
        if self._look is not None:
            self._look.cancel()
        gone = task.cancelled() or task.exception() is not None
        if self.over or self._connection is None:
            return
        if gone or self._transport.is_closing():
            self.client_closed()
        else:
            self._connection.resume_reading()

    # ---- the end

    def cut(self, reason: CutReason, retry_after: float | None) -> None:
        """End the exchange from outside."""
        if self.over:
            return
        between = self._between_chunks
        if self._connection is not None:
            self._connection.abort()
        error = cut_error(reason, retry_after)
        if self._started:
            self._break_off(error, between_chunks=between)
        else:
            self._settle(error)

    @property
    def _between_chunks(self) -> bool:
        # Chunks that are made here go out whole.
        return self._chunk or (self._connection is not None and self._connection.between_chunks)

    def _break_off(self, error: RequestError, *, between_chunks: bool | None = None) -> None:
        self.exchange.broken = error.code
        self._client.force_close()
        transport = self._transport
        if not transport.is_closing():
            if between_chunks is None:
                between_chunks = self._between_chunks
            if self._event_stream and self._chunked and between_chunks:
                exchange = self.exchange
                event = error_event(error, anthropic=exchange.anthropic, request_id=exchange.request_id)
                chunk = b"%x\r\n%b\r\n" % (len(event), event)
                transport.write(chunk)
                exchange.bytes_out += len(chunk)
            if self._close_delimited:
                # To this client a proper close would mean the proper end: reset the connection instead.
                reset(transport)
            elif transport.get_write_buffer_size():
                # The client's protocol closes the connection, which waits until all has been read. Not for ever.
                self._loop.call_later(_FLUSH_TIMEOUT, transport.abort)
        self._settle(None)

    def _settle(self, error: Exception | None) -> None:
        if self.over:
            return
        self.over = True
        if self._chunked and self._connection is not None:
            self.exchange.activity.untold.discard(self._connection)
        if self._look is not None:
            self._look.cancel()
        assert self._on_end is not None
        self._on_end(error)

    def detach(self) -> None:
        """Let go of everything, however it ended."""
        self.over = True
        if self._chunked and self._connection is not None:
            self.exchange.activity.untold.discard(self._connection)
        if self._look is not None:
            self._look.cancel()
        # A task that still waits for the client is left to itself: to cancel it would cancel the future that
        # aiohttp's protocol hands to everything that waits.
        self._connection = None
        self._on_end = None
        del self._client  # which may hold the relay: what ends is freed at once, not by the garbage collector


def cut_error(reason: CutReason, retry_after: float | None) -> RequestError:
    """Return the error that a client gets whose request was cut."""
    if reason is CutReason.CANCELLED:  # to be tried again would be to defy the operator
        return CancelledRequestError(_CUT_MESSAGES[reason])
    return UnavailableError(_CUT_MESSAGES[reason], code=reason.value, retry_after=retry_after)
