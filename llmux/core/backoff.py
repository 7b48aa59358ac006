"""Exponential backoff after failures: first, doubling, ±20 % jitter, capped."""

from __future__ import annotations

from collections.abc import Callable

JITTER = 0.2


class Backoff:
    """The failures in a row of one thing, and until when it is left alone."""

    __slots__ = ("failures", "until")

    def __init__(self) -> None:
        self.failures = 0
        self.until = float("-inf")

    def active(self, now: float) -> bool:
        """Whether it is to be left alone."""
        return now < self.until

    def remaining(self, now: float) -> float:
        """Seconds until the next try is allowed, >= 0."""
        return max(0.0, self.until - now)

    def fail(self, now: float, first: float, maximum: float, jitter: Callable[[], float]) -> float:
        """Count a failure and return the pause in seconds. ``jitter`` returns a number in [0, 1)."""
        pause = min(maximum, first * 2.0 ** min(self.failures, 62))
        self.failures += 1
        pause = min(maximum, pause * (1.0 + JITTER * (2.0 * jitter() - 1.0)))
        self.until = now + pause
        return pause

    def clear(self) -> None:
        """Forget all failures."""
        self.failures = 0
        self.until = float("-inf")
