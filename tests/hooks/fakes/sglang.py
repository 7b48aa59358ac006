"""SGLang's server with its memory saver, and what it dies of.

Facts, from its scheduler_update_weights_mixin.py: it asserts that no request is under way when memory is released;
it keeps what is released in a set, so that to resume what is not released ends it; and it wants a JSON body.
From its tokenizer_manager.py: given TERM, it has its schedulers release what they hold and end; one that ends by
itself, as of TERM, has crashed.
From its utils/auth.py: with an admin's key, its orders take that one only; its models take the other one only.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from tests.hooks.fakes import web
from tests.hooks.fakes.base import Fake, run


class Sglang(Fake):
    """``released``: whether its memory is."""

    def __init__(self, alias: str, *, saver: bool = True, key: str = "", admin_key: str = "") -> None:
        super().__init__(alias)
        self.saver = saver
        self.key = key
        self.admin_key = admin_key or key
        self.released = False

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self._health),
            web.get("/v1/models", self._with_key("key", self._models)),
            web.post("/flush_cache", self._with_key("admin_key", self._flush)),
            web.post("/release_memory_occupation", self._with_key("admin_key", self._release)),
            web.post("/resume_memory_occupation", self._with_key("admin_key", self._resume)),
            web.post("/v1/completions", self._with_key("key", self._complete)),
        ]

    def _with_key(self, which: str, handler: web.Handler) -> web.Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            key = getattr(self, which)
            if key and request.headers.get("Authorization") != f"Bearer {key}":
                return web.json_response({"error": "Unauthorized"}, status=401)
            return await handler(request)

        return handle

    async def _health(self, _request: web.Request) -> web.Response:
        if self.released:  # it makes a token to see whether it can
            self.die()
        return web.Response()

    async def _models(self, _request: web.Request) -> web.Response:
        return self.models()

    async def _flush(self, _request: web.Request) -> web.Response:
        return web.Response(status=400 if self.in_flight else 200, text="Cache flushed.")

    async def _release(self, request: web.Request) -> web.Response:
        if not await self._body_is_an_object(request):
            return web.json_response({"error": "Field required"}, status=422)
        if self.in_flight or self.released:
            self.die(0.02)
        self.released = self.saver
        return web.json_response(None)

    async def _resume(self, request: web.Request) -> web.Response:
        if not await self._body_is_an_object(request):
            return web.json_response({"error": "Field required"}, status=422)
        if not self.released:
            self.die()
        self.released = False
        return web.json_response(None)

    async def _complete(self, _request: web.Request) -> web.Response:
        if self.released:
            self.die()
        return web.json_response({"model": self.alias, "choices": [{"text": " Paris"}]})

    @staticmethod
    async def _body_is_an_object(request: web.Request) -> bool:
        return request.content_type == "application/json" and isinstance(await request.json(), dict)


def start_scheduler() -> int:
    """Start one, which ends when the end of the pipe that is returned is closed."""
    reading, writing = os.pipe()
    scheduler = os.fork()
    if scheduler:
        os.close(reading)
        signal.signal(signal.SIGCHLD, lambda *_: os.write(2, b"scheduler_0 crashed\n"))
        return writing
    os.close(writing)
    os.read(reading, 1)
    os.write(2, b"scheduler_0 has released its memory\n")
    os._exit(0)


def main() -> None:
    """Take SGLang's options, and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--enable-memory-saver", action="store_true")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--admin-api-key", default="")
    given = parser.parse_args()
    if given.model_path == "broken":
        sys.exit("OSError: broken is no folder, and no model on the hub")
    keys = {"key": given.api_key, "admin_key": given.admin_api_key}
    scheduler = start_scheduler()
    run(Sglang(given.served_model_name, saver=given.enable_memory_saver, **keys), given.port)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.close(scheduler)
    os.wait()


if __name__ == "__main__":
    main()
