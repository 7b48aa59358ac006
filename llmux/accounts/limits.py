"""Limits and budgets of keys: how much is left, and until when. Pure: the caller gives the time.

A rate is enforced by the generic cell rate algorithm: one number says when the allowance would be full again. Any
part of it may be used at once, and it grows back evenly. Since a request's use is known only at its end, an
estimate is taken at its admission, and corrected at its end.

A budget covers a day or a month of UTC; setting the clock forth and back does not start it anew. Estimates are
*reserved* at the admission, in the step that checks them, so many requests at once can overrun a budget only by
the error of the estimates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from llmux.config.accounts import Rate

Per = Literal["day", "month"]
_ROUNDING = 1e-4  # seconds: rounding errors of the clock are no reason to wait


class Left(NamedTuple):
    """What a client is told of a limit: how many of how many are left, and the seconds until all are."""

    limit: int
    remaining: int
    reset: float


@dataclass(slots=True)
class Allowance:
    """What is left of one rate of one key."""

    rate: Rate
    full_at: float = 0.0  # when all of it is available again, on the loop's clock

    def wait(self, now: float, count: float) -> float:
        """Return the seconds until so many can be taken, 0 for at once. More than all there is counts as all."""
        each = self.rate.seconds / self.rate.number
        wanted = min(count, self.rate.number) * each
        wait = max(0.0, self.full_at - now) + wanted - self.rate.seconds
        return wait if wait > _ROUNDING else 0.0

    def take(self, now: float, count: float) -> None:
        """Take so many, available or not."""
        self.full_at = max(self.full_at, now) + count * self.rate.seconds / self.rate.number

    def correct(self, count: float) -> None:
        """Take so many more than estimated, or fewer."""
        self.full_at += count * self.rate.seconds / self.rate.number

    def left(self, now: float) -> Left:
        """Return what is left."""
        until = max(0.0, self.full_at - now)
        used = until * self.rate.number / self.rate.seconds
        return Left(self.rate.number, max(0, int(self.rate.number - used + 1e-9)), until)


@dataclass(slots=True)
class Budget:
    """What one key may spend, in millionths of the currency."""

    amount: int
    per: Per
    soft: float  # the fraction from which on it serves only awake models, or nothing
    awake_only: bool
    spent: int = 0
    reserved: int = 0
    period: tuple[int, int] = (0, 0)  # its first second, and that of the next, since 1970
    newest: int = 0  # the first second of the latest period so far
    known: Callable[[tuple[int, int]], int] = lambda _period: 0  # returns what was spent in it; may take a while

    def turn(self, now: float) -> None:
        """Begin anew if the period has ended. ``now`` is a Unix time."""
        if not self.period[0] <= now < self.period[1]:
            ended, self.period = self.period[1], period(self.per, now)
            since = self.period[0]
            time_has_passed = since == ended and since > self.newest  # else the clock was set
            self.spent = 0 if time_has_passed else self.known(self.period)
            self.newest = max(self.newest, since)

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left."""
        return self.spent >= self.amount

    @property
    def is_full(self) -> bool:
        """Whether nothing is left besides what is reserved."""
        return self.spent + self.reserved >= self.amount

    @property
    def is_soft(self) -> bool:
        """Whether it has reached its soft limit."""
        return self.spent >= self.amount * self.soft


def period(per: Per, now: float) -> tuple[int, int]:
    """Return the first second of the day or month of a Unix time, and that of the next."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if per == "day":
        start = int(today.timestamp())
        return start, start + 86_400
    first = today.replace(day=1)
    year, month = (first.year + 1, 1) if first.month == 12 else (first.year, first.month + 1)  # noqa: PLR2004
    return int(first.timestamp()), int(first.replace(year=year, month=month).timestamp())


def spell(seconds: float) -> str:
    """Write a duration as OpenAI's headers do: ``6m0s``, ``1.2s``, ``20ms``."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:  # noqa: PLR2004
        return f"{milliseconds}ms"
    if milliseconds < 60_000:  # noqa: PLR2004
        return f"{milliseconds / 1000:g}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
