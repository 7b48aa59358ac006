"""The pure core: events in, effects out, time injected. Start reading at ``machine``."""

from llmux.core.machine import Core

__all__ = ["Core"]
