"""What happens to the placement, in the past tense; and what it wants done, in the imperative.

Whatever drives the placement (a gateway with sockets, a test, the simulator in virtual time) hands it the events
and carries the effects out in the order given. Requests are the driver's own positive integers. Notices tell what
was decided or has happened; dropping one breaks nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from llmux.core.effects import Refusal
from llmux.fleet.fleet_view import HostReport

FLIGHT = 15.0  # seconds after which a request in the store's sets counts no more, unless it is renewed


class Event:
    """Something that has happened."""

    __slots__ = ()


# ---- hosts


@dataclass(slots=True)
class HostsKnown(Event):
    """All hosts that there are have been added: a model that none of them has is not found."""


@dataclass(slots=True)
class HostReported(Event):
    """A report has come. ``age`` is how many seconds ago it was taken, as far as is known."""

    report: HostReport
    age: float = 0.0


@dataclass(slots=True)
class HostAdded(Event):
    """The host is configured, and has not said anything yet."""

    host: str


@dataclass(slots=True)
class HostUnreachable(Event):
    """A connection to the host was refused, or what follows its events has lost it: nothing goes there."""

    host: str
    reason: str = ""


@dataclass(slots=True)
class HostReachable(Event):
    """A probe was answered: the host is ready."""

    host: str


@dataclass(slots=True)
class HostRemoved(Event):
    """The host has signed off, its lease in the store has ended, or it is configured no more."""

    host: str


# ---- requests


@dataclass(slots=True)
class RequestArrived(Event):
    """A request that names ``model`` (its canonical name, no alias) wants a host."""

    request: int
    model: str


@dataclass(slots=True)
class RequestAbandoned(Event):
    """The client left; wherever the request is, it is over."""

    request: int


@dataclass(slots=True)
class RequestWaiting(Event):
    """The host says that the request waits there: at ``position`` (from 1 on), for about ``expected`` seconds."""

    request: int
    position: int = 1
    expected: float | None = None


@dataclass(slots=True)
class AnswerBegan(Event):
    """The host has admitted the request, or the first byte of its answer is there.

    From here on it goes nowhere else: an engine may have run it.
    """

    request: int


@dataclass(slots=True)
class RequestEnded(Event):
    """The last byte of the host's answer is out, whatever the answer was."""

    request: int


@dataclass(slots=True)
class ConnectFailed(Event):
    """No connection to the host was to be had, so not a byte of the request was sent."""

    request: int
    reason: str = ""


@dataclass(slots=True)
class RequestRefused(Event):
    """The host has refused the request before its admission, with ``X-LLMux-Refused``: no engine has seen it.

    ``code`` is a ``Refusal``, or of a newer host another word. ``retry_after`` is in seconds.
    """

    request: int
    code: str
    retry_after: float | None = None
    message: str = ""


@dataclass(slots=True)
class ConnectionBroken(Event):
    """Bytes of the request were sent, then the connection ended without an answer: an engine may have run it."""

    request: int


@dataclass(slots=True)
class RequestWithdrawn(Event):
    """After ``Withdraw``: the host has let the request go and has *proven* that no engine has seen it.

    Where it cannot prove that, this event may not be sent; the request then stays where it is.
    """

    request: int


# ---- the store, and time


@dataclass(slots=True)
class ClaimSeen(Event):
    """The store says which host the wake of ``model`` belongs to, and for how many seconds more."""

    model: str
    host: str
    remaining: float


@dataclass(slots=True)
class LoadSeen(Event):
    """The store says how many requests the other gateways have on ``host``, by model; ``age`` is in seconds."""

    host: str
    requests: dict[str, int]
    age: float = 0.0


@dataclass(slots=True)
class DeadlineReached(Event):
    """The time that ``next_deadline()`` named has come."""


# ---- effects


class Code(enum.StrEnum):
    """Why a gateway itself rejects a request; what a host says is passed on in its own words."""

    UNKNOWN_MODEL = "model_not_found"  # 404: no host has it, and all have reported
    QUEUE_FULL = "queue_full"  # 429
    NO_HOST = "no_host"  # 503: no host that has the model can be reached
    HOST_LOST = "host_lost"  # 502: the connection ended without an answer; it is not sent again


# After these a host takes nothing for any model; after the others nothing for this one.
OF_THE_HOST = frozenset({Refusal.LEASED, Refusal.STOPPING})


@dataclass(slots=True)
class Send:
    """Send the request to the host; from here on it counts as placed there. ``attempt`` is 1 on the first."""

    request: int
    model: str
    host: str
    attempt: int
    waited: float  # seconds in the gateway's queue


@dataclass(slots=True)
class Withdraw:
    """Take the request, which waits on ``host``, back: ``to`` would serve it sooner by more than a switch.

    Answer with ``RequestWithdrawn`` only on the host's word that it was not admitted. If it was, the answer's
    events follow as if nothing had been.
    """

    request: int
    host: str
    to: str


@dataclass(slots=True)
class Reject:
    """Answer the request with an error. ``retry_after`` is in seconds, ``message`` for people."""

    request: int
    model: str
    code: str
    message: str
    retry_after: float | None
    waited: float


@dataclass(slots=True)
class ClaimWake:
    """Write into the store that ``host`` wakes ``model``, for ``term`` seconds, unless there is a claim already.

    It is advice to the other gateways: nothing waits for the answer, which comes as ``ClaimSeen``. A claim of the
    host ``over`` counts no more: as many wait there as will be served at once, or it cannot serve. It is replaced.
    """

    model: str
    host: str
    term: float
    over: str = ""


@dataclass(slots=True)
class Probe:
    """Ask the host whether it is ready; the answer is ``HostReachable`` or ``HostUnreachable``."""

    host: str


# ---- notices


@dataclass(slots=True)
class RequestQueued:
    """A request waits in the gateway. ``depth`` is the length of the model's queue here."""

    request: int
    model: str
    depth: int


@dataclass(slots=True)
class HostEjected:
    """Nothing goes to the host until a probe is answered. ``pause`` is the seconds until the next probe."""

    host: str
    reason: str
    pause: float


@dataclass(slots=True)
class HostRestored:
    """The host takes requests again."""

    host: str


@dataclass(slots=True)
class ReportRefused:
    """A report was not taken in: it was overtaken, or comes from another instance while the known one lives."""

    host: str
    instance: str
    seq: int
    reason: str


@dataclass(slots=True)
class ViewStale:
    """Every report on hosts for ``model`` is older than its lease: requests are spread by own counts alone."""

    model: str


@dataclass(slots=True)
class RouteOverruled:
    """The route has raised, or named a host that may not be used: treated as ``least_in_flight``, told once."""

    answer: str


Effect = (
    Send
    | Withdraw
    | Reject
    | ClaimWake
    | Probe
    | RequestQueued
    | HostEjected
    | HostRestored
    | ReportRefused
    | ViewStale
    | RouteOverruled
)
