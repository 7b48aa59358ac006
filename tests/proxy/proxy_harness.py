"""A raw engine, a raw client, and the forwarder between them under aiohttp's server.

Both ends send and compare exact bytes; neither knows HTTP beyond finding where a request ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web

from llmux.errors import RequestError
from llmux.proxy import ClientGoneError, EngineActivity, Exchange, Forwarder, error_response
from llmux.proxy.relay import Relay
from llmux.upstream import EngineAddress

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
EXTRA = [("X-Request-ID", "req-1"), ("X-LLMux-Queue-Seconds", "0.000")]
EXTRA_BYTES = b"X-Request-ID: req-1\r\nX-LLMux-Queue-Seconds: 0.000\r\n"


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something has happened that nobody announces. A test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110, there is no event to wait for
        await asyncio.sleep(0.001)


async def abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def chunk(text: str) -> bytes:
    """Return an event in a chunk of its own."""
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


class Exchanging:
    """A relay's client, as far as it is the same for all."""

    modern = keep_alive = True

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.drained = asyncio.Event()

    def open_transport(self) -> Any:
        return self.transport

    def head_made(self, head: Any, *, keep_alive: bool) -> None:
        pass

    def bytes_written(self, count: int) -> None:
        pass

    def force_close(self) -> None:
        self.keep_alive = False

    async def drain(self) -> None:
        await self.drained.wait()


@contextlib.contextmanager
def deaf_host() -> Iterator[EngineAddress]:
    """An address whose queue of new connections is full: whoever comes next hears nothing."""
    with socket.socket() as full, socket.socket() as one, socket.socket() as two:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for sock in (one, two):
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield EngineAddress(*full.getsockname())


class Side:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()


class EngineSide(Side):
    """One accepted connection, seen from the engine."""

    def __init__(self, engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self.engine = engine

    async def head(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        self.engine.heads.append(head)
        return head

    async def request(self) -> bytes:
        head = await self.head()
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        body = await self.reader.readexactly(length)
        self.engine.bodies.append(body)
        return body

    async def send(self, *parts: bytes) -> None:
        """Send each part so that it arrives on its own."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            if len(parts) > 1:
                await self.engine.settle()

    async def closed(self) -> None:
        """Wait until the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


Script = Callable[[EngineSide], Awaitable[None]]


class Engine:
    """Listens; every connection runs the script."""

    def __init__(self, script: Script, *, ssl_context: ssl.SSLContext | None = None) -> None:
        self.script = script
        self.ssl_context = ssl_context
        self.connections = 0
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.port = 0
        self.failures: list[BaseException] = []
        self.open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def settle(self) -> None:
        """Let what was sent arrive: on loopback it has, once the loop has gone round a few times."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._run, "127.0.0.1", 0, ssl=self.ssl_context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self.script(EngineSide(self, reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001, for the test to raise
            self.failures.append(error)
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except (ConnectionError, asyncio.CancelledError):
                pass
            finally:
                self.open.discard(writer)

    def stop_listening(self) -> None:
        assert self._server is not None
        self._server.close()

    async def __aexit__(self, *_: object) -> None:
        self.stop_listening()
        for writer in list(self.open):
            await abort(writer)
        for task in self._tasks:
            task.cancel()
        await until(lambda: not self.open)
        assert not self.failures, self.failures


@dataclass
class Body:
    """A request's body in pieces."""

    parts: list[bytes]

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))

    @property
    def single(self) -> bytes | None:
        return self.parts[0] if len(self.parts) == 1 else None

    def slices(self) -> Iterator[bytes]:
        return iter(self.parts)


