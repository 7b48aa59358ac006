"""What is measured while models are served, and the estimates made from it. Pure; the core is given it."""

from __future__ import annotations

from llmux.core.state import State
from llmux.estimates.costs import SwitchCosts
from llmux.estimates.meter import Meter, Successors

__all__ = ["Estimates", "costs_of"]


class Estimates:
    """All measurements of one core; see ``llmux.core.spec.Estimates``."""

    def __init__(self) -> None:
        self.costs = SwitchCosts()
        self._successors = Successors()

    def meter(self, model: str) -> Meter:
        """Return a new, empty meter for a model."""
        return Meter(model, self._successors)


def costs_of(state: State) -> SwitchCosts:
    """Return the switch costs of a core that was given ``Estimates``."""
    assert isinstance(state.costs, SwitchCosts)
    return state.costs
