"""The configuration: a YAML or JSON file, or Python values, checked before anything starts.

The conversion to the core's values is imported when it is first used: a check does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmux.config.problems import ConfigErrors
from llmux.config.schema import (
    BackoffConfig,
    Config,
    CostConfig,
    GroupConfig,
    ModelConfig,
    PolicyConfig,
    TimeoutsConfig,
)

if TYPE_CHECKING:
    from llmux.config.specs import EngineDefinition, first_costs, to_specs

__all__ = [
    "BackoffConfig",
    "Config",
    "ConfigErrors",
    "CostConfig",
    "EngineDefinition",
    "GroupConfig",
    "ModelConfig",
    "PolicyConfig",
    "TimeoutsConfig",
    "first_costs",
    "to_specs",
]


def __getattr__(name: str) -> Any:
    if name in ("EngineDefinition", "first_costs", "to_specs"):
        value = globals()[name] = getattr(import_module("llmux.config.specs"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
