"""Spill-over in virtual time: the effect of a remote that serves requests which would wait too long (`spill`).

The rule is that of production (``targets.route_rules``), with the same estimate of the wait
(``runtime.wait_estimate``), applied when a request arrives and again while it waits. The remote is assumed to take
any number of requests, and to answer each as fast as its model's engine does alone. Its price is charged for the
tokens of the trace; in a record, for those that the answer reported, or else an estimate from bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmux.core.events import RequestAbandoned
from llmux.runtime import wait_estimate
from llmux.simulator.trace import Job, TraceError
from llmux.targets.route_rules import Offer, spills

if TYPE_CHECKING:
    from llmux.core.model import Model
    from llmux.simulator.run import Run

EVERY = 0.25, 2.0  # seconds between two looks at the queue, at least and at most: a twentieth of ``over``
_MILLION = 1_000_000
_LOOK = -1  # in place of a job


@dataclass(frozen=True, slots=True)
class Spill:
    """When requests go to a remote: ``over`` so many seconds, and the price of a million tokens there."""

    over: float
    price: tuple[float, float] | None = None  # input, output; None: unknown

    def cost(self, jobs: Sequence[Job]) -> float | None:
        """Return what the remote charges for these, in the currency of the price; None without one."""
        if self.price is None:
            return None
        given, made = self.price
        return sum(read * given + written * made for read, written in (job.size for job in jobs)) / _MILLION


def parse_price(text: str) -> tuple[float, float]:
    """Read ``input=0.25,output=2``.

    Raises:
        TraceError: it is invalid; the message says what to write.

    """
    found = {"input": 0.0, "output": 0.0}
    for word in text.split(","):
        name, sign, value = (part.strip() for part in word.partition("="))
        try:
            price = float(value) if sign and name in found else -1.0
        except ValueError:
            price = -1.0
        if not 0.0 <= price < float("inf"):
            raise TraceError(
                f"--spill-price {text}: {word!r} is not a price; write input=0.25,output=2, of a million tokens"
            )
        found[name] = price
    return found["input"], found["output"]


class Spilling:
    """The remote of one run."""

    def __init__(self, run: Run, spill: Spill) -> None:
        self._run = run
        self._offer = Offer("", spill.over)
        self._every = min(max(spill.over / 20.0, EVERY[0]), EVERY[1])
        self._looks = False  # a look is due
        self.due: list[tuple[float, int]] = []  # heap of (time, job): ends of answers there, and looks

    def takes(self, job: int) -> bool:
        """Return whether an arriving job goes there at once; if not, it is checked again while it waits."""
        run, state = self._run, self._run.core.state
        model = state.models[run.jobs[job].model]
        if not self._looks:
            self._looks = True
            heapq.heappush(self.due, (run.time + self._every, _LOOK))
        if not spills(self._offer, 0.0, wait_estimate.for_a_newcomer(state, model, run.time), None):
            return False
        self._serve(job)
        return True

    def act(self) -> None:
        """Do what is due."""
        job = heapq.heappop(self.due)[1]
        if job != _LOOK:
            self._run.answered_elsewhere(job)
            return
        self._looks = False
        state = self._run.core.state
        for model in [model for model in state.models.values() if model.queue]:
            self._look_at(model)
        if state.queued:
            self._looks = True
            heapq.heappush(self.due, (self._run.time + self._every, _LOOK))

    def _look_at(self, model: Model) -> None:
        run = self._run
        awake = wait_estimate.until_awake(run.core.state, model, run.time)
        position = 0
        for request in list(model.queue.values()):
            position += 1
            expected = awake + wait_estimate.in_queue(model, position)
            if request.id in model.queue and spills(self._offer, run.time - request.arrived, expected, None):
                run.feed(RequestAbandoned(request.id))
                self._serve(request.id)
                position -= 1

    def _serve(self, job: int) -> None:
        run = self._run
        engine, what = run.serving[run.jobs[job].model].engine, run.jobs[job]
        if what.service is not None:
            first, whole = min(what.first, what.service), what.service
        else:
            first, whole = engine.before_first_token(what) / engine.decode, engine.work(what) / engine.decode
        run.spilled(job, run.time + first)
        heapq.heappush(self.due, (run.time + whole, job))
