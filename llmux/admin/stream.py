"""The live event stream: events of the core and the hooks, as server-sent events.

A slow reader loses events, and is told how many; it never slows serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from llmux.core.effects import Effect, PolicyDecided, RunHook, SwitchStarted
from llmux.core.spec import HookKind
from llmux.observability.gpus import UNREAD, Gpus
from llmux.observability.notices import describe
from llmux.runtime import Switcher
from llmux.runtime.history import decisions_since
from llmux.runtime.status_document import host_report, status

BACKLOG = 1000  # events kept for a slow reader
HEARTBEAT = 15.0  # seconds
REPORT_PAUSE = 0.1  # minimum seconds between two reports
REPORT_LOOK = 0.5  # maximum seconds between two checks for changes
SOON = 0.05  # seconds from a phase change to the status for clients with a short interval
# In the status, and too many to send one by one; decisions are sent whole.
QUIET = frozenset({"request_queued", "policy_decided"})
_PROBES = frozenset({HookKind.ALIVE, HookKind.VERIFY})


class EventStream:
    """One subscriber.

    ``every`` (seconds) sends the status periodically, and counts streamed events meanwhile; with ``gpus`` their
    load is sent too. ``output`` is for operators: the output of hooks.
    """

    def __init__(
        self, switcher: Switcher, *, every: float | None = None, gpus: Gpus | None = None, output: bool = False
    ) -> None:
        self._switcher = switcher
        self._every = every
        self._gpus = gpus
        self._output = output
        self._events: deque[bytes] = deque()
        self._lost = 0
        self._decision = switcher.decisions.last_id
        self._move = switcher.timeline.last_move
        self._due = 0.0  # when the status, or a heartbeat, is sent next
        self._gpus_told: Mapping[str, Any] | None = None
        self._news = asyncio.Event()

    def take(self, effect: Effect) -> None:
        """Queue an effect if it is news; never waits."""
        self._take_moves()
        if isinstance(effect, PolicyDecided | SwitchStarted):
            for decision in decisions_since(self._switcher, self._decision):
                self._decision = decision["id"]
                self._put("decision", decision)
        if isinstance(effect, RunHook) and effect.kind in _PROBES:
            return
        event = describe(effect, base_url=self._switcher.log.base_url)
        if event is not None and event.name not in QUIET:
            self._put(event.name, event.fields)

    def take_hook(self, name: str, fields: Mapping[str, object]) -> None:
        """Queue a hook's output, or how it ended; never waits."""
        if self._output or name != "hook_output":
            self._put(name, fields)

    def _take_moves(self) -> None:
        if self._switcher.timeline.last_move != self._move:
            for move in self._switcher.history.moves_since(self._move):
                self._move = move["id"]
                self._put("phase", move)
            if self._every is not None:
                self._due = min(self._due, asyncio.get_running_loop().time() + SOON)

    def _put(self, name: str, fields: Mapping[str, object]) -> None:
        if len(self._events) >= BACKLOG:
            self._lost += 1
        else:
            self._events.append(sse(name, {"time": time.time(), **fields}))
        self._news.set()

    async def serve(self, request: web.Request, response: web.StreamResponse) -> None:
        """Write events until the client leaves or llmux stops."""
        await response.prepare(request)
        switcher = self._switcher
        ends = [switcher.subscribe(self.take), switcher.history.listen(self.take_hook)]
        if self._every is not None:
            ends.append(switcher.activities.watch())
        try:
            await self._write_events(response)
        finally:
            for end in ends:
                end()

    async def _write_events(self, response: web.StreamResponse) -> None:
        now = asyncio.get_running_loop().time
        pause = self._every or HEARTBEAT
        await self._tell_status(response)
        self._due = now() + pause
        while not self._switcher.stopped.is_set():
            if now() >= self._due:
                self._due = now() + pause
                if self._every is None:
                    await response.write(b": llmux\n\n")
                else:
                    self._take_moves()
                    await self._tell_status(response)
            try:
                async with asyncio.timeout_at(self._due):
                    await self._news.wait()
            except TimeoutError:
                continue
            self._news.clear()
            await self._write_all(response)

    async def _tell_status(self, response: web.StreamResponse) -> None:
        await self._write_all(response)
        await response.write(sse("status", status(self._switcher)))
        if self._gpus is None:
            return
        found = self._gpus.glance()
        if found is not self._gpus_told and found is not UNREAD:
            self._gpus_told = found
            await response.write(sse("gpus", found))

    async def _write_all(self, response: web.StreamResponse) -> None:
        while self._events:
            await response.write(self._events.popleft())
        if self._lost:
            lost, self._lost = self._lost, 0
            await response.write(sse("lost", {"events": lost}))


class ReportStream:
    """A gateway that is sent a report every ``every`` seconds, and soon after any change other than of a queue.

    There is no backlog: a gateway that reads slowly gets the newest report when it reads again.
    """

    def __init__(self, switcher: Switcher, *, every: float) -> None:
        self._switcher = switcher
        self._every = every
        self._news = asyncio.Event()
        self._told = self._state()

    async def serve(self, request: web.Request, response: web.StreamResponse) -> None:
        """Write reports until the gateway leaves or llmux stops."""
        await response.prepare(request)
        switcher, now = self._switcher, asyncio.get_running_loop().time
        end = switcher.subscribe(self._look)
        try:
            while not switcher.stopped.is_set():
                self._told = self._state()
                due = now() + self._every
                await response.write(sse("report", host_report(switcher)))
                await asyncio.sleep(REPORT_PAUSE)
                while now() < due and self._state() == self._told:
                    self._news.clear()
                    with contextlib.suppress(TimeoutError):
                        # Some changes have no effect event.
                        async with asyncio.timeout(min(REPORT_LOOK, due - now())):
                            await self._news.wait()
        finally:
            end()

    def _look(self, _effect: Effect) -> None:
        if self._state() != self._told:
            self._news.set()

    def _state(self) -> tuple[object, ...]:
        """Return what a gateway must be told at once when it changes."""
        switcher, s = self._switcher, self._switcher.core.state
        return switcher.timeline.last_move, s.stopping, s.lease, s.ready, switcher.stopped.is_set()


def sse(name: str, fields: object) -> bytes:
    """Return one server-sent event."""
    return f"event: {name}\ndata: {json.dumps(fields, default=str)}\n\n".encode()
