"""Requests that ride along: they never cause a switch.

The core keeps such a request beside its model's queue, where no policy sees it, and serves it when its model is
awake anyway and has room. It may cause a switch all the same in the *window* of the day that is for that, and when
it has waited for as long as it may; from then on it waits as any other. What the time of day is, the core does not
know: it is looked at here, while something rides along.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any

from llmux.core.events import Event, RidesEnded
from llmux.core.state import State

TURN = 0.2  # seconds between two looks at the clock: it may be set

Window = tuple[int, int]
"""The minutes of the day at which it begins and ends; over midnight where it ends before it begins."""


class Riders:
    """What rides along in a core. ``clock`` is the time of day here; ``post`` hands an event to the core."""

    def __init__(
        self, state: State, post: Callable[[Event], None], clock: Callable[[], datetime] = datetime.now
    ) -> None:
        self._state = state
        self._post = post
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self.window: Window | None = None
        self.max_wait = 86_400.0

    def configure(self, window: Window | None, max_wait: float) -> None:
        """Take over when, and after how many seconds, what rides along may cause a switch."""
        self.window, self.max_wait = window, max_wait
        if self.waiting():
            self.watch()

    @property
    def seconds(self) -> float:
        """How long a request that comes now is to ride along."""
        return 0.0 if self._in_window() else self.max_wait

    def watch(self) -> None:
        """See to it that the window is noticed: something rides along."""
        if self._timer is None and self.window is not None:
            self._timer = asyncio.get_running_loop().call_later(TURN, self._turn)

    def waiting(self) -> Counter[str]:
        """Return how many ride along for each model."""
        return Counter({name: len(model.riders) for name, model in self._state.models.items() if model.riders})

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

    def _in_window(self) -> bool:
        if self.window is None:
            return False
        begin, end = self.window
        clock = self._clock()
        minute = clock.hour * 60 + clock.minute
        return begin <= minute < end if begin < end else minute >= begin or minute < end

    def _turn(self) -> None:
        self._timer = None
        if self._in_window():
            self._post(RidesEnded())
        elif self.waiting():
            self.watch()


def _spell(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"
