"""llmux: one GPU, many models, one OpenAI- and Anthropic-compatible endpoint."""

from llmux.app import build_app, middleware_for
from llmux.config import Config, ModelConfig, PolicyConfig
from llmux.core import Core
from llmux.core.costs import SwitchCosts
from llmux.core.policy import Policy, Snapshot, Stay, SwitchRecord, SwitchTo, WaitUntil
from llmux.errors import LLMuxError, RequestError
from llmux.hookrunner import HookRunner
from llmux.middleware import Front
from llmux.proxy import Forwarder
from llmux.runtime import InFlightGuard, Switcher
from llmux.version import __version__

__all__ = [
    "Config",
    "Core",
    "Forwarder",
    "Front",
    "HookRunner",
    "InFlightGuard",
    "LLMuxError",
    "ModelConfig",
    "Policy",
    "PolicyConfig",
    "RequestError",
    "Snapshot",
    "Stay",
    "SwitchCosts",
    "SwitchRecord",
    "SwitchTo",
    "Switcher",
    "WaitUntil",
    "__version__",
    "build_app",
    "middleware_for",
]
