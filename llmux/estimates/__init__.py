"""What is measured while models are served, and what it lets one expect. Pure; the core is handed it."""

from llmux.estimates.meter import Meters

__all__ = ["Meters"]
