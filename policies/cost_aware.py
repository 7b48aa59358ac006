"""Switch when the queue is worth it: the cost-aware rule of llmux before 2.0, with its parameters.

A model is awake for at least as long as the next switch costs. Then it is left for a queue that holds
``amortization_factor`` requests per second of that cost, or whose oldest request has waited for
``coalesce_window``, in which more may gather. A request that has waited for ``max_wait`` is served at once.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, Field

from llmux.core.policy import ModelView, Snapshot, Stay, SwitchTo, WaitUntil


class CostAware:
    """Leaves for a queue that is long enough for its switch cost, or old enough."""

    class Options(BaseModel):
        """Seconds; the names are those of llmux 1."""

        coalesce_window: float = Field(default=2.0, ge=0, description="How long a short queue gathers.")
        amortization_factor: float = Field(default=0.5, ge=0, description="Requests per second of switch cost.")
        max_wait: float = Field(default=15.0, gt=0, description="What has waited this long is served next.")

    def __init__(self, options: Options) -> None:
        self._options = options

    def decide(self, now: Snapshot) -> Stay | SwitchTo | WaitUntil:
        """Take the first queue, oldest waiter first, that justifies its switch."""
        home = [now.models[name] for name in now.awake]
        since = max((model.awake_since or 0.0 for model in home), default=-math.inf)
        if any(model.in_flight and model.queued and (model.oldest_arrival or 0.0) <= since for model in home):
            return Stay("the requests that it was woken for come first")
        soonest = math.inf
        for name in now.waiting:
            due = self._due(now.models[name], now.time, since)
            if due <= now.time:
                return SwitchTo(name, reason="its queue is worth the switch")
            soonest = min(soonest, due)
        return WaitUntil(soonest, reason="no queue is worth its switch yet")

    def _due(self, model: ModelView, time: float, since: float) -> float:
        """Return when the model may be switched to, if nothing changes."""
        options, cost = self._options, model.switch_cost
        oldest = model.oldest_arrival or time
        enough = max(1, math.ceil(options.amortization_factor * cost))
        gathered = oldest if model.queued >= enough else oldest + options.coalesce_window
        return min(oldest + options.max_wait, max(since + cost, gathered))
