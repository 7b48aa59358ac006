"""llmux's own endpoints: everything it serves that is not forwarded."""

from llmux.admin.endpoints import Admin

__all__ = ["Admin"]
