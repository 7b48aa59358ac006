"""Traces as files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmux.simulator import Job
from llmux.simulator.trace import NEEDED


def lines(jobs: Iterable[Job]) -> Iterator[str]:
    """Yield open-loop jobs as CSV lines, the header first; ``read_trace`` can read them."""
    yield ",".join(NEEDED)
    for job in jobs:
        yield f"{job.arrival:.3f},{job.model},{job.prompt_tokens},{job.output_tokens}"