class Client(Side):
    """A raw connection to the proxy."""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def get(self, target: bytes = b"/v1/x", *headers: bytes, version: bytes = b"1.1") -> None:
        await self.send(
            b"GET " + target + b" HTTP/" + version + b"\r\n" + b"\r\n".join((b"Host: llmux", *headers, b"\r\n"))
        )

    async def expect(self, data: bytes) -> None:
        """Read exactly these bytes."""
        try:
            got = await self.reader.readexactly(len(data))
        except asyncio.IncompleteReadError as error:
            got = error.partial
        assert got == data

    async def expect_end(self) -> None:
        assert await self.reader.read() == b""

    async def until(self, mark: bytes) -> bytes:
        return await self.reader.readuntil(mark)

    async def rest(self) -> bytes:
        return await self.reader.read()


class Proxy:
    """The forwarder, served as llmux serves it."""

    def __init__(self) -> None:
        self.forwarder = Forwarder()
        self.activity = EngineActivity()
        self.address: EngineAddress | None = None
        self.options: dict[str, Any] = {}
        self.exchanges: list[Exchange] = []
        self.outcomes: list[BaseException | None] = []
        self.requests: list[web.Request] = []
        self.engines: list[Engine] = []
        self.on_arrival: Callable[[Exchange], None] | None = None
        self.changed = asyncio.Condition()
        self.port = 0
        self._stack = contextlib.AsyncExitStack()

    @property
    def exchange(self) -> Exchange:
        return self.exchanges[-1]

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._stack.push_async_callback(self.forwarder.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        options = dict(self.options)
        body = options.pop("body", Body([data]) if request.can_read_body or data else None)
        assert self.address is not None
        exchange = Exchange(
            address=self.address,
            method=request.method,
            target=request.raw_path.encode("utf-8", "surrogateescape"),
            raw_headers=request.raw_headers,
            body=body,
            request_id="req-1",
            activity=self.activity,
            extra_headers=EXTRA,
            anthropic=request.path.startswith("/v1/messages"),
            **options,
        )
        self.exchanges.append(exchange)
        self.requests.append(request)
        if self.on_arrival is not None:
            self.on_arrival(exchange)
        await self._notify()
        outcome: BaseException | None = None
        try:
            return await self.forwarder.forward(request, exchange)
        except RequestError as error:
            outcome = error
            return error_response(error, anthropic=exchange.anthropic, headers=EXTRA)
        except (ClientGoneError, asyncio.CancelledError) as error:
            outcome = error
            raise asyncio.CancelledError from None
        finally:
            self.outcomes.append(outcome)
            asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a request's arrival or end makes the condition true."""
        async with self.changed:
            await self.changed.wait_for(condition)

    @property
    def relay(self) -> Relay:
        """The relay of the exchange under way."""
        relay = getattr(self.exchange.on_cut, "__self__", None)
        assert isinstance(relay, Relay)
        return relay

    async def until_reading_paused(self) -> None:
        """Wait until a slow client has stopped the reading from the engine for good."""
        await until(lambda: self.exchanges and getattr(self.exchange.on_cut, "__self__", None))
        connection = self.relay._connection
        assert connection is not None
        steady = 0
        while steady < 20:
            await asyncio.sleep(0.001)
            steady = steady + 1 if connection._reading_paused else 0

    async def until_sender_waits(self) -> None:
        """Wait until a slow engine has stopped the writing to it for good."""
        connection = self.relay._connection
        assert connection is not None
        steady = 0
        while steady < 20:
            await asyncio.sleep(0.001)
            steady = steady + 1 if connection._writing_paused else 0

    async def finished(self, count: int = 1) -> None:
        await self.until(lambda: len(self.outcomes) >= count)

    async def engine(self, script: Script) -> Engine:
        engine = await self._stack.enter_async_context(Engine(script))
        self.address = EngineAddress("127.0.0.1", engine.port)
        self.engines.append(engine)
        return engine

    async def client(self) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        client = Client(reader, writer)
        self._stack.push_async_callback(abort, writer)
        return client


def answering(*parts: bytes, close: bool = False) -> Script:
    """Answer every request with these bytes, each part arriving on its own."""

    async def script(side: EngineSide) -> None:
        while True:
            await side.request()
            await side.send(*parts)
            if close:
                return

    return script
