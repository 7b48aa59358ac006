"""A model's definition as the state file keeps it, for a model that the configuration lists no more.

What holds the GPU has to be put to sleep with the hooks under which it was woken, also by a llmux that was started
after its predecessor was killed and the model removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmux.config.specs import EngineDefinition
from llmux.core.spec import DEFAULT_TIMEOUTS, HookKind, Level, ModelSpec

_TEXTS = ("name", "host", "base_path", "url")


def remember(spec: ModelSpec) -> dict[str, Any] | None:
    """Return what JSON can keep of a definition; None of one that is not for an engine (a library user's own)."""
    definition = spec.definition
    if not isinstance(definition, EngineDefinition):
        return None
    return {
        **{name: getattr(definition, name) for name in _TEXTS},
        "port": definition.port,
        "tls": definition.tls,
        "scripts": {kind.value: script for kind, script in definition.scripts.items()},
        "env": dict(definition.env),
        "cwd": str(definition.cwd),
        "timeouts": {kind.value: seconds for kind, seconds in spec.timeouts.items()},
        "levels": [[level.name, level.host_memory] for level in spec.levels],
    }


def recall(kept: object) -> ModelSpec:
    """Return the definition. ValueError, TypeError, KeyError or OverflowError when it is damaged.

    What it may be awake beside is not kept: it is put to sleep before anything is woken.
    """
    if not isinstance(kept, Mapping):
        raise TypeError("a definition is no object")
    scripts = {HookKind(kind): str(script) for kind, script in kept["scripts"].items()}
    definition = EngineDefinition(
        **{name: str(kept[name]) for name in _TEXTS},
        port=int(kept["port"]),
        tls=bool(kept["tls"]),
        scripts=scripts,
        env={str(name): str(value) for name, value in kept["env"].items()},
        cwd=Path(kept["cwd"]),
    )
    timeouts = {HookKind(kind): _seconds(seconds) for kind, seconds in kept["timeouts"].items()}
    levels = tuple(Level(str(name), int(need)) for name, need in kept.get("levels", ()))
    return ModelSpec(
        definition.name, definition, frozenset(scripts), {**DEFAULT_TIMEOUTS, **timeouts}, levels=levels
    )


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):  # JSON cannot keep it again
        raise ValueError(f"{value!r} is no duration")
    return seconds
