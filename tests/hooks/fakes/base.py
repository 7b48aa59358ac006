"""What the stand-ins for engines have in common: an HTTP server, and a state that a test can see and change."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from tests.hooks.fakes import web

DIED = 9  # the exit code of an engine that died of an order


class Fake:
    """An engine's HTTP API. ``POST /fake`` sets its attributes, ``GET /fake`` shows them."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.calls: list[str] = []  # all that was asked, but for /fake
        self.broken: list[str] = []  # paths that are answered with 500
        self.broken_once: list[str] = []  # the same, for the next time only
        self.hanging: list[str] = []  # paths that are not answered
        self.in_flight = 0

    def routes(self) -> list[web.RouteDef]:
        """Return what the engine answers."""
        raise NotImplementedError

    async def listen(self, port: int) -> asyncio.Server:
        """Serve."""
        routes = [web.post("/fake", self._set), web.get("/fake", self._show), *self.routes()]
        return await web.listen(routes, self._guard, port)

    async def _guard(self, request: web.Request, handler: web.Handler) -> web.StreamResponse:
        if request.path == "/fake":
            return await handler(request)
        self.calls.append(f"{request.method} {request.path_qs} {await request.text()}".strip())
        if request.path in self.hanging:
            await asyncio.sleep(3600)
        once = request.path in self.broken_once
        if once:
            self.broken_once.remove(request.path)
        if once or request.path in self.broken:
            return web.json_response({"error": {"message": "CUDA out of memory"}}, status=500)
        return await handler(request)

    async def _set(self, request: web.Request) -> web.Response:
        for name, value in (await request.json()).items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        return web.json_response({})

    async def _show(self, _request: web.Request) -> web.Response:
        return web.json_response(vars(self))

    def models(self) -> web.Response:
        """Answer /v1/models."""
        return web.json_response({"object": "list", "data": [{"id": self.alias, "object": "model"}]})

    def die(self, seconds: float = 0.0) -> None:
        """End the process, as an engine does that fails an assertion."""
        asyncio.get_running_loop().call_later(seconds, os._exit, DIED)


@contextlib.contextmanager
def serving(fake: Fake, port: int) -> Iterator[Fake]:
    """Serve it from a thread until the block ends."""
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()

    async def serve() -> None:
        server = await fake.listen(port)
        started.set()
        await stopping.wait()
        server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.sleep(0)  # what they closed is closed with the next turn

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(60)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
        loop.close()


def run(fake: Fake, port: int) -> None:
    """Serve it as this process, until TERM."""

    async def serve() -> None:
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        await fake.listen(port)
        await stopping.wait()

    asyncio.run(serve())
