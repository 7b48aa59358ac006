"""What the core wants done, in the imperative; and notices, which tell what has been decided or has happened.

The shell carries effects out in the order given. Notices become log events, metrics and the live event
stream; dropping one breaks nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from llmux.core.phases import Phase
from llmux.core.spec import HookKind


class Refusal(enum.StrEnum):
    """Why a request is rejected; the value is the error's code."""

    UNKNOWN_MODEL = "model_not_found"  # 404
    QUEUE_FULL = "queue_full"  # 429
    WAKE_FAILED = "wake_failed"  # 503
    SLEEP_FAILED = "sleep_failed"  # 503: what holds the GPU could not be put to sleep
    BACKING_OFF = "backing_off"  # 503
    FAULTED = "faulted"  # 503
    PINNED = "pinned"  # 503: another model is pinned
    LEASED = "leased"  # 503: the GPU is lent
    STOPPING = "stopping"  # 503
    DEADLINE = "deadline"  # 503: it cannot be answered in its time
    WAITED_TOO_LONG = "request_timeout"  # 504


class CutReason(enum.StrEnum):
    """Why requests in flight are ended."""

    DRAIN_DEADLINE = "drain_deadline"
    STOPPING = "stopping"
    CANCELLED = "cancelled"  # by an operator; the core does not do that


SWITCH_OVER = "its switch is over"  # why a prefetch is ended that is no longer of use


@dataclass(slots=True)
class Admit:
    """Send the request to its engine; it counts as in flight from this moment."""

    request: int
    model: str
    definition: object  # of the engine that is awake: its address
    epoch: int  # grows with every activation of the model
    returned: bool  # True: it was returned once already, and may not be again
    waited: float  # seconds in the queue


@dataclass(slots=True)
class Reject:
    """Answer the request with an error. ``retry_after`` is in seconds, ``message`` for people."""

    request: int
    model: str
    refusal: Refusal
    message: str
    retry_after: float | None
    waited: float


@dataclass(slots=True)
class RunHook:
    """Start a hook. ``switch`` is 0 and ``sources``/``target`` are empty outside a switch.

    ``level`` is the sleep level: to go to, or for ``wake`` to come from; empty where there is none, or none known.
    """

    hook: int
    model: str
    kind: HookKind
    definition: object
    switch: int = 0
    sources: tuple[str, ...] = ()
    target: str = ""
    level: str = ""


@dataclass(slots=True)
class KillHook:
    """End a hook's process group: TERM, 5 s, KILL. Its ``HookFinished`` is still owed."""

    hook: int
    reason: str  # timeout | stopping | SWITCH_OVER


@dataclass(slots=True)
class CancelRequests:
    """End these requests, which are in flight; each still owes its ``RequestFinished``."""

    requests: tuple[int, ...]
    model: str
    reason: CutReason
    retry_after: float | None = None


@dataclass(slots=True)
class RecordHolders:
    """Write down, before the next effect is carried out, which models may hold the GPU."""

    holders: frozenset[str]


@dataclass(slots=True)
class Answer:
    """The answer to an operator's command: accepted (with the switch's id, if one serves it), or why not."""

    ticket: int
    accepted: bool
    switch: int | None = None
    reason: str = ""


# ---- notices


@dataclass(slots=True)
class Ready:
    """Every model's first ``alive`` has ended; ``adopted`` were found running."""

    adopted: tuple[str, ...]


@dataclass(slots=True)
class RequestQueued:
    """A request waits. ``depth`` is the length of the model's queue."""

    request: int
    model: str
    depth: int


@dataclass(slots=True)
class SwitchStarted:
    """A switch has begun: ``sources`` drain. ``to`` is None when models only go to sleep."""

    switch: int
    sources: tuple[str, ...]
    to: str | None
    reason: str


@dataclass(slots=True)
class SwitchDrained:
    """Everything that leaves has drained; the sleep hooks start."""

    switch: int
    sources: tuple[str, ...]
    to: str | None
    drain: float


@dataclass(slots=True)
class ModelActivated:
    """The model is awake.

    ``duration`` covers the whole switch, drain included; None for what was adopted, or would not sleep.
    """

    model: str
    switch: int
    sources: tuple[str, ...]
    duration: float | None


@dataclass(slots=True)
class ModelDeactivated:
    """The model no longer is awake; it was for ``active`` seconds."""

    model: str
    active: float


@dataclass(slots=True)
class SwitchEnded:
    """A switch is over. ``cost`` (seconds from the end of the drain to ready) is None unless it succeeded."""

    switch: int
    sources: tuple[str, ...]
    to: str | None
    result: str  # success | failure | abandoned
    duration: float
    drain: float
    cost: float | None
    estimate: float | None  # the new estimate for this direction, when there is one


