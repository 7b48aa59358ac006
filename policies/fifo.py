"""First come, first served: leave at the first request for another model, and go to the oldest waiter.

This is the rule of llmux 2.x: requests that waited when the model came (or, later, when the first request for
another model began to wait) are still served. It is fair and never idle, but spends much of its time draining and
switching when requests for two models alternate: raise ``min_active`` then, or choose another policy.
"""

from __future__ import annotations

from llmux.core.policy import Snapshot, Stay, SwitchTo


class Fifo:
    """Serves the oldest waiter next, whatever that costs."""

    def decide(self, now: Snapshot) -> Stay | SwitchTo:
        """Switch to the first of ``waiting``, once those before it are admitted (``max_in_flight``)."""
        oldest = now.models[now.waiting[0]].oldest_arrival or now.time
        for model in map(now.models.__getitem__, now.awake):
            first = model.oldest_arrival
            if first is not None and model.in_flight and first <= max(oldest, model.awake_since or 0.0):
                return Stay("earlier requests wait for a place")
        return SwitchTo(now.waiting[0], reason="it has the oldest waiter")
