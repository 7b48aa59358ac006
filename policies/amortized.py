"""Amortized switches: a visit lasts at least ``alpha`` times what the next switch costs.

So at most a share 1/(1 + alpha) of the time is spent on switching, whatever the traffic. Then the model is left
for the queue whose waiters lose most by waiting, per second that it takes to reach them. A request which has
waited for too long ends a visit as in ``exhaustive``, behind the same gate.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from llmux.core.policy import ModelView, Snapshot, Stay, SwitchTo, WaitUntil

OVERHEAD = 1.0  # seconds: keeps the value of a free switch finite


class Amortized:
    """Dwells in proportion to the cost of leaving, then serves the greatest need."""

    class Options(BaseModel):
        """The bound on waits is the larger of ``staleness`` and ``factor`` switch costs."""

        alpha: float = Field(default=1.0, ge=0, description="Least visit, in costs of the next switch.")
        staleness: float = Field(default=60.0, gt=0, description="Seconds.")
        factor: float = Field(default=4.0, ge=0, description="In costs of the switch.")

    def __init__(self, options: Options) -> None:
        self._options = options

    def decide(self, now: Snapshot) -> Stay | SwitchTo | WaitUntil:
        """Stay until the visit has paid for the next switch; then go where the need is greatest."""
        home = [now.models[name] for name in now.awake]
        since = max((model.awake_since or 0.0 for model in home), default=0.0)
        if any(model.in_flight and model.queued and (model.oldest_arrival or 0.0) <= since for model in home):
            return Stay("the requests that it was woken for come first")
        options = self._options
        for name in now.waiting:
            model = now.models[name]
            age = now.time - (model.oldest_arrival or now.time)
            if age >= options.staleness and age >= options.factor * model.switch_cost:
                return SwitchTo(name, reason="waited too long")
        best = max((now.models[name] for name in now.waiting), key=lambda model: _need(model, now.time))
        paid = since + options.alpha * best.switch_cost
        if home and paid > now.time:
            return WaitUntil(paid, reason="the visit has not paid for the next switch")
        return SwitchTo(best.name, reason="the greatest need per second of switching")


def _need(model: ModelView, time: float) -> float:
    """Return request-seconds of waiting that end when the model is there, per second until then."""
    cost = model.switch_cost
    # Waiters came one after the other: their mean age is about half that of the oldest.
    age = (time - (model.oldest_arrival or time)) / 2.0
    return model.queued * (age + cost) / (OVERHEAD + cost)
