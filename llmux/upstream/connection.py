"""One connection to an engine.

Theory of operation
===================

A connection carries one exchange at a time. ``begin`` gives it a *sink* and the caller writes the request;
from then on two things happen independently of each other:

- The request's body goes out in ``send``, a coroutine in the caller's task, slice by slice, waiting whenever
  the transport's buffer is full. It ends early when the response has ended or the connection is lost: an
  engine may answer (413, say) without reading the body.
- The response comes in through ``data_received``. The head is gathered up to its empty line and parsed at
  once; interim responses are dropped, and too many of them are an error. After that every block of bytes goes
  to the sink as the very object that the transport delivered, chunk framing included, while the connection
  follows the framing to know where the body ends. Nothing is awaited on this path: it is callbacks all
  the way to the client's socket.

The sink hears ``response_started``, then ``response_data`` (always at least once, perhaps with nothing), and
then exactly one of ``response_ended`` and ``response_lost``; or ``response_lost`` alone. After either, or
after ``abort``, the connection has let go of the sink and will not call it again.

    idle ──begin──▶ head ──▶ body (length | chunked | until close | tunnel) ──▶ idle
                     │ 1xx ↺                        │
                     └─────────── lost ◀────────────┘

Whole chunks go past the sink (``pass_chunks``). Where there is a native relay, the stream is *lent* to it with its
first chunks (``write_block``), and comes back with whatever is not a whole chunk: see ``native.py``.

A connection is fit for another exchange (``reusable``) when both messages ended properly, the engine did not
say otherwise, and nothing came after the end of the response. Whatever arrives on an idle connection ends it:
it would be taken for the answer to the next request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol, cast

from llmux.upstream.engine import EngineLostError, EngineProtocolError
from llmux.upstream.head import (
    CHUNK_STARTS,
    MAX_HEAD,
    MOST_DIGITS,
    MOST_KNOWN,
    ChunkError,
    ChunkTracker,
    Framing,
    ResponseHead,
    are_chunks,
    around_length,
    parse_head,
    without_id,
)
from llmux.upstream.native import WORTHWHILE, Back, NativeRelay, Passed
from llmux.upstream.sockets import hang_up, has_all

# Written without a pause at most this much, then the loop gets a turn: an engine on the same machine can
# take bytes as fast as they are written, and the others wait meanwhile.
_TURN = 1 << 20

# What an engine may send in interim responses before its answer: so many bytes at once and a second, each response
# counted as INTERIM_LEAST at least. Progress reports keep far below it; a flood would hold up all the others.
INTERIM_BURST = MAX_HEAD
INTERIM_RATE = 16 * 1024
INTERIM_LEAST = 256

STALE_WITHIN = 1.0  # seconds: what a pooled connection was given counts as not sent if it ends so soon

_END_OF_HEAD = b"\r\n\r\n"
_START_OF_HEAD = b"HTTP/1."
_CRLF = b"\r\n"
_CR = b"\r"

AT_ONCE = 8  # chunks that have passed, of which the sink is told in one call
AFTER_LOSS = 8  # as many times that, before a stream is lent again that had come back too soon

# Module constants: reading a member off its enum costs more, and this is the innermost loop.
_MOST_CHUNK = len(CHUNK_STARTS)
_MOST_CHUNKS = 16 * 1024  # bytes; of a larger block the sink keeps a part only
_NONE = Framing.NONE
_LENGTH = Framing.LENGTH
_CHUNKED = Framing.CHUNKED
_UNTIL_CLOSE = Framing.UNTIL_CLOSE
_TUNNEL = Framing.TUNNEL


# A head as ``around_length`` has it, and what it says.
LastHead = tuple[bytes, bytes, ResponseHead]


class ResponseSink(Protocol):
    """Receives a response. All calls are synchronous, from the event loop."""

    def response_started(self, head: ResponseHead) -> None:
        """Take the head. ``response_data`` follows at once."""

    def response_data(self, data: bytes) -> None:
        """Take body bytes, as framed by the engine; or the chunks' contents after ``unchunk``."""

    def response_ended(self) -> None:
        """Take note that the response is complete."""

    def response_lost(self, error: EngineLostError | EngineProtocolError) -> None:
        """Take note that there will be no more of it."""


