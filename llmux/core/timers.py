"""What is due when: named deadlines in a heap, replaced lazily."""

from __future__ import annotations

import enum
import heapq
from collections.abc import Hashable


class Timer(enum.StrEnum):
    """What may be due. The key of a model's or a hook's timer is the pair of this and its name or number."""

    # of llmux
    ASK = "ask"  # the policy, again
    HELD = "held"  # what is held back may be let in
    DRAIN = "drain"  # the switch under way has drained for long enough
    DEFAULT = "default"  # it has been quiet for long enough for the default model
    LEASE = "lease"
    GRACE = "grace"  # of the stop
    # of a hook
    HOOK = "hook"
    # of a request
    RIDE = "ride"  # it rides along for no longer
    # of a model
    TIMEOUT = "timeout"  # of its oldest waiter
    OVERDUE = "overdue"  # its oldest waiter
    IDLE = "idle"
    PROBE = "probe"
    VERIFY = "verify"
    WAKE_BACKOFF = "wake backoff"
    SLEEP_BACKOFF = "sleep backoff"
    PIN = "pin"


class Timers:
    """Deadlines by key. Setting a key again replaces its time; stale heap entries are skipped on sight."""

    __slots__ = ("_heap", "_serial", "_times")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Hashable]] = []
        self._times: dict[Hashable, tuple[float, int]] = {}
        self._serial = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._times

    def set(self, key: Hashable, when: float | None) -> None:
        """Make ``key`` due at ``when``; None: never."""
        if when is None:
            self.cancel(key)
            return
        self._serial += 1
        self._times[key] = (when, self._serial)
        heapq.heappush(self._heap, (when, self._serial, key))
        if len(self._heap) > 64 + 4 * len(self._times):
            self._compact()

    def cancel(self, key: Hashable) -> None:
        """Forget ``key``; it need not be there."""
        self._times.pop(key, None)

    def cancel_all(self, name: str) -> None:
        """Forget whatever is due of a model."""
        for timer in Timer:
            self.cancel((timer, name))

    def clear(self) -> None:
        """Forget all."""
        self._times.clear()

    def next(self) -> float | None:
        """Return the earliest deadline, or None."""
        heap, times = self._heap, self._times
        while heap:
            when, serial, key = heap[0]
            known = times.get(key)
            if known is not None and known[1] == serial:
                return when
            heapq.heappop(heap)
        return None

    def pop_due(self, now: float) -> Hashable | None:
        """Take out and return one key that is due, or return None."""
        when = self.next()
        if when is None or when > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._times[key]
        return key

    def _compact(self) -> None:
        self._heap = [(when, serial, key) for key, (when, serial) in self._times.items()]
        heapq.heapify(self._heap)
