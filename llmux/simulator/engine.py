"""How fast an engine works: continuous batching as processor sharing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmux.simulator.trace import Job


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Speed of every engine in the simulation.

    Each of ``b`` streams in flight advances at ``decode / (1 + slowdown·(b - 1))`` tokens/s. A prompt counts in
    the same currency, as ``prompt_tokens · decode / prefill`` tokens of decoding.
    """

    slots: int = 16  # max_in_flight
    decode: float = 60.0  # tokens/s of one stream alone
    prefill: float = 6000.0  # prompt tokens/s
    slowdown: float = 0.03  # what each further stream costs the others, as a share

    def rates(self) -> list[float]:
        """Return the tokens/s of each stream by the number of streams, from 0 to ``slots``."""
        return [0.0] + [self.decode / (1.0 + self.slowdown * (b - 1)) for b in range(1, self.slots + 1)]

    def before_first_token(self, job: Job) -> float:
        """Return the work until the first token is out, in tokens of decoding."""
        return job.prompt_tokens * self.decode / self.prefill + 1.0

    def work(self, job: Job) -> float:
        """Return the whole work of a job, in tokens of decoding; an answer has at least one token."""
        return job.prompt_tokens * self.decode / self.prefill + max(1.0, job.output_tokens)

    def load(self, jobs: Iterable[Job], seconds: float) -> float:
        """Return the share of the engines' full batches that ``jobs`` would fill over ``seconds``."""
        full = self.slots * self.rates()[-1]
        return sum(map(self.work, jobs)) / (full * seconds) if seconds > 0 else 0.0
