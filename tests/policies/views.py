"""Snapshots to show to a policy: what the core would show, written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmux.core.policy import Decision, Policy
from llmux.plugins import load_policy


@dataclass
class Model:
    name: str
    waiters: list[float] = field(default_factory=list)  # arrival times, oldest first
    in_flight: int = 0
    limit: int | None = 16
    awake_since: float | None = None
    admissions: int = 0
    oldest_admission: float | None = None
    last_served: float | None = None
    arrival_rate: float = 0.0
    service_time: float = 4.0
    switch_cost: float = 10.0

    @property
    def awake(self) -> bool:
        return self.awake_since is not None

    @property
    def queued(self) -> int:
        return len(self.waiters)

    @property
    def oldest_arrival(self) -> float | None:
        return self.waiters[0] if self.waiters else None

    def arrivals(self) -> Iterator[float]:
        return iter(self.waiters)


class View:
    def __init__(self, time: float, *models: Model) -> None:
        self.time = time
        self.models: Mapping[str, Model] = {model.name: model for model in models}
        self.awake = tuple(model.name for model in models if model.awake)
        asleep = [model for model in models if model.waiters and not model.awake]
        self.waiting = tuple(model.name for model in sorted(asleep, key=lambda model: model.waiters[0]))


def policy(name: str, **options: Any) -> Policy:
    return load_policy(name, options, Path())


def ask(name: str, time: float, *models: Model, **options: Any) -> Decision:
    return policy(name, **options).decide(View(time, *models))
