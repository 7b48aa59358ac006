"""Drain first, then the longest queue, with a staleness bound. The time-slice rule of llmux before 2.0.

The awake model is served until it is idle, at least for ``min_active``; then comes the model with the most
waiters. A request which has waited for ``max_wait`` is served at once. As in every rule with such a bound,
requests which waited when the model came are served first, as otherwise under load it would do nothing but switch
(see ``exhaustive``).
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from llmux.core.policy import Snapshot, Stay, SwitchTo, WaitUntil


class TimeSlice:
    """Goes to the longest queue when idle, and to the model of a request which has waited too long."""

    class Options(BaseModel):
        """Seconds; the names are those of llmux 1."""

        max_wait: float = Field(default=15.0, gt=0, description="What has waited this long is served next.")
        min_active: float = Field(default=5.0, ge=0, description="A model stays awake for at least this long.")

    def __init__(self, options: Options) -> None:
        self._options = options

    def decide(self, now: Snapshot) -> Stay | SwitchTo | WaitUntil:
        """Stay while busy, unless the oldest waiter is stale."""
        oldest = now.models[now.waiting[0]].oldest_arrival or now.time
        stale = oldest + self._options.max_wait
        home = [now.models[name] for name in now.awake]
        busy = any(model.in_flight or model.queued for model in home)
        if stale <= now.time:
            for model in home:
                owed = model.oldest_arrival
                if owed is not None and model.in_flight and owed <= max(model.awake_since or 0.0, stale):
                    return Stay("the requests that it was woken for come first")
            return SwitchTo(now.waiting[0], reason="waited too long")
        ready = max((model.awake_since or 0.0 for model in home), default=0.0) + self._options.min_active
        if busy or ready > now.time:
            return WaitUntil(
                stale if busy else min(stale, ready), reason="the awake model's time slice is not over"
            )
        return SwitchTo(max(now.waiting, key=lambda name: now.models[name].queued), reason="the longest queue")
