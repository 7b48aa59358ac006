"""Letting go of those who have waited, a few in each turn of the loop.

When a model has been woken, hundreds may be admitted in one step. Were they all to go on at once, each with a
connection to open, the first would have to wait for the last before its bytes could move. So the loop gets to look
at its sockets in between.
"""

from __future__ import annotations

import asyncio
from collections import deque

AT_ONCE = 4
"""How many go on in one turn of the loop; each takes it some 0.1 ms to send its request."""


class Waking:
    """Waiters that may go on, in their order."""

    def __init__(self) -> None:
        self._due: deque[asyncio.Future[None]] = deque()
        self._room = AT_ONCE
        self._turning = False

    def add(self, waiter: asyncio.Future[None]) -> None:
        """Let a waiter go on, in this turn of the loop or in one of the next."""
        self._due.append(waiter)
        self._go_on()

    def _go_on(self) -> None:
        while self._due and self._room:
            waiter = self._due.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._room -= 1
        if self._room < AT_ONCE and not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = False
        self._room = AT_ONCE
        self._go_on()
