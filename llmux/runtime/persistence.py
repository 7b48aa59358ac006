"""The state that outlives this llmux.

Which models may hold the GPU, with which definition, what switches cost, which hooks run, and operators' orders:
pins, a lease, the manual mode. A restarted llmux continues from it. The state file's times are Unix times, as the
core's clock ends with its process.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmux.config.specs import recall, remember
from llmux.core.events import Started
from llmux.core.model import Lease, Pin
from llmux.core.spec import HookKind, ModelSpec
from llmux.core.state import State as CoreState
from llmux.estimates import costs_of
from llmux.hookrunner import Trace, end_leftovers
from llmux.observability.notices import EventLog
from llmux.observability.state_file import NoState, State, StateStore, dump_costs, load_costs

SOON = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class OperatorState:
    """What ``Started`` restores. Times are on the core's clock."""

    pins: Mapping[str, Pin] = field(default_factory=dict)
    lease: Lease | None = None
    manual: bool | None = None


def dump_operators(s: CoreState, now: float) -> dict[str, Any]:
    """Return the saved part as JSON values; ``now`` is the time on the core's clock."""
    offset = time.time() - now
    lease = s.lease
    return {
        "pins": {
            model.name: {
                "until": _kept(model.pin.until, offset),
                "reason": model.pin.reason,
                "left": _left(model.pin.until, now),
            }
            for model in s.models.values()
            if model.pin is not None
        },
        "lease": None
        if lease is None
        else {
            "until": _kept(lease.until, offset),
            "since": _kept(lease.since, offset),
            "reason": lease.reason,
            "waits": lease.waits,
            "id": lease.id,
        },
        "manual": s.manual if s.manual != s.rules.manual else None,
    }


def load_operators(kept: object, now: float) -> OperatorState:
    """Parse it. KeyError, TypeError or ValueError when it is damaged."""
    if kept is None:
        return OperatorState()
    if not isinstance(kept, Mapping):
        raise TypeError("it is not an object")
    pins = {str(name): _pin(pin, now) for name, pin in kept["pins"].items()}
    lease, manual = kept["lease"], kept["manual"]
    return OperatorState(
        pins, None if lease is None else _lease(lease, now), None if manual is None else bool(manual)
    )


def _pin(kept: Mapping[str, Any], now: float) -> Pin:
    until, left = _moment(kept["until"], now - time.time()), kept.get("left")
    if until is not None and left is not None:  # the clock was set back: it lasts no longer than it would have
        until = min(until, now + float(left))
    return Pin(until, str(kept["reason"]))


def _lease(kept: Mapping[str, Any], now: float) -> Lease:
    offset = now - time.time()
    until, since = _moment(kept["until"], offset), _moment(kept["since"], offset)
    since = now if since is None else since
    if until is not None and since > now:  # the clock was set back: it lasts no longer than it was given for
        until, since = now + until - since, now
    return Lease(until, str(kept["reason"]), bool(kept["waits"]), str(kept["id"]), since)


def _kept(moment: float | None, offset: float) -> float | None:
    # Milliseconds: two clocks read one after the other differ in the digits after that.
    return None if moment is None else round(moment + offset, 3)


def _left(until: float | None, now: float) -> float | None:
    # Whole minutes: the file is not rewritten for each second that passes.
    return None if until is None else 60.0 * math.ceil((until - now) / 60.0)


def _moment(kept: Any, offset: float) -> float | None:
    if kept is None:
        return None
    moment = float(kept) + offset
    if not math.isfinite(moment):
        raise ValueError(f"{kept!r} is not a time")
    return moment


class Persistence:
    """Loads the state at the start, and saves it whenever it matters.

    ``hooks`` returns which hooks run, ``now`` the time on the core's clock.
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
        self.gone: tuple[ModelSpec, ...] = ()
        """The holders that are configured no more, from ``open`` until ``begin``."""
        self._remembered: dict[str, tuple[ModelSpec, object]] = {}  # the definitions of the holders
        self._begun = False
        self._soon: asyncio.Handle | None = None  # the next save
        self._is_next = False  # it is in the next turn of the loop

    def open(self) -> None:
        """Read the state. StateLockedError when another llmux uses the same file."""
        self._store.open()
        self._found = state = self._store.load()
        self._last_use = dict(state.last_use)
        self.gone = tuple(self._gone())
        if isinstance(state.costs, Mapping):
            try:
                load_costs(costs_of(self._core), state.costs)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                self._log.emit("state_file_unreadable", error=f"its switch costs are damaged: {error}")

    async def begin(self) -> Started:
        """End the hooks of a llmux that was killed; return the event with which the core starts."""
        # They could wake a second engine without the core's knowledge.
        hooks = [Trace(*hook) for hook in self._found.hooks]
        for trace in await end_leftovers(hooks, on_ending=self._save_ending):
            self._log.emit("leftover_hook_ended", pid=trace.pid)
        if hooks:
            self._store.save(replace(self._found, hooks=()))
        self._begun = True
        found, wish = self._found, self._asked()
        gone, self.gone = self.gone, ()
        return Started(found.holders, found.recent(), gone, found.levels, wish.pins, wish.lease, wish.manual)

    def _save_ending(self, hooks: list[Trace]) -> None:
        # If this llmux is killed as well, the next one has to end what is left of their groups.
        if hooks:
            self._store.save(replace(self._found, hooks=tuple(hooks)))

    def _asked(self) -> OperatorState:
        try:
            return load_operators(self._found.asked, self._now())
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            self._log.emit("state_file_unreadable", error=f"its pins and lease are damaged: {error!r}")
            return OperatorState()

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

    def save(self) -> None:
        """Save the present state."""
        if self._soon is not None:
            self._soon.cancel()
        self._soon, self._is_next = None, False
        if not self._begun:  # the state that was loaded still holds
            return
        core = self._core
        holders = core.recorded
        self._remember(holders)
        definitions = {name: kept for name, (_, kept) in self._remembered.items()}
        # While it goes deeper the lighter level is kept: it takes more.
        levels = {name: m.level.name for name, m in core.models.items() if m.level and name not in holders}
        last_use, costs, wish = dict(self._last_use), dump_costs(costs_of(core)), dump_operators(core, self._now())
        self._store.save(State(holders, last_use, costs, definitions, levels, self._hooks(), wish))

    def _remember(self, holders: Iterable[str]) -> None:
        before, models = self._remembered, self._core.models
        self._remembered = {}
        for name in holders:
            if name in models:
                spec, kept = models[name].running, before.get(name)
                self._remembered[name] = kept if kept and kept[0] is spec else (spec, remember(spec))

    def save_soon(self) -> None:
        """Save in the next turn of the loop, with all that comes in this one, and before any hook begins.

        Thousands of hooks may end in a few turns; the file is as long as there are models.
        """
        if not self._is_next:
            if self._soon is not None:
                self._soon.cancel()
            self._soon, self._is_next = asyncio.get_running_loop().call_soon(self.save), True

    def hooks_changed(self, kinds: Collection[HookKind]) -> None:
        """Keep which hooks run: at once, or of ``alive``, which changes nothing, soon.

        At the start it runs for every model: with n of them, n times the file with n hooks in it.
        """
        if any(kind is not HookKind.ALIVE for kind in kinds):
            self.save()
        elif self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(SOON, self.save)

    def close(self) -> None:
        """Save a last time, and let go of the file."""
        self.save()
        self._store.close()
