"""What is known of the engines that are awake, by model."""

from __future__ import annotations

from collections.abc import Callable

from llmux.core.effects import Admit
from llmux.upstream import EngineActivity


class Activities(dict[str, tuple[int, EngineActivity]]):
    """The epoch and the activity of each model's engine."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers = 0

    def of(self, admission: Admit) -> EngineActivity:
        """Return the activity of the engine that serves this admission."""
        known = self.get(admission.model)
        if known is None or known[0] != admission.epoch:
            known = (admission.epoch, EngineActivity(counting=self._watchers > 0))
            self[admission.model] = known
        return known[1]

    def streamed(self, model: str) -> int:
        """Return how many events a model's engine has streamed, as far as they were counted."""
        known = self.get(model)
        return 0 if known is None else known[1].streamed

    def watch(self) -> Callable[[], None]:
        """Count streamed events until the returned function is called and there is no other watcher."""
        self._count(1)
        return lambda: self._count(-1)

    def _count(self, more: int) -> None:
        self._watchers += more
        for _, activity in self.values():
            activity.counting = self._watchers > 0
