"""llmux's own endpoints: what it serves besides the engines."""

from llmux.admin.endpoints import Admin

__all__ = ["Admin"]
