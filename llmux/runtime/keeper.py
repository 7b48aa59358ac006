"""What outlives this llmux.

Who may hold the GPU, with which definition, what switches cost, which hooks run, what operators have asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from llmux.config.specs import recall, remember
from llmux.core.effects import RecordHolders
from llmux.core.events import Started
from llmux.core.spec import ModelSpec
from llmux.core.state import State as CoreState
from llmux.hookrunner import Trace, end_leftovers
from llmux.observability.notices import EventLog
from llmux.observability.state import NoState, State, StateStore
from llmux.runtime import asked


class Keeper:
    """Loads the state at the start, and saves it whenever it matters.

    ``hooks`` tells which hooks run, ``now`` what time it is on the core's clock.
    """

    def __init__(
        self,
        store: StateStore | None,
        core: CoreState,
        log: EventLog,
        hooks: Callable[[], tuple[Trace, ...]],
        now: Callable[[], float],
    ) -> None:
        self._store = store or NoState()
        self._now = now
        self._core = core
        self._log = log
        self._hooks = hooks
        self._last_use: dict[str, float] = {}
        self._found = State()
        self._begun = False

    def open(self) -> None:
        """Read what was kept. StateLockedError when another llmux uses the same file."""
        self._store.open()
        self._found = state = self._store.load()
        self._last_use = dict(state.last_use)
        if isinstance(state.costs, Mapping):
            try:
                self._core.costs.load(state.costs)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                self._log.emit("state_file_unreadable", error=f"its switch costs are damaged: {error}")

    async def begin(self) -> Started:
        """End the hooks of a llmux that was killed; return the event with which the core starts."""
        # They could wake a second engine behind the core's back.
        for trace in await end_leftovers(Trace(*hook) for hook in self._found.hooks):
            self._log.emit("leftover_hook_ended", pid=trace.pid)
        self._begun = True
        found, wish = self._found, self._asked()
        gone = tuple(self._gone())
        return Started(found.holders, found.recent(), gone, found.levels, wish.pins, wish.lease, wish.manual)

    def _asked(self) -> asked.Asked:
        try:
            return asked.load(self._found.asked, self._now())
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            self._log.emit("state_file_unreadable", error=f"its pins and lease are damaged: {error!r}")
            return asked.Asked()

    def _gone(self) -> Iterator[ModelSpec]:
        for name in sorted(self._found.holders - self._core.models.keys()):
            try:
                yield recall(self._found.definitions[name])
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
                self._log.emit("holder_unknown", model=name)

    def used(self, model: str) -> None:
        """Note that a model is in use now."""
        self._last_use[model] = time.time()

    def forget(self, model: str) -> None:
        """Forget a model that was removed."""
        self._last_use.pop(model, None)

    def save(self, effect: RecordHolders | None = None) -> None:
        """Keep the state as it is, or with the holders that the core wants recorded."""
        if not self._begun:  # what was found still holds
            return
        core = self._core
        holders = core.recorded if effect is None else effect.holders
        definitions = {name: remember(core.models[name].running) for name in holders if name in core.models}
        # While it goes deeper the lighter level is kept: it takes more.
        levels = {name: m.level.name for name, m in core.models.items() if m.level and name not in holders}
        last_use, costs, wish = dict(self._last_use), core.costs.dump(), asked.dump(core, self._now())
        self._store.save(State(holders, last_use, costs, definitions, levels, self._hooks(), wish))

    def close(self) -> None:
        """Save a last time, and let go of the file."""
        self.save()
        self._store.close()
