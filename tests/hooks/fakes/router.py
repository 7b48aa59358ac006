"""llama-server as a router. Facts: llama.cpp's tools/server/server-models.cpp."""

from __future__ import annotations

import asyncio

from tests.hooks.fakes import web
from tests.hooks.fakes.base import Fake


def refusal(message: str, status: int = 400) -> web.Response:
    """Return an error as llama-server words it."""
    return web.json_response({"error": {"code": status, "message": message}}, status=status)


class Router(Fake):
    """``status`` of each model: unloaded, loading, loaded, sleeping. Those in ``bad`` cannot be loaded."""

    def __init__(self, *models: str, key: str = "") -> None:
        super().__init__("router")
        self.key = key
        self.status = dict.fromkeys(models, "unloaded")
        self.failed: list[str] = []
        self.bad: list[str] = []
        self.takes = 0.15  # seconds

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/models", self._models),
            web.post("/models/load", self._load),
            web.post("/models/unload", self._unload),
        ]

    async def _models(self, _request: web.Request) -> web.Response:
        def entry(name: str) -> dict[str, object]:
            status: dict[str, object] = {"value": self.status[name], "args": ["llama-server", "--port", "1"]}
            if name in self.failed:
                status |= {"exit_code": 1, "failed": True}
            return {"id": name, "aliases": [], "object": "model", "status": status, "source": "models_dir"}

        return web.json_response({"data": [entry(name) for name in self.status], "object": "list"})

    def _unauthorized(self, request: web.Request) -> bool:
        return bool(self.key) and request.headers.get("Authorization") != f"Bearer {self.key}"

    async def _load(self, request: web.Request) -> web.Response:
        name = (await request.json())["model"]
        if self._unauthorized(request):
            return refusal("Invalid API Key", 401)
        if name not in self.status:
            return refusal("model is not found", 404)
        if self.status[name] != "unloaded":
            return refusal("model is already running")
        self.status[name] = "loading"
        self.failed = [other for other in self.failed if other != name]
        asyncio.get_running_loop().call_later(self.takes, self._loaded, name)
        return web.json_response({"success": True})

    def _loaded(self, name: str) -> None:
        if name in self.bad:
            self.status[name] = "unloaded"
            self.failed.append(name)
        elif self.status[name] == "loading":
            self.status[name] = "loaded"

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["model"]
        if self._unauthorized(request):
            return refusal("Invalid API Key", 401)
        if self.status.get(name, "unloaded") == "unloaded":
            return refusal("model is not running")
        asyncio.get_running_loop().call_later(self.takes, self._unloaded, name)
        return web.json_response({"success": True})

    def _unloaded(self, name: str) -> None:
        if not self.in_flight:  # else its process goes on answering
            self.status[name] = "unloaded"
