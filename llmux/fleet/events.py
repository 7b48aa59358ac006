"""What happens to the placement, in the past tense; and what it wants done, in the imperative.

Whatever drives the placement (a gateway with sockets, a test, the simulator in virtual time) passes it the events
and carries out the effects in the order given. Requests are the driver's own positive integers. Notices say what
was decided or has happened; dropping one breaks nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from llmux.core.effects import Refusal
from llmux.fleet.fleet_view import HostReport

FLIGHT = 15.0  # seconds after which a request in the store's sets no longer counts, unless it is renewed


class Event:
    """Something that has happened."""

    __slots__ = ()


# ---- hosts


@dataclass(slots=True)
class HostsKnown(Event):
    """All existing hosts have been added: a model that none of them has is not found."""


@dataclass(slots=True)
class HostReported(Event):
    """A report has arrived. ``age`` is how many seconds ago it was taken, as far as is known."""

    report: HostReport
    age: float = 0.0


@dataclass(slots=True)
class HostAdded(Event):
    """The host is configured, and has not reported yet."""

    host: str


@dataclass(slots=True)
class HostUnreachable(Event):
    """A connection to the host was refused, or its follower has lost it: no request goes there."""

    host: str
    reason: str = ""


@dataclass(slots=True)
class HostReachable(Event):
    """A probe was answered: the host is ready."""

    host: str


@dataclass(slots=True)
class HostRemoved(Event):
    """The host has deregistered, its lease in the store has expired, or it is no longer configured."""

    host: str


# ---- requests


@dataclass(slots=True)
class RequestArrived(Event):
    """A request that names ``model`` (its canonical name, no alias) wants a host."""

    request: int
    model: str


@dataclass(slots=True)
class RequestAbandoned(Event):
    """The client left; the request is over, whatever its stage."""

    request: int


@dataclass(slots=True)
class RequestWaiting(Event):
    """The host reports that the request is queued: for about ``expected`` seconds, if it knows."""

    request: int
    expected: float | None = None


@dataclass(slots=True)
class AnswerBegan(Event):
    """The host has admitted the request, or the first byte of its answer has arrived.

    From here on it goes to no other host: an engine may have run it.
    """

    request: int


@dataclass(slots=True)
class RequestEnded(Event):
    """The last byte of the host's answer has arrived, whatever the answer was."""

    request: int


@dataclass(slots=True)
class ConnectFailed(Event):
    """No connection to the host could be opened, so not a byte of the request was sent."""

    request: int
    reason: str = ""


@dataclass(slots=True)
class RequestRefused(Event):
    """The host has refused the request before its admission, with ``X-LLMux-Refused``: no engine has seen it.

    ``code`` is a ``Refusal``, or another word from a newer host. ``retry_after`` is in seconds.
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
    """After ``Withdraw``: the host has released the request and has *proven* that no engine has seen it.

    If it cannot prove that, this event may not be sent; the request then stays on its host.
    """

    request: int


# ---- the store, and time


@dataclass(slots=True)
class ClaimSeen(Event):
    """The store says which host has claimed the wake of ``model``, and for how many more seconds."""

    model: str
    host: str
    remaining: float


@dataclass(slots=True)
class LoadSeen(Event):
    """The store says how many requests the other gateways have on ``host``, by model."""

    host: str
    requests: dict[str, int]


@dataclass(slots=True)
class DeadlineReached(Event):
    """The time that ``next_deadline()`` named has come."""


# ---- effects


class Code(enum.StrEnum):
    """Why a gateway itself rejects a request; a host's refusal is passed on in its own words."""

    UNKNOWN_MODEL = "model_not_found"  # 404: no host has it, and all have reported
    QUEUE_FULL = "queue_full"  # 429
    NO_HOST = "no_host"  # 503: no host that has the model can be reached
    HOST_LOST = "host_lost"  # 502: the connection ended without an answer; it is not sent again


# After these a host takes no request for any model; after the others none for this one.
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
    """Take the request back from the queue of ``host``: ``to`` would serve it sooner by more than a switch.

    Answer with ``RequestWithdrawn`` only if the host confirms that it was not admitted. If it was, the answer's
    events follow as usual.
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

    It is advice to the other gateways: nothing waits for the answer, which arrives as ``ClaimSeen``. A claim of
    the host ``over`` is replaced: as many requests wait there as it serves at once, or it cannot serve.
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
    """No request goes to the host until a probe is answered. ``pause`` is the seconds until the next probe."""

    host: str
    reason: str
    pause: float


@dataclass(slots=True)
class HostRestored:
    """The host takes requests again."""

    host: str


@dataclass(slots=True)
class ReportRefused:
    """A report was refused: a newer one had arrived, or it is from another instance while the known one lives."""

    host: str
    instance: str
    seq: int
    reason: str


@dataclass(slots=True)
class ViewStale:
    """Every report on hosts for ``model`` has expired: requests are spread by the gateway's own counts alone."""

    model: str


@dataclass(slots=True)
class RouteOverruled:
    """The route raised, or returned a host that may not be used: ``least_in_flight`` is used, reported once."""

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
