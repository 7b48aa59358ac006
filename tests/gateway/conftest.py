"""Several hosts and a gateway in one process: real servers, real sockets, real hooks, trivial engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llmux.app import FRONT
from llmux.config.gateway import GatewayConfig
from llmux.gateway.service import Gateway, build_gateway
from tests.server.fixtures import limit, pytest_asyncio_loop_factories
from tests.server.house import HOST, House, until

__all__ = ["pytest_asyncio_loop_factories"]


def pytest_collection_modifyitems(items):
    limit(items, Path(__file__).parent)


class Door(House):
    """A gateway, with a house for each host."""

    gateway: Gateway

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fast = True  # requests take the fast path
        self.hosts: dict[str, House] = {}
        self.houses: list[House] = []

    async def host(self, name: str, models: Any = "a b", **more: Any) -> House:
        folder = self.folder / name
        folder.mkdir()
        house = self.hosts[name] = House(folder)
        self.houses.append(house)
        await house.__aenter__()
        await house.open(models, **more)
        return house

    def gateway_config(self, hosts: dict[str, Any] | None = None, **more: Any) -> GatewayConfig:
        told = {name: {"url": f"http://{HOST}:{house.port}"} for name, house in self.hosts.items()}
        file = self.folder / "gateway.json"
        document = {"port": 0, "hosts": told | (hosts or {}), "fleet": {"report_every": "200ms"}, **more}
        file.write_text(json.dumps(document))
        return GatewayConfig.from_file(file, environ={})

    async def open_gateway(
        self, hosts: dict[str, Any] | None = None, *, wait: bool = True, **more: Any
    ) -> Gateway:
        """Start a gateway to all hosts, and wait until each has reported."""
        app, self.gateway = build_gateway(self.gateway_config(hosts, **more), self.log)
        await self.serve(app)
        app[FRONT].port = self.port
        self._fast_path = app[FRONT].fast_path
        self.open_fast_path(self.fast)
        if wait:
            await until(lambda: all(self.gateway.state(host) == "ready" for host in self.gateway.hosts.all()))
        return self.gateway

    def open_fast_path(self, opened: bool) -> None:
        """Have requests take the fast path, or none."""
        self._fast_path.open = opened

    async def open_all(self, names: str = "one two", models: Any = "a b", **more: Any) -> Gateway:
        for name in names.split():
            await self.host(name, models)
        return await self.open_gateway(**more)

    def served(self) -> dict[str, int]:
        """How many requests each host's engine has had."""
        return {name: len(house.engine.heads) for name, house in self.hosts.items()}

    async def known(self, host: str, phase: str, model: str = "a") -> None:
        """Wait until the gateway knows that a model is in a phase."""

        def there() -> bool:
            seen = self.gateway.view(self.gateway.hosts[host])
            return seen is not None and seen.report is not None and seen.report.models[model].phase.value == phase

        await until(there)


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    door = Door(tmp_path)
    async with door:
        yield door
        if hasattr(door, "gateway") and door._runner is not None:
            await door.close()
        for house in door.houses:
            await house.__aexit__(None, None, None)


@pytest.fixture(params=[True, False], ids=["fast path", "long way"])
def both_ways(request: pytest.FixtureRequest, door: Door) -> None:
    """Have the test's requests take the fast path, and then the long way."""
    door.fast = request.param


class Puppet:
    """A host that says and does what a test tells it."""

    def __init__(self) -> None:
        self.report: dict[str, Any] = {
            "version": "0",
            "instance": "puppet",
            "seq": 0,
            "lease": 6.0,
            "ready": True,
            "leased": False,
            "free_in": 0.0,
            "names": {"a": "a"},
            "models": {"a": dict(AWAKE)},
        }
        self.does: list[
            Any
        ] = []  # the answers, or what writes them, to requests in their order; None, or none left: hang up
        self.requests: list[bytes] = []
        self.asked: list[bytes] = []  # all other first lines
        self.withdrawn = asyncio.Event()
        self.silent = False
        self.saying: bytes | None = None  # in place of the report
        self.listed = b'{"data": []}'
        self.lists = asyncio.Event()  # not set: it is asked for that, and does not answer yet
        self.lists.set()
        self.port = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> dict[str, str]:
        return {"url": f"http://{HOST}:{self.port}"}

    async def close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
                body = await reader.readexactly(length)
                if head.startswith(b"GET /llmux/events?report="):
                    await self._stream(writer)
                elif head.startswith(b"POST /v1/"):
                    self.requests.append(head + body)
                    answer = self.does.pop(0) if self.does else None
                    if answer is None:
                        return
                    if callable(answer):
                        await answer(writer)
                    else:
                        writer.write(answer)
                else:
                    self.asked.append(head.partition(b"\r\n")[0])
                    if head.startswith(b"POST /llmux/withdraw/"):
                        self.withdrawn.set()
                    await self.lists.wait()
                    said = self.listed
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            if not self.silent:
                self.report["seq"] += 1
                said = json.dumps(self.report).encode() if self.saying is None else self.saying
                event = b"event: report\ndata: %b\n\n" % said
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                await writer.drain()
            await asyncio.sleep(0.02)


AWAKE = {
    "phase": "awake", "queued": 0, "in_flight": 0, "expected_wait": 0.0, "switch_cost": 0.0, "sleep": 1.0,
    "wake": 2.0, "arrival_rate": 0.0, "service": 0.1, "slots": None, "awake_for": 5.0, "idle_for": 1.0,
}  # fmt: skip
ASLEEP = {**AWAKE, "phase": "asleep", "expected_wait": 3.0, "switch_cost": 3.0, "awake_for": 0.0}


@pytest.fixture
async def puppet() -> AsyncIterator[Puppet]:
    puppet = Puppet()
    await puppet.open()
    yield puppet
    await puppet.close()


@pytest.fixture
async def other() -> AsyncIterator[Puppet]:
    """Another one, where the model is asleep: the second choice."""
    puppet = Puppet()
    puppet.report["models"] = {"a": dict(ASLEEP)}
    puppet.report["instance"] = "other"
    await puppet.open()
    yield puppet
    await puppet.close()


def answer(body: bytes, *fields: str, status: str = "200 OK") -> bytes:
    """Write an answer."""
    head = "".join(f"{field}\r\n" for field in (f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}"))
    return head.encode() + b"\r\n" + body
