"""The shell around the core: feeds it events, and carries out its effects."""

from llmux.runtime.request_handle import InFlightGuard, Ticket
from llmux.runtime.switcher import Switcher

__all__ = ["InFlightGuard", "Switcher", "Ticket"]
