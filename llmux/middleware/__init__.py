"""The way in: requests are identified, checked, and sent on."""

from llmux.middleware.front import Front

__all__ = ["Front"]
