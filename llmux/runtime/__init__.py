"""The shell around the core: it feeds it, and carries its effects out."""

from llmux.runtime.request_handle import InFlightGuard, Ticket
from llmux.runtime.switcher import Switcher

__all__ = ["InFlightGuard", "Switcher", "Ticket"]
