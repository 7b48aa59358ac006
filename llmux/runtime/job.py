"""From the core's wish for a hook to the hook runner's job."""

from __future__ import annotations

from llmux.config import EngineDefinition
from llmux.core.effects import RunHook
from llmux.hookrunner import HookJob


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
    )
