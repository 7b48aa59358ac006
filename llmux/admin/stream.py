"""The live event stream: what the core tells, as server-sent events.

A slow reader loses events, and is told so; it never slows serving.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque

from aiohttp import web

from llmux.core.effects import Effect, PolicyDecided, SwitchStarted
from llmux.observability.notices import describe
from llmux.runtime import Switcher
from llmux.runtime.decisions import decisions_since
from llmux.runtime.status import status

BACKLOG = 1000  # events kept for a slow reader
HEARTBEAT = 15.0  # seconds
# Told by the status, too many to be told one by one; decisions are told whole.
QUIET = frozenset({"request_queued", "hook_started", "policy_decided"})


class EventStream:
    """One subscriber."""

    def __init__(self, switcher: Switcher) -> None:
        self._switcher = switcher
        self._events: deque[bytes] = deque()
        self._lost = 0
        self._decision = switcher.core.state.decision_ids
        self._news = asyncio.Event()

    def take(self, effect: Effect) -> None:
        """Queue an effect if it is news; never waits."""
        if isinstance(effect, PolicyDecided | SwitchStarted):
            for decision in decisions_since(self._switcher, self._decision):
                self._decision = decision["id"]
                self._put("decision", decision)
        event = describe(effect, base_url=self._switcher.log.base_url)
        if event is not None and event.name not in QUIET:
            self._put(event.name, event.fields)

    def _put(self, name: str, fields: object) -> None:
        if len(self._events) >= BACKLOG:
            self._lost += 1
        else:
            self._events.append(sse(name, fields))
        self._news.set()

    async def serve(self, request: web.Request, response: web.StreamResponse) -> None:
        """Write events until the client leaves or llmux stops."""
        await response.prepare(request)
        unsubscribe = self._switcher.subscribe(self.take)
        try:
            await response.write(sse("status", status(self._switcher)))
            while not self._switcher.stopped.is_set():
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        await self._news.wait()
                except TimeoutError:
                    await response.write(b": llmux\n\n")
                    continue
                self._news.clear()
                await self._write_all(response)
        finally:
            unsubscribe()

    async def _write_all(self, response: web.StreamResponse) -> None:
        while self._events:
            await response.write(self._events.popleft())
        if self._lost:
            lost, self._lost = self._lost, 0
            await response.write(sse("lost", {"events": lost}))


def sse(name: str, fields: object) -> bytes:
    """Return one server-sent event."""
    return f"event: {name}\ndata: {json.dumps(fields, default=str)}\n\n".encode()
