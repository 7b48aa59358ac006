"""The records of the core: a request, a model, a hook that runs, a switch under way. Data, no rules."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmux.core.backoff import Backoff
from llmux.core.phases import HOLDING, Phase
from llmux.core.policy import Policy
from llmux.core.spec import HookKind, Level, ModelSpec

if TYPE_CHECKING:
    from llmux.core.evictions import Eviction

ARRIVAL_WINDOW = 120.0  # seconds over which arrivals are averaged
SERVICE_ALPHA = 0.1


class Request:
    """One request, from its arrival to its end."""

    __slots__ = ("admitted", "arrived", "id", "model", "returned")

    def __init__(self, request: int, model: Model, arrived: float) -> None:
        self.id = request
        self.model = model
        self.arrived = arrived
        self.admitted: float | None = None  # when; None while queued
        self.returned = False


class Step(enum.Enum):
    """The steps by which a model leaves the GPU; see ``retirement``."""

    SLEEP = HookKind.SLEEP
    VERIFY = HookKind.VERIFY
    STOP = HookKind.STOP
    ALIVE = HookKind.ALIVE


@dataclass(slots=True)
class Retirement:
    """A model on its way off the GPU."""

    cleanup: bool  # the engine is gone or never came: there is nothing to lose
    started: float
    step: Step = Step.SLEEP
    hook: int | None = None  # None between two polls of verify
    slept: bool = False  # the sleep hook succeeded
    stopped: bool = False  # stop was tried
    verified: bool = False  # verify was tried
    verify_until: float = 0.0
    error: str = ""


@dataclass(slots=True)
class HookRun:
    """A hook whose process runs, as far as the core knows."""

    id: int
    model: Model
    kind: HookKind
    started: float
    deadline: float
    killed: bool = False


class Stage(enum.StrEnum):
    """How far a switch has come; the value is the ``phase`` in ``/llmux/status``."""

    DRAINING = "draining"
    SLEEPING = "sleeping"
    WAKING = "waking"
    CLEANUP = "cleanup"


@dataclass(slots=True)
class Switch:
    """The switch under way: ``leaving`` make room for ``target`` (None: nobody comes)."""

    id: int
    target: Model | None
    spec: ModelSpec | None  # what the target will be woken under: fixed, like the whole plan
    leaving: tuple[Model, ...]
    reason: str
    requested: bool  # an operator, a pin or preload wants it: no waiter is needed
    started: float
    stage: Stage = Stage.DRAINING
    drained: float = 0.0
    error: str = ""  # why it cannot reach its target any more
    measurable: bool = True  # a cleanup on the way says nothing about what this direction costs

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of those that leave, the target's own cleanup left out."""
        return tuple(model.name for model in self.leaving if model is not self.target)


@dataclass(frozen=True, slots=True)
class Pin:
    """That a model is to stay awake: until when on the core's clock (None: until it is unpinned), and why."""

    until: float | None = None
    reason: str = ""


@dataclass(slots=True)
class Lease:
    """The whole GPU, lent to a foreign job. Times are on the core's clock, in seconds."""

    until: float | None  # None: until it is given back
    reason: str = ""
    waits: bool = False  # whether requests wait for its end; else they are turned away
    id: str = ""  # who knows it may renew the lease
    since: float = 0.0
    told: bool = False  # that everything sleeps, and the job may begin


@dataclass(slots=True, eq=False)
class Shadow:
    """A policy that is asked what it would do, and is not followed."""

    name: str
    policy: Policy
    dropped: str = ""  # why it is asked no more
    counts: dict[tuple[str, bool], int] = field(
        default_factory=dict
    )  # (kind of answer, as the policy did) → how often


@dataclass(slots=True, eq=False)
class Model:
    """Everything the core knows of one model."""

    spec: ModelSpec
    order: int = 0  # its place in the configuration
    phase: Phase = Phase.UNKNOWN
    woken: ModelSpec | None = None  # what it was woken under; None while asleep
    queue: OrderedDict[int, Request] = field(default_factory=OrderedDict)
    in_flight: dict[int, Request] = field(default_factory=dict)
    epoch: int = 0
    level: Level | None = None  # at which it sleeps, goes to sleep, or wakes from; None: awake, or not known
    deepening: Level | None = None  # to which it goes while it sleeps
    awake_since: float | None = None
    admissions: int = 0  # since it was last activated
    last_served: float | None = None
    last_used: float = -math.inf
    last_error: str = ""
    wake_backoff: Backoff = field(default_factory=Backoff)
    sleep_backoff: Backoff = field(default_factory=Backoff)
    # probing
    probe: int | None = None  # the alive hook that runs
    suspected: bool = False  # a connection was refused: nothing is admitted until alive has spoken
    stale_probe: bool = False  # the probe that runs began before the suspicion
    missed: int = 0
    found: bool | None = None  # what the first alive said
    woken_by_hook: bool = False  # its first connection proves the wake
    unproven_failures: int = 0  # the failures in a row that such a wake would end
    prefetch: int | None = None  # the prefetch hook that runs
    # leaving
    retirement: Retirement | None = None
    cleanup_owed: bool = False  # an errand: clean up without anybody asking
    faulted_in_cleanup: bool = False  # its fault came in a cleanup: the next try is one too
    failed_cleanups: int = 0
    first_failed_cleanup: float = 0.0
    extra: bool = False  # found awake at the start although it may not be
    evicted: Eviction | None = None  # the last time that it made room for another
    removed: bool = False
    pinned: bool = False
    pinned_until: float | None = None
    pin_reason: str = ""
    wanted: bool = False  # preload
    put_away: bool = False  # by an operator: only what asks for it wakes it
    arrival_mass: float = 0.0
    arrival_seen: float = 0.0
    service: float = 0.0

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def next(self) -> ModelSpec:
        """The definition under which it would be woken now."""
        return self.running if self.phase is Phase.LOST else self.spec

    @property
    def running(self) -> ModelSpec:
        """The definition that is in force for its engine."""
        return self.woken or self.spec

    @property
    def holds(self) -> bool:
        """Whether it may hold the GPU."""
        return self.phase in HOLDING

    @property
    def idle(self) -> bool:
        """Whether nobody uses it or waits for it."""
        return not self.in_flight and not self.queue

    @property
    def has_room(self) -> bool:
        """Whether it would admit one more."""
        limit = self.spec.max_in_flight
        return self.phase is Phase.AWAKE and not self.suspected and (limit is None or len(self.in_flight) < limit)

    def oldest(self) -> Request | None:
        """Return its oldest waiter."""
        return next(iter(self.queue.values()), None)

    def count_arrival(self, now: float) -> None:
        """Feed the arrival rate."""
        decay = math.exp((self.arrival_seen - now) / ARRIVAL_WINDOW)
        self.arrival_mass = self.arrival_mass * decay + 1.0
        self.arrival_seen = now

    def arrival_rate(self, now: float) -> float:
        """Return the arrivals per second."""
        return self.arrival_mass * math.exp((self.arrival_seen - now) / ARRIVAL_WINDOW) / ARRIVAL_WINDOW

    def count_service(self, seconds: float) -> None:
        """Feed the service time."""
        self.service = self.service + SERVICE_ALPHA * (seconds - self.service) if self.service else seconds
