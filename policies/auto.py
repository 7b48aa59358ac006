"""Auto: one of several policies decides, the one that would have served the last hour best.

This class only passes each decision to the chosen policy. llmux chooses it: every few minutes it replays the
traffic of the last hour under each candidate, and calls ``adopt`` with one that was better by more than chance.
Until there is an hour's evidence the first candidate decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from llmux.core.policy import Decision, Policy, Snapshot, Stay, SwitchRecord

AMONG = ("adaptive", "adaptive:tour=2", "adaptive:patience=6", "idle", "fifo")
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|[smh])?\s*\Z")
OBJECTIVE = re.compile(r"mean|p\d{2}(?:\.\d+)?|slo:.+")


class Candidate(BaseModel, extra="forbid"):
    """A policy to choose from: like ``policy.use``, with its options."""

    use: str = Field(min_length=1)
    options: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name, with its options if it has any."""
        if not self.options:
            return self.use
        return f"{self.use}:{','.join(f'{key}={value}' for key, value in self.options.items())}"


def _candidate(value: Any) -> Any:
    """Convert ``NAME`` and ``NAME:key=value,…`` to a mapping."""
    if not isinstance(value, str):
        return value
    use, colon, rest = value.rpartition(":")
    if not colon or "=" not in rest:
        return {"use": value}
    return {"use": use, "options": dict(_option(word) for word in rest.split(",") if word)}


def _option(word: str) -> tuple[str, Any]:
    key, _, value = word.partition("=")
    for kind in (int, float):
        try:
            return key.strip(), kind(value)
        except ValueError:
            continue
    return key.strip(), value.strip()


def _duration(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = DURATION.match(value)
    if found is None:
        raise ValueError(f"{value!r} is not a duration; write seconds, or 30s, 5m, 1h")
    return float(found[1]) * UNITS[found[2] or "s"]


Seconds = Annotated[float, BeforeValidator(_duration)]


class Auto:
    """Delegates to the chosen candidate."""

    class Options(BaseModel):
        """What to choose from, for what, and how often."""

        among: tuple[Annotated[Candidate, BeforeValidator(_candidate)], ...] = Field(
            default=tuple(Candidate.model_validate(_candidate(each)) for each in AMONG),
            min_length=1,
            description="Policies to choose from, the first of them until something is known.",
        )
        objective: str = Field(default="mean", description="Of the waits: mean, p95, p99, or slo:10s.")
        every: Seconds = Field(default=300.0, gt=0.0, description="Seconds between two looks.")
        past: Seconds = Field(default=3600.0, gt=0.0, description="Seconds of traffic that are replayed.")

        @field_validator("objective")
        @classmethod
        def _known(cls, value: str) -> str:
            if not OBJECTIVE.fullmatch(value):
                raise ValueError(f"{value!r} is unknown; write mean, p95, p99, or slo:10s")
            if value.startswith("slo:"):
                _duration(value.removeprefix("slo:"))
            return value

    def __init__(self, options: Options) -> None:
        self.options = options
        self.limit = _duration(options.objective.removeprefix("slo:")) if "slo" in options.objective else None
        self.makers: dict[str, Callable[[], Policy]] = {}
        self._policies: dict[str, Policy] = {}
        self.chosen = options.among[0].name

    def compose(self, load: Callable[[str, Mapping[str, Any]], Policy]) -> None:
        """Create the candidates with ``load(use, options)``. Called once, before any decision."""
        for each in self.options.among:
            self.makers[each.name] = partial(load, each.use, each.options)
        self._policies = {name: make() for name, make in self.makers.items()}

    @property
    def uses(self) -> tuple[str, ...]:
        """The ``policy.use`` of each candidate."""
        return tuple(each.use for each in self.options.among)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Their names, in the order of the configuration."""
        return tuple(self._policies)

    def adopt(self, name: str) -> str | None:
        """Let another candidate decide from now on; return the one before, None if nothing changes."""
        if name not in self._policies or name == self.chosen:
            return None
        before, self.chosen = self.chosen, name
        return before

    def decide(self, now: Snapshot) -> Decision:
        """Return the chosen candidate's decision; the others observe the snapshot and the decision."""
        decision = self._policies[self.chosen].decide(now)
        for name, policy in self._policies.items():
            observe = getattr(policy, "observe", None)
            if observe is not None and name != self.chosen:
                observe(now, decision)
        return decision

    def anticipate(self, now: Snapshot) -> Decision:
        """Call ``anticipate`` of the chosen candidate, if it has that."""
        ask = getattr(self._policies[self.chosen], "anticipate", None)
        answer: Decision = Stay("the chosen policy does not anticipate") if ask is None else ask(now)
        return answer

    def on_switch_completed(self, record: SwitchRecord) -> None:
        """Pass it to all of them: any may be next."""
        for policy in self._policies.values():
            tell = getattr(policy, "on_switch_completed", None)
            if tell is not None:
                tell(record)
