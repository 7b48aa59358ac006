"""Decisions as JSON: for ``/llmux/decisions``, the status, the live events and the record."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llmux.observability.decision_log import DecisionRecord

if TYPE_CHECKING:
    from llmux.runtime.switcher import Switcher

IN_STATUS = 10  # the last ones


def decisions(switcher: Switcher, count: int) -> list[dict[str, Any]]:
    """Return the last ``count`` decisions, oldest first. Times are Unix times, durations seconds."""
    return _documents(switcher, switcher.decisions.latest(switcher.core.state, count))


def decisions_since(switcher: Switcher, number: int) -> list[dict[str, Any]]:
    """Return the decisions after the one with this id, oldest first."""
    return _documents(switcher, switcher.decisions.since(number))


def document(record: DecisionRecord, offset: float) -> dict[str, Any]:
    """Return a decision as JSON values; ``offset`` is added to its times."""
    return {
        "id": record.id,
        "time": record.time + offset,
        "last": record.last + offset,
        "times": record.times,
        "kind": record.kind,
        "by": record.by,
        "awake": [each.model for each in record.serving],
        "target": record.target,
        "reason": record.reason,
        "said": record.said,
        "until": None if record.until is None else record.until + offset,
        "switch": record.switch,
        "leaving": list(record.leaving),
        "serving": [each._asdict() for each in record.serving],
        "waiting": [each._asdict() for each in record.waiting],
        "more": record.more,
    }


def _documents(switcher: Switcher, records: Iterable[DecisionRecord]) -> list[dict[str, Any]]:
    offset = time.time() - switcher.now()
    return [document(record, offset) for record in records]
