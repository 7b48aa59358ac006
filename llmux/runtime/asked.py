"""What operators have asked for, as the state file keeps it: pins, a lease, the manual mode.

A restarted llmux goes on with it. The times in there are Unix times, as the core's clock ends with its process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmux.core.model import Lease, Pin
from llmux.core.state import State


@dataclass(frozen=True, slots=True)
class Asked:
    """What ``Started`` takes over. Times are on the core's clock."""

    pins: Mapping[str, Pin] = field(default_factory=dict)
    lease: Lease | None = None
    manual: bool | None = None


def dump(s: State, now: float) -> dict[str, Any]:
    """Return what JSON can keep of it; ``now`` is the time on the core's clock."""
    offset = time.time() - now
    lease = s.lease
    return {
        "pins": {
            model.name: {"until": _kept(model.pin.until, offset), "reason": model.pin.reason}
            for model in s.models.values()
            if model.pin is not None
        },
        "lease": None
        if lease is None
        else {
            "until": _kept(lease.until, offset),
            "since": _kept(lease.since, offset),
            "reason": lease.reason,
            "waits": lease.waits,
            "id": lease.id,
        },
        "manual": s.manual if s.manual != s.rules.manual else None,
    }


def load(kept: object, now: float) -> Asked:
    """Return what was kept. KeyError, TypeError or ValueError when it is damaged."""
    if kept is None:
        return Asked()
    if not isinstance(kept, Mapping):
        raise TypeError("it is no object")
    offset = now - time.time()
    pins = {
        str(name): Pin(_moment(pin["until"], offset), str(pin["reason"])) for name, pin in kept["pins"].items()
    }
    lease, manual = kept["lease"], kept["manual"]
    return Asked(pins, None if lease is None else _lease(lease, now), None if manual is None else bool(manual))


def _lease(kept: Mapping[str, Any], now: float) -> Lease:
    offset = now - time.time()
    until, since = _moment(kept["until"], offset), _moment(kept["since"], offset)
    since = now if since is None else since
    if until is not None and since > now:  # the clock was put back: it lasts no longer than it was given for
        until, since = now + until - since, now
    return Lease(until, str(kept["reason"]), bool(kept["waits"]), str(kept["id"]), since)


def _kept(moment: float | None, offset: float) -> float | None:
    # Milliseconds: two clocks that are read one after the other differ in what comes after that.
    return None if moment is None else round(moment + offset, 3)


def _moment(kept: Any, offset: float) -> float | None:
    if kept is None:
        return None
    moment = float(kept) + offset
    if not math.isfinite(moment):
        raise ValueError(f"{kept!r} is no time")
    return moment
