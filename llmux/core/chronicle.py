"""Keeps the last decisions, for those who ask why. Nothing here changes what is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmux.core import admission
from llmux.core.decisions import FIGURES, By, DecisionRecord, Kind, Serving, Waiting
from llmux.core.model import Model, Switch
from llmux.core.phases import Phase
from llmux.core.state import State


def waiting_models(s: State) -> list[Model]:
    """Return the models that are not awake and have waiters, the oldest waiter's first."""
    return sorted(
        (m for m in s.models.values() if m.queue and m.phase is not Phase.AWAKE),
        key=lambda m: (next(iter(m.queue.values())).arrived, m.order),
    )


def keep(
    s: State,
    kind: Kind,
    target: str | None,
    by: By,
    said: str,
    waiting: Sequence[Model],
    until: float | None = None,
) -> None:
    """Keep a decision; the repetition of the last one only counts."""
    if s.decisions is None:
        return
    last = s.decisions[-1] if s.decisions else None
    if last is not None and last.switch is None and (last.kind, last.target, last.by) == (kind, target, by):
        last.times += 1
        last.last, last.said, last.until = s.now, said, until
        return
    s.decision_ids += 1
    figures = _serving(s), *_waiting(s, waiting)
    s.decisions.append(DecisionRecord(s.decision_ids, s.now, kind, target, by, said, *figures, until, last=s.now))


def begun(s: State, switch: Switch, *, decided: bool) -> None:
    """Note to which switch a decision led; one that nobody waits for is a decision by itself."""
    if s.decisions is None:
        return
    if not decided:
        keep(s, "switch", switch.target.name if switch.target else None, "core", switch.reason, waiting_models(s))
    s.decisions[-1].switch = switch.id
    s.decisions[-1].leaving = switch.sources


def latest(s: State, count: int) -> list[DecisionRecord]:
    """Return the last ``count`` decisions, oldest first; what still holds has the figures of this moment."""
    records = list(s.decisions or ())[-count:] if count > 0 else []
    if records and records[-1].switch is None and s.switch is None and (waiting := waiting_models(s)):
        figures, more = _waiting(s, waiting)
        records[-1] = replace(records[-1], last=s.now, serving=_serving(s), waiting=figures, more=more)
    return records


def since(s: State, number: int) -> list[DecisionRecord]:
    """Return the decisions after the one with this id, oldest first."""
    new: list[DecisionRecord] = []
    for record in reversed(s.decisions or ()):
        if record.id <= number:
            break
        new.append(record)
    return new[::-1]


def _serving(s: State) -> tuple[Serving, ...]:
    return tuple(Serving(m.name, len(m.in_flight), len(m.queue)) for m in s.in_phase(Phase.AWAKE))


def _waiting(s: State, models: Sequence[Model]) -> tuple[tuple[Waiting, ...], int]:
    """Return the figures of some, and how many wait for the others: with many models they would take long."""
    figures = tuple(_queue(s, model) for model in models[:FIGURES])
    return figures, sum(len(model.queue) for model in models[FIGURES:])


def _queue(s: State, model: Model) -> Waiting:
    arrived = [request.arrived for request in model.queue.values()]
    leaving = admission.who_leaves(s, model) or ()
    cost = admission.switch_cost(s, leaving, model)
    return Waiting(model.name, len(arrived), s.now - arrived[0], s.now * len(arrived) - sum(arrived), cost)
