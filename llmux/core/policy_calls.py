"""What policies see, how they are asked, and what becomes of an answer that is invalid.

They see live, read-only views over the state, without a copy. A policy cannot break anything: whatever it raises
or returns is checked here, reported once for each kind, and treated as first come, first served.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from llmux.core import policy as api
from llmux.core import residency
from llmux.core.effects import PolicyAdopted, PolicyOverruled
from llmux.core.events import PolicyChosen
from llmux.core.model import AWAKE, Model
from llmux.core.phases import HOLDING
from llmux.core.state import State

LONGEST = 300  # characters: an answer may be as long as it likes
RAISED = BaseException  # also ``sys.exit()``, a cancelled task, a panic of a library in Rust


class LiveModel:
    """One model, read from the state at each access: a ``ModelView``."""

    __slots__ = ("_model", "_snapshot", "_state")

    # What is told as it stands; policies ask for it often.
    name = property(attrgetter("_model.name"))
    limit = property(attrgetter("_model.spec.max_in_flight"))
    admissions = property(attrgetter("_model.admissions"))
    last_served = property(attrgetter("_model.last_served"))
    service_time = property(attrgetter("_model.meter.service"))
    engine = property(attrgetter("_model.meter"))
    successors = property(attrgetter("_model.meter.successors"))

    def __init__(self, snapshot: LiveSnapshot, state: State, model: Model) -> None:
        self._snapshot = snapshot
        self._state = state
        self._model = model

    @property
    def awake(self) -> bool:
        return self._model.phase is AWAKE

    @property
    def queued(self) -> int:
        return len(self._model.queue)

    @property
    def in_flight(self) -> int:
        return len(self._model.in_flight)

    @property
    def oldest_arrival(self) -> float | None:
        first = next(iter(self._model.queue.values()), None)
        return None if first is None else first.arrived

    @property
    def awake_since(self) -> float | None:
        return self._model.awake_since if self._model.phase is AWAKE else None

    @property
    def oldest_admission(self) -> float | None:
        first = next(iter(self._model.in_flight.values()), None)
        return None if first is None else first.admitted

    @property
    def arrival_rate(self) -> float:
        return self._model.meter.arrival_rate(self._state.now)

    @property
    def switch_cost(self) -> float:
        state, model, leaving = self._state, self._model, self._snapshot.leaving(self._model)
        if state.has_levels:
            return residency.switch_cost(state, leaving, model)
        # A policy may look at each of many models.
        return state.costs.estimate([each.spec.name for each in leaving], model.spec.name)

    def arrivals(self) -> Iterator[float]:
        return (request.arrived for request in self._model.queue.values())


class LiveSnapshot:
    """The whole, read from the state at each access."""

    __slots__ = ("_all", "_models", "_state", "models", "waiting")

    def __init__(self, state: State) -> None:
        self._state = state
        self._models: dict[str, LiveModel] = {}
        self.models: Mapping[str, LiveModel] = MappingProxyType(self._models)
        self.waiting: tuple[str, ...] = ()
        self._all: list[Model] | None = None  # what leaves for any; None: not looked at since it was asked last
        self.refresh()

    def ask(self, waiting: tuple[str, ...]) -> None:
        """Show what is the case now."""
        self.waiting, self._all = waiting, None

    def leaving(self, target: Model) -> Sequence[Model]:
        """Return those that would leave for ``target``, none if it cannot be had."""
        s = self._state
        if s.rules.capacity is not None or target.next.companions is not None:
            return residency.who_leaves(s, target) or ()
        # One at a time: all leave, whichever comes.
        if self._all is None:
            self._all = [] if residency.immovable(s, target) else s.in_phase(*HOLDING)
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
        return tuple([model.name for model in self._state.in_phase(AWAKE)])


def spelled(error: BaseException) -> str:
    """Return the kind of an error and its words, if it has any to show. Ctrl-C goes on."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    try:
        return f"{type(error).__name__}: {error}"[:LONGEST]
    except RAISED:  # an error of the user's may raise anything, too
        return f"{type(error).__name__}: "


def ask(
    s: State, question: Any, snapshot: api.Snapshot, choice: Collection[str], *, anticipating: bool = False
) -> tuple[object, str | None]:
    """Ask a policy ``question`` about ``snapshot``; return its decision, and what is wrong with it, or None.

    It may name what is in ``choice``. ``anticipating``: no request waits, so that it may stay.
    """
    try:
        decision = question(snapshot)
        error = _invalid(s, decision, choice, anticipating=anticipating)
    except RAISED as raised:
        decision, error = None, f"raised {spelled(raised)}"
    if error is not None:
        _overrule(s, error)
    return decision, error


def _invalid(s: State, decision: object, choice: Collection[str], *, anticipating: bool) -> str | None:
    if isinstance(decision, api.SwitchTo):
        if decision.model not in choice:
            why = "which is not asleep" if anticipating else "for which no request waits"
            return f"named {repr(decision.model)[:LONGEST]}, {why}"
    elif isinstance(decision, api.Stay):
        if not anticipating and all(model.idle for model in s.in_phase(AWAKE)):
            return "stayed although every awake model is idle"
    elif isinstance(decision, api.WaitUntil):
        if not decision.time > s.now:
            return f"waits until {decision.time!r}, which is not in the future"
    else:
        return f"answered {repr(decision)[:LONGEST]}, which is not a decision"
    return None


def _overrule(s: State, error: str) -> None:
    """Say, once for each kind, that the policy did what cannot be followed."""
    kind = error.partition(" ")[0]
    if kind not in s.policy_errors:
        s.policy_errors.add(kind)
        s.out.append(PolicyOverruled(error))


def inform(s: State, record: api.SwitchRecord) -> None:
    """Tell the policy of a switch that has ended."""
    try:
        tell = getattr(s.policy, "on_switch_completed", None)
        if tell is not None:
            tell(record)
    except RAISED as error:
        _overrule(s, f"on_switch_completed raised {spelled(error)}")


def adopt(s: State, event: PolicyChosen) -> None:
    """Have a policy that chooses among others (``adopt(name)``) follow another of them, if it has that one."""
    change = getattr(s.policy, "adopt", None)
    try:
        before = change and change(event.name)
    except RAISED as error:
        _overrule(s, f"adopt raised {spelled(error)}")
        return
    if before:
        s.last_told = s.last_decision = None  # what it decides is told anew
        s.out.append(PolicyAdopted(event.name, str(before), event.reason))
