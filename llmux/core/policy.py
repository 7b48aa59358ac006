"""The contract between the core and a switch policy.

A policy is any object with a ``decide`` method. It is asked whenever something happened while no switch is
under way and a model that is not awake has a waiter; it answers at once, from what it is shown, and keeps
whatever memory it likes in itself. It cannot break anything: an invalid answer is logged once
and treated as first-come-first-served, and ``max_wait`` holds over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Stay:
    """Do not switch now; ask again at the next event."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class SwitchTo:
    """Switch to ``model`` now. It must be one of ``snapshot.waiting``."""

    model: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Do not switch now; ask again at ``time`` (absolute, on the snapshot's clock) or at the next event."""

    time: float
    reason: str = ""


Decision = Stay | SwitchTo | WaitUntil


class Successor(NamedTuple):
    """A model that was asked after another one's answer."""

    share: float  # of those answers, 0 to 1; recent ones count more
    delay: float  # seconds from the end of the answer to the arrival, on average
    seen: int  # how often


class EngineView(Protocol):
    """How an engine's speed depends on how much it is given, as measured. Seconds, and answers a second."""

    def throughput(self, in_flight: int) -> float:
        """Return the answers a second with so many in flight; 0 until a first answer."""

    def drain(self, in_flight: int) -> float:
        """Return the expected seconds until so many have ended, if none is added; 0 until a first answer."""

    def serving(self, waiting: int, limit: int | None) -> float:
        """Return the expected seconds to serve so many, at most ``limit`` (None: all) at a time."""

    @property
    def slots(self) -> int | None:
        """From how many in flight on further ones bring no more answers a second; None while that was not seen."""

    @property
    def most(self) -> float:
        """The most answers a second that were seen; with more arrivals it is overloaded. 0 until measured."""


class ModelView(Protocol):
    """One model, read live from the core. Durations in seconds, rates per second."""

    @property
    def name(self) -> str:
        """The model's name in requests."""

    @property
    def awake(self) -> bool:
        """Whether it is awake and admitting."""

    @property
    def queued(self) -> int:
        """How many requests wait for it."""

    @property
    def in_flight(self) -> int:
        """How many requests it is serving."""

    @property
    def limit(self) -> int | None:
        """``max_in_flight``, or None."""

    @property
    def oldest_arrival(self) -> float | None:
        """When its oldest waiter arrived, or None."""

    @property
    def awake_since(self) -> float | None:
        """When it was last activated, or None while it is not awake."""

    @property
    def admissions(self) -> int:
        """How many requests it was given since it was last activated."""

    @property
    def oldest_admission(self) -> float | None:
        """When the one it has been serving for longest was admitted, or None while it serves none."""

    @property
    def last_served(self) -> float | None:
        """When its last answer ended, or None."""

    @property
    def arrival_rate(self) -> float:
        """Arrivals per second, an exponential average over about two minutes."""

    @property
    def service_time(self) -> float:
        """Seconds from admission to the last byte, an exponential average; 0 until measured."""

    @property
    def switch_cost(self) -> float:
        """Expected seconds of a switch to it from what is awake now, without the drain."""

    @property
    def engine(self) -> EngineView:
        """How its engine's speed depends on how much it is given."""

    @property
    def successors(self) -> Mapping[str, Successor]:
        """Which models were asked next after its answers, and how soon, by name."""

    def arrivals(self) -> Iterator[float]:
        """Arrival times of its waiters, oldest first."""


class Snapshot(Protocol):
    """What a policy is shown: a live, read-only view. Do not keep it."""

    @property
    def time(self) -> float:
        """Now, in seconds of a monotonic clock."""

    @property
    def models(self) -> Mapping[str, ModelView]:
        """Every model by name."""

    @property
    def awake(self) -> tuple[str, ...]:
        """The models that are awake, in the order of the configuration."""

    @property
    def waiting(self) -> tuple[str, ...]:
        """The models that are not awake and may be switched to: never empty, oldest waiter first."""


@dataclass(frozen=True, slots=True)
class SwitchRecord:
    """A switch that has ended. ``cost`` is None unless it succeeded."""

    id: int
    from_models: tuple[str, ...]
    to: str | None
    result: str  # success | failure | abandoned
    drain: float
    cost: float | None
    ended: float


class Policy(Protocol):
    """What a switch policy implements.

    Two more methods may be added: ``on_switch_completed(record)``; and ``anticipate(now)``, which returns a
    decision as ``decide`` does. It is asked, where the user has said ``anticipate: true``, when an answer has
    ended, no request waits and none is in flight, and may name any model that is asleep; all else leaves things as
    they are.
    """

    def decide(self, now: Snapshot) -> Decision:
        """Say what to do. Pure in spirit, called often, may not block."""
