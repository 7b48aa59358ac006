"""The pure core: events in, effects out, time injected. Start reading at ``machine``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmux.core.machine import Core

__all__ = ["Core"]


def __getattr__(name: str) -> Any:
    """Import the machine when it is asked for: a configuration, or a policy, needs a few of the values only."""
    if name != "Core":
        raise AttributeError(f"module 'llmux.core' has no attribute {name!r}")
    from llmux.core.machine import Core  # noqa: PLC0415

    return Core
