"""Turns effects of the core and results of hooks into events: for the log, and for the live event stream.

``describe`` is pure. ``EventLog`` writes; it is the way to log anything that is in ``events.CATALOGUE``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import structlog

from llmux.core import effects as core
from llmux.observability.log import CATALOGUE, get_logger

if TYPE_CHECKING:
    from llmux.hookrunner import HookJob, HookResult
    from llmux.observability.metrics import Metrics

_PROBES = frozenset({"alive", "verify"})
_EVERY = 10.0  # seconds between two `request_rejected` lines of one model and reason
_DEBUG = 10
_TAIL = 2000  # characters of a failed hook's output


class Described(NamedTuple):
    """An event: its name and its fields."""

    name: str
    fields: Mapping[str, object]


def source_names(sources: tuple[str, ...]) -> str:
    """Return the ``from`` of an event: ``idle``, the model, or several joined by commas."""
    return ",".join(sources) or "idle"


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def describe(effect: core.Effect, *, base_url: str = "http://127.0.0.1:3000") -> Described | None:
    """Return the event that tells an effect; None for those that are no news (``Admit``, …)."""
    tell = _TELLERS.get(type(effect))
    if tell is None:
        return None
    event = tell(effect)
    if event.name == "model_faulted":
        model = quote(str(event.fields["model"]), safe="")
        repair = f"curl -X POST {base_url}/llmux/models/{model}/reset"
        return Described(event.name, {**event.fields, "repair": repair})
    return event


def _switch(it: core.SwitchStarted | core.SwitchDrained | core.SwitchEnded) -> dict[str, object]:
    return {"switch": it.switch, "from": source_names(it.sources), "to": it.to}


def _switch_ended(it: core.SwitchEnded) -> Described:
    fields = {
        **_switch(it),
        "result": it.result,
        "duration_secs": _seconds(it.duration),
        "drain_secs": _seconds(it.drain),
        "cost_secs": _seconds(it.cost),
        "estimate_secs": _seconds(it.estimate),
    }
    return Described("switch_ended", fields)


def _switch_failed(it: core.SwitchFailed) -> Described:
    # The original's field is `model`; `to` is there for symmetry, and null when models only went to sleep.
    model = it.to or source_names(it.sources)
    sources = source_names(it.sources)
    return Described(
        "switch_failed", {"switch": it.switch, "model": model, "from": sources, "to": it.to, "error": it.error}
    )


def _model_activated(it: core.ModelActivated) -> Described:
    fields = {"model": it.model, "from": source_names(it.sources), "duration_secs": _seconds(it.duration)}
    return Described("model_activated", {**fields, "switch": it.switch})


def _model_deepened(it: core.ModelDeepened) -> Described:
    fields = {"model": it.model, "from_level": it.before, "to_level": it.level}
    return Described("model_deepened", {**fields, "duration_secs": _seconds(it.seconds)})


def _backoff_started(it: core.BackoffStarted) -> Described:
    fields = {"model": it.model, "hook": str(it.kind), "failures": it.failures, "secs": _seconds(it.seconds)}
    return Described("backoff_started", {**fields, "error": it.error})


def _model_assumed_asleep(it: core.ModelAssumedAsleep) -> Described:
    unproven = "that its GPU memory is free: no `verify` or `stop` hook could tell"
    fields = {"model": it.model, "tries": it.tries, "unproven": unproven, "error": it.error}
    return Described("model_assumed_asleep", fields)


def _pin_set(it: core.PinSet) -> Described:
    fields = {"model": it.model, "pinned": it.pinned, "limited": it.until is not None, "reason": it.reason or None}
    return Described("pin_set", fields)


def _lease_set(it: core.LeaseSet) -> Described:
    fields = {"leased": it.leased, "limited": it.until is not None, "reason": it.reason or None}
    requests = ("wait" if it.waits else "reject") if it.leased else None
    return Described("lease_set", {**fields, "requests": requests})


def _rejected(it: core.Reject) -> Described:
    if it.refusal is core.Refusal.WAITED_TOO_LONG:
        # `timeout_secs` is the original's field; the core tells how long the request really waited.
        fields = {"model": it.model, "timeout_secs": round(it.waited, 1), "request": it.request}
        return Described("request_timeout", fields)
    fields = {"model": it.model, "code": str(it.refusal), "error": it.message, "request": it.request}
    return Described("request_rejected", {**fields, "retry_after_secs": _seconds(it.retry_after)})


_TELLERS: dict[type, Callable[..., Described]] = {
    core.Ready: lambda it: Described("ready", {"adopted": list(it.adopted)}),
    core.RequestQueued: lambda it: Described(
        "request_queued", {"request": it.request, "model": it.model, "depth": it.depth}
    ),
    core.SwitchStarted: lambda it: Described("switch_started", {**_switch(it), "reason": it.reason}),
    core.SwitchDrained: lambda it: Described("switch_drained", {**_switch(it), "drain_secs": _seconds(it.drain)}),
    core.SwitchEnded: _switch_ended,
    core.SwitchFailed: _switch_failed,
    core.ModelActivated: _model_activated,
    core.ModelDeactivated: lambda it: Described(
        "model_deactivated", {"model": it.model, "active_secs": _seconds(it.active)}
    ),
    core.ModelDeepened: _model_deepened,
    core.SleepHookFailed: lambda it: Described(
        "sleep_hook_failed", {"model": it.model, "to": it.to, "error": it.error}
    ),
    core.BackoffStarted: _backoff_started,
    core.ModelLost: lambda it: Described("model_lost", {"model": it.model, "error": it.error}),
    core.ModelFaulted: lambda it: Described("model_faulted", {"model": it.model, "error": it.error}),
    core.ModelAssumedAsleep: _model_assumed_asleep,
    core.ModelReset: lambda it: Described("model_reset", {"model": it.model}),
    core.ModelRemoved: lambda it: Described("model_removed", {"model": it.model}),
    core.PolicyOverruled: lambda it: Described("policy_overruled", {"answer": it.answer}),
    core.PolicyDecided: lambda it: Described(
        "policy_decided", {"decision": it.decision, "model": it.model, "reason": it.reason}
    ),
    core.PolicyAdopted: lambda it: Described(
        "policy_adopted", {"policy": it.policy, "before": it.before, "reason": it.reason}
    ),
    core.PinSet: _pin_set,
    core.LeaseSet: _lease_set,
    core.LeaseHeld: lambda it: Described("lease_held", {"after_secs": _seconds(it.after)}),
    core.ManualSet: lambda it: Described("manual_set", {"manual": it.manual}),
    core.Stopped: lambda _it: Described("stopped", {}),
    core.Reject: _rejected,
    core.CancelRequests: lambda it: Described(
        "requests_cut", {"model": it.model, "reason": str(it.reason), "requests": len(it.requests)}
    ),
    core.RunHook: lambda it: Described(
        "hook_started", {"model": it.model, "hook": str(it.kind), "switch": it.switch or None}
    ),
    core.Answer: lambda it: Described(
        "command_answered", {"accepted": it.accepted, "switch": it.switch, "reason": it.reason or None}
    ),
}
# Never built unless the log is at debug: they come with every request.
_ONLY_DEBUG = frozenset({core.RequestQueued, core.RunHook, core.PolicyDecided, core.Answer})


class EventLog:
    """Writes events to the log, at the level that the catalogue gives them."""

    def __init__(
        self,
        logger: structlog.stdlib.BoundLogger | None = None,
        *,
        base_url: str = "http://127.0.0.1:3000",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``base_url`` is where an operator on this machine reaches llmux; it appears in repair commands."""
        self._logger = get_logger("llmux") if logger is None else logger
        self.base_url = base_url
        self._clock = clock
        self._rejections: dict[tuple[str, str], tuple[float, int]] = {}

    def emit(self, name: str, /, **fields: object) -> None:
        """Log an event of the catalogue. Fields that are None are left out, but for ``to``."""
        self._write(CATALOGUE[name].level, name, fields)

    def effect(self, effect: core.Effect) -> None:
        """Log what an effect of the core tells, if it tells anything."""
        kind = type(effect)
        if kind not in _TELLERS or (kind in _ONLY_DEBUG and not self._logger.isEnabledFor(_DEBUG)):
            return
        event = describe(effect, base_url=self.base_url)
        if event is None:
            return
        level, fields = CATALOGUE[event.name].level, event.fields
        if event.name == "request_rejected":
            level, more = self._rejection(str(fields["model"]), str(fields["code"]), level)
            fields = {**fields, "more": more or None}
        elif event.name == "switch_ended" and fields["result"] == "abandoned":
            fields = {**fields, "note": "the last waiter left"}
        self._write(level, event.name, fields)

    def hook_ended(
        self, model: str, hook: str, *, ok: bool, seconds: float, exit_code: int | None, output: str = ""
    ) -> None:
        """Log the end of a hook. ``exit_code`` is None when it was never started, negative when it was killed."""
        name = "hook_completed" if ok else "hook_failed"
        fields: dict[str, object] = {
            "model": model,
            "hook": hook,
            "exit_code": exit_code,
            "duration_secs": _seconds(seconds),
            "stderr": None if ok else output[-_TAIL:] or None,
        }
        self._write(_DEBUG if hook in _PROBES else CATALOGUE[name].level, name, fields)

    def hook_output(self, model: str, hook: str, line: str) -> None:
        """Log one line that a hook printed."""
        level = _DEBUG if hook in _PROBES else CATALOGUE["hook_output"].level
        self._write(level, "hook_output", {"model": model, "hook": hook, "line": line})

    def _rejection(self, model: str, code: str, level: int) -> tuple[int, int]:
        """Return the level of a refusal, and how many like it were passed over before it.

        The keys are models of the core and its own reasons: they are few, whatever clients send.
        """
        if code in {core.Refusal.STOPPING, core.Refusal.UNKNOWN_MODEL}:
            return _DEBUG, 0
        now = self._clock()
        last, passed = self._rejections.get((model, code), (now - _EVERY, 0))
        if now - last < _EVERY:
            self._rejections[model, code] = (last, passed + 1)
            return _DEBUG, 0
        self._rejections[model, code] = (now, 0)
        return level, passed

    def _write(self, level: int, name: str, fields: Mapping[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            told = {key: value for key, value in fields.items() if value is not None or key == "to"}
            self._logger.log(level, name, **told)


def tell_end(result: HookResult, log: EventLog, metrics: Metrics) -> None:
    """Count and log the end of a hook. A prefetch that was ended with its switch has not failed, and was told."""
    kind = result.kind.value
    over = result.killed == core.SWITCH_OVER
    metrics.hook_ended(result.model, kind, result.duration, result.ok or over)
    if over:
        return
    code = -result.signal if result.signal is not None else result.exit_code
    output = result.tail or result.detail
    log.hook_ended(result.model, kind, ok=result.ok, seconds=result.duration, exit_code=code, output=output)


def line_to(log: EventLog) -> Callable[[HookJob, str], None]:
    """Return what logs a line that a hook printed."""
    return lambda job, line: log.hook_output(job.model, job.kind.value, line)


def orphan_to(log: EventLog) -> Callable[[HookJob], None]:
    """Return what logs that something holds a hook's output beyond its end."""
    return lambda job: log.emit("hook_left_pipe_open", model=job.model, hook=job.kind.value)
