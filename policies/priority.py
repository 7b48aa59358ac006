"""Priorities with ageing: important models first, and all others in time.

Each model has a priority (1 by default). A waiter's priority grows by 1 for every ``ageing`` seconds of waiting,
so even the least important one is served in the end. The awake model is left when it is idle, and when a waiter's
priority exceeds its own after it has been awake for as long as the switch costs.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, Field, field_validator

from llmux.core.policy import ModelView, Snapshot, Stay, SwitchTo, WaitUntil


class Priority:
    """Serves the waiter of the highest priority, age included."""

    class Options(BaseModel):
        """Which models matter more, and how fast waiting makes up for it."""

        priorities: Mapping[str, float] = Field(default_factory=dict, description="By the model's name.")
        default: float = Field(default=1.0, description="For the models that are not named.")
        ageing: float = Field(default=30.0, gt=0, description="Seconds of waiting that count as 1.")

        @field_validator("priorities", mode="before")
        @classmethod
        def _read(cls, value: object) -> object:
            """Accept ``chat=5 batch=0.5``, as the simulator's command line gives it."""
            if not isinstance(value, str):
                return value
            return dict(word.partition("=")[::2] for word in value.split())

    def __init__(self, options: Options) -> None:
        self._options = options

    def decide(self, now: Snapshot) -> Stay | SwitchTo | WaitUntil:
        """Leave when idle, or when another model is more important by now."""
        home = [now.models[name] for name in now.awake]
        best = max((now.models[name] for name in now.waiting), key=lambda model: self._of(model, now.time))
        busy = [model for model in home if model.in_flight or model.queued]
        if not busy:
            return SwitchTo(best.name, reason="the awake model is idle")
        if any(
            model.in_flight and model.queued and (model.oldest_arrival or 0.0) <= (model.awake_since or 0.0)
            for model in busy
        ):
            return Stay("the requests that it was woken for come first")
        own = max(self._rank(model) for model in busy)
        # The time when its oldest waiter overtakes those at home, and the visit has paid for the switch.
        overtakes = now.time + (own - self._of(best, now.time)) * self._options.ageing
        paid = max(model.awake_since or 0.0 for model in busy) + best.switch_cost
        due = max(overtakes, paid)
        if due <= now.time and self._of(best, now.time) > own:
            return SwitchTo(best.name, reason="its priority is the highest, age included")
        return WaitUntil(max(due, now.time) + 0.01, reason="the awake model is more important for now")

    def _rank(self, model: ModelView) -> float:
        return self._options.priorities.get(model.name, self._options.default)

    def _of(self, model: ModelView, time: float) -> float:
        age = time - (model.oldest_arrival or time)
        return self._rank(model) + age / self._options.ageing
