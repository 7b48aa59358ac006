"""What has happened lately: phases, decisions and their reasons, what went wrong, what hooks print.

All of it is bounded, and none of it is touched by a request. What hooks print is kept apart: it is for
operators.

Reasons for switches and evictions are returned as JSON and in words: for ``/llmux/decisions``, ``/llmux/status``,
``/v1/models``, the live events and the record.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmux.config.setting_types import format_size
from llmux.core import effects as fx
from llmux.core.state import State
from llmux.hookrunner import HookJob, HookResult
from llmux.hookrunner.job import QUIET_KINDS
from llmux.observability.decision_log import Candidate, DecisionRecord, Evicted, duration
from llmux.observability.notices import describe
from llmux.observability.timeline import Move, Timeline

if TYPE_CHECKING:
    from llmux.runtime.switcher import Switcher

HOUR = 3600.0  # seconds that are shown
NOTES = 1000
LINES = 200  # of 4 KiB at most: see the hook runner's ``Output``

NOTED = (
    fx.SwitchStarted,
    fx.SwitchEnded,
    fx.SwitchFailed,
    fx.SleepHookFailed,
    fx.BackoffStarted,
    fx.ModelLost,
    fx.ModelFaulted,
    fx.ModelAssumedAsleep,
    fx.ModelReset,
    fx.ModelDeepened,
    fx.PinSet,
    fx.LeaseSet,
    fx.LeaseHeld,
    fx.ManualSet,
)
"""The effects that are kept."""

Listener = Callable[[str, dict[str, Any]], None]


class History:
    """The last hour of one switcher.

    ``now`` is the core's clock. ``log_line(job, line)`` is called with every line that a hook prints.
    """

    def __init__(
        self,
        core: State,
        timeline: Timeline,
        now: Callable[[], float],
        log_line: Callable[[HookJob, str], None],
    ) -> None:
        self._core = core
        self._timeline = timeline
        self._now = now
        self._log_line = log_line
        self._began: float | None = None
        self._notes: deque[tuple[float, fx.Effect]] = deque(maxlen=NOTES)
        self._lines: deque[tuple[float, str, str, str]] = deque(maxlen=LINES)
        self._listeners: tuple[Listener, ...] = ()
        self.on_hook: Callable[[HookResult], None] | None = None  # called with how each hook ended
        for kind in NOTED:
            timeline.on(kind, self._note)

    def begin(self) -> None:
        """Record the start: nothing is known of what was before."""
        self._began = self._now()

    def _note(self, time: float, effect: fx.Effect) -> None:
        self._notes.append((time, effect))

    # ---- hooks

    def line(self, job: HookJob, line: str) -> None:
        """Log a line that a hook printed; keep it and publish it, except those of ``alive`` and ``verify``."""
        self._log_line(job, line)
        if not job.quiet:
            self._lines.append((self._now(), job.model, job.kind.value, line))
            self._tell("hook_output", {"model": job.model, "hook": job.kind.value, "line": line})

    def hook_ended(self, result: HookResult) -> None:
        """Publish how a hook ended, except ``alive`` and ``verify``; call ``on_hook`` for every one."""
        if self.on_hook is not None:
            self.on_hook(result)
        if result.kind in QUIET_KINDS:
            return
        code = -result.signal if result.signal is not None else result.exit_code
        fields = {"model": result.model, "hook": result.kind.value, "exit_code": code}
        name = "hook_completed" if result.ok else "hook_failed"
        self._tell(name, {**fields, "duration_secs": round(result.duration, 3)})

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener(name, fields)`` at once with what hooks do; returns how to end it."""

        def end() -> None:
            self._listeners = tuple(one for one in self._listeners if one is not listener)

        self._listeners = (*self._listeners, listener)
        return end

    def _tell(self, name: str, fields: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener(name, fields)

    # ---- looking

    def moves_since(self, number: int) -> list[dict[str, Any]]:
        """Return the moves after the one with this id, oldest first."""
        offset = self._offset()
        return [_move(move, offset) for move in self._timeline.moves_since(number)]

    def document(self, *, output: bool, base_url: str) -> dict[str, Any]:
        """Return the last hour. Times are Unix times. ``output``: with what hooks printed.

        ``base_url`` is where an operator on this machine reaches llmux, for repair commands.
        """
        now, offset = self._now(), self._offset()
        began = now if self._began is None else self._began
        moves = self._timeline.moves
        if len(moves) == moves.maxlen:
            began = max(began, moves[0].time)
        begins = max(began, now - HOUR)
        return {
            "now": now + offset,
            "begins": begins + offset,
            "phases": {name: model.phase.value for name, model in self._core.models.items()},
            "moves": [_move(move, offset) for move in moves if move.time >= begins],
            "notes": [
                {"time": at + offset, "event": event.name, **event.fields}
                for at, effect in self._notes
                if at >= begins and (event := describe(effect, base_url=base_url)) is not None
            ],
            "output": [
                {"time": at + offset, "model": model, "hook": hook, "line": line}
                for at, model, hook, line in self._lines
            ]
            if output
            else None,
        }

    def _offset(self) -> float:
        return time.time() - self._now()


def _move(move: Move, offset: float) -> dict[str, Any]:
    return {
        "id": move.id,
        "time": move.time + offset,
        "model": move.model,
        "from": move.source.value,
        "to": move.target.value,
    }


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
    """Return an eviction as JSON values; ``offset`` is added to its time."""
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
    """Return the part about one of the models that left."""
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
