"""Whether a remote, or another host, gets requests: a circuit breaker. Pure: events in, the time injected.

    closed ──FAILURES in a row──▶ open ──its pause is over──▶ half-open ──a probe succeeds──▶ closed
      ▲                            ▲                             │
      └── any success              └────── the probe fails ──────┘   (and the pause doubles, up to LONGEST)

While it is closed all requests pass. While it is open none does. Half-open, one passes at a time, the *probe*, and
its outcome decides; the others are refused meanwhile. A probe without an outcome (its client left) makes room for
the next one.

A remote can also ask for a rest: 429 or 503 with ``Retry-After``. While it rests nothing is sent; this is not a
failure, and the state afterwards is the same.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

FAILURES = 3
"""So many failures in a row open it."""
FIRST, LONGEST = 5.0, 120.0
"""Seconds of the first pause, and of the longest."""
LONGEST_REST = 600.0
"""Seconds; a longer rest is cut to this."""


class State(enum.StrEnum):
    """What a breaker does with the next request."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    RESTING = "resting"


@dataclass(slots=True)
class Breaker:
    """The breaker of one remote. All times are seconds on one clock."""

    failures: int = 0  # in a row
    error: str = ""  # the last failure, in words
    _open_until: float | None = None  # None: closed
    _pause: float = FIRST
    _probe: int | None = None  # the number of the probe in progress
    _rests_until: float = 0.0
    _passes: int = field(default=0, repr=False)

    def state(self, now: float) -> State:
        """Return what it does with a request now."""
        if now < self._rests_until:
            return State.RESTING
        if self._open_until is None:
            return State.CLOSED
        return State.OPEN if now < self._open_until else State.HALF_OPEN

    def wait(self, now: float) -> float | None:
        """Return None if a request may pass now, else the seconds until it may be worth another try, above 0."""
        if now < self._rests_until:
            return self._rests_until - now
        if self._open_until is None:
            return None
        if now < self._open_until:
            return self._open_until - now
        return None if self._probe is None else 1.0

    def passed(self, now: float) -> int:
        """Let a request pass, which ``wait`` allows. Return its number, with which its outcome is reported."""
        self._passes += 1
        if self._open_until is not None and now >= self._open_until:
            self._probe = self._passes
        return self._passes

    def succeeded(self, number: int) -> None:
        """Record that the remote answered, whatever it said."""
        # An answer to a request from before it opened says nothing about now, unless it has just arrived.
        self._end(number)
        self.failures, self.error = 0, ""
        self._open_until, self._pause = None, FIRST

    def failed(self, number: int, now: float, error: str) -> None:
        """Record a failure: no connection, no answer in time, a server's error, or an answer that broke off."""
        probing = self._end(number)
        self.failures += 1
        self.error = error
        if probing:
            self._pause = min(2 * self._pause, LONGEST)
            self._open_until = now + self._pause
        elif self._open_until is None and self.failures >= FAILURES:
            self._open_until = now + self._pause

    def abandoned(self, number: int) -> None:
        """Record an unknown outcome: the client left, or the request was ended here."""
        self._end(number)

    def rests(self, number: int, now: float, seconds: float) -> None:
        """Record that the remote asks for a rest."""
        self.succeeded(number)
        self._rests_until = max(self._rests_until, now + min(seconds, LONGEST_REST))

    def _end(self, number: int) -> bool:
        """Return whether it was the probe, which is now over."""
        if self._probe != number:
            return False
        self._probe = None
        return True
