"""What an engine is like, from a record of it: how many it serves at once, and how they slow each other down.

A service as recorded has in it what else was served. Under a guess of ``slots`` and ``slowdown`` that can be taken
out: what waits in the engine begins as slots become free, and then advances at the common speed; the integral of
that speed is the time which the request would have taken alone. The best guess is the one under which these times
depend most on what is known of the request itself, the bytes of its body and of its answer. Where answers are
streamed, no more slots are guessed than streams were seen at once.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmux.simulator.engine_model import EngineModel

SLOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SLOWDOWNS = (0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SAMPLES = 1000  # services that are looked at to choose; all are then reckoned
BETTER = 0.9  # an error that is this share of the simpler guess's or less is worth the guess
PIECE = 0.005  # seconds: an answer in one piece takes less to pass
TOGETHER = 0.1  # seconds: what comes within that, as when a model is awake at last, has no order
MOST_STREAMED = 0.8  # share of the answers: then streams tell how many are served at once
RARE = 0.02  # share of the time that says nothing: clocks err, and so does the network
UNSEEN = 1024  # slots of an engine that was never seen to be full
LEAST = 1e-4  # seconds: no answer takes less


@dataclass(frozen=True, slots=True)
class Service:
    """One recorded service. Times in seconds."""

    admitted: float
    ended: float
    first: float  # when its first byte came
    asked: int  # bytes of its body
    answered: int  # bytes of its answer


@dataclass(frozen=True, slots=True)
class Fit:
    """An engine, and what each service would have taken alone, in the order in which they were given."""

    engine: EngineModel
    alone: Sequence[float]
    first: Sequence[float]  # of ``alone``, until the first byte
    most: int  # how many were in flight at once, at most
    error: float  # of what bytes say of ``alone``, as a share of its root mean square


def fit(services: Sequence[Service], limit: int | None) -> Fit:
    """Fit an engine to what it was seen to do; ``limit`` is how many llmux admits at once (None: all)."""
    sample = services[:SAMPLES]
    most = _most(sample)
    unlimited = limit or max(UNSEEN, most)
    best, least = (unlimited, 0.0), float("inf")
    for slots in _candidates(sample, most, unlimited):
        course = _Course(sample, slots)
        for slowdown in SLOWDOWNS if most > 1 else (0.0,):
            error = _error(sample, list(course.alone(slowdown)))
            simpler = slots == best[0]
            if error < least * (1.0 if simpler else BETTER):
                best, least = (slots, slowdown), error
    slots, slowdown = best
    pairs = list(_Course(services, slots).alone(slowdown))
    engine = EngineModel(slots, 1.0, float("inf"), slowdown)
    return Fit(engine, [alone for alone, _ in pairs], [first for _, first in pairs], _most(services), least**0.5)


def _candidates(services: Sequence[Service], most: int, unlimited: int) -> Iterator[int]:
    """Yield how many slots there may be, most first: a little more than were usually seen to speak at once."""
    speaking = 0
    if sum(map(_streamed, services)) >= MOST_STREAMED * len(services):
        speaking = _usually([(each.first, each.ended) for each in services])
    highest = speaking + max(1, speaking // 4) if speaking else most
    if _usually([(each.admitted, each.ended) for each in services]) <= highest:
        yield unlimited
    yield from (count for count in reversed(SLOTS) if speaking <= count < min(most, unlimited, highest + 1))


def _streamed(service: Service) -> bool:
    """Say whether it came in pieces: what comes in one, at the end, does not tell when it was begun."""
    speaking = service.ended - service.first
    return speaking > PIECE and speaking > RARE * (service.ended - service.admitted)


def _usually(spans: Sequence[tuple[float, float]]) -> int:
    """Return the most that lasted at once, but for rare moments."""
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    lasted: dict[int, float] = {}
    count, since = 0, changes[0][0]
    for time, change in changes:
        lasted[count] = lasted.get(count, 0.0) + time - since
        count, since = count + change, time
    rare = RARE * sum(seconds for at_once, seconds in lasted.items() if at_once)
    for at_once in sorted(lasted, reverse=True):
        rare -= lasted[at_once]
        if rare < 0.0:
            return at_once
    return 1


class _Course:
    """Which request was served when, if an engine has so many slots; the slowdown does not change that."""

    def __init__(self, services: Sequence[Service], slots: int) -> None:
        events = sorted(
            itertools.chain(
                ((each.admitted, 1, index) for index, each in enumerate(services)),
                ((each.ended, 0, index) for index, each in enumerate(services)),
            )
        )
        self.services = services
        self.moments: list[float] = [0.0]
        self.streams: list[int] = [0]  # from the moment of this index to the next
        self.begun = [0] * len(services)  # indices of moments
        self.ended = [0] * len(services)
        # Which of those that came together the engine took first, their first bytes say, where they stream.
        keys = [(round(each.admitted / TOGETHER), each.first) for each in services]
        waiting: list[tuple[tuple[int, float], int]] = []
        running: set[int] = set()
        for time, kind, index in events:
            here = len(self.moments)
            if kind == 1:
                heapq.heappush(waiting, (keys[index], index))
            elif index in running:
                running.discard(index)
                self.ended[index] = here
            else:  # it was faster than its place in the engine's queue allows
                waiting.remove((keys[index], index))
                heapq.heapify(waiting)
                self.begun[index] = self.ended[index] = here
            while waiting and len(running) < slots:
                _, first = heapq.heappop(waiting)
                running.add(first)
                self.begun[first] = here
            self.moments.append(time)
            self.streams.append(len(running))

    def alone(self, slowdown: float) -> Iterator[tuple[float, float]]:
        """Return what each would have taken alone, in seconds, and how much of it until its first byte."""
        progress = [0.0]
        for index in range(1, len(self.moments)):
            seconds = self.moments[index] - self.moments[index - 1]
            speed = 1.0 / (1.0 + slowdown * max(0, self.streams[index - 1] - 1))
            progress.append(progress[-1] + seconds * speed)
        for index, each in enumerate(self.services):
            begun, ended = self.begun[index], self.ended[index]
            whole = max(LEAST, progress[ended] - progress[begun])
            span = each.ended - self.moments[begun]
            share = (each.first - self.moments[begun]) / span if span > 0 else 1.0
            yield whole, whole * min(1.0, max(0.0, share))


def _most(services: Sequence[Service]) -> int:
    ends: list[float] = []
    most = 0
    for each in sorted(services, key=lambda one: one.admitted):
        while ends and ends[0] <= each.admitted:
            heapq.heappop(ends)
        heapq.heappush(ends, each.ended)
        most = max(most, len(ends))
    return most


def _error(services: Sequence[Service], pairs: Sequence[tuple[float, float]]) -> float:
    """Return the part of the squares that bytes do not explain: of the times alone, and until the first byte."""
    most_asked = max(each.asked for each in services) or 1
    most_answered = max(each.answered for each in services) or 1
    asked = [each.asked / most_asked for each in services]
    answered = [each.answered / most_answered for each in services]
    whole = [alone for alone, _ in pairs]
    rest = _unexplained([[1.0] * len(pairs), asked, answered], whole)
    streamed = [index for index, each in enumerate(services) if _streamed(each)]
    if streamed:
        begun = [pairs[index][1] for index in streamed]
        rest += _unexplained([[1.0] * len(streamed), [asked[index] for index in streamed]], begun)
    return rest / sum(value * value for value in whole)


def _unexplained(columns: Sequence[Sequence[float]], values: Sequence[float]) -> float:
    """Return the squares that the best sum of some of the columns leaves, none with a weight below 0."""
    best = sum(value * value for value in values)
    for count in range(1, len(columns) + 1):
        for used in itertools.combinations(columns, count):
            rows = list(zip(*used, strict=True))
            weights = _least_squares(rows, values)
            if weights is not None and min(weights) >= 0.0:  # more bytes do not take less time
                left = (
                    (value - sum(map(operator.mul, weights, row))) ** 2
                    for row, value in zip(rows, values, strict=True)
                )
                best = min(best, sum(left))
    return best


def _least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float] | None:
    """Solve the normal equations of a few unknowns; None where they do not determine them."""
    size = len(rows[0])
    table = [
        [sum(row[i] * row[j] for row in rows) for j in range(size)]
        + [sum(row[i] * value for row, value in zip(rows, values, strict=True))]
        for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(table[k][i]))
        table[i], table[pivot] = table[pivot], table[i]
        if abs(table[i][i]) < 1e-9 * len(rows):
            return None
        for k in range(size):
            if k != i:
                factor = table[k][i] / table[i][i]
                table[k] = [one - factor * other for one, other in zip(table[k], table[i], strict=True)]
    return [table[i][size] / table[i][i] for i in range(size)]
