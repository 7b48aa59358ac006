"""One engine at work: streams that share it, and what waits in it because its slots are taken."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from llmux.simulator.engine import EngineModel
from llmux.simulator.trace import Job

EPSILON = 1e-9  # tokens: work smaller than this is done


@dataclass(slots=True)
class Serving:
    """Streams of one engine. All advance alike, so that one number, ``made``, is the progress of each."""

    engine: EngineModel
    time: float = 0.0  # up to which ``made`` is right
    made: float = 0.0  # tokens that a stream in flight since the start would have got
    streams: list[tuple[float, int]] = field(default_factory=list)  # heap of (progress at which it ends, job)
    waiting: deque[tuple[int, Job]] = field(default_factory=deque)
    history: list[tuple[float, float]] = field(default_factory=list)  # (progress, time) when the speed changes
    first_tokens: list[tuple[float, int]] = field(default_factory=list)  # (progress at its first token, job)
    speed: float = 0.0  # tokens/s of each stream
    rates: list[float] = field(init=False)  # of the engine, by the number of streams

    def __post_init__(self) -> None:
        self.rates = self.engine.rates()

    def add(self, index: int, job: Job, time: float) -> None:
        """Take in a job, whose work begins at once if a slot is free."""
        self.made += (time - self.time) * self.speed
        self.time = time
        if len(self.streams) >= self.engine.slots:
            self.waiting.append((index, job))
        else:
            self._begin(index, job)

    def finish(self, time: float) -> int:
        """Take out the stream that is done, and begin with what has waited longest; return its job."""
        made = self.made + (time - self.time) * self.speed
        self.time = time
        work, index = heapq.heappop(self.streams)
        self.made = made = max(made, work)
        if self.waiting:
            self._begin(*self.waiting.popleft())
        else:
            self.history.append((made, time))
            self.speed = self.rates[len(self.streams)]
        return index

    def _begin(self, index: int, job: Job) -> None:
        made, engine = self.made, self.engine
        heapq.heappush(self.streams, (made + engine.work(job), index))
        self.first_tokens.append((made + engine.before_first_token(job), index))
        self.history.append((made, self.time))
        self.speed = self.rates[len(self.streams)]

    def place_first_tokens(self, end: float, times: list[float | None]) -> None:
        """Turn the progress at which each first token came into a time: progress is linear in between."""
        made = self.made + (end - self.time) * self.speed
        history, position = [*self.history, (made, end)], 0
        before_made, before = after_made, after = history[0]
        last = len(history) - 1
        for progress, index in sorted(self.first_tokens):
            if progress > made + EPSILON:
                break
            while after_made < progress and position < last:
                before_made, before = after_made, after
                position += 1
                after_made, after = history[position]
            width = after_made - before_made
            share = (progress - before_made) / width if width > 0 and progress < after_made else 1.0
            times[index] = before + share * (after - before)
