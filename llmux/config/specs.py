"""From the configuration to the values of the core and the hooks, and to what the state file keeps of it.

What holds the GPU must be put to sleep with the hooks under which it was woken, even by a llmux that was started
after its predecessor was killed and the model removed. So the state file keeps a model's definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmux.config.residency import capacity_of, companions_of, memory_of
from llmux.config.schema import Config
from llmux.core.spec import DEFAULT_TIMEOUTS, HookKind, Level, ModelSpec, Rules


@dataclass(frozen=True, slots=True)
class EngineDefinition:
    """How to run a model's hooks and how to reach its engine.

    Two are equal if nothing that matters to a running engine differs: a reload that changes limits, aliases or
    timeouts leaves the definition unchanged.
    """

    name: str
    host: str
    port: int
    tls: bool = False
    base_path: str = ""  # "" or "/prefix", put before every forwarded path
    url: str = ""  # all of the above: http://host:port/prefix
    scripts: Mapping[HookKind, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path = Path()
    upstream_model: str | None = None


def to_specs(config: Config) -> tuple[list[ModelSpec], Rules]:
    """Return the models, in the order of the configuration, and the guard rails."""
    return [_model(config, name) for name in config.models], _rules(config)


def first_costs(config: Config) -> Mapping[str, tuple[float | None, float | None]]:
    """Return the first guesses at (wake, sleep) in seconds, for the models that give any."""
    return {
        name: (model.cost.wake, model.cost.sleep)
        for name, model in config.models.items()
        if model.cost.wake is not None or model.cost.sleep is not None
    }


def _model(config: Config, name: str) -> ModelSpec:
    model = config.models[name]
    address = model.address
    host, port = address.endpoint
    return ModelSpec(
        name=name,
        definition=EngineDefinition(
            name=name,
            host=address.host,
            port=address.port,
            tls=address.tls,
            base_path=address.base_path,
            url=address.url,
            scripts=model.scripts,
            env=dict(model.env),
            cwd=config.folder,
            upstream_model=model.upstream_model,
        ),
        hooks=frozenset(model.scripts),
        timeouts={kind: getattr(model.timeouts, kind.value) for kind in HookKind},
        max_in_flight=model.max_in_flight,
        max_queued=model.max_queued,
        memory=memory_of(config, name),
        companions=companions_of(config, name),
        levels=tuple(Level(level, need) for level, need in model.levels.items()),
        shared_address=f"{host}:{port}" if model.shared_address else None,
        idle_sleep=config.idle_sleep_of(name),
        preload=model.preload,
        keep_awake=model.keep_awake,
    )


def _rules(config: Config) -> Rules:
    policy = config.policy
    return Rules(
        request_timeout=policy.request_timeout,
        max_wait=policy.max_wait,
        min_active=policy.min_active,
        anticipate=policy.anticipate,
        manual=policy.manual,
        lease_waits=config.lease_requests == "wait",
        drain_timeout=policy.effective_drain_timeout,
        backoff_first=config.backoff.first,
        backoff_max=config.backoff.max,
        alive_every=config.alive_every,
        alive_failures=config.alive_failures,
        capacity=capacity_of(config),
        host_memory=config.host_memory,
        default_model=config.default_model,
        default_after=config.default_after,
        shutdown_grace=config.shutdown_grace,
        sleep_on_exit=config.on_exit == "sleep",
    )


_TEXTS = ("name", "host", "base_path", "url")


def remember(spec: ModelSpec) -> dict[str, Any] | None:
    """Return a definition as JSON values; None for one that is not for an engine (a library user's own)."""
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
    """Return the definition. ValueError, TypeError, KeyError or OverflowError if it is damaged.

    The models that it may be awake with are not kept: it is put to sleep before any model is woken.
    """
    if not isinstance(kept, Mapping):
        raise TypeError("a definition is not an object")
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
    if not math.isfinite(seconds):  # JSON cannot represent it
        raise ValueError(f"{value!r} is not a duration")
    return seconds
