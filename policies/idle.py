"""Leave when idle: serve the awake model as long as it has work, then go to the oldest waiter.

This is llama-swap's rule, and the exhaustive service of the polling literature: it never pays for a drain, and
requests come in groups. A model that never falls idle keeps all others waiting until ``max_wait``.
"""

from __future__ import annotations

from llmux.core.policy import Snapshot, Stay, SwitchTo


class Idle:
    """Switches only when nothing is in flight or queued for the awake model."""

    def decide(self, now: Snapshot) -> Stay | SwitchTo:
        """Stay while any request is served."""
        for name in now.awake:
            if now.models[name].in_flight or now.models[name].queued:
                return Stay("the awake model is busy")
        return SwitchTo(now.waiting[0], reason="the awake model is idle")
