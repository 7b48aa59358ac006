"""Why it switched and what left for it, as JSON and in words.

For ``/llmux/decisions``, ``/llmux/status``, ``/v1/models``, the live events and the record.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llmux.observability.decision_log import DecisionRecord

if TYPE_CHECKING:
    from llmux.runtime.switcher import Switcher


from collections.abc import Iterator, Mapping

from llmux.config.setting_types import format_size
from llmux.observability.decision_log import Candidate, Evicted, duration

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


def eviction(made: Evicted, offset: float) -> dict[str, Any]:
    """Return all of it as JSON values; ``offset`` is added to its time."""
    return {
        "time": made.time + offset,
        "switch": made.switch,
        "for": made.target,
        "left": list(made.left),
        "reason": reason(made),
        "need": _sizes(made.need),
        "free": _sizes(made.free),
        "models": [{**each._asdict(), "memory": _sizes(each.memory)} for each in made.candidates],
    }


def brief(made: Evicted, offset: float) -> dict[str, Any]:
    """Return what one of those that left is told of."""
    return {"time": made.time + offset, "switch": made.switch, "for": made.target, "reason": reason(made)}


def reason(made: Evicted) -> str:
    """Say why these models made room, and not the others."""
    left = [each for each in made.candidates if each.left]
    names = " and ".join(each.model for each in left)
    first = f"{names} {'makes' if len(left) == 1 else 'make'} room for {made.target}"
    shortage = _shortage(made)
    parts = [f"{first}: {shortage}" if shortage else first]
    parts += [_left(made, each) for each in left]
    parts += [f"{each.model} stays, {_stays(each)}" for each in made.candidates if not each.left]
    return "; ".join(parts)


def _shortage(made: Evicted) -> str:
    if made.free is None:
        return "" if made.grouped else "one model at a time is awake"
    need = made.need or {}
    return "it needs " + " and ".join(_gpu(gpu, need[gpu], made.free.get(gpu, 0)) for gpu in need)


def _gpu(gpu: str, need: int, free: int) -> str:
    of_gpu = f" of GPU {gpu}" if gpu else ""
    there = f"{format_size(free)} free" if free >= 0 else f"{format_size(-free)} too much in use"
    return f"{format_size(need)}{of_gpu} ({there})"


def _left(made: Evicted, each: Candidate) -> str:
    if each.why == "apart" and (made.grouped or made.free is not None):
        size = f" ({format_size(sum(each.memory.values()))})" if each.memory and made.free is not None else ""
        return f"{each.model}{size} cannot be awake beside it"
    parts = [*_busy(each), f"sleep {duration(each.sleep)}", f"wake {duration(each.wake)}"]
    expected = f"{each.expected:.2g} expected in 2 min"
    return f"to lose {each.model} costs {duration(each.cost)} ({', '.join([*parts, expected])})"


def _stays(each: Candidate) -> str:
    match each.why:
        case "pinned":
            return "it is pinned"
        case "backoff":
            return "it would not go to sleep a moment ago"
    would = f"it would cost {duration(each.cost)}"
    if each.keep_awake:
        return f"keep_awake applies to it ({would})"
    busy = list(_busy(each))
    return f"it is busy: {', '.join(busy)} ({would})" if busy else would


def _busy(each: Candidate) -> Iterator[str]:
    if each.in_flight:
        yield f"{each.in_flight} in flight"
    if each.queued:
        yield f"{each.queued} waiting"


def _sizes(sizes: Mapping[str, int] | None) -> int | dict[str, int] | None:
    """Return bytes: of the one GPU, or by the name of each."""
    if sizes is None:
        return None
    return sizes[""] if list(sizes) == [""] else dict(sizes)
