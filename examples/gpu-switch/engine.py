#!/usr/bin/env python3
"""An engine with real weights and a real forward pass, whose weights can leave the GPU.

python engine.py NAME PORT --size 8GiB [--device cuda|cpu]

OpenAI-shaped: /v1/models, /v1/completions, /v1/chat/completions (streaming too), /health. For the hooks, on the
same port: POST /sleep, POST /wake, and GET /moves: what each move took. It knows no words: it answers in numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import weights
from aiohttp import web


class Engine:
    """One model. It dies when it is asked something in its sleep, as some real ones do."""

    def __init__(self, name: str, model: weights.Weights) -> None:
        self.name = name
        self.model = model
        self.awake = True
        self.moves: list[dict[str, Any]] = []
        self._one = asyncio.Lock()  # one batch at a time, and no move beside it

    def app(self) -> web.Application:
        """Return the server."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/v1/models", self.models),
                web.post("/v1/completions", self.complete),
                web.post("/v1/chat/completions", self.complete),
                web.post("/sleep", self.sleep),
                web.post("/wake", self.wake),
                web.get("/moves", self.told),
            ]
        )
        return app

    async def health(self, _request: web.Request) -> web.Response:
        """Answer 200 while the weights are on the device."""
        return web.json_response({"awake": self.awake}, status=200 if self.awake else 503)

    async def models(self, _request: web.Request) -> web.Response:
        """Say which model this is."""
        return web.json_response({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def told(self, _request: web.Request) -> web.Response:
        """Say what the moves took."""
        return web.json_response({"bytes": self.model.bytes, "moves": self.moves})

    async def sleep(self, _request: web.Request) -> web.Response:
        """Move the weights to the host."""
        return await self._move("sleep")

    async def wake(self, _request: web.Request) -> web.Response:
        """Move the weights to the device."""
        return await self._move("wake")

    async def _move(self, which: str) -> web.Response:
        async with self._one:
            if self.awake == (which == "wake"):
                return web.json_response({"already": True})
            move = self.model.to_device if which == "wake" else self.model.to_host
            moved = (await asyncio.to_thread(move)).as_dict()
            self.awake = which == "wake"
            self.moves.append({"move": which, "at": time.time(), **moved})
            return web.json_response(moved)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer with so many tokens."""
        asked = await request.json()
        prompt = json.dumps(asked.get("messages") or asked.get("prompt") or "")
        chat = "chat" in request.path
        tokens = self.tokens(list(prompt.encode()), int(asked.get("max_tokens") or 16))
        kind = "chat.completion" if chat else "text_completion"
        head = {"id": "x", "created": int(time.time()), "model": self.name}
        if not asked.get("stream"):
            text = "".join([token async for token in tokens])
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choice = {"index": 0, "finish_reason": "stop", **said}
            return web.json_response({**head, "object": kind, "choices": [choice]})
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        async for token in tokens:
            said = {"delta": {"content": token}} if chat else {"text": token}
            choice = {"index": 0, "finish_reason": None, **said}
            event = {**head, "object": f"{kind}.chunk" if chat else kind, "choices": [choice]}
            await answer.write(f"data: {json.dumps(event)}\n\n".encode())
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def tokens(self, context: list[int], count: int) -> AsyncIterator[str]:
        """Yield so many tokens, each from a pass through all the weights."""
        for _ in range(count):
            async with self._one:
                if not self.awake:
                    sys.exit("asked in its sleep")
                token = await asyncio.to_thread(self.model.next_token, context)
            context.append(token)
            yield f"{token} "


def main() -> None:
    """Serve, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("port", type=int)
    parser.add_argument("--size", type=weights.size, default="64MiB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bandwidth", action="store_true", help="print what the device can do, and end")
    options = parser.parse_args()
    try:
        if options.bandwidth:
            print(json.dumps(weights.bandwidth(options.size, options.device)))
            return
        model = weights.make(options.size, sum(options.name.encode()), options.device)
    except ImportError as error:
        needed = "torch or numpy" if options.device == "cpu" else "torch"
        sys.exit(f"--device {options.device} needs {needed}: {error}")
    except RuntimeError as error:  # torch's word for a device that is not there or is full
        sys.exit(f"--device {options.device}: {error}")
    web.run_app(Engine(options.name, model).app(), host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
