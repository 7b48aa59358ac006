"""Ollama. Facts: its docs/api.md, and server/routes.go."""

from __future__ import annotations

import asyncio

from tests.hooks.fakes import web
from tests.hooks.fakes.base import Fake


class Ollama(Fake):
    """``loaded``: the models that are, and how much of each is on the GPU. ``embedders`` generate nothing."""

    def __init__(self, *models: str, embedders: tuple[str, ...] = ()) -> None:
        super().__init__("ollama")
        self.known = [*models, *embedders]
        self.embedders = list(embedders)
        self.loaded: dict[str, float] = {}
        self.part = 1.0  # of a model that has room on the GPU
        self.keeps: dict[str, object] = {}

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/ps", self._ps),
            web.post("/api/generate", self._generate),
            web.post("/api/embed", self._embed),
        ]

    async def _ps(self, _request: web.Request) -> web.Response:
        size = 4 << 30
        models = [
            {
                "name": name,
                "model": name,
                "size": size,
                "digest": "4f22",
                "details": {"parent_model": "", "format": "gguf", "family": "llama"},
                "expires_at": "2318-10-17T16:47:07Z",
                "size_vram": int(size * part),
            }
            for name, part in self.loaded.items()
        ]
        return web.json_response({"models": models})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "prompt" in body or body.get("stream") is not False:
            return web.json_response({"error": "this test loads and unloads, and asks nothing"}, status=500)
        name = self._full(body["model"])
        if name not in self.known:
            return web.json_response({"error": f"model '{body['model']}' not found"}, status=404)
        if body["keep_alive"] == 0:
            asyncio.get_running_loop().call_later(0.15, self._expire, name)
            return web.json_response({"model": name, "done": True, "done_reason": "unload"})
        if name in self.embedders:
            return web.json_response({"error": f'"{body["model"]}" does not support generate'}, status=400)
        return await self._load(name, body, {"done": True, "done_reason": "load"})

    async def _embed(self, request: web.Request) -> web.Response:
        body = await request.json()
        return await self._load(self._full(body["model"]), body, {"embeddings": []})

    async def _load(self, name: str, body: dict[str, object], answer: dict[str, object]) -> web.Response:
        await asyncio.sleep(0.1)
        self.loaded[name] = self.part
        self.keeps[name] = body["keep_alive"]
        return web.json_response({"model": name, **answer})

    def _expire(self, name: str) -> None:
        if not self.in_flight:
            self.loaded.pop(name, None)

    @staticmethod
    def _full(name: str) -> str:
        return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
