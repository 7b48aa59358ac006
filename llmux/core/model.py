"""The records of the core: a request, a model, a hook that runs, a switch under way. Data, no rules."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from llmux.core.phases import HOLDING, Phase, Stage, Step
from llmux.core.spec import HookKind, Level, Meter, ModelSpec

JITTER = 0.2


class Lifecycle(enum.StrEnum):
    """How far llmux itself has come."""

    CREATED = "created"
    STARTING = "starting"  # it looks at what runs
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"


# Every event asks for these: a global is found faster than a member.
READY, ENDING = Lifecycle.READY, (Lifecycle.STOPPING, Lifecycle.STOPPED)
AWAKE, LOST = Phase.AWAKE, Phase.LOST


class Reason(enum.StrEnum):
    """What a switch is for. Of the ones for requests that wait, words of their own say more."""

    REQUESTED = "requested"
    PINNED = "pinned"
    LEASE = "lease"
    UNWANTED = "not wanted"
    STOPPING = "stopping"
    IDLE = "idle"
    PRELOAD = "preload"
    KEEP_AWAKE = "keep_awake"
    DEFAULT = "default"
    ANTICIPATED = "it is likely to be asked next"
    BACK = "its engine is gone"
    OVERDUE = "overdue"
    ROOM = "there is room beside what is awake"
    POLICY = "policy"


@dataclass(slots=True)
class Backoff:
    """Exponential backoff: the failures in a row of one thing, and until when it is left alone."""

    failures: int = 0
    until: float = -math.inf

    def active(self, now: float) -> bool:
        """Whether no other try is allowed yet."""
        return now < self.until

    def remaining(self, now: float) -> float:
        """Seconds until the next try is allowed, >= 0."""
        return max(0.0, self.until - now)

    def fail(self, now: float, first: float, maximum: float, jitter: Callable[[], float]) -> float:
        """Count a failure; return the pause in seconds: ``first``, doubled each time, ±20 %, at most ``maximum``.

        ``jitter`` returns a number in [0, 1).
        """
        pause = min(maximum, first * 2.0 ** min(self.failures, 62))
        self.failures += 1
        pause = min(maximum, pause * (1.0 + JITTER * (2.0 * jitter() - 1.0)))
        self.until = now + pause
        return pause

    def clear(self) -> None:
        """Forget all failures."""
        self.failures = 0
        self.until = -math.inf


@dataclass(slots=True, eq=False)
class Request:
    """One request, from its arrival to its end."""

    id: int
    model: Model
    arrived: float
    admitted: float | None = None  # when; None while queued
    returned: bool = False


@dataclass(slots=True)
class Teardown:
    """A model on its way off the GPU; see ``teardown``."""

    cleanup: bool  # the engine is gone or never came: there is nothing to lose
    started: float
    step: Step = Step.SLEEP
    hook: int | None = None  # None between two polls of verify
    tried: set[Step] = field(default_factory=set)
    slept: bool = False  # the sleep hook succeeded
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


@dataclass(slots=True)
class Switch:
    """The switch under way: ``leaving`` make room for ``target`` (None: nothing is woken)."""

    id: int
    target: Model | None
    spec: ModelSpec | None  # what the target will be woken under: fixed, like the whole plan
    leaving: tuple[Model, ...]
    cause: Reason
    reason: str  # in words
    requested: bool  # an operator, a pin or preload wants it: no waiter is needed
    started: float
    stage: Stage = Stage.DRAINING
    drained: float | None = None  # when; None while it drains
    error: str = ""  # why it cannot reach its target any more
    outdated: bool = False  # a reload came in its course
    measurable: bool = True  # a cleanup on the way says nothing about what this direction costs
    sources: tuple[str, ...] = field(init=False)  # names of those that leave, the target's own cleanup left out
    to: str | None = field(init=False)  # the target's name

    def __post_init__(self) -> None:
        self.sources = tuple([model.name for model in self.leaving if model is not self.target])
        self.to = None if self.target is None else self.target.name


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
    waits: bool = False  # whether requests wait for its end; else they are rejected
    id: str = ""  # to know it is the right to renew the lease
    since: float = 0.0
    told: bool = False  # that everything sleeps, and the job may begin


@dataclass(slots=True)
class Probe:
    """What ``alive`` says of a model that is awake."""

    hook: int | None = None  # the alive hook that runs
    stale: bool = False  # it began before the suspicion
    suspected: bool = False  # a connection was refused: nothing is admitted until alive has spoken
    missed: int = 0  # failures in a row

    def trust(self) -> None:
        """The engine is there, or another one is."""
        self.suspected = False
        self.missed = 0


@dataclass(slots=True)
class Cleanup:
    """What is known of a model's cleanups."""

    owed: bool = False  # it is cleaned up without a request that asks for it
    again: bool = False  # its fault came in a cleanup: the next try is one too
    failures: int = 0
    since: float = 0.0  # when the first of them failed


@dataclass(slots=True, eq=False)
class Model:
    """Everything the core knows of one model."""

    spec: ModelSpec
    meter: Meter
    order: int = 0  # its place in the configuration
    phase: Phase = Phase.UNKNOWN
    woken: ModelSpec | None = None  # what it was woken under; None while asleep
    queue: OrderedDict[int, Request] = field(default_factory=OrderedDict)
    riders: dict[int, Request] = field(default_factory=dict)  # that wait beside the queue, and cause no switch
    watched: Request | None = None  # its waiter whose timeout and overdue timers are set
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
    probe: Probe = field(default_factory=Probe)
    found: bool | None = None  # what the first alive said
    unproven: int | None = None  # of a wake whose engine was not reached yet: the failures in a row before it
    prefetch: int | None = None  # the prefetch hook that runs
    teardown: Teardown | None = None
    cleanup: Cleanup = field(default_factory=Cleanup)
    extra: bool = False  # found awake at the start although it may not be
    removed: bool = False
    pin: Pin | None = None
    preload_due: bool = False
    put_away: bool = False  # by an operator: only what asks for it wakes it
    keep: float | None = None  # instead of ``idle_sleep``; see ``RequestFinished``
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.spec.name

    @property
    def next(self) -> ModelSpec:
        """The definition under which it would be woken now."""
        return self.running if self.phase is LOST else self.spec

    @property
    def running(self) -> ModelSpec:
        """The definition that is in force for its engine."""
        return self.woken or self.spec

    @property
    def holds(self) -> bool:
        """Whether it may hold the GPU."""
        return self.phase in HOLDING

    @property
    def pinned(self) -> bool:
        """Whether it is to stay awake."""
        return self.pin is not None

    @property
    def idle(self) -> bool:
        """Whether no request is served by it or waits for it."""
        return not self.in_flight and not self.queue

    @property
    def idle_after(self) -> float | None:
        """After how many seconds without requests it is put to sleep; None: never."""
        after = self.spec.idle_sleep if self.keep is None else self.keep
        return None if after is None or after < 0 else after

    @property
    def has_room(self) -> bool:
        """Whether it would admit one more."""
        if self.phase is not AWAKE or self.probe.suspected:
            return False
        limit = self.spec.max_in_flight
        return limit is None or len(self.in_flight) < limit

    def oldest(self) -> Request | None:
        """Return its oldest waiter."""
        return next(iter(self.queue.values()), None)
