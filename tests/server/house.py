"""llmux as it runs in production, inside a test: its server on a real socket, real hooks, a trivial engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from llmux.app import FRONT, build_app
from llmux.config import Config
from llmux.errors import RequestError
from llmux.observability.notices import EventLog
from llmux.runtime import Switcher
from llmux.server import BACKLOG, Runner
from tests.harness.ports import free_port  # noqa: F401
from tests.harness.waiting import PATIENCE

HOST = "127.0.0.1"
WAKE = ': >"$LLMUX_MODEL.up"'  # what the shell does by itself: another program is most of a hook's work
SLEEP = 'rm -f "$LLMUX_MODEL.up"'
ALIVE = 'test -e "$LLMUX_MODEL.up"'


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something has happened that nobody announces. A test's timeout bounds it."""
    pause = 0.002
    while not condition():
        await asyncio.sleep(pause)
        pause = min(1.1 * pause, 0.02)


def held(name: str) -> str:
    """Shell text that waits for ``House.release(name)``."""
    return f"until [ -e release.{name} ]; do sleep 0.03; done"


class Log(EventLog):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, dict[str, Any]]] = []

    def _write(self, _level: int, name: str, fields: Any) -> None:
        self.events.append((name, dict(fields)))

    def named(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.events if event == name]


@dataclass
class Reply:
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes
    fields: list[tuple[str, str]] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]

    @property
    def marked(self) -> bool:
        """Whether both headers are there, once each."""
        names = [name for name, _ in self.fields]
        return (
            names.count("x-request-id") == 1
            and names.count("x-llmux-queue-seconds") == 1
            and float(self.headers["x-llmux-queue-seconds"]) >= 0
            and bool(self.headers["x-request-id"])
        )


class Line:
    """One connection of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> Reply:
        raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        fields = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        return Reply(int(first.split()[1]), dict(fields), b"", fields)

    async def reply(self, *, head: bool = False) -> Reply:
        reply = await self.head()
        if head or reply.status in {101, 204, 304}:
            return reply
        if "content-length" in reply.headers:
            reply.body = await self.reader.readexactly(int(reply.headers["content-length"]))
        elif reply.headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                reply.body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        else:
            reply.body = await self.reader.read()
        return reply

    async def closed(self) -> bytes:
        """Read to the end."""
        with contextlib.suppress(ConnectionError):
            return await self.reader.read()
        return b""

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.transport.abort()


def message(method: str, target: str, body: Any = None, **headers: str) -> bytes:
    """Write a request. ``body``: bytes as they are, anything else as JSON."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    if not any(name.lower() == "host" for name in headers):
        headers = {"Host": "127.0.0.1", **headers}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name.replace('_', '-')}: {v}" for name, v in headers.items())]
    if body is not None:
        lines.append(f"Content-Length: {len(data)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape") + data


class Engine:
    """An engine for every model. A request for ``/v1/hold…`` is answered when ``go`` is set."""

    def __init__(self) -> None:
        self.port = 0
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.open = 0
        self.go = asyncio.Event()
        self.says: bytes | list[bytes] | None = None  # the whole answer, instead of ``ok``, or its pieces
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                await self._one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        self.bodies.append(await reader.readexactly(length))
        self.heads.append(head)
        if b"/hold" in lines[0]:
            going = asyncio.ensure_future(self.go.wait())
            gone = asyncio.ensure_future(reader.read(1))
            await asyncio.wait({going, gone}, return_when=asyncio.FIRST_COMPLETED)
            going.cancel()
            if gone.done():
                raise ConnectionResetError
            gone.cancel()
            await asyncio.wait({gone})
        if b"/stream" in lines[0]:
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"9\r\ndata: 1\n\n\r\n"
            )
            await reader.read(1)
            raise ConnectionResetError
        if b"upgrade: websocket" in lines:
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            await reader.read(1)
            raise ConnectionResetError
        if self.says is not None:
            pieces = [self.says] if isinstance(self.says, bytes) else self.says
            for number, piece in enumerate(pieces):
                if number:  # the last one may be read before
                    await asyncio.sleep(0)
                writer.write(piece)
            return
        body = b"" if head.startswith(b"HEAD") else b"ok"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + body)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


