"""Whether a remote, or another host, is asked at all: a circuit breaker. Pure: events in, the time injected.

    closed ──FAILURES in a row──▶ open ──its pause is over──▶ half-open ──a probe succeeds──▶ closed
      ▲                            ▲                             │
      └── any success              └────── the probe fails ──────┘   (and the pause doubles, up to LONGEST)

While it is closed all requests pass. While it is open none does. Half-open, one passes at a time, the *probe*,
and what becomes of it decides; the others are refused meanwhile. A probe of which no end is told (its client left)
makes room for the next one.

Beside that a remote can ask for a rest: 429 or 503 with ``Retry-After``. While it rests nothing is sent; that is
no failure, and afterwards all is as it was.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

FAILURES = 3
"""So many in a row open it."""
FIRST, LONGEST = 5.0, 120.0
"""Seconds of the first pause, and of the longest."""
LONGEST_REST = 600.0
"""Seconds; a longer rest than that is not believed."""


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
    _probe: int | None = None  # the pass of the probe under way
    _rests_until: float = 0.0
    _passes: int = field(default=0, repr=False)

    def state(self, now: float) -> State:
        """Return what it does with a request that comes now."""
        if now < self._rests_until:
            return State.RESTING
        if self._open_until is None:
            return State.CLOSED
        return State.OPEN if now < self._open_until else State.HALF_OPEN

    def wait(self, now: float) -> float | None:
        """Return None if a request may pass now, else the seconds until it is worth another look, above 0."""
        if now < self._rests_until:
            return self._rests_until - now
        if self._open_until is None:
            return None
        if now < self._open_until:
            return self._open_until - now
        return None if self._probe is None else 1.0

    def passed(self, now: float) -> int:
        """Let a request pass, which ``wait`` allows. Return its pass: what becomes of it is told with that."""
        self._passes += 1
        if self._open_until is not None and now >= self._open_until:
            self._probe = self._passes
        return self._passes

    def succeeded(self, number: int) -> None:
        """Take note that the remote answered, whatever it said."""
        # What was sent before it opened says nothing of now; but an answer that has just come does.
        self._end(number)
        self.failures, self.error = 0, ""
        self._open_until, self._pause = None, FIRST

    def failed(self, number: int, now: float, error: str) -> None:
        """Take note that it did not: no connection, no answer in time, a server's error, or one that broke off."""
        probing = self._end(number)
        self.failures += 1
        self.error = error
        if probing:
            self._pause = min(2 * self._pause, LONGEST)
            self._open_until = now + self._pause
        elif self._open_until is None and self.failures >= FAILURES:
            self._open_until = now + self._pause

    def abandoned(self, number: int) -> None:
        """Take note that it is not known: the client left, or the request was ended here."""
        self._end(number)

    def rests(self, number: int, now: float, seconds: float) -> None:
        """Take note that the remote asks for a rest."""
        self.succeeded(number)
        self._rests_until = max(self._rests_until, now + min(seconds, LONGEST_REST))

    def _end(self, number: int) -> bool:
        """Return whether it was the probe, which is over now."""
        if self._probe != number:
            return False
        self._probe = None
        return True
