"""Triton's model repository. Facts: its docs/protocol/extension_model_repository.md."""

from __future__ import annotations

import asyncio

from tests.hooks.fakes import web
from tests.hooks.fakes.base import Fake


class Triton(Fake):
    """``state`` of each model: "" (never loaded), READY, UNLOADING, UNAVAILABLE; ``parts`` of an ensemble."""

    def __init__(self, *models: str, explicit: bool = True) -> None:
        super().__init__("triton")
        self.explicit = explicit
        self.state = dict.fromkeys(models, "")
        self.parts: dict[str, list[str]] = {}
        self.bad: list[str] = []

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v2/repository/index", self._index),
            web.post("/v2/repository/models/{model}/load", self._load),
            web.post("/v2/repository/models/{model}/unload", self._unload),
            web.get("/v2/models/{model}/ready", self._ready),
        ]

    async def _index(self, request: web.Request) -> web.Response:
        if not isinstance(await request.json(), dict):
            return web.json_response({"error": "failed to parse the request JSON buffer"}, status=400)
        return web.json_response(
            [
                {"name": name, "version": "1", "state": state, "reason": "unloaded" * (state == "UNAVAILABLE")}
                if state
                else {"name": name}
                for name, state in self.state.items()
            ]
        )

    async def _load(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        if not self.explicit:
            message = "explicit model load / unload is not allowed if polling is enabled"
            return web.json_response({"error": message}, status=503)
        await asyncio.sleep(0.1)
        if name in self.bad or name not in self.state:
            message = f"load failed for model '{name}': version 1 is at UNAVAILABLE state"
            return web.json_response({"error": message}, status=400)
        for each in (name, *self.parts.get(name, [])):
            self.state[each] = "READY"
        return web.Response()

    async def _unload(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        parameters = (await request.json()).get("parameters", {})
        leaving = [name, *(self.parts.get(name, []) if parameters.get("unload_dependents") else [])]
        for each in leaving:
            self.state[each] = "UNLOADING"
        asyncio.get_running_loop().call_later(0.15, self._unloaded, leaving)
        return web.Response()

    def _unloaded(self, names: list[str]) -> None:
        if self.in_flight:  # it goes on until the last request has ended
            asyncio.get_running_loop().call_later(0.05, self._unloaded, names)
        else:
            self.state |= dict.fromkeys(names, "UNAVAILABLE")

    async def _ready(self, request: web.Request) -> web.Response:
        ready = self.state.get(request.match_info["model"]) == "READY"
        return web.Response(status=200 if ready else 400)
