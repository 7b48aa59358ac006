"""What has happened lately, for whoever comes to look: the phases of models, what went wrong, what hooks print.

All of it is bounded, and none of it is touched by a request. What hooks print is kept apart: it is for operators.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from llmux.core import effects as fx
from llmux.core.state import State
from llmux.hookrunner import HookJob, HookResult
from llmux.hookrunner.job import QUIET_KINDS
from llmux.observability.notices import describe
from llmux.observability.timeline import Move, Timeline

HOUR = 3600.0  # seconds that are told
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
        self.on_hook: Callable[[HookResult], None] | None = None  # is told how each hook ended
        for kind in NOTED:
            timeline.on(kind, self._note)

    def begin(self) -> None:
        """Take note of the start: nothing is known of what was before."""
        self._began = self._now()

    def _note(self, time: float, effect: fx.Effect) -> None:
        self._notes.append((time, effect))

    # ---- hooks

    def line(self, job: HookJob, line: str) -> None:
        """Log a line that a hook printed; keep it and pass it on, but for those of ``alive`` and ``verify``."""
        self._log_line(job, line)
        if not job.quiet:
            self._lines.append((self._now(), job.model, job.kind.value, line))
            self._tell("hook_output", {"model": job.model, "hook": job.kind.value, "line": line})

    def hook_ended(self, result: HookResult) -> None:
        """Pass on how a hook ended, but for ``alive`` and ``verify``; to ``on_hook`` whichever it was."""
        if self.on_hook is not None:
            self.on_hook(result)
        if result.kind in QUIET_KINDS:
            return
        code = -result.signal if result.signal is not None else result.exit_code
        fields = {"model": result.model, "hook": result.kind.value, "exit_code": code}
        name = "hook_completed" if result.ok else "hook_failed"
        self._tell(name, {**fields, "duration_secs": round(result.duration, 3)})

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Have ``listener(name, fields)`` called with what hooks do, at once; returns how to end it."""

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
