"""Exhaustive service with a gate and a staleness bound: stay while there is work, but not for ever.

With ``idle``, a model that never falls idle keeps all others out. Here a request which has waited for the bound
ends the visit, with a drain. The gate makes that safe: requests which waited when the model came are served before
it may be left. Without it, once every model has a request older than the bound, each visit ends as soon as it has
begun and the GPU does nothing but switch. ``gate: false`` is there to show that, in the simulator.

Exhaustive and gated service are the classic disciplines of polling systems: H. Takagi, Analysis of Polling
Systems, MIT Press 1986.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from llmux.core.policy import Snapshot, SwitchTo, WaitUntil

RECHECK = 1.0  # seconds: a gate may open at any event, and is checked at least this often


class Exhaustive:
    """Serves the awake model until it is idle or a request for another has waited for too long."""

    class Options(BaseModel):
        """The bound is the larger of ``staleness`` and ``factor`` switch costs."""

        staleness: float = Field(default=60.0, gt=0, description="Seconds.")
        factor: float = Field(default=4.0, ge=0, description="In costs of the switch.")
        route: Literal["oldest", "longest"] = Field(default="oldest", description="Where to go when idle.")
        gate: bool = Field(default=True, description="Serve the requests which waited at the wake before leaving.")

    def __init__(self, options: Options) -> None:
        self._options = options

    def decide(self, now: Snapshot) -> SwitchTo | WaitUntil:
        """Stay behind the gate; then go to the model whose wait is stale, or, when idle, along the route."""
        home = [now.models[name] for name in now.awake]
        if self._options.gate and any(
            model.in_flight and model.queued and (model.oldest_arrival or 0.0) <= (model.awake_since or 0.0)
            for model in home
        ):
            return WaitUntil(now.time + RECHECK, reason="the requests that it was woken for come first")
        due = {name: self._stale_at(now, name) for name in now.waiting}
        soonest = min(due, key=due.__getitem__)
        if due[soonest] <= now.time:
            return SwitchTo(next(name for name in now.waiting if due[name] <= now.time), reason="waited too long")
        if any(model.in_flight or model.queued for model in home):
            return WaitUntil(due[soonest], reason="the awake model is busy")
        if self._options.route == "longest":
            return SwitchTo(max(now.waiting, key=lambda name: now.models[name].queued), reason="the longest queue")
        return SwitchTo(now.waiting[0], reason="it has the oldest waiter")

    def _stale_at(self, now: Snapshot, name: str) -> float:
        model = now.models[name]
        bound = max(self._options.staleness, self._options.factor * model.switch_cost)
        return (model.oldest_arrival or now.time) + bound
