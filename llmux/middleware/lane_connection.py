"""A client's connection whose requests are offered to the lane before aiohttp sees them.

aiohttp's parser keeps what it has seen of a request, so the two can take turns only where one request ends and the
next begins. ``_owed`` says how far that is; once it is not known, all that comes is aiohttp's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp.web_protocol import RequestHandler

from llmux.middleware.endpoint import Handover
from llmux.middleware.lane import Lane, Ride
from llmux.middleware.plain_request import UNKNOWN, read

HOLD = 0.25  # seconds that the rest of a small request may take; aiohttp knows how to wait for longer
MOST_AHEAD = 64 * 1024  # bytes that a client may send before its last request is answered


class LaneConnection(RequestHandler):
    """One client's connection."""

    __slots__ = ("_ahead", "_busy", "_held", "_lane", "_owed", "_timer", "handover", "loop", "output_size", "ride")

    def __init__(self, *args: Any, lane: Lane, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loop = self._loop
        self.ride: Ride | None = None  # a request is on the lane
        self.handover: Handover | None = None  # the next request that aiohttp begins was on the lane
        self.output_size = 0
        self._lane = lane
        self._busy = 0  # requests that aiohttp has begun with
        self._owed = 0  # bytes that belong to a request that aiohttp has the beginning of; UNKNOWN
        self._held = b""  # what has come and nobody was given yet
        self._ahead = False  # that is more than is good: nothing more is read
        self._timer: asyncio.TimerHandle | None = None  # the rest of what is held takes too long

    def data_received(self, data: bytes) -> None:
        """Offer what has come to the lane, if a request begins here."""
        if self.ride is not None:
            self.keep(data)
            return
        if self._held:
            data = self._held + data
            self._held = b""
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        if not data or self._owed < 0 or not self._lane.open:
            self._pass_on(data)
        elif self._owed:
            self._owed -= len(data)
            self._pass_on(data)
        else:
            self._at_boundary(data)

    def _at_boundary(self, data: bytes) -> None:
        seen = read(data)
        total = seen.total
        missing = total - len(data)
        fit = seen.plain and total - seen.head <= self._lane.most
        if fit and not (self._busy or self._close or self._force_close):
            if missing > 0:
                self._held = data
                self._timer = self._loop.call_later(HOLD, self._waited)
                return
            if self._lane.offer(self, data, seen):
                return
        self._owed = missing if total >= 0 and missing >= 0 else UNKNOWN
        self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        """Give bytes to aiohttp."""
        before = len(self._messages)
        super().data_received(data)
        self._busy += len(self._messages) - before

    async def _handle_request(self, *args: Any) -> Any:
        try:
            response, reset = await super()._handle_request(*args)
            if reset or not response.keep_alive:
                self._owed = UNKNOWN
            return response, reset
        finally:
            self._busy -= 1

    def _waited(self) -> None:
        self._timer = None
        data, self._held = self._held, b""
        self._owed = read(data).total - len(data)
        self._pass_on(data)

    # ---- the ride

    def keep(self, data: bytes) -> None:
        """Hold what comes while a request is on the lane."""
        self._held += data
        if len(self._held) > MOST_AHEAD and not self._ahead and self.transport is not None:
            self._ahead = True
            self.transport.pause_reading()

    def ride_over(self, *, keep_alive: bool) -> None:
        """Look at what comes next."""
        self.ride = None
        transport = self.transport
        if transport is None:
            return
        if not keep_alive or self._close or self._force_close or transport.is_closing():
            self.force_close()
            return
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._held:
            self._loop.call_soon(self._next)
        if self._ahead:
            self._ahead = False
            transport.resume_reading()

    def _next(self) -> None:
        if self._held and self.ride is None and self.transport is not None:
            self.data_received(b"")

    def hand_over(self, handover: Handover, raw: bytes) -> None:
        """Give a request to aiohttp that was on the lane."""
        self.ride = None
        if self.transport is None or self._close or self._force_close:
            self._lane.abandon(handover)
            self.force_close()
            return
        self.handover = handover
        if self._held:
            raw, self._held, self._owed = raw + self._held, b"", UNKNOWN
        if self._ahead:
            self._ahead = False
            self.transport.resume_reading()
        self._pass_on(raw)

    async def drain(self) -> None:
        """Wait until the client has read most of what it was sent."""
        await self._drain_helper()

    # ---- the connection

    def _process_keepalive(self) -> None:
        if self.ride is None:
            super()._process_keepalive()
        else:
            self._keepalive_handle = self._loop.call_later(self._keepalive_timeout, self._process_keepalive)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End what is on the lane."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
        if self.ride is not None:
            self.ride.client_closed()
        if self.handover is not None:
            self._lane.abandon(self.handover)
            self.handover = None
