"""Traffic: which model is asked for, when, and how much work that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmux.errors import LLMuxError


class TraceError(LLMuxError):
    """A trace, a cost matrix or a synthetic load cannot be used; says where and what to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a trace.

    A job of a closed loop has no arrival of its own (None): it arrives ``think`` seconds after the job that names
    it as its ``successor`` (an index into the trace) was answered.
    """

    arrival: float | None  # seconds from the start of the trace
    model: str
    prompt_tokens: int
    output_tokens: int
    successor: int | None = None
    think: float = 0.0  # seconds between this job's answer and its successor
    service: float | None = None  # seconds from admission to the end, whoever else is served
    alone: float | None = None  # seconds that it would take if nothing else were served
    first: float = 0.0  # seconds of either until the first byte; then tokens do not matter
    patience: float | None = None  # seconds after which it leaves the queue


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs and a name to tell them by. The order of jobs is free; arrivals are at or after 0."""

    name: str
    jobs: Sequence[Job]

    @property
    def models(self) -> tuple[str, ...]:
        """The models by their first arrival; those that are only ever successors come last."""
        first: dict[str, float] = {}
        never = float("inf")
        for job in self.jobs:
            arrival = never if job.arrival is None else job.arrival
            if arrival < first.setdefault(job.model, arrival):
                first[job.model] = arrival
        return tuple(sorted(first, key=first.__getitem__))

    @property
    def closed_loop(self) -> bool:
        """Whether some jobs wait for the answers to others."""
        return any(job.successor is not None for job in self.jobs)

    def stretched(self, factor: float) -> Trace:
        """Return the same jobs with all times multiplied by ``factor``: 8 makes the load eight times lighter."""
        jobs = [
            replace(job, arrival=None if job.arrival is None else job.arrival * factor, think=job.think * factor)
            for job in self.jobs
        ]
        return replace(self, jobs=jobs)

    def sliced(self, start: float, end: float) -> Trace:
        """Return what arrives in start ≤ t < end, with its times from ``start``. Not for closed loops."""
        if self.closed_loop:
            raise TraceError("a closed loop has no slices: its arrivals depend on its answers")
        jobs = [
            replace(job, arrival=job.arrival - start)
            for job in self.jobs
            if job.arrival is not None and start <= job.arrival < end
        ]
        return replace(self, jobs=jobs)

    def busiest(self, count: int) -> Trace:
        """Return the jobs of the ``count`` models with the most of them. Not for closed loops."""
        if self.closed_loop:
            raise TraceError("models cannot be taken out of a closed loop")
        kept = {model for model, _ in Counter(job.model for job in self.jobs).most_common(count)}
        return replace(self, jobs=[job for job in self.jobs if job.model in kept])
