"""From the core's wish for a hook to the hook runner's job, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable

from llmux.config import EngineDefinition
from llmux.core.effects import SWITCH_OVER, RunHook
from llmux.hookrunner import HookJob, HookResult
from llmux.observability.metrics import Metrics
from llmux.observability.notices import EventLog


def job_for(effect: RunHook) -> HookJob:
    """Return the job. Raises KeyError when the model has no such hook."""
    definition = effect.definition
    assert isinstance(definition, EngineDefinition)
    return HookJob(
        id=effect.hook,
        model=effect.model,
        kind=effect.kind,
        script=definition.scripts[effect.kind],
        cwd=definition.cwd,
        env=definition.env,
        url=definition.url,
        port=definition.port,
        switch=effect.switch,
        sources=effect.sources,
        target=effect.target,
        level=effect.level,
    )


def tell_end(result: HookResult, log: EventLog, metrics: Metrics) -> None:
    """Count and log the end of a hook. A prefetch that was ended with its switch has not failed, and was told."""
    kind = result.kind.value
    over = result.killed == SWITCH_OVER
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
