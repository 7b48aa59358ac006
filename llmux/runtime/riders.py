"""Requests that ride along: they never cause a switch.

Such a request does not enter the core before it would be let through at once, because its model is awake and has
room. Until then it waits here, and no policy sees it. It enters all the same, and may cause a switch, in the
*window* of the day that is for that, and when it has waited for as long as it may.

One timer looks after all that wait, and runs only while something does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from llmux.core import admission
from llmux.core.state import State
from llmux.errors import QueueFullError

TURN = 0.2  # seconds between two looks

Window = tuple[int, int]
"""The minutes of the day at which it begins and ends; over midnight where it ends before it begins."""


@dataclass(slots=True, eq=False)
class _Rider:
    model: str
    until: float  # on the core's clock
    going: asyncio.Future[None] | None = None


class Riders:
    """Those that wait. ``now`` is the core's clock, ``clock`` the time of day here."""

    def __init__(
        self, state: State, now: Callable[[], float], clock: Callable[[], datetime] = datetime.now
    ) -> None:
        self._state = state
        self._now = now
        self._clock = clock
        self._riders: dict[_Rider, None] = {}  # in the order in which they came
        self._timer: asyncio.TimerHandle | None = None
        self.window: Window | None = None
        self.max_wait = 86_400.0

    async def ride(self, model: str) -> float:
        """Wait until a request may enter, and return the seconds that it has waited.

        The caller enters it without a pause. Raises QueueFullError when as many wait as may.
        """
        began = self._now()
        rider = _Rider(model, began + self.max_wait)
        if self._may_go(rider):
            return 0.0
        most = self._state.models[model].spec.max_queued
        if self.waiting().get(model, 0) >= most:
            raise QueueFullError(f"{most} requests ride along for {model!r} already.", retry_after=60.0)
        self._riders[rider] = None
        try:
            while not self._may_go(rider):
                rider.going = asyncio.get_running_loop().create_future()
                self._arm()
                await rider.going
        finally:
            del self._riders[rider]
        return self._now() - began

    def waiting(self) -> Counter[str]:
        """Return how many wait for each model."""
        return Counter(rider.model for rider in self._riders)

    def document(self) -> list[dict[str, Any]]:
        """Return what waits, and until when, in words."""
        window = "" if self.window is None else f", from {_spell(self.window[0])} to {_spell(self.window[1])}"
        return [
            {
                "model": model,
                "requests": count,
                "reason": f"{count} ride along for {model}: they cause no switch, and are served when it is awake"
                f" anyway{window}, or when they have waited for {self.max_wait:g} s",
            }
            for model, count in sorted(self.waiting().items())
        ]

    def _may_go(self, rider: _Rider) -> bool:
        state = self._state
        model = state.models.get(rider.model)
        if model is None or state.stopping or self._now() >= rider.until or self._in_window():
            return True
        return admission.is_open(state, model)

    def _in_window(self) -> bool:
        if self.window is None:
            return False
        begin, end = self.window
        clock = self._clock()
        minute = clock.hour * 60 + clock.minute
        return begin <= minute < end if begin < end else minute >= begin or minute < end

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TURN, self._turn)

    def _turn(self) -> None:
        self._timer = None
        for rider in self._riders:
            going = rider.going
            if going is not None and not going.done() and self._may_go(rider):
                going.set_result(None)
        if self._riders:
            self._arm()


def _spell(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"
