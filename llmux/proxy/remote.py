"""Requests to endpoints on other hosts. Imported only if there are any.

An ``Endpoint`` has its own connections, which are kept for the next request, and a breaker. A request to one uses
the same forwarder and relay as one to an engine, with a time limit for each step, and these differences:

- An error, 400 or above, is read completely before any of it is passed on: so that another endpoint may be tried
  instead, and so that the key, if an error repeats it, does not reach the client.
- Only whole events of a stream are passed on. If it breaks off, the error event follows the last whole one; and
  until the first event, another endpoint may be tried: if that is an error, too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import math
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from llmux.aiohttp_internals import RelayedResponse
from llmux.errors import EngineError, RemoteError, RemoteTimeoutError, RequestError
from llmux.proxy.aiohttp_client import AiohttpClient
from llmux.proxy.exchange import Exchange
from llmux.proxy.forward import Forwarder
from llmux.proxy.relay import Relay
from llmux.proxy.translated import TranslatingRelay
from llmux.targets.breaker import Breaker, State
from llmux.targets.codecs import Translation
from llmux.targets.codecs.sse import EventParser
from llmux.upstream import (
    ConnectionPool,
    EngineAddress,
    EngineConnection,
    EngineLostError,
    EngineProtocolError,
    EngineRefusedError,
    Framing,
    ResponseHead,
)

IDLE = 30.0
"""Seconds that a connection is kept for the next request: a handshake costs two or three round trips."""
MOST_ERROR = 256 * 1024
"""Bytes of an error's body that are passed on."""
MOST_HELD = 1024 * 1024
"""Bytes of one event that are held back until it is whole; a longer one is passed on in pieces."""

