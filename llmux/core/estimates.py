"""What the core is handed to measure with, and asks what to expect. Seconds, and per second; pure, too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from llmux.core.policy import EngineView, Successor

ARRIVAL_WINDOW = 120.0  # seconds over which arrivals are averaged
NO_LEVELS: Mapping[str, str] = {}


class Costs(Protocol):
    """What switches cost, from the end of the drain to ready. Models without levels sleep at level ""."""

    guesses: Mapping[str, tuple[float | None, float | None]]
    """Of wake and sleep, by model: what counts until it was measured."""

    def record(self, sources: Collection[str], target: str, seconds: float) -> float | None:
        """Take in a whole switch and return the new estimate; with several leaving there is none."""

    def record_wake(self, model: str, seconds: float, level: str = "") -> None:
        """Take in how long a wake took, out of that level."""

    def record_sleep(self, model: str, seconds: float, level: str = "") -> None:
        """Take in how long a sleep took, its verify included, at that level."""

    def estimate(self, sources: Collection[str], target: str, levels: Mapping[str, str] = NO_LEVELS) -> float:
        """Return the expected cost of a switch, >= 0; ``levels`` by model."""

    def wake_of(self, model: str, level: str = "") -> float:
        """Return the expected duration of a wake, out of that level."""

    def sleep_of(self, model: str, level: str = "") -> float:
        """Return the expected duration of a sleep and its verify, at that level."""


class Meter(EngineView, Protocol):
    """What is measured of one model."""

    service: float
    """From admission to the last byte, on average; 0 until a first answer."""

    def arrived(self, now: float) -> None:
        """Take in an arrival."""

    def changed(self, now: float, in_flight: int) -> None:
        """Take in that so many are served from now on."""

    def answered(self, now: float, in_flight: int, took: float) -> None:
        """Take in that one has been answered, after ``took`` seconds, and that so many are served from now on."""

    def arrival_rate(self, now: float) -> float:
        """Return the arrivals per second, averaged over about ``ARRIVAL_WINDOW`` seconds."""

    @property
    def successors(self) -> Mapping[str, Successor]:
        """Which models were asked next after its answers."""


class Estimates(Protocol):
    """All that is measured for one core."""

    @property
    def costs(self) -> Costs:
        """What switches cost."""

    def meter(self, model: str) -> Meter:
        """Return a new meter for a model, by its name."""
