"""The driver: the only code that feeds the core; it also carries out the effects.

Everything happens in one event loop. ``post`` passes an event to the core, adds the step to the timeline, and
carries out the effects, at once and in order; an event that is posted meanwhile waits for its turn. So a request
for an awake model is admitted, and counted, within the very call that reports its arrival.

Whatever fails here, even in the core, everything else is carried out, and no request is left waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.phases import CoreError
from llmux.observability.notices import EventLog
from llmux.observability.timeline import EXPLAIN, Step, Timeline

if TYPE_CHECKING:
    from llmux.estimates.fair_order import FairOrder

RETRY = 1.0  # seconds until the core is called again after an error of its own
QUIET = EXPLAIN | {fx.Admit}  # effects that observers do not use

Act = Callable[[Any], None]
"""Carries out an effect of one kind."""


class Driver:
    """Feeds one core.

    ``acts`` has the function that carries out each kind of effect. ``observers`` are called with each effect after
    that, admissions excepted; ``subscribers`` with those, too; ``watchers`` with each whole step, before that.
    ``make_good`` gets an event that the core failed at.
    """

    def __init__(
        self,
        core: Core,
        timeline: Timeline,
        acts: Mapping[type, Act],
        *,
        observers: tuple[Act, ...],
        make_good: Callable[[ev.Event], None],
        log: EventLog,
    ) -> None:
        self.now: Callable[[], float] = time.monotonic
        self._timeline = timeline
        self._core = core
        self._acts = acts
        self._observers = observers
        self.subscribers: tuple[Act, ...] = ()
        self._make_good = make_good
        self._log = log
        self.order: FairOrder | None = None
        """The order of the keys, with ``fair``."""
        self._watchers: tuple[Callable[[Step], None], ...] = ()
        self._inbox: deque[ev.Event] = deque()
        self._driving = False
        self._timer: asyncio.TimerHandle | None = None
        self._armed = math.inf
        self._not_before = 0.0  # when the core may be called again, after an error

    def close(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def subscribe(self, observer: Act) -> Callable[[], None]:
        """Call ``observer`` with every effect, too; returns how to end that."""

        def end() -> None:
            self.subscribers = tuple(one for one in self.subscribers if one != observer)

        self.subscribers = (*self.subscribers, observer)
        return end

    def watch(self, watcher: Callable[[Step], None]) -> Callable[[], None]:
        """Call ``watcher`` with every step from here on; returns how to end that."""

        def end() -> None:
            self._watchers = tuple(one for one in self._watchers if one is not watcher)

        self._watchers = (*self._watchers, watcher)
        return end

    def post(self, event: ev.Event) -> None:
        """Pass an event to the core and carry out the effects."""
        inbox, core = self._inbox, self._core
        inbox.append(event)
        if self._driving:
            return
        self._driving = True
        state = core.state
        try:
            while inbox:
                event, order = inbox.popleft(), self.order
                try:
                    if order is not None:
                        order.before(self.now(), event)
                    effects = core.handle(event, self.now())
                except Exception as error:  # noqa: BLE001 - an error in one place must not stop all others
                    self._failed(error, event)
                    continue
                if order is not None:
                    order.after(state.now, effects)
                self._timeline.add(state.now, event, effects)
                if self._watchers:
                    self._tell(Step(state.now, event, effects))
                if effects:
                    self._carry_out(effects)
        finally:
            self._driving = False
        deadline = core.next_deadline()
        # An early timer finds nothing to do, and is set again.
        if deadline is not None and (self._timer is None or deadline < self._armed):
            self._arm(deadline)

    def mistaken(self, error: Exception, during: object) -> None:
        """Log an error of llmux's own."""
        with contextlib.suppress(Exception):
            self._log.emit("internal_error", error=str(error), during=repr(during), exc_info=error)

    def _failed(self, error: Exception, event: ev.Event) -> None:
        effects = self._core.state.out  # what had been decided, and is counted
        if self.order is not None:
            self.order.after(self._core.state.now, effects)
        self._timeline.add(self._core.state.now, event, effects)
        if isinstance(error, CoreError):
            error.story = self._timeline.story()
        self.mistaken(error, event)
        self._not_before = self.now() + RETRY
        self._carry_out(effects)
        self._make_good(event)

    def _tell(self, step: Step) -> None:
        for watcher in self._watchers:
            try:
                watcher(step)
            except Exception as error:  # noqa: BLE001 - it only looks on
                self.mistaken(error, step.event)

    def _carry_out(self, effects: list[fx.Effect]) -> None:
        acts = self._acts
        for effect in effects:
            kind = effect.__class__
            act = acts.get(kind)
            if act is not None:
                try:
                    act(effect)
                except Exception as error:  # noqa: BLE001
                    self.mistaken(error, effect)
                    if isinstance(effect, fx.RunHook):
                        detail = f"could not be run: {error}"
                        self._inbox.append(ev.HookFinished(effect.hook, ok=False, detail=detail))
            observers = () if kind in QUIET else self._observers
            if self.subscribers and kind not in EXPLAIN:
                observers += self.subscribers
            for observer in observers:
                try:
                    observer(effect)
                except Exception as error:  # noqa: BLE001 - it only looks on
                    self.mistaken(error, effect)

    def _arm(self, deadline: float) -> None:
        # uvloop's clock counts milliseconds: a timer due within this one would fire again and again.
        deadline = max(math.ceil(deadline * 1000.0) / 1000.0, self._not_before)
        if self._timer is not None:
            if self._armed <= deadline:
                return
            self._timer.cancel()
        self._armed = deadline
        self._timer = asyncio.get_running_loop().call_at(deadline, self._alarm)

    def _alarm(self) -> None:
        self._timer = None
        self.post(ev.DeadlineReached())
