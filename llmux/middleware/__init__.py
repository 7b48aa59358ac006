"""The way in: what comes is identified, judged, and sent on its way."""

from llmux.middleware.front import Front

__all__ = ["Front"]
