"""TabbyAPI. Facts: its endpoints/core/router.py and common/auth.py."""

from __future__ import annotations

import asyncio

from tests.hooks.fakes import web
from tests.hooks.fakes.base import Fake

KEY = "0b5c-admin"


class Tabby(Fake):
    """``loaded``: the one model that is; ``bad`` ones fail while they load, after the 200."""

    def __init__(self, *models: str) -> None:
        super().__init__("tabby")
        self.known = list(models)
        self.bad: list[str] = []
        self.loaded: str | None = None
        self.options: dict[str, object] = {}

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/model", self._model),
            web.post("/v1/model/load", self._load),
            web.post("/v1/model/unload", self._unload),
        ]

    @staticmethod
    def _unauthorized(request: web.Request) -> web.Response | None:
        if request.headers.get("x-admin-key") == KEY:
            return None
        return web.json_response({"detail": "Invalid admin key"}, status=401)

    async def _model(self, request: web.Request) -> web.Response:
        if refused := self._unauthorized(request):
            return refused
        if self.loaded is None:
            return web.json_response({"detail": "No models are currently loaded."}, status=503)
        return web.json_response({"id": self.loaded, "object": "model", "parameters": {"max_seq_len": 8192}})

    async def _load(self, request: web.Request) -> web.StreamResponse:
        if refused := self._unauthorized(request):
            return refused
        body = await request.json()
        if "model_name" not in body:
            return web.json_response({"detail": "Field required"}, status=422)
        name = body.pop("model_name")
        if name not in self.known:
            return web.json_response({"detail": "Could not find the model path for load."}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"model_type":"model","module":1,"modules":2,"status":"processing"}\r\n\r\n')
        await asyncio.sleep(0.1)
        self.loaded, self.options = None, body
        if name in self.bad:
            await response.write(b'data: {"error": {"message":"Insufficient VRAM","trace":null}}\r\n\r\n')
        else:
            self.loaded = name
            await response.write(
                b'data: {"model_type":"model","module":2,"modules":2,"status":"finished"}\r\n\r\n'
            )
        await response.write_eof()
        return response

    async def _unload(self, request: web.Request) -> web.Response:
        if refused := self._unauthorized(request):
            return refused
        if self.loaded is None:
            return web.json_response({"detail": "No models are currently loaded."}, status=503)
        self.loaded = None
        return web.json_response(None)