@dataclass(slots=True)
class SwitchFailed:
    """A switch did not reach its target."""

    switch: int
    sources: tuple[str, ...]
    to: str | None
    error: str


@dataclass(slots=True)
class SleepHookFailed:
    """A sleep hook failed, or ``verify`` never passed after it."""

    model: str
    to: str | None
    error: str


@dataclass(slots=True)
class ModelDeepened:
    """A sleeping model was put into a deeper level: host memory was short."""

    model: str
    before: str
    level: str
    seconds: float


@dataclass(slots=True)
class BackoffStarted:
    """The model is left alone for ``seconds`` after its ``failures``-th failure in a row."""

    model: str
    kind: HookKind  # wake or sleep
    failures: int
    seconds: float
    error: str


@dataclass(slots=True)
class ModelLost:
    """The model's engine is gone; its cleanup is owed."""

    model: str
    error: str


@dataclass(slots=True)
class ModelFaulted:
    """It is not known whether the model still holds the GPU."""

    model: str
    error: str


@dataclass(slots=True)
class ModelAssumedAsleep:
    """Several cleanups failed while ``alive`` kept failing: it counts as asleep, unproven."""

    model: str
    tries: int
    error: str


@dataclass(slots=True)
class ModelReset:
    """An operator has cleared the model's backoff and fault."""

    model: str


@dataclass(slots=True)
class PolicyOverruled:
    """The policy gave an answer that cannot be followed; first-come-first-served was used instead."""

    answer: str


@dataclass(slots=True)
class PolicyDecided:
    """What the policy answered, when it differs from its last answer or a switch came between."""

    decision: str  # stay | switch | wait | overdue
    model: str | None
    reason: str


@dataclass(slots=True)
class PolicyAdopted:
    """Of the policies that ``use: auto`` chooses among, another one decides from now on."""

    policy: str
    before: str
    reason: str


@dataclass(slots=True)
class PinSet:
    """The model is pinned (``pinned``) or no longer pinned."""

    model: str
    pinned: bool
    until: float | None
    reason: str = ""


@dataclass(slots=True)
class LeaseSet:
    """The GPU is lent to a foreign job, or came back. ``waits``: requests wait for its end."""

    leased: bool
    until: float | None
    reason: str = ""
    waits: bool = False


@dataclass(slots=True)
class LeaseHeld:
    """Nothing holds the GPU any more: the foreign job may begin, ``after`` seconds of its lease."""

    after: float


@dataclass(slots=True)
class ManualSet:
    """Operators alone switch, or the policy does again."""

    manual: bool


@dataclass(slots=True)
class ModelRemoved:
    """A model that left the configuration is gone."""

    model: str


@dataclass(slots=True)
class PhaseChanged:
    """A model came from one phase into another; ``why`` is the table's."""

    model: str
    source: Phase
    target: Phase
    why: str


Kind = Literal["stay", "switch", "wait", "adopt"]  # adopt: another policy decides from now on
By = Literal["policy", "overruled", "max_wait", "min_active", "core", "manual", "auto"]


@dataclass(slots=True)
class Decided:
    """What was decided while no switch was under way, and why.

    ``figures`` are what ``State.figures`` said of that moment; without, it is what was decided last, once more.
    ``switch`` is the one that begins with it.
    """

    kind: Kind
    target: str | None  # where to; None for stay and for going to sleep
    by: By  # ``min_active`` holds back what the policy wants
    said: str  # the policy's own reason, its fault, or the reason of a switch that no request waits for
    until: float | None = None  # when it ends by itself, for ``wait``; on the core's clock
    figures: object = None
    switch: int | None = None
    leaving: tuple[str, ...] = ()  # what makes room in that switch


@dataclass(slots=True)
class Stopped:
    """Nothing is in flight and no hook runs: llmux may exit."""


Notice = (
    Ready | RequestQueued | SwitchStarted | SwitchDrained | ModelActivated | ModelDeactivated | SwitchEnded
    | SwitchFailed | SleepHookFailed | ModelDeepened | BackoffStarted | ModelLost | ModelFaulted
    | ModelAssumedAsleep | ModelReset | PolicyOverruled | PolicyDecided | PolicyAdopted
    | PinSet | LeaseSet | LeaseHeld | ManualSet | ModelRemoved | Stopped
)  # fmt: skip

# What only explains the others: for the timeline, and no part of a playbook.
Explanation = PhaseChanged | Decided

Effect = Admit | Reject | RunHook | KillHook | CancelRequests | RecordHolders | Answer | Notice | Explanation
