"""What the core is told about models and rules, and what it is handed to measure with: no configuration format.

All durations are seconds (float, >= 0), all times are the seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llmux.core.policy import EngineView, Successor


class HookKind(enum.StrEnum):
    """The hooks of a model; the value is what the hook sees as ``LLMUX_HOOK``."""

    WAKE = "wake"
    SLEEP = "sleep"
    ALIVE = "alive"
    VERIFY = "verify"
    STOP = "stop"
    PREFETCH = "prefetch"


Memory = int | Mapping[str, int]
"""Bytes: of the one GPU, or by the name of each of several."""

DEFAULT_TIMEOUTS: Mapping[HookKind, float] = {
    HookKind.WAKE: 1800.0,
    HookKind.SLEEP: 300.0,
    HookKind.ALIVE: 10.0,
    HookKind.VERIFY: 60.0,
    HookKind.STOP: 60.0,
    HookKind.PREFETCH: 600.0,
}


@dataclass(frozen=True, slots=True)
class Level:
    """A way to sleep, and the bytes of host memory that it takes."""

    name: str
    host_memory: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model as the rules see it.

    ``definition`` is opaque to the core: the shell finds in it what it needs to run hooks and to reach
    the engine. A model keeps the definition under which it was woken until it is asleep again.
    """

    name: str
    definition: object = None
    hooks: frozenset[HookKind] = frozenset({HookKind.WAKE, HookKind.SLEEP, HookKind.ALIVE})
    timeouts: Mapping[HookKind, float] = field(default_factory=lambda: dict(DEFAULT_TIMEOUTS))
    max_in_flight: int | None = None
    max_queued: int = 1000
    memory: Memory | None = None
    companions: frozenset[str] | None = None  # what its groups let it be awake with; None: no groups are in use
    levels: tuple[Level, ...] = ()  # how it may sleep, lightest first; none takes more than the one before
    shared_address: str | None = None  # models with the same one are never awake together
    idle_sleep: float | None = None
    preload: bool = False
    keep_awake: bool = False  # the last to leave, and back as soon as it fits


@dataclass(frozen=True, slots=True)
class Rules:
    """The guard rails: they hold over any policy."""

    request_timeout: float | None = None
    max_wait: float = 600.0
    min_active: float = 0.0
    anticipate: bool = False  # the policy may wake a model that no request waits for yet
    manual: bool = False  # operators alone switch
    lease_waits: bool = False  # requests wait for the end of a lease; else they are rejected
    drain_timeout: float | None = None  # None: a running answer is never cut; 0: cut at once
    backoff_first: float = 1.0
    backoff_max: float = 20.0
    alive_every: float = 15.0  # 0: no periodic probe
    alive_failures: int = 3
    capacity: Memory | None = None  # needs every model's memory
    host_memory: int | None = None  # bytes for those that sleep; None: no limit
    default_model: str | None = None  # is woken when all has been quiet for default_after seconds
    default_after: float = 300.0
    shutdown_grace: float = 30.0
    sleep_on_exit: bool = False


ARRIVAL_WINDOW = 120.0  # seconds over which arrivals are averaged
NO_LEVELS: Mapping[str, str] = {}


class Costs(Protocol):
    """What switches cost, from the end of the drain to ready. Models without levels sleep at level ""."""

    guesses: Mapping[str, tuple[float | None, float | None]]
    """Of wake and sleep, by model: what counts until it was measured."""

    def record(self, sources: Collection[str], target: str, seconds: float) -> float | None:
        """Take in a whole switch and return the new estimate; with several leaving there is none."""

    def record_wake(self, model: str, seconds: float, level: str = "") -> None:
        """Take in how long a wake took, out of that level."""

    def record_sleep(self, model: str, seconds: float, level: str = "") -> None:
        """Take in how long a sleep took, its verify included, at that level."""

    def estimate(self, sources: Collection[str], target: str, levels: Mapping[str, str] = NO_LEVELS) -> float:
        """Return the expected cost of a switch, >= 0; ``levels`` by model."""

    def wake_of(self, model: str, level: str = "") -> float:
        """Return the expected duration of a wake, out of that level."""

    def sleep_of(self, model: str, level: str = "") -> float:
        """Return the expected duration of a sleep and its verify, at that level."""


class Meter(EngineView, Protocol):
    """What is measured of one model."""

    service: float
    """From admission to the last byte, on average; 0 until a first answer."""

    def arrived(self, now: float) -> None:
        """Take in an arrival."""

    def changed(self, now: float, in_flight: int) -> None:
        """Take in that so many are served from now on."""

    def answered(self, now: float, in_flight: int, took: float) -> None:
        """Take in that one has been answered, after ``took`` seconds, and that so many are served from now on."""

    def arrival_rate(self, now: float) -> float:
        """Return the arrivals per second, averaged over about ``ARRIVAL_WINDOW`` seconds."""

    @property
    def successors(self) -> Mapping[str, Successor]:
        """Which models were asked next after its answers."""


class Estimates(Protocol):
    """All that is measured for one core."""

    @property
    def costs(self) -> Costs:
        """What switches cost."""

    def meter(self, model: str) -> Meter:
        """Return a new meter for a model, by its name."""
