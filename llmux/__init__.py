"""llmux: one GPU, many models, one OpenAI- and Anthropic-compatible endpoint.

What it exports is imported when it is first used: `import llmux.config` takes no server along.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmux.renamed import install
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.app import build_app, middleware_for
    from llmux.config import Config, ModelConfig, PolicyConfig
    from llmux.core import Core
    from llmux.core.policy import Policy, Snapshot, Stay, SwitchRecord, SwitchTo, WaitUntil
    from llmux.errors import LLMuxError, RequestError
    from llmux.estimates.costs import SwitchCosts
    from llmux.hookrunner import HookRunner
    from llmux.middleware import Front
    from llmux.proxy import Forwarder
    from llmux.runtime import InFlightGuard, Switcher

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

install()

_HOMES = {
    **dict.fromkeys(("build_app", "middleware_for"), "app"),
    **dict.fromkeys(("Config", "ModelConfig", "PolicyConfig"), "config"),
    "Core": "core",
    "SwitchCosts": "estimates.costs",
    **dict.fromkeys(("Policy", "Snapshot", "Stay", "SwitchRecord", "SwitchTo", "WaitUntil"), "core.policy"),
    **dict.fromkeys(("LLMuxError", "RequestError"), "errors"),
    "HookRunner": "hookrunner",
    "Front": "middleware",
    "Forwarder": "proxy",
    **dict.fromkeys(("InFlightGuard", "Switcher"), "runtime"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: an export, or a module, as ``llmux.config`` after ``import llmux``."""
    if name in _HOMES:
        value = getattr(import_module(f"llmux.{_HOMES[name]}"), name)
        globals()[name] = value  # found without this function from now on
        return value
    if not name.startswith("_"):
        try:
            return import_module(f"llmux.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"llmux.{name}":
                raise
    raise AttributeError(f"module 'llmux' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