class House:
    """One llmux with one engine for all its models. ``build`` may be replaced to serve another application."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = Engine()
        self.log = Log()
        self.lines: list[Line] = []
        self.tracer_provider: Any = None
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        await self.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for line in self.lines:
            line.abort()
        self.engine.go.set()
        if self._runner is not None:
            async with asyncio.timeout(PATIENCE):
                await self._runner.cleanup()
        await self.engine.stop()

    def model(self, **more: Any) -> dict[str, Any]:
        return {
            "port": self.engine.port,
            "shared_address": True,
            "wake": WAKE,
            "sleep": SLEEP,
            "alive": ALIVE,
        } | more

    def config(self, models: Any = "a b", **more: Any) -> Config:
        """Make a configuration. ``models`` are names, or what differs from the usual by name."""
        given = {name: {} for name in models.split()} if isinstance(models, str) else models
        text = json.dumps(
            {
                "port": 0,
                "state": None,
                "alive_every": 0,
                "backoff": {"first": "10ms", "max": "20ms"},
                "models": {name: self.model(**settings) for name, settings in given.items()},
                **more,
            }
        )
        file = self.folder / "config.json"
        file.write_text(text)
        return Config.from_file(file, environ={})

    async def open(self, models: Any = "a b", **more: Any) -> Switcher:
        """Serve, and wait until what runs has been looked at."""
        config = self.config(models, **more)
        app, self.switcher = build_app(config, log=self.log, tracer_provider=self.tracer_provider)
        self.front = app[FRONT]
        await self.serve(app)
        self.front.port = self.port
        self.front.configure(self.switcher.config)
        await until(lambda: self.switcher.core.state.ready)
        return self.switcher

    async def serve(self, app: web.Application, *, plain: bool = False, **options: Any) -> None:
        """Serve an application: as production does, or ``plain`` as aiohttp does."""
        self._runner = web.AppRunner(app, access_log=None, **options) if plain else Runner(app, self.log)
        self._runner._shutdown_timeout = 0.5
        await self._runner.setup()
        site = web.TCPSite(self._runner, HOST, 0, backlog=BACKLOG)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        assert self._runner is not None
        runner, self._runner = self._runner, None
        await runner.cleanup()

    def release(self, name: str) -> None:
        (self.folder / f"release.{name}").touch()

    def up(self, model: str) -> None:
        """Have the model found running."""
        (self.folder / f"{model}.up").touch()

    # ---- clients

    async def control(self) -> None:
        """Open the control socket, too."""
        assert isinstance(self._runner, Runner)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.folder / "control.sock"))
        listener.listen()
        listener.setblocking(False)
        await self._runner.serve_control(listener)

    async def line(self, *, socket: bool = False) -> Line:
        """Connect, over the control ``socket`` if told so."""
        if socket:
            line = Line(*await asyncio.open_unix_connection(self.folder / "control.sock"))
        else:
            line = Line(*await asyncio.open_connection(HOST, self.port))
        self.lines.append(line)
        return line

    async def begin(
        self, method: str, target: str, body: Any = None, *, socket: bool = False, **headers: str
    ) -> Line:
        """Send a request, and leave its answer unread."""
        line = await self.line(socket=socket)
        line.send(message(method, target, body, **headers))
        return line

    async def ask(
        self, method: str, target: str, body: Any = None, *, socket: bool = False, **headers: str
    ) -> Reply:
        line = await self.begin(method, target, body, socket=socket, **headers)
        reply = await line.reply(head=method == "HEAD")
        line.close()
        return reply

    async def chat(self, model: str, path: str = "/v1/chat/completions") -> Reply:
        return await self.ask("POST", path, {"model": model})

    async def raw(self, data: bytes, *, head: bool = False) -> Reply:
        line = await self.line()
        line.send(data)
        reply = await line.reply(head=head)
        line.close()
        return reply

    def in_flight(self, model: str) -> int:
        return len(self.switcher.core.state.models[model].in_flight)

    def queued(self, model: str) -> int:
        return len(self.switcher.core.state.models[model].queue)


@contextlib.asynccontextmanager
async def refused(kind: type[RequestError]) -> AsyncIterator[None]:
    """The block ends with this error."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")
