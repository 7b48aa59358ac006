"""What a host says of itself: a report. Plain values, taken at one instant; all durations are seconds.

A report is true when it is taken and grows old on its way. ``instance`` names one run of a host's process, ``seq``
grows with each of its reports: a report that was overtaken, or comes from a process that has been succeeded by
another, is recognised and refused. Times on the wire are durations (``age``, ``lease``): clocks of hosts may be
wrong, the time that passes is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llmux.core.phases import Phase

LEASE = 6.0  # seconds for which a report counts, if it says nothing else
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
