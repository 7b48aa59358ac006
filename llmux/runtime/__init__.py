"""The shell around the core: it feeds it, and carries its effects out."""

from llmux.runtime.switcher import InFlightGuard, Switcher
from llmux.runtime.ticket import Ticket

__all__ = ["InFlightGuard", "Switcher", "Ticket"]