class ChunkCounter(Protocol):
    """Is told of chunks that have gone past the sink."""

    def chunks_passed(self, chunks: list[bytes]) -> None:
        """Take note of chunks, and do nothing else. Called before the sink hears anything more."""

    def passed_natively(self, passed: Passed) -> None:
        """Take note of chunks that the native relay has passed, and do nothing else."""

    def check_client(self) -> None:
        """See how whatever gets the chunks gets on with them: called after every ``AT_ONCE`` of them."""


class UploadWatcher(Protocol):
    """Is told when the engine does not take bytes as fast as they come (a tunnel's other side)."""

    def upload_paused(self) -> None:
        """Stop writing."""

    def upload_resumed(self) -> None:
        """Go on."""


class EngineConnection(asyncio.Protocol):
    """One connection to an engine; see the module's theory of operation."""

    __slots__ = (
        "_begun",
        "_between",
        "_buffer",
        "_chunks",
        "_client",
        "_counter",
        "_framing",
        "_head_request",
        "_interim",
        "_interim_since",
        "_last_head",
        "_left",
        "_lent",
        "_native",
        "_passed",
        "_payload",
        "_reading_paused",
        "_repeats",
        "_request_sent",
        "_sink",
        "_told",
        "_until_lent",
        "_upgrade",
        "_watcher",
        "_writable",
        "_write_chunk",
        "_writing_paused",
        "idle_since",
        "length",
        "loop",
        "lost",
        "on_idle_end",
        "on_interim",
        "pooled",
        "received",
        "reusable",
        "taken",
        "transport",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, native: NativeRelay | None = None) -> None:
        self.loop = loop
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)  # until connection_made
        self.lost = False
        self.reusable = False
        self.received = False  # anything at all since ``begin``
        self.taken = False  # it ended when the engine's host had all of the request: the engine may have read it
        self.pooled = False  # it was taken from the pool: it may have died there
        self.idle_since = 0.0
        self.length = b""  # of the answer under way, as its head says; empty: it says none
        self.on_idle_end: Callable[[EngineConnection], None] | None = None  # set while it is pooled
        self.on_interim: Callable[[bytes], None] | None = None  # is given the heads of interim responses
        self._sink: ResponseSink | None = None
        self._told = ""  # the ID of the request
        self._repeats = False  # the engine repeats it in each head, which would be alike without it
        self._between = False  # the body stands between two chunks, and whole ones go past the sink
        self._client: asyncio.Transport | None = None  # that they are written to
        self._write_chunk: Callable[[bytes], None] = _nowhere
        self._native = native
        self._lent = 0  # the key of the stream at the native relay; 0: it is here
        self._until_lent = 1  # in calls of ``_tell_many``; 0: as soon as it stands between two chunks
        self._counter: ChunkCounter | None = None  # of these
        self._passed: list[bytes] = []  # chunks that the sink is still to be told of
        self._framing: Framing | None = None  # None: the head is still to come
        self._begun = 0.0
        self._buffer = b""
        self._interim = 0  # bytes of interim responses since the request
        self._interim_since = 0.0
        self._last_head: LastHead | None = None  # most engines send the same again and again
        self._left = 0
        self._chunks: ChunkTracker | None = None
        self._payload: list[bytes] | None = None
        self._head_request = False
        self._upgrade = False
        self._request_sent = False
        self._reading_paused = False
        self._writing_paused = False
        self._writable: asyncio.Future[None] | None = None
        self._watcher: UploadWatcher | None = None

    # ---- the request

    def begin(
        self,
        sink: ResponseSink,
        *,
        head_request: bool = False,
        upgrade: bool = False,
        whole: Iterable[bytes | memoryview] = (),
        told: str = "",
    ) -> None:
        """Start an exchange: what comes in from now on is for ``sink``. ``whole``: all of a request, in pieces.

        If the engine repeats ``told``, the request's ID, in an `X-Request-ID`, the sink does not get that field.
        """
        assert self._sink is None, "a connection carries one exchange at a time"
        self._sink = sink
        self._framing = None
        self._head_request = head_request
        self._upgrade = upgrade
        if head_request or upgrade:
            self._last_head = None  # the same head would mean something else
        self._interim = 0
        self._told = told
        self._request_sent = False
        self._begun = self.loop.time()
        self.taken = False
        self._payload = None
        self._counter = None
        self.received = False
        self.reusable = False
        for piece in whole:
            self._request_sent = True
            self.transport.write(piece)

    def write_whole(self, request: bytes) -> None:
        """Write all of a small request."""
        self._request_sent = True
        self.transport.write(request)

    async def send(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a request piece by piece, as fast as the engine takes it, until it or the answer ends."""
        turn = 0
        for piece in pieces:
            if self._sink is None:
                return
            self.transport.write(piece)
            turn += len(piece)
            if self._writing_paused:
                turn = 0
                self._writable = self.loop.create_future()
                try:
                    await self._writable
                finally:
                    self._writable = None
            elif turn >= _TURN:
                turn = 0
                await asyncio.sleep(0)
        if self._sink is not None:
            self._request_sent = True

    def watch_upload(self, watcher: UploadWatcher) -> None:
        """Tell ``watcher`` when to pause writing (a tunnel writes from callbacks, not from a coroutine)."""
        self._watcher = watcher
        if self._writing_paused:
            watcher.upload_paused()

    def pause_writing(self) -> None:
        """Take note that the transport's buffer is full."""
        self._writing_paused = True
        if self._watcher is not None:
            self._watcher.upload_paused()

    def resume_writing(self) -> None:
        """Take note that the transport's buffer has drained."""
        self._writing_paused = False
        self._wake_sender()
        if self._watcher is not None:
            self._watcher.upload_resumed()

    def _wake_sender(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # ---- the response

    def was_stale(self, error: Exception) -> bool:
        """Whether the exchange ended with ``error`` on a connection that had died while it was pooled.

        Or that died of age as the request was on its way: without a byte of an answer, what was written to a
        pooled connection counts as not sent, if the end came soon. An engine that keeps a whole request for longer
        works on it. A fresh connection is never stale.
        """
        if not self.pooled or self.received or not isinstance(error, EngineLostError):
            return False
        return not self._all_sent or self.loop.time() - self._begun < STALE_WITHIN

    @property
    def _all_sent(self) -> bool:
        """Whether all of the request was written, and the engine takes it."""
        return self._request_sent and not self._writing_paused

    @property
    def between_chunks(self) -> bool:
        """Whether a chunked body stands between two of its chunks."""
        return self._chunks is not None and self._chunks.between_chunks

    def pass_chunks(self, client: asyncio.Transport, counter: ChunkCounter) -> None:
        """Write each whole chunk to ``client``, past the sink. The first bytes of a body are for the sink."""
        self._client, self._write_chunk, self._counter = client, client.write, counter
        self._until_lent = 1
        if self._native is not None:
            self._until_lent = self._native.patience
            if not self._until_lent:
                self._write_chunk = self._lend

    def unchunk(self) -> None:
        """Deliver the chunks' contents only: the sink's reader does not know chunks."""
        self._payload = []

    def pause_reading(self) -> None:
        """Take nothing more from the engine for now."""
        assert not self._lent, "a client whose buffer is empty is not waited for"
        if not self._reading_paused and not self.transport.is_closing():
            self._reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Take bytes from the engine again."""
        if self._reading_paused:
            self._reading_paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:  # noqa: C901, the innermost loop
        """Pass the bytes on, and follow the framing to know where the response ends."""
        if self._between:
            size = len(data)
            # In line: ``is_one_chunk(data)``, which most events of a stream are. No more is done with each than is
            # needed for it to be on its way.
            if (size < _MOST_CHUNK and data.startswith(CHUNK_STARTS[size]) and data.endswith(_CRLF)) or (
                size <= _MOST_CHUNKS and are_chunks(data)
            ):
                try:
                    self._write_chunk(data)
                except RuntimeError:  # uvloop's, of a transport that is closed: its client has just left
                    self._tell_many()
                    return
                passed = self._passed
                passed.append(data)
                if len(passed) >= AT_ONCE:
                    self._tell_many()
                return
        sink = self._sink
        if sink is None:
            # No exchange expects this. (Or the exchange was aborted a moment ago.)
            self.abort()
            return
        self.received = True
        framing = self._framing
        if framing is _CHUNKED:
            self._chunked_data(sink, data)
        elif framing is None:
            # Without the ID only to compare them: of what comes in pieces no one knows yet where its body begins.
            if (
                (last := self._last_head) is None
                or self._buffer
                or not self._same_head(
                    sink, last, without_id(data, self._told.encode()) if self._repeats else data
                )
            ):
                self._head_data(sink, data)
        elif framing is _LENGTH:
            left = self._left - len(data)
            if left > 0:
                self._left = left
                sink.response_data(data)
            else:
                self._end(sink, data, len(data) + left)
        else:
            sink.response_data(data)

    def tell_passed(self) -> None:
        """Tell the sink of the chunks that it has not been told of."""
        passed = self._passed
        if passed:
            assert self._counter is not None
            self._passed = []
            self._counter.chunks_passed(passed)
        if self._lent:
            assert self._native is not None
            assert self._counter is not None
            self._counter.passed_natively(self._native.look(self._lent))

    def _tell_many(self) -> None:
        self.tell_passed()
        assert self._counter is not None
        if self._native is not None:
            self._until_lent -= 1
            if self._until_lent <= 0:
                self._write_chunk = self._lend
        self._counter.check_client()

    # ---- the native relay

    def write_block(self, client: asyncio.Transport, block: bytes) -> None:
        """Write what the sink has been given just now, all of it, and its head if that is due.

        The stream is lent, if whole chunks go past the sink from now on.
        """
        if self._client is client and not self._until_lent and self.between_chunks:
            self._lend(block)
        else:
            client.write(block)

    def _lend(self, data: bytes) -> None:
        """Write whole chunks, and lend the stream if that can be done now."""
        assert self._client is not None
        assert self._native is not None
        if self._request_sent and not self._reading_paused:
            self._lent = self._native.lend(self, self._client, data)
        if self._lent or self._between:
            self._until_lent = AFTER_LOSS
            self._write_chunk = self._client.write
        if not self._lent:
            self._client.write(data)

    def handed_back(self, back: Back) -> None:
        """Go on with a stream that the native relay does not go on with."""
        self._have_back(back)
        if back.blocks >= WORTHWHILE:
            self._until_lent = 1
        if not self.transport.is_closing():
            self.transport.resume_reading()
        if back.unread:
            self.data_received(back.unread)
        if self._sink is not None and self._counter is not None:
            self._counter.check_client()

    def _take_back(self) -> None:
        """Have a lent stream at once. What was received and not passed on is dropped."""
        if self._lent:
            assert self._native is not None
            self._have_back(self._native.take(self._lent))

    def _have_back(self, back: Back) -> None:
        assert self._client is not None
        assert self._counter is not None
        self._lent = 0
        self.tell_passed()
        self._counter.passed_natively(back.passed)
        if back.unsent and not self._client.is_closing():
            self._client.write(back.unsent)

    def _chunked_data(self, sink: ResponseSink, data: bytes) -> None:
        assert self._chunks is not None
        payload = self._payload
        if self._between:
            self._between = False
            self.tell_passed()
        try:
            end = self._chunks.feed(data, payload)
        except ChunkError as error:
            self._until_lent = 1  # what follows is not looked at, let alone passed on
            if payload is None and error.offset:
                sink.response_data(data[: error.offset])
            self._fail(EngineProtocolError(f"The engine's answer is not framed as HTTP/1.1 demands: {error}."))
            return
        if payload is not None:
            data = b"".join(payload)
            payload.clear()
            if end >= 0:
                self._end(sink, data, len(data))
                return
        if end >= 0:
            self._end(sink, data, end)
            return
        sink.response_data(data)
        if self._counter is not None and payload is None and data and self._sink is sink:
            self._between = self._chunks.between_chunks

    def _same_head(self, sink: ResponseSink, last: LastHead, data: bytes) -> bool:
        """Begin with the body, if these bytes begin with the last head again, but for the length."""
        before, after, head = last
        if not data.startswith(before):
            return False
        start = len(before)
        end = data.find(_CR, start, start + MOST_DIGITS + 1) if after else start
        length = data[start:end]
        if not data.startswith(after, end) or (after and not length.isdigit()):
            return False
        self.length = length
        self._body_begins(sink, head, data[end + len(after) :])
        return True

    def _head_data(self, sink: ResponseSink, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while True:
            end = data.find(_END_OF_HEAD)
            if end < 0:
                if not data.startswith(_START_OF_HEAD[: len(data)]):
                    self._fail(EngineProtocolError("The engine's answer is not HTTP/1.1."))
                elif len(data) > MAX_HEAD:
                    self._fail(EngineProtocolError("The head of the engine's answer is too large."))
                else:
                    self._buffer = data
                return
            end += len(_END_OF_HEAD)
            if end > MAX_HEAD:
                self._fail(EngineProtocolError("The head of the engine's answer is too large."))
                return
            try:
                head = self._parse_head(data[:end])
            except EngineProtocolError as error:
                self._fail(error)
                return
            data = data[end:]
            if head is not None:
                self._body_begins(sink, head, data)
                return
            if not data:
                return

    def _parse_head(self, data: bytes) -> ResponseHead | None:
        """Parse a head; None for an interim response, which counts. Raises EngineProtocolError."""
        if self._told:
            without = without_id(data, self._told.encode())
            self._repeats = without is not data
            data = without
        head, self.length = parse_head(data, to_head_request=self._head_request, upgrade=self._upgrade)
        if head is None:
            self._count_interim(len(data))
            if self.on_interim is not None:
                self.on_interim(data)
        elif len(data) <= MOST_KNOWN and not (self._head_request or self._upgrade):
            before, after = around_length(data)
            # A length that stands there in an unusual way is read by the parser each time.
            self._last_head = (before, after, head) if after or not self.length else None
        return head

    def _count_interim(self, size: int) -> None:
        now = self.loop.time()
        if not self._interim:
            self._interim_since = now
        self._interim += max(size, INTERIM_LEAST)
        if self._interim > INTERIM_BURST + INTERIM_RATE * (now - self._interim_since):
            raise EngineProtocolError("The engine sent too many interim responses.")

    def _body_begins(self, sink: ResponseSink, head: ResponseHead, data: bytes) -> None:
        self.reusable = head.keep_alive
        framing = self._framing = head.framing
        self._left = left = int(self.length) if framing is _LENGTH else 0
        self._chunks = ChunkTracker() if framing is _CHUNKED else None
        sink.response_started(head)
        if self._sink is not sink:
            return  # the sink gave up
        if framing is _LENGTH and left <= len(data):  # most answers come in one piece
            self._end(sink, data, left)
        elif framing is _NONE:
            self._end(sink, data, 0)
        elif data and framing is not _TUNNEL:
            self.data_received(data)
        else:
            sink.response_data(data)

    def _end(self, sink: ResponseSink, data: bytes, end: int) -> None:
        if end < len(data):
            data = data[:end]
            self.reusable = False
        sink.response_data(data)
        if self._sink is not sink:
            return
        if not self._request_sent or self._writing_paused:
            self.reusable = False
        self._sink = None
        if self._counter is not None:
            self._client, self._counter, self._write_chunk = None, None, _nowhere
        if self._writable is not None:
            self._wake_sender()
        sink.response_ended()

    def _fail(self, error: EngineLostError | EngineProtocolError) -> None:
        sink = self._sink
        self.abort()
        if sink is not None:
            sink.response_lost(error)

    # ---- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def eof_received(self) -> None:
        """End at once: the transport alone would wait until it has written what the engine may never read."""
        self._over(None)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End what was under way, and leave the pool."""
        self.lost = True
        if self.on_idle_end is not None:
            self.on_idle_end(self)
        self._over(exc)

    def _over(self, exc: Exception | None) -> None:
        self.reusable = False
        self._take_back()
        self.tell_passed()
        sink = self._sink
        if sink is None:
            self._wake_sender()
            return
        self._sink = None
        self._between = False
        self._watcher = None
        self._wake_sender()
        if self.pooled and not self.received:
            self.taken = self._all_sent and has_all(self.transport)
        if exc is None and self._framing in {_UNTIL_CLOSE, _TUNNEL}:
            # Nothing but the end of the connection delimits these.
            sink.response_ended()
        elif self._framing is None:
            sink.response_lost(EngineLostError("The engine closed the connection before it answered."))
        else:
            sink.response_lost(EngineLostError("The engine broke off in the middle of its answer."))

    def abort(self) -> None:
        """Close at once, whatever is under way. The sink hears nothing any more, but of chunks that have passed.

        The engine is told within this call. The loop closes the socket only in its next turn, and a sleep hook
        that starts in this one could come first.
        """
        self._take_back()
        self.tell_passed()
        self._sink = None
        self._between = False
        self._watcher = None
        self.reusable = False
        self._wake_sender()
        if not self.transport.is_closing():
            hang_up(self.transport)
        self.transport.abort()


def _nowhere(_data: bytes) -> None:
    """Take a chunk before there is anything to take it."""
