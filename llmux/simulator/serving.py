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

    def advance(self, time: float) -> None:
        """Let the streams run until ``time``."""
        self.made += (time - self.time) * self.speed
        self.time = time

    def add(self, index: int, job: Job, time: float) -> None:
        """Take in a job, whose work begins at once if a slot is free."""
        self.advance(time)
        if len(self.streams) >= self.engine.slots:
            self.waiting.append((index, job))
        else:
            self._begin(index, job)

    def finish(self, time: float) -> int:
        """Take out the stream that is done, and begin with what has waited longest; return its job."""
        self.advance(time)
        work, index = heapq.heappop(self.streams)
        self.made = max(self.made, work)
        if self.waiting:
            self._begin(*self.waiting.popleft())
        else:
            self._changed()
        return index

    def _begin(self, index: int, job: Job) -> None:
        heapq.heappush(self.streams, (self.made + self.engine.work(job), index))
        self.first_tokens.append((self.made + self.engine.before_first_token(job), index))
        self._changed()

    def _changed(self) -> None:
        self.history.append((self.made, self.time))
        self.speed = self.engine.rate(len(self.streams)) if self.streams else 0.0

    def place_first_tokens(self, end: float, times: list[float | None]) -> None:
        """Turn the progress at which each first token came into a time: progress is linear in between."""
        self.advance(end)
        self.history.append((self.made, end))
        history, position = self.history, 0
        for progress, index in sorted(self.first_tokens):
            if progress > self.made + EPSILON:
                break
            while position < len(history) - 1 and history[position][0] < progress:
                position += 1
            after, before = history[position], history[max(0, position - 1)]
            width = after[0] - before[0]
            share = (progress - before[0]) / width if width > 0 else 1.0
            times[index] = before[1] + min(share, 1.0) * (after[1] - before[1])
