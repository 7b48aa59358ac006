"""The clock for deleting things by their age, which cannot be undone."""

from __future__ import annotations

import time
from time import monotonic

STEP = 60.0  # seconds; a clock that is further ahead was set
BELIEVED = 3600.0  # seconds after which the new time is accepted: it was no mistake, or this machine had slept


class Calendar:
    """The time; a clock that is set ahead is not believed at once."""

    def __init__(self) -> None:
        self._offset = time.time() - monotonic()
        self._ahead_since: float | None = None

    def now(self) -> float:
        """Return a Unix time."""
        steady = monotonic()
        offset = time.time() - steady
        if offset > self._offset + STEP:
            if self._ahead_since is None:
                self._ahead_since = steady
            if steady < self._ahead_since + BELIEVED:
                return steady + self._offset
        self._offset, self._ahead_since = offset, None
        return steady + offset
