"""The shell around the core: it feeds it, and carries its effects out."""

from llmux.runtime.guard import InFlightGuard
from llmux.runtime.switcher import Switcher
from llmux.runtime.ticket import Ticket

__all__ = ["InFlightGuard", "Switcher", "Ticket"]
