"""First come, first served: switch at once to the model whose oldest waiter has waited longest.

This is the rule of llmux 2.x. It is fair and never idle, but spends much of its time draining and
switching when requests for two models alternate: raise ``min_active`` then, or choose another policy.
"""

from __future__ import annotations

from llmux.core.policy import Snapshot, SwitchTo


class Fifo:
    """Serves the oldest waiter next, whatever that costs."""

    def decide(self, now: Snapshot) -> SwitchTo:
        """Switch to the first of ``waiting``, which is sorted by its oldest waiter."""
        return SwitchTo(now.waiting[0], reason="it has the oldest waiter")
