"""The configuration: a YAML or JSON file, or Python values, checked before anything starts."""

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
