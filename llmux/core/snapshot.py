"""What a policy sees: live, read-only views over the state, without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from llmux.core import placement
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.core.policy import EngineView
from llmux.core.state import State
from llmux.core.successors import Successor


class LiveModel:
    """One model, read from the state at each access."""

    __slots__ = ("_model", "_snapshot", "_state")

    def __init__(self, snapshot: LiveSnapshot, state: State, model: Model) -> None:
        self._snapshot = snapshot
        self._state = state
        self._model = model

    @property
    def name(self) -> str:
        """The model's name in requests."""
        return self._model.spec.name

    @property
    def awake(self) -> bool:
        """Whether it is awake."""
        return self._model.phase is Phase.AWAKE

    @property
    def queued(self) -> int:
        """How many requests wait for it."""
        return len(self._model.queue)

    @property
    def in_flight(self) -> int:
        """How many requests it is serving."""
        return len(self._model.in_flight)

    @property
    def limit(self) -> int | None:
        """``max_in_flight``, or None."""
        return self._model.spec.max_in_flight

    @property
    def oldest_arrival(self) -> float | None:
        """When its oldest waiter arrived, or None."""
        oldest = self._model.oldest()
        return None if oldest is None else oldest.arrived

    @property
    def awake_since(self) -> float | None:
        """When it was last activated, or None while it is not awake."""
        return self._model.awake_since if self._model.phase is Phase.AWAKE else None

    @property
    def admissions(self) -> int:
        """How many requests it was given since it was last activated."""
        return self._model.admissions

    @property
    def oldest_admission(self) -> float | None:
        """When the one it has been serving for longest was admitted, or None while it serves nobody."""
        first = next(iter(self._model.in_flight.values()), None)
        return None if first is None else first.admitted

    @property
    def last_served(self) -> float | None:
        """When its last answer ended, or None."""
        return self._model.last_served

    @property
    def arrival_rate(self) -> float:
        """Arrivals per second."""
        return self._model.arrival_rate(self._state.now)

    @property
    def service_time(self) -> float:
        """Seconds from admission to the last byte; 0 until measured."""
        return self._model.service

    @property
    def switch_cost(self) -> float:
        """Expected seconds of a switch to it from what is awake now, without the drain."""
        state, model, leaving = self._state, self._model, self._snapshot.leaving(self._model)
        if state.has_levels:
            return placement.switch_cost(state, leaving, model)
        # A policy may look at each of many models.
        return state.costs.estimate([each.spec.name for each in leaving], model.spec.name)

    @property
    def engine(self) -> EngineView:
        """How its engine's speed depends on how much it is given."""
        return self._model.load

    @property
    def successors(self) -> Mapping[str, Successor]:
        """Which models were asked next after its answers, and how soon, by name."""
        return self._state.successors.after(self._model.name)

    def arrivals(self) -> Iterator[float]:
        """Arrival times of its waiters, oldest first."""
        return (request.arrived for request in self._model.queue.values())


class LiveSnapshot:
    """The whole, read from the state at each access."""

    __slots__ = ("_all", "_models", "_state", "models", "waiting")

    def __init__(self, state: State) -> None:
        self._state = state
        self._models: dict[str, LiveModel] = {}
        self.models: Mapping[str, LiveModel] = MappingProxyType(self._models)
        self.waiting: tuple[str, ...] = ()
        self._all: list[Model] | None = None  # who leaves for anybody; None: not looked at since it was asked last
        self.refresh()

    def ask(self, waiting: tuple[str, ...]) -> None:
        """Show what is the case now."""
        self.waiting = waiting
        self._all = None

    def leaving(self, target: Model) -> Sequence[Model]:
        """Return those that would leave for ``target``, none if it cannot be had."""
        s = self._state
        if s.rules.capacity is not None or target.next.companions is not None:
            return placement.who_leaves(s, target) or ()
        # One at a time: all leave, whoever comes.
        if self._all is None:
            self._all = [] if placement.immovable(s, target) else [m for m in s.models.values() if m.holds]
        return [model for model in self._all if model is not target]

    def refresh(self) -> None:
        """Take over which models there are."""
        self._models.clear()
        self._models.update((name, LiveModel(self, self._state, m)) for name, m in self._state.models.items())

    @property
    def time(self) -> float:
        """Now, in seconds of a monotonic clock."""
        return self._state.now

    @property
    def awake(self) -> tuple[str, ...]:
        """The models that are awake."""
        return tuple(name for name, model in self._state.models.items() if model.phase is Phase.AWAKE)