SECRET = 8
"""Characters: a shorter key is no secret, and not searched for in errors."""
WORTH_ANOTHER = frozenset({408, 429})
"""The statuses below 500 with which another endpoint may succeed."""
_REDIRECT = 300
_NOT_MODIFIED = 304
_ERROR = 400
_SERVER_ERROR = 500
_UNAUTHORIZED = 401
_LACKED = frozenset({404, 405, 501})
_TOO_MANY = 429
_UNAVAILABLE = 503
_REST = 1.0  # seconds, if an overloaded endpoint does not say for how long
_SMOOTHING = 0.3  # weight of the latest time to a first byte in the mean
# What marks a stream as complete if its connection's end may be a cut.
_ENDS = (b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete", b"response.failed")
# Events that only announce an answer. With another endpoint to try they are held, but not for long: what lies
# between llmux and its client may lose patience with a silent connection.
HELD_FOR = 5.0  # seconds
_ANNOUNCING = frozenset({"ping", "message_start", "response.created", "response.queued", "response.in_progress"})
_FAILING = frozenset({"error", "response.failed"})
_REFRAMED = frozenset({b"content-length", b"transfer-encoding"})


class RemoteAnswerError(RemoteError):
    """The endpoint answered with an error with which another one may succeed."""

    code = "remote_failed"

    def __init__(self, message: str, status: int, retry_after: float | None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.status = status


class PathLackedError(RemoteAnswerError):
    """The endpoint does not know a path that some lack."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each step may take, in seconds: see `remotes` in the configuration."""

    connect: float = 5.0
    first_byte: float = 60.0
    idle: float = 60.0
    total: float | None = None


class _Pool(ConnectionPool):
    """Connections that belong to the endpoint, whichever request they were opened for."""

    def take(self, owner: object) -> EngineConnection | None:  # noqa: ARG002
        return super().take(self)

    def release(self, connection: EngineConnection, owner: object) -> None:  # noqa: ARG002
        super().release(connection, self)


class Endpoint:
    """One endpoint on another host."""

    def __init__(
        self,
        name: str,
        address: EngineAddress,
        timeouts: Timeouts,
        *,
        ca: str | None = None,
        max_in_flight: int | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        """``name`` is for people; ``ca`` a file of certificates, in place of the system's."""
        self.name = name
        self.address = address
        self.timeouts = timeouts
        self.max_in_flight = max_in_flight
        self.breaker = Breaker() if breaker is None else breaker
        self.in_flight = 0
        self.latency = 0.0
        """Recent seconds to the first byte of an answer; 0 if unknown."""
        self.counts: dict[str, int] = {}
        """Requests by outcome: ``ok``, ``failed``, ``refused`` (4xx), ``left``."""
        context = None
        if address.tls:
            context = ssl.create_default_context(cafile=ca)
            context.set_alpn_protocols(["http/1.1"])
            if ca is not None:
                # Python 3.13 began to demand everything that RFC 5280 requires of a certificate, such as key
                # identifiers. Private authorities often lack some, and must not fail with another Python.
                context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        self._forwarder = Forwarder(idle_timeout=IDLE, connect_timeout=timeouts.connect, ssl_context=context)
        self._forwarder.pool = _Pool(idle_timeout=IDLE, connect_timeout=timeouts.connect, ssl_context=context)

    def wait(self, now: float) -> float | None:
        """Return None if it takes a request now, else the seconds after which it may, above 0."""
        if self.max_in_flight is not None and self.in_flight >= self.max_in_flight:
            return 1.0
        return self.breaker.wait(now)

    def room(self, now: float) -> float:
        """Return how many requests it takes now."""
        if self.wait(now) is not None:
            return 0
        if self.breaker.state(now) is not State.CLOSED:
            return 1  # the probe
        return math.inf if self.max_in_flight is None else self.max_in_flight - self.in_flight

    async def forward(
        self,
        request: web.Request,
        exchange: Exchange,
        relay: GuardFactory | None = None,
        *,
        secret: str | None = None,
        others: bool = False,
        may_lack: bool = False,
    ) -> RelayedResponse:
        """Send a request, which ``wait`` allows, and relay the answer; ``relay`` makes a special relay.

        ``secret`` is the key, which no answer may repeat. ``others``: there are other endpoints to try.
        ``may_lack``: it may not know the path, which is a PathLackedError then.

        Raises RemoteError, and what ``Forwarder.forward`` raises, when nothing has gone to the client yet.
        """
        loop = asyncio.get_running_loop()
        number = self.breaker.passed(loop.time())
        self.in_flight += 1
        watch = Watch(self, number, loop, secret=secret, others=others, may_lack=may_lack)
        told = False
        try:
            make = GuardedRelay if relay is None else relay
            response = await self._forwarder.forward(
                request, exchange, lambda client, exchange, loop: make(client, exchange, loop, watch)
            )
            told = True
            watch.over(exchange, None)
        except EngineError as error:
            told = True
            watch.over(exchange, error)
            raise self._renamed(error) from error
        except RemoteError as error:
            told = True
            watch.over(exchange, error)
            raise
        finally:
            watch.stop()
            self.in_flight -= 1
            if not told:
                self.breaker.abandoned(number)
                self._count("left")
        return response

    def _renamed(self, error: EngineError) -> RemoteError:
        """Return an error of the connection as one of this endpoint: clients do not learn its address."""
        if isinstance(error, EngineRefusedError):
            return RemoteError(f"{self.name} cannot be reached.", code="remote_unreachable")
        if isinstance(error, EngineLostError | EngineProtocolError):
            return RemoteError(f"{self.name} broke off before its answer.", code="remote_broke_off")
        return RemoteError(error.message.replace("The engine", self.name, 1))

    def _count(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1

    async def close(self) -> None:
        """Close the idle connections; the others close when their requests end."""
        await self._forwarder.close()


class Watch:
    """Enforces the time limits of one request, and reports its outcome to the breaker."""

    def __init__(
        self,
        endpoint: Endpoint,
        number: int,
        loop: asyncio.AbstractEventLoop,
        *,
        secret: str | None,
        others: bool,
        may_lack: bool,
    ) -> None:
        self.name = endpoint.name
        self.secret = None if secret is None else secret.encode()
        self.others = others
        self.holds = others
        """What only announces an answer is held: another endpoint could give one."""
        self.may_lack = may_lack
        self._endpoint = endpoint
        self._number = number
        self._loop = loop
        self._began = loop.time()
        self._relay: Guard | None = None
        self.refusal: ResponseHead | None = None  # of an error, which is read completely
        self.judged = False  # the first event of the stream has been looked at
        self.failed = False  # it was an error
        self.looked = 0  # bytes of what is held that announce an answer
        self._kept: list[bytes] = []
        self._size = 0
        self._answered = False
        self._pending = False  # a stream has been answered, but has said nothing yet
        self._timer: asyncio.TimerHandle | None = None
        self._last: asyncio.TimerHandle | None = None
        self._hold: asyncio.TimerHandle | None = None

    @property
    def broke_off(self) -> str:
        """What a client is told about an incomplete answer."""
        return f"{self.name} broke off in the middle of its answer."

    def keep(self, data: bytes) -> None:
        """Keep a piece of an error."""
        self._size += len(data)
        if self._size <= MOST_ERROR:
            self._kept.append(data)

    def kept(self) -> bytes:
        """Return the text of an error, without the key."""
        body, secret = b"".join(self._kept), self.secret
        # A short text could be part of anything.
        return body if secret is None or len(secret) < SECRET else body.replace(secret, b"...")

    def sent(self, relay: Guard) -> None:
        """Begin to wait for the answer."""
        self._relay = relay
        limits = self._endpoint.timeouts
        self._arm(self._loop.time() + limits.first_byte, self._too_late)
        if limits.total is not None and self._last is None:
            error = f"{self.name} has not answered all within {limits.total:g} s."
            self._last = self._loop.call_at(self._began + limits.total, self._expire, error)

    def answered(self, status: int, retry_after: float | None, *, stream: bool) -> None:
        """Take note of an answer's head. ``stream``: what counts is its first event."""
        endpoint, now = self._endpoint, self._loop.time()
        self._answered = True
        breaker = endpoint.breaker
        if self.may_lack and status in _LACKED:
            breaker.succeeded(self._number)
        elif status == _TOO_MANY or (status == _UNAVAILABLE and retry_after is not None):
            breaker.rests(self._number, now, _REST if retry_after is None else retry_after)
        elif status < _REDIRECT and stream:
            self._pending = True
            if self.others:
                self._hold = self._loop.call_later(HELD_FOR, self._let_go)
        elif status < _SERVER_ERROR:
            breaker.succeeded(self._number)
        else:
            breaker.failed(self._number, now, f"it answered with {status}")
        if status < _REDIRECT:
            took = now - self._began
            endpoint.latency += (_SMOOTHING if endpoint.latency else 1.0) * (took - endpoint.latency)
        self._arm(now + endpoint.timeouts.idle, self._look)

    def begun(self) -> None:
        """Take note that a stream has said something."""
        if self._pending:
            self._pending = False
            self._endpoint.breaker.succeeded(self._number)

    def over(self, exchange: Exchange, error: RequestError | None) -> None:
        """Record the end of a request that was not ended here."""
        endpoint, status = self._endpoint, exchange.status
        broken = self.failed or (exchange.broken is not None and exchange.cut_off is None)
        if broken or (error is not None and (self._pending or not self._answered)):
            said = "its answer broke off" if error is None else error.message
            endpoint.breaker.failed(self._number, self._loop.time(), said)
        else:
            self.begun()
        outcome = "refused" if status is not None and _ERROR <= status < _SERVER_ERROR else "failed"
        ok = error is None and not broken and status is not None and status < _ERROR
        endpoint._count("ok" if ok else outcome)  # noqa: SLF001 - its other half

    def stop(self) -> None:
        """Stop the timers."""
        for timer in (self._timer, self._last, self._hold):
            if timer is not None:
                timer.cancel()
        self._relay = None

    def _arm(self, when: float, look: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, look)

    def _let_go(self) -> None:
        self.holds = False
        if self._relay is not None and not self._relay.over:
            self._relay.let_go()

    def _too_late(self) -> None:
        self._expire(f"{self.name} has not begun to answer within {self._endpoint.timeouts.first_byte:g} s.")

    def _look(self) -> None:
        """Check whether anything has arrived lately. While the client does not read, nothing can."""
        relay, idle = self._relay, self._endpoint.timeouts.idle
        if relay is None or relay.over:
            return
        now = self._loop.time()
        last = relay.exchange.activity.last_byte
        due = now + idle if relay.held else (now if last is None else last) + idle
        if due > now:
            self._arm(due, self._look)
        else:
            self._expire(f"{self.name} has sent nothing for {idle:g} s.")

    def _expire(self, error: str) -> None:
        if self._relay is not None:
            self._relay.expire(RemoteTimeoutError(error))


class Guard(Relay):
    """The common part of relays for other hosts: time limits, and errors that are read completely."""

    __slots__ = ()
    _passes_chunks = False  # every byte counts against the time limits
    _watch: Watch

    @property
    def held(self) -> bool:
        """Whether reading is paused because the client does not read."""
        return self._draining is not None

    def _drained(self, task: asyncio.Task[None]) -> None:
        super()._drained(task)
        self.exchange.activity.last_byte = self._loop.time()  # the pause does not count as the endpoint's silence

    def attach(
        self, connection: EngineConnection, on_end: Callable[[Exception | None], None] | None = None
    ) -> None:
        """Use this connection, and begin to wait for the answer."""
        super().attach(connection, on_end)
        self._watch.sent(self)

    def response_started(self, head: ResponseHead) -> None:
        """Begin the client's answer, unless it is an error."""
        assert self._connection is not None
        self._watch.answered(head.status, retry_after_of(head), stream=head.event_stream)
        if head.status < _REDIRECT or head.status == _NOT_MODIFIED:
            super().response_started(head)
            return
        self.exchange.status = head.status
        self._watch.refusal = head
        if head.framing is Framing.CHUNKED:
            self._connection.unchunk()

    def response_data(self, data: bytes) -> None:
        """Pass bytes on; keep those of an error."""
        if self._watch.refusal is None:
            super().response_data(data)
        else:
            self.exchange.activity.last_byte = self._loop.time()
            self._watch.keep(data)

    def response_ended(self) -> None:
        """Finish; an error is delivered as a whole."""
        refusal = self._watch.refusal
        if refusal is None:
            super().response_ended()
        else:
            self._judge(refusal)

    def response_lost(self, error: EngineError) -> None:
        """Break off. An incomplete error is delivered as it is."""
        refusal = self._watch.refusal
        if refusal is not None:
            self._judge(refusal)
        elif self._started:
            super().response_lost(EngineError(self._watch.broke_off))
        else:
            super().response_lost(error)

    def _ready(self, events: bytes) -> bool:
        """Return whether the first whole events of a stream are passed on.

        While they only announce an answer, and another endpoint could give one, they are not. If another is tried
        because they report an error, this is over.
        """
        watch = self._watch
        failing = begins_with_error(events[watch.looked :])
        if failing is None:
            held = watch.holds and len(events) <= MOST_HELD
            watch.looked = len(events) if held else 0
            return not held
        watch.judged = True
        if failing:
            return not self._began_badly()
        watch.begun()
        return True

    def let_go(self) -> None:
        """Pass on what has been held for long enough."""

    def _began_badly(self) -> bool:
        """Note that the stream began with an error; return whether another endpoint is tried instead."""
        watch = self._watch
        watch.failed = True
        if watch.others and not self._started:
            self.expire(RemoteError(f"{watch.name} answered with an error in its stream.", code="remote_failed"))
        return self.over

    def expire(self, error: RequestError) -> None:
        """End it, as when the endpoint takes too long."""
        if self.over:
            return
        between = self._between_chunks
        if self._connection is not None:
            self._connection.abort()
        if self._started:
            self._break_off(error, between_chunks=between)
        else:
            self._settle(error)

    def _judge(self, head: ResponseHead) -> None:
        """Pass an error on, or let another endpoint be tried."""
        watch, status = self._watch, head.status
        watch.refusal = None
        if status == _UNAUTHORIZED:
            # It is about llmux's key, but would seem to be about the client's. And some repeat parts of the key.
            error = f"{watch.name} does not accept the key that llmux has for it."
            self._settle(RemoteError(error, code="remote_key"))
            return
        if status < _ERROR:
            # A client that followed it would bypass llmux.
            self._settle(RemoteError(f"{watch.name} answered with a redirect ({status}): its `url` is not right."))
            return
        if watch.may_lack and status in _LACKED:
            self._settle(PathLackedError(f"{watch.name} does not know the path ({status}).", status, None))
            return
        if watch.others and (status >= _SERVER_ERROR or status in WORTH_ANOTHER):
            error = f"{watch.name} answered with {status}."
            self._settle(RemoteAnswerError(error, status, retry_after_of(head)))
            return
        assert self._connection is not None
        body = watch.kept()
        self._connection.length = b"%d" % len(body)
        super().response_started(_with_length(head))
        super().response_data(body)
        super().response_ended()


class GuardedRelay(Guard):
    """The sink of an exchange with another host whose answer passes unchanged."""

    __slots__ = ("_held", "_until_close", "_watch", "_whole_events")

    def __init__(
        self, client: AiohttpClient, exchange: Exchange, loop: asyncio.AbstractEventLoop, watch: Watch
    ) -> None:
        super().__init__(client, exchange, loop)
        self._watch = watch
        self._held = b""  # the beginning of an event, or what only announces an answer
        self._whole_events = False
        self._until_close = False

    def response_started(self, head: ResponseHead) -> None:
        """Begin the client's answer, unless it is an error."""
        super().response_started(head)
        if self._event_stream and self._watch.refusal is None:
            assert self._connection is not None
            self._connection.unchunk()
            self._chunk = self._whole_events = True
            self._until_close = head.framing is Framing.UNTIL_CLOSE

    def response_data(self, data: bytes) -> None:
        """Pass bytes on: for an event stream, whole events."""
        if not self._whole_events:
            self._watch.begun()  # it is not looked into
            super().response_data(data)
            return
        self.exchange.activity.last_byte = self._loop.time()
        if self._held:
            data = self._held + data
        end = len(data) if data.endswith((b"\n\n", b"\n\r\n")) else end_of_events(data)
        if len(data) - end > MOST_HELD:
            end = len(data)
        if end and not self._watch.judged and not self._ready(data[:end]):
            if self.over:
                return
            end = 0
        self._held = data[end:]
        if end:
            super().response_data(data[:end])

    def let_go(self) -> None:
        """Pass on what has been held for long enough."""
        if end := end_of_events(self._held):
            data, self._held, self._watch.looked = self._held[:end], self._held[end:], 0
            super().response_data(data)

    def response_ended(self) -> None:
        """Tell the end."""
        if self._until_close and not self._is_whole():
            self._lose(EngineError(self._watch.broke_off))
            return
        if self._whole_events and (self._held or self._head):
            held, self._held = self._held, b""
            super().response_data(held)
        super().response_ended()

    def _is_whole(self) -> bool:
        last = b"".join((*self.exchange.tail, self._held))
        return any(end in last for end in _ENDS)

    def _lose(self, error: RequestError) -> None:
        if self._started:
            self._break_off(error)
        else:
            self._settle(error)


class TranslatingGuardedRelay(Guard, TranslatingRelay):
    """The same for an answer that the client gets in another dialect."""

    __slots__ = ("_silent", "_watch")

    def __init__(
        self,
        client: AiohttpClient,
        exchange: Exchange,
        loop: asyncio.AbstractEventLoop,
        translation: Translation,
        watch: Watch,
    ) -> None:
        TranslatingRelay.__init__(self, client, exchange, loop, translation)
        self._watch = watch
        self._silent = False  # the client has not been told that it is kept open

    def _keep_open(self) -> None:
        self._silent = self._watch.holds and not self._started
        if not self._silent:
            super()._keep_open()

    def let_go(self) -> None:
        """Tell the client that it is kept open."""
        if self._silent and not self._started:
            self._keep_open()

    def _send(self, data: bytes) -> None:
        stream = self._stream
        if data and stream is not None and not self._started:
            if not stream.failed:
                self._watch.begun()
            elif self._began_badly():
                return
        super()._send(data)


GuardFactory = Callable[[AiohttpClient, Exchange, asyncio.AbstractEventLoop, Watch], Guard]


def translating(translation: Translation) -> GuardFactory:
    """Return what makes the relay of an answer that is translated."""
    return lambda client, exchange, loop, watch: TranslatingGuardedRelay(
        client, exchange, loop, translation, watch
    )


def _with_length(head: ResponseHead) -> ResponseHead:
    """Return the head of an answer whose body is there: as long as that is, and readable as it is."""
    fields = [field for field in head.fields if field[0] not in _REFRAMED]
    fields.append((b"content-length", b"Content-Length", b""))
    return dataclasses.replace(head, framing=Framing.LENGTH, fields=fields, event_stream=False, written={})


def begins_with_error(events: bytes) -> bool | None:
    """Return whether the first event that says something is an error; None if none does."""
    for name, text in EventParser().feed(events):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        document = document if isinstance(document, dict) else {}
        kind = str(name or document.get("type"))
        if kind not in _ANNOUNCING:
            return kind in _FAILING or bool(document.get("error")) or document.get("object") == "error"
    return None


def end_of_events(data: bytes) -> int:
    """Return where the last whole event ends."""
    plain = data.rfind(b"\n\n")
    other = data.rfind(b"\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, other + 3 if other >= 0 else 0)


def retry_after_of(head: ResponseHead) -> float | None:
    """Return the seconds for which an answer asks its client to wait, None where it does not."""
    for lower, _, value in head.fields:
        if lower == b"retry-after":
            return _seconds(value.decode("latin-1").strip())
    return None


def _seconds(text: str) -> float | None:
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
