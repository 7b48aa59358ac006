"""What is measured while models are served, and what it lets one expect. Pure; the core is handed it."""

from __future__ import annotations

from llmux.core.state import State
from llmux.estimates.costs import SwitchCosts
from llmux.estimates.meter import Meter, Successors

__all__ = ["Estimates", "costs_of"]


class Estimates:
    """All that is measured for one core; see ``llmux.core.spec.Estimates``."""

    def __init__(self) -> None:
        self.costs = SwitchCosts()
        self._successors = Successors()

    def meter(self, model: str) -> Meter:
        """Return a new meter for a model, which has measured nothing."""
        return Meter(model, self._successors)


def costs_of(state: State) -> SwitchCosts:
    """Return the costs of a core that was handed ``Estimates``, with all that is in them."""
    assert isinstance(state.costs, SwitchCosts)
    return state.costs
