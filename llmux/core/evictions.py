"""Why those left who left: what it costs to lose each, as it was when the switch began. Nothing here decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llmux.core import admission, placement
from llmux.core.model import Model, Switch
from llmux.core.state import State

Why = Literal["", "pinned", "backoff", "apart"]


class Candidate(NamedTuple):
    """A model that held the GPU. Times in seconds."""

    model: str
    left: bool
    why: Why  # pinned, backoff: it could not leave; apart: it cannot be awake beside the target; else its cost
    keep_awake: bool
    in_flight: int
    queued: int
    expected: float  # requests in the next two minutes, one at least
    sleep: float
    wake: float
    cost: float  # its sleep, and a wake for each that it has or is to be expected
    memory: Mapping[str, int] | None  # bytes by GPU


@dataclass(frozen=True, slots=True)
class Eviction:
    """One choice of who leaves, in a time of the core's clock.

    ``need`` is what the target takes, ``free`` what there was: bytes by GPU, None without ``capacity``.
    ``grouped`` says that groups are in use.
    """

    time: float
    switch: int
    target: str
    candidates: tuple[Candidate, ...]
    need: Mapping[str, int] | None
    free: Mapping[str, int] | None
    grouped: bool

    @property
    def left(self) -> tuple[str, ...]:
        """Who left."""
        return tuple(each.model for each in self.candidates if each.left)


def note(s: State, switch: Switch) -> None:
    """Keep why those leave who leave, if anybody leaves for a target, and decisions are kept at all."""
    target = switch.target
    leaving = [model for model in switch.leaving if model is not target]
    if target is None or not leaving or s.decisions is None:
        return
    holders = [model for model in s.models.values() if model.holds and model is not target]
    stuck = admission.immovable(s, target)
    capacity, need = s.rules.capacity, target.next.memory
    s.eviction = eviction = Eviction(
        s.now,
        switch.id,
        target.name,
        tuple(_candidate(s, model, target, left=model in leaving, stuck=model.name in stuck) for model in holders),
        None if capacity is None or need is None else placement.per_gpu(need),
        None if capacity is None else placement.free([model.running for model in holders], capacity),
        target.next.companions is not None,
    )
    for model in leaving:
        model.evicted = eviction


def _candidate(s: State, model: Model, target: Model, *, left: bool, stuck: bool) -> Candidate:
    loss = admission.loss(s, model)
    why: Why = ""
    if stuck:
        why = "pinned" if model.pinned else "backoff"
    elif not placement.fits([target.next, model.running], s.rules.capacity):
        why = "apart"
    memory = model.running.memory
    return Candidate(
        model.name,
        left,
        why,
        model.spec.keep_awake,
        len(model.in_flight),
        len(model.queue),
        loss.expected,
        loss.sleep,
        loss.wake,
        loss.seconds,
        None if memory is None else placement.per_gpu(memory),
    )
