"""A policy that is shown wrong averages: to see what it is worth when the estimates are off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmux.core.policy import Decision, EngineView, ModelView, Policy, Snapshot, SwitchRecord


class Misjudged:
    """Asks ``policy``, but every cost, arrival rate and service time it sees is multiplied by a factor."""

    def __init__(
        self, policy: Policy, factor: float = 1.0, *, rates: float | None = None, services: float | None = None
    ) -> None:
        self._policy = policy
        self._costs = factor
        self._rates = factor if rates is None else rates
        self._services = factor if services is None else services

    def decide(self, now: Snapshot) -> Decision:
        """Ask the policy."""
        return self._policy.decide(_Shown(now, self._costs, self._rates, self._services))

    def on_switch_completed(self, record: SwitchRecord) -> None:
        """Tell the policy of a switch: what it cost is measured, and right."""
        inform = getattr(self._policy, "on_switch_completed", None)
        if inform is not None:
            inform(record)


class _Shown:
    """A snapshot whose models are shown wrong."""

    def __init__(self, now: Snapshot, costs: float, rates: float, services: float) -> None:
        self.time = now.time
        self.awake = now.awake
        self.waiting = now.waiting
        self.models: Mapping[str, ModelView] = {
            name: _ShownModel(model, costs, rates, services) for name, model in now.models.items()
        }


class _ShownModel:
    """A model whose averages are wrong."""

    def __init__(self, model: ModelView, costs: float, rates: float, services: float) -> None:
        self._model = model
        self._factors = costs, rates, services

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def switch_cost(self) -> float:
        """Seconds, wrong."""
        return self._model.switch_cost * self._factors[0]

    @property
    def arrival_rate(self) -> float:
        """Arrivals per second, wrong."""
        return self._model.arrival_rate * self._factors[1]

    @property
    def service_time(self) -> float:
        """Seconds, wrong."""
        return self._model.service_time * self._factors[2]

    @property
    def engine(self) -> EngineView:
        """Of another speed than it has."""
        return _ShownEngine(self._model.engine, self._factors[2])

    def arrivals(self) -> Iterator[float]:
        """Arrival times, right."""
        return self._model.arrivals()


class _ShownEngine:
    """An engine whose speed is wrong."""

    def __init__(self, engine: EngineView, factor: float) -> None:
        self._engine, self._factor = engine, factor
        self.slots = engine.slots

    @property
    def most(self) -> float:
        """Answers a second, wrong."""
        return self._engine.most / self._factor

    def throughput(self, in_flight: int) -> float:
        """Answers a second, wrong."""
        return self._engine.throughput(in_flight) / self._factor

    def drain(self, in_flight: int) -> float:
        """Seconds, wrong."""
        return self._engine.drain(in_flight) * self._factor

    def serving(self, waiting: int, limit: int | None) -> float:
        """Seconds, wrong."""
        return self._engine.serving(waiting, limit) * self._factor
