"""What a host says of itself: a report. Plain values, taken at one instant; all durations are seconds.

A report is true when it is taken and grows old on its way. ``instance`` names one run of a host's process, ``seq``
grows with each of its reports: a report that was overtaken, or comes from a process that has been succeeded by
another, is recognised and refused. Times on the wire are durations (``age``, ``lease``): clocks of hosts may be
wrong, the time that passes is the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmux.core.phases import Phase

LEASE = 6.0  # seconds for which a report counts, if it says nothing else
_MOST_MODELS = 10_000
_PHASES = {phase.value: phase for phase in Phase}
# In these phases a model answers, or is about to.
HELD = frozenset({Phase.AWAKE, Phase.WAKING})
# In these it takes room on the GPU which another would have to be given.
ON_GPU = frozenset({Phase.AWAKE, Phase.WAKING, Phase.DRAINING})


class ModelReport(NamedTuple):
    """One model on one host.

    ``expected_wait`` is the host's own forecast of how long a request which came now would wait for its admission
    (None: it would be refused). ``switch_cost`` is what a wake would take from there, what has to leave included;
    ``sleep`` and ``wake`` are the halves of its own. ``slots`` is how many it serves at once (None: no limit).
    """

    phase: Phase = Phase.ASLEEP
    queued: int = 0
    in_flight: int = 0
    expected_wait: float | None = 0.0
    switch_cost: float = 0.0
    sleep: float = 0.0
    wake: float = 0.0
    arrival_rate: float = 0.0  # requests a second, on this host
    service: float = 0.0  # seconds of a mean answer; 0: none was measured
    slots: int | None = None
    awake_for: float = 0.0  # seconds; 0 while it is not awake
    idle_for: float = 0.0  # seconds since its last answer ended, 0 while it has requests; inf: it never had one
    evicts: tuple[str, ...] | None = None  # what its wake would put to sleep; None: all that is on the GPU


@dataclass(frozen=True, slots=True)
class HostReport:
    """A host at one instant."""

    host: str
    instance: str = ""
    seq: int = 0
    url: str = ""
    models: Mapping[str, ModelReport] = field(default_factory=dict)
    ready: bool = True  # False: it starts or stops
    leased: bool = False  # its GPU is lent to another job, which is also how a host is drained
    lease: float = LEASE  # seconds for which this report counts
    free_in: float = 0.0  # seconds until the switch under way and the drains ahead of it are over

    @property
    def load(self) -> int:
        """How many requests it serves or has waiting."""
        return sum(each.in_flight + each.queued for each in self.models.values())


def read_report(host: str, document: Mapping[str, Any]) -> HostReport:
    """Return what a host reports. Raises ValueError, TypeError or LookupError if it is something else."""
    models = document["models"]
    if len(models) > _MOST_MODELS:
        raise ValueError(f"{len(models)} models")
    return HostReport(
        host=host,
        instance=str(document["instance"]),
        seq=int(document["seq"]),
        models={str(name): _model(each) for name, each in models.items()},
        ready=bool(document["ready"]),
        leased=bool(document["leased"]),
        lease=_seconds(document["lease"]),
        free_in=_seconds(document["free_in"]),
    )


def _model(each: Mapping[str, Any]) -> ModelReport:
    wait, slots, idle = each["expected_wait"], each["slots"], each["idle_for"]
    return ModelReport(
        phase=_PHASES.get(each["phase"], Phase.UNKNOWN),
        queued=int(each["queued"]),
        in_flight=int(each["in_flight"]),
        expected_wait=None if wait is None else _seconds(wait),
        switch_cost=_seconds(each["switch_cost"]),
        sleep=_seconds(each["sleep"]),
        wake=_seconds(each["wake"]),
        arrival_rate=_seconds(each["arrival_rate"]),
        service=_seconds(each["service"]),
        slots=None if slots is None else max(1, int(slots)),
        awake_for=_seconds(each["awake_for"]),
        idle_for=math.inf if idle is None else _seconds(idle),
        evicts=tuple(str(name) for name in each["evicts"]) if each.get("evicts") is not None else None,
    )


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0.0 <= seconds < math.inf:
        raise ValueError(f"{value!r} is not a duration")
    return seconds
