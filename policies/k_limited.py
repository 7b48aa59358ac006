"""At most k requests per visit: then the next model's turn, if a request waits for it.

The k-limited discipline of polling systems. It bounds how long the others wait without a clock: a round takes at
most the switches and k requests of each model. Requests that waited when the model came count like the rest, so k
must be large enough to clear what gathers in a round, or the backlog grows: about its length times the rate.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from llmux.core.policy import Snapshot, Stay, SwitchTo


class KLimited:
    """Leaves when idle or after ``k`` admissions, for the oldest waiter."""

    class Options(BaseModel):
        """How much a visit may hold."""

        k: int = Field(default=32, ge=1, description="Requests a visit, while others wait.")

    def __init__(self, options: Options) -> None:
        self._options = options

    def decide(self, now: Snapshot) -> Stay | SwitchTo:
        """Stay until the visit has reached its limit."""
        for model in map(now.models.__getitem__, now.awake):
            if (model.in_flight or model.queued) and model.admissions < self._options.k:
                return Stay("the visit has not had its share")
        return SwitchTo(now.waiting[0], reason="it has the oldest waiter")
