"""llmux's own endpoints: what it serves besides the engines."""

from llmux.admin.routes import Admin

__all__ = ["Admin"]
