"""Requests to endpoints on other hosts. Imported only if there are any.

An ``Endpoint`` has its own connections, which are kept for the next request, and a breaker. A request to one uses
the same forwarder as one to an engine, a relay of its own (``guarded``), and a time limit for each step, which a
``Watch`` enforces.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from llmux.aiohttp_internals import RelayedResponse
from llmux.errors import EngineError, RemoteError, RemoteTimeoutError, RequestError
from llmux.proxy.aiohttp_client import AiohttpClient
from llmux.proxy.exchange import Exchange
from llmux.proxy.forward import Forwarder
from llmux.proxy.guarded import LACKED, Guard, GuardedRelay
from llmux.targets.breaker import Breaker, State
from llmux.upstream import (
    ConnectionPool,
    EngineAddress,
    EngineConnection,
    EngineLostError,
    EngineProtocolError,
    EngineRefusedError,
    ResponseHead,
)

IDLE = 30.0
"""Seconds that a connection is kept for the next request: a handshake costs two or three round trips."""
MOST_ERROR = 256 * 1024
"""Bytes of an error's body that are passed on."""
SECRET = 8
"""Characters: a shorter key is no secret, and not searched for in errors."""
_REDIRECT = 300
_ERROR = 400
_SERVER_ERROR = 500
_TOO_MANY = 429
_UNAVAILABLE = 503
_REST = 1.0  # seconds, if an overloaded endpoint does not say for how long
_SMOOTHING = 0.3  # weight of the latest time to a first byte in the mean
HELD_FOR = 5.0
"""Seconds for which events that only announce an answer are held, where another endpoint could give one. Not for
long: what lies between llmux and its client may lose patience with a silent connection."""


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
        if self.may_lack and status in LACKED:
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


GuardFactory = Callable[[AiohttpClient, Exchange, asyncio.AbstractEventLoop, Watch], Guard]
