"""vLLM's server in sleep mode, and what it dies of.

Facts: https://docs.vllm.ai/en/latest/features/sleep_mode/ and vllm issues 45520 (to sleep under a request kills
it, after a 200), 15483 (so does a request to a sleeper), 34600 (a wake that runs out of memory keeps some).
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.hooks.fakes import web
from tests.hooks.fakes.base import Fake, run


class Vllm(Fake):
    """``weights``: gpu, cpu (level 1), dropped (level 2), empty (room without contents)."""

    def __init__(self, alias: str, *, sleep_mode: bool = True, key: str = "") -> None:
        super().__init__(alias)
        self.sleep_mode = sleep_mode and os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
        self.key = key
        self.weights = "gpu"
        self.kv_cache = True
        self.prefixes = "none"  # or stale: of weights that are no more
        self.held = 0  # how often the prefixes cannot be reset, because a block of them is in use
        self.left_over = 0  # requests that have gone, but are counted until the engine's next step
        self.metrics = True

    def routes(self) -> list[web.RouteDef]:
        always = [
            web.get("/health", self._health),
            web.get("/v1/models", self._models),
            web.get("/metrics", self._metrics),
            web.post("/v1/completions", self._complete),
        ]
        return (
            always
            + [
                web.get("/is_sleeping", self._is_sleeping),
                web.post("/sleep", self._sleep),
                web.post("/wake_up", self._wake_up),
                web.post("/collective_rpc", self._rpc),
                web.post("/reset_prefix_cache", self._reset),
            ]
            * self.sleep_mode
        )

    @property
    def sleeping(self) -> bool:
        """Whether anything is not there."""
        return self.weights in ("cpu", "dropped") or not self.kv_cache

    def _unauthorized(self, request: web.Request) -> bool:
        return bool(self.key) and request.headers.get("Authorization") != f"Bearer {self.key}"

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.Response(status=401) if self._unauthorized(request) else self.models()

    async def _metrics(self, _request: web.Request) -> web.Response:
        if not self.metrics:
            return web.Response(status=404)
        running = self.in_flight + self.left_over
        return web.Response(
            text='# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0"} '
            f'{running:.1f}\nvllm:num_requests_waiting{{engine="0"}} 0.0\nvllm:num_requests_total 7.0\n'
        )

    async def _is_sleeping(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": self.sleeping})

    async def _sleep(self, request: web.Request) -> web.Response:
        if self.in_flight or self.sleeping:
            self.die(0.02)  # after it has answered
        self.weights = {"1": "cpu", "2": "dropped"}[request.query.get("level", "1")]
        self.kv_cache = False
        return web.Response()

    async def _wake_up(self, request: web.Request) -> web.Response:
        tags = request.query.getall("tags", ["weights", "kv_cache"])
        if "weights" in tags:
            if self.weights in ("gpu", "empty"):  # mapped twice: a CUDA error
                self.die()
            self.weights = {"cpu": "gpu", "dropped": "empty"}.get(self.weights, self.weights)
        if "kv_cache" in tags:
            self.kv_cache = True
            self.prefixes = "stale" if self.weights == "empty" else self.prefixes
        return web.Response()

    async def _rpc(self, request: web.Request) -> web.Response:
        assert (await request.json()) == {"method": "reload_weights"}
        if self.weights not in ("empty", "gpu"):  # no room for them: an illegal access
            self.die()
        if self.kv_cache:  # the cache has taken the room that loading needs
            return web.json_response({"error": "CUDA out of memory"}, status=500)
        self.weights, self.prefixes = "gpu", "stale"
        return web.json_response({"results": [None]})

    async def _reset(self, _request: web.Request) -> web.Response:
        success = self.held == 0
        if success:
            self.prefixes = "none"
        else:
            self.held -= 1
        return web.json_response({"success": success})

    async def _complete(self, request: web.Request) -> web.Response:
        if self._unauthorized(request):
            return web.Response(status=401)
        body = await request.json()
        assert body["max_tokens"] == 1
        if self.sleeping:
            self.die()
        self.left_over = 0
        text = " Paris" if self.weights == "gpu" and self.prefixes == "none" else "!!!!"
        return web.json_response({"model": self.alias, "choices": [{"text": text}]})


def main() -> None:
    """Take vLLM's options, and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--enable-sleep-mode", action="store_true")
    given = parser.parse_args()
    if given.model == "broken":
        sys.exit("OSError: broken is no folder, and no model on the hub")
    key = os.environ.get("VLLM_API_KEY", "")
    run(Vllm(given.served_model_name, sleep_mode=given.enable_sleep_mode, key=key), given.port)


if __name__ == "__main__":
    main()
