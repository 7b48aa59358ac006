"""The last requests, in memory: what ``/llmux/activity``, the page and ``llmux requests`` show.

It contains no prompt, answer or key. A request costs one tuple. Refused requests are kept apart, so that a flood
of them does not displace served ones.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

KEPT, REFUSED = 1000, 100  # requests: that an engine has answered, and others
_ERRORS = 400  # the least status that is an error


class FinishedRequest(NamedTuple):
    """One request that has ended. Times are seconds; ``ended`` is of the loop's clock."""

    id: int
    ended: float
    model: str | None  # None: it named none that is configured
    status: int  # 499: its client left first
    waited: float  # in the queue
    first_byte: float | None  # from its arrival
    duration: float  # from its arrival to its end
    request_id: str
    input_tokens: int | None
    output_tokens: int | None
    error: str | None  # the error's code, if llmux refused it or the answer broke off
    key: str | None  # the name of its key
    streamed: bool  # the answer was an event stream
    asked: str | None  # the model as the client named it, if that is a known name

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens by the time since the first byte, or since the admission where all came at once.

        None where one of them is not known.
        """
        if self.output_tokens is None or self.first_byte is None:
            return None
        took = self.duration - (self.first_byte if self.streamed else self.waited)
        return self.output_tokens / took if took > 0 else None


class RequestLog:
    """The last requests of one llmux. ``now`` is the loop's clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._served: deque[tuple[Any, ...]] = deque(maxlen=KEPT)
        self._refused: deque[tuple[Any, ...]] = deque(maxlen=REFUSED)
        self.last_id = 0

    def add(
        self,
        ended: float,
        model: str | None,
        status: int,
        waited: float,
        first_byte: float | None,
        duration: float,
        request_id: str,
        tokens: tuple[int | None, int | None],
        error: str | None,
        key: str | None,
        streamed: bool,
        asked: str | None = None,
    ) -> int:
        """Keep a request that has ended; return its number.

        Refused are requests with an ``error`` and its status, and those that left before their first byte.
        """
        self.last_id = number = self.last_id + 1
        # As a tuple: making the record costs more, and few are ever read.
        row = (
            number, ended, model, status, waited, first_byte, duration, request_id, *tokens, error, key, streamed,
            asked,
        )  # fmt: skip
        if status >= _ERRORS and (error is not None or first_byte is None):
            self._refused.append(row)
        else:
            self._served.append(row)
        return number

    def rows(
        self,
        limit: int,
        *,
        before: int | None = None,
        after: int = 0,
        model: str | None = None,
        key: str | None = None,
    ) -> list[dict[str, Any]]:
        """Return the last ones that match, newest first. ``before`` and ``after`` are ids, times Unix times."""
        offset = time.time() - self._now()
        found: list[dict[str, Any]] = []
        for one in self._matching(before, model, key):
            if len(found) >= limit or one.id <= after:
                break
            found.append(_document(one, offset))
        return found

    def _matching(self, before: int | None, model: str | None, key: str | None) -> Iterator[FinishedRequest]:
        newest_first = heapq.merge(reversed(self._served), reversed(self._refused), reverse=True)
        for one in map(FinishedRequest._make, newest_first):
            named = (model is None or one.model == model) and (key is None or one.key == key)
            if named and (before is None or one.id < before):
                yield one


def _document(one: FinishedRequest, offset: float) -> dict[str, Any]:
    return {
        "id": one.id,
        "time": one.ended - one.duration + offset,
        "asked": one.asked,
        "model": one.model,
        "status": one.status,
        "waited": one.waited,
        "first_byte": one.first_byte,
        "duration": one.duration,
        "input_tokens": one.input_tokens,
        "output_tokens": one.output_tokens,
        "tokens_per_second": one.tokens_per_second,
        "request_id": one.request_id,
        "error": one.error,
        "key": one.key,
    }
