"""trtllm-serve in sleep mode: signed orders, and states that take a while.

Facts: TensorRT-LLM's docs/source/features/sleep-wakeup.md.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import os
import re
import sys
import time

from tests.hooks.fakes import web
from tests.hooks.fakes.base import Fake, run

DOMAIN = b"trtllm-runtime-control-v1\n"
HEADER = "x-trtllm-runtime-control-"


class Trtllm(Fake):
    """``state``: running, parking, parked, waking, failed."""

    def __init__(self, alias: str, *, key: str, sleep_mode: bool = True) -> None:
        super().__init__(alias)
        self.key = key
        self.sleep_mode = sleep_mode
        self.state = "running"
        self.fails = False  # whether the next order leaves it failed
        self.nonces: list[str] = []

    def routes(self) -> list[web.RouteDef]:
        always = [
            web.get("/health", self._health),
            web.get("/v1/models", self._models),
            web.post("/v1/completions", self._complete),
        ]
        return (
            always
            + [
                web.get("/memory_status", self._status),
                web.post("/release_memory", self._release),
                web.post("/resume_memory", self._resume),
            ]
            * self.sleep_mode
        )

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _request: web.Request) -> web.Response:
        return self.models()

    async def _complete(self, _request: web.Request) -> web.Response:
        if self.state != "running":
            return web.json_response({"error": "not admitted"}, status=503)
        return web.json_response({"model": self.alias, "choices": [{"text": " Paris"}]})

    async def _signed(self, request: web.Request) -> bool:
        stamp = request.headers.get(HEADER + "timestamp", "")
        nonce = request.headers.get(HEADER + "nonce", "")
        if not re.fullmatch("[0-9a-f]{32}", nonce) or nonce in self.nonces or not stamp.isdecimal():
            return False
        self.nonces.append(nonce)
        parts = (request.method, request.path, stamp, nonce)
        message = DOMAIN + b"".join(part.encode() + b"\n" for part in parts) + await request.read()
        digest = hmac.new(self.key.encode(), message, hashlib.sha256).hexdigest()
        fresh = abs(time.time() - int(stamp)) < 60
        return fresh and hmac.compare_digest(request.headers.get(HEADER + "auth", ""), f"sha256={digest}")

    async def _status(self, request: web.Request) -> web.Response:
        if not await self._signed(request):
            return web.json_response({"error": "authentication"}, status=401)
        return web.json_response({"state": self.state, "parked_tags": []})

    async def _release(self, request: web.Request) -> web.Response:
        return await self._order(request, "parking", "parked", {"running", "parked"})

    async def _resume(self, request: web.Request) -> web.Response:
        return await self._order(request, "waking", "running", {"running", "parked"})

    async def _order(self, request: web.Request, during: str, after: str, allowed: set[str]) -> web.Response:
        if not await self._signed(request):
            return web.json_response({"error": "authentication"}, status=401)
        if self.state not in allowed:
            return web.json_response({"error": f"is {self.state}"}, status=409)
        if self.fails:
            self.state = "failed"
            return web.json_response({"error": "a worker failed"}, status=500)
        self.state = during
        await asyncio.sleep(0.05)
        self.state = after
        return web.json_response({"status": "success"})


def main() -> None:
    """Take trtllm-serve's options, and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--enable_sleep_mode", action="store_true")
    given = parser.parse_args()
    if given.model == "broken":
        sys.exit("OSError: broken is no folder, and no model on the hub")
    key = os.environ["TRTLLM_RUNTIME_CONTROL_API_KEY"]
    run(Trtllm(given.model, key=key, sleep_mode=given.enable_sleep_mode), given.port)


if __name__ == "__main__":
    main()
