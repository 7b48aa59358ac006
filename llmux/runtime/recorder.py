"""What goes into the record: a line for each request, switch and decision.

See "The record" in ``llmux/OPERATING.md``.

Times are seconds on the core's clock from ``origin`` on, for which the ``start`` line gives the calendar time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmux.config import Config
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind, Rules
from llmux.errors import ConfigError
from llmux.estimates import costs_of
from llmux.observability.notices import EventLog
from llmux.observability.record import FORMAT, RecordFile
from llmux.observability.state_file import dump_costs
from llmux.observability.timeline import Step
from llmux.runtime.history import document
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.core.model import Model
    from llmux.runtime.request_handle import Outcome, Ticket
    from llmux.runtime.switcher import Switcher

DIGITS = 9
GONE = 499  # the client left first


@dataclass(slots=True)
class _Request:
    arrived: float
    order: int = 0  # its arrival's place among the events of the core
    order_ended: int = 0
    admitted: float | None = None
    ended: float | None = None
    switch: int | None = None


@dataclass(slots=True)
class _Hook:
    model: str
    hook: str
    began: float
    seconds: float | None = None
    ok: bool = False
    order: int = 0  # of its end; 0: it has not ended

    def line(self, origin: float) -> dict[str, Any]:
        return {
            "model": self.model,
            "hook": self.hook,
            "at": round(self.began - origin, DIGITS),
            "seconds": None if self.seconds is None else round(self.seconds, DIGITS),
            "ok": self.ok,
            "order": self.order,
        }


@dataclass(slots=True)
class _Switch:
    decided: float
    order: int
    reason: str
    error: str = ""
    hooks: dict[int, _Hook] = field(default_factory=dict)


class Recorder:
    """Turns what happens into lines: a fold over the steps of the core.

    The core does not know a request's outcome, its status and its bytes: ``request`` is called with them.
    """

    def __init__(self, switcher: Switcher, file: RecordFile, because: str) -> None:
        self.file = file
        self._switcher = switcher
        self._place = switcher.config.record_path, switcher.config.record_size
        self._now = switcher.core.state.now  # of the current step
        self._origin = switcher.now()
        self._tick = (-1.0, -1)  # the last one: when, and its order
        self._order = 0  # of the core's events: times may be equal, as uvloop's clock has milliseconds
        self._requests: dict[int, _Request] = {}
        self._riding: set[int] = set()  # requests that ride along, which a simulation leaves out
        self._visits: dict[str, int] = {}  # by which switch a model is awake
        self._switches: dict[int, _Switch] = {}
        self._deepening: dict[int, _Hook] = {}  # hooks outside a switch
        self._reasons: dict[int, str] = {}  # in words, for switches that have just begun
        self._decision = switcher.decisions.last_id
        # Some events are numbered before their effects, some after.
        self._before: Mapping[type, Callable[[Any], None]] = {
            ev.RequestArrived: self._arrived,
            ev.HookFinished: self._hook_ended,
        }
        self._after: Mapping[type, Callable[[Any], None]] = {
            ev.RequestFinished: lambda event: self._left(event.request),
            ev.RequestAbandoned: lambda event: self._left(event.request),
            ev.HookFinished: lambda _event: self._put_deepened(),
            ev.DeadlineReached: lambda _event: self._alarm(),
            ev.ShutdownRequested: lambda _event: self._event("stopping"),
            ev.ConfigReplaced: lambda _event: self._reloaded(),
        }
        self._handlers: Mapping[type, Callable[[Any], None]] = {
            fx.Reject: lambda effect: self._left(effect.request),
            fx.Admit: self._admitted,
            fx.RequestQueued: self._queued,
            fx.SwitchStarted: self._switch_started,
            fx.PolicyDecided: lambda _effect: self._decided(),
            fx.RunHook: self._hook_started,
            fx.ModelActivated: lambda effect: self._visits.update({effect.model: effect.switch}),
            fx.SwitchFailed: self._switch_failed,
            fx.SwitchEnded: self._switch_ended,
            fx.Ready: lambda _effect: self.begin("start"),
            fx.PinSet: lambda effect: self._event("pin", model=effect.model, pinned=effect.pinned),
            fx.LeaseSet: lambda effect: self._event("lease", leased=effect.leased, waits=effect.waits),
            fx.ManualSet: lambda effect: self._event("manual", manual=effect.manual),
            fx.ModelReset: lambda effect: self._event("reset", model=effect.model),
            fx.ModelLost: lambda effect: self._event("lost_engine", model=effect.model),
        }
        if switcher.core.state.ready:
            self.begin(because)
        loop = asyncio.get_running_loop()

        def gone() -> None:  # in the file's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._gone)

        file.on_gone = gone

    def begin(self, because: str) -> None:
        """Write the state and the rules, from which the following lines can be understood."""
        s, config = self._switcher.core.state, self._switcher.config
        self._put(
            "start",
            because=because,
            format=FORMAT,
            llmux=__version__,
            at=self._at(self._switcher.now()),
            time=time.time(),
            clock=self._origin,
            policy={"use": config.policy.use, "options": dict(config.policy.options)},
            rules=rules_line(s.rules),
            models=[model_line(model) for model in s.models.values() if not model.removed],
            pins=[model.name for model in s.models.values() if model.pinned],
            lease=None if s.lease is None else {"waits": s.lease.waits},
            manual=s.manual,
            fair=config.policy.fair is not None,
            costs=dump_costs(costs_of(s)),
            guesses={name: list(guess) for name, guess in s.costs.guesses.items()},
        )

    def take(self, step: Step) -> None:
        """Record an event of the core, and its effects."""
        self._now = step.time
        kind = step.event.__class__
        before = self._before.get(kind)
        if before is not None:
            before(step.event)
        for effect in step.effects:
            handler = self._handlers.get(effect.__class__)
            if handler is not None:
                handler(effect)
        after = self._after.get(kind)
        if after is not None:
            after(step.event)

    def request(self, ticket: Ticket, status: int | None, outcome: Outcome | None, sent: int) -> None:
        """Write a request's line, once it has left; see ``Switcher.leave``."""
        entry = self._requests.pop(ticket.id, None)
        if entry is None:  # it arrived before the record began
            entry = _Request(ticket.arrived)
        ended = self._switcher.now() if entry.ended is None else entry.ended
        if not entry.order_ended:  # the core has not been told yet
            entry.order_ended = self._next()
        admitted = entry.admitted
        first = None if outcome is None else outcome.first_byte_at
        self._put(
            "request",
            id=ticket.id,
            arrival_s=self._at(entry.arrived),
            model=ticket.model,
            prompt_bytes=0 if outcome is None else sent,
            answer_bytes=0 if outcome is None else outcome.bytes_out,
            wait_s=round((ended if admitted is None else admitted) - entry.arrived, DIGITS),
            first_byte_s=None if first is None else round(first - entry.arrived, DIGITS),
            service_s=None if admitted is None else round(ended - admitted, DIGITS),
            outcome=outcome_of(ticket, status, outcome),
            status=status,
            switch=entry.switch,
            order=[entry.order, entry.order_ended],
            **({} if ticket.keep is None else {"keep_s": ticket.keep}),
            **_tokens(outcome),
            **({"key": ticket.key} if ticket.key else {}),
        )
        if self.file.full:
            self._begin_new()

    def served_elsewhere(self, ticket: Ticket, status: int | None, outcome: Outcome | None, sent: int) -> None:
        """Write the line of a request, or one try of it, that another host served: the core did not know it."""
        ended = self._switcher.now()
        first = None if outcome is None else outcome.first_byte_at
        self._put(
            "remote",
            sent_s=self._at(ticket.arrived),
            asked=ticket.asked,
            target=ticket.model,
            prompt_bytes=sent,
            answer_bytes=0 if outcome is None else outcome.bytes_out,
            first_byte_s=None if first is None else round(first - ticket.arrived, DIGITS),
            service_s=round(ended - ticket.arrived, DIGITS),
            outcome=outcome_of(ticket, status, outcome),
            status=status,
        )
        if self.file.full:
            self._begin_new()

    def _gone(self) -> None:
        if self._switcher.recorder is self:  # else this record has ended
            self._begin_new(gone=True)

    def _begin_new(self, *, gone: bool = False) -> None:
        self.file.begin_new(gone=gone)
        if self._switcher.core.state.ready:  # else that is the first line
            self.begin("rotated")

    def end(self) -> None:
        """Write the end; the file is still to be closed."""
        self._put("stop", at=self._at(self._switcher.now()))

    # ---- events

    def _arrived(self, event: ev.RequestArrived) -> None:
        if event.rides:
            self._riding.add(event.request)
        else:
            self._enters(event.request)

    def _enters(self, request: int) -> None:
        self._riding.discard(request)
        self._requests[request] = _Request(self._now, self._next())

    def _left(self, request: int) -> None:
        self._riding.discard(request)
        entry = self._requests.get(request)
        if entry is not None:
            entry.ended = self._now
            entry.order_ended = self._next()

    def _hook_ended(self, event: ev.HookFinished) -> None:
        for hooks in (self._deepening, *(switch.hooks for switch in self._switches.values())):
            run = hooks.get(event.hook)
            if run is not None:
                run.ok, run.order = event.ok, self._next()
                run.seconds = max(0.0, self._now - run.began)

    def _put_deepened(self) -> None:
        for hook, run in list(self._deepening.items()):
            if run.seconds is not None:
                self._put("hook", **self._deepening.pop(hook).line(self._origin))

    def _event(self, what: str, **fields: object) -> None:
        """Write an event of the core that came neither from a client nor from a hook."""
        if not self._switcher.core.state.ready:
            return  # the first line of the record contains the state
        self._put("event", event=what, at=self._at(self._now), order=self._next(), **fields)

    def _alarm(self) -> None:
        """Write that a time has come for which the core had asked."""
        if (self._now, self._order) == self._tick:
            return  # a timer that was too early fires again, often within the same moment
        self._put("tick", at=self._at(self._now), order=self._next())
        self._tick = self._now, self._order

    def _reloaded(self) -> None:
        config = self._switcher.config
        if self._place == (config.record_path, config.record_size):  # else this record ends
            self.begin("reload")

    # ---- effects

    def _admitted(self, effect: fx.Admit) -> None:
        if effect.request in self._riding:
            self._enters(effect.request)
        entry = self._requests.get(effect.request)
        if entry is not None:
            if effect.waited == 0:
                entry.arrived = self._now
            entry.admitted = self._now
            entry.switch = self._visits.get(effect.model)

    def _queued(self, effect: fx.RequestQueued) -> None:
        if effect.request in self._riding:
            self._enters(effect.request)
        entry = self._requests.get(effect.request)
        if entry is not None and entry.admitted is None:  # else it is queued again
            entry.arrived = self._now

    def _switch_started(self, effect: fx.SwitchStarted) -> None:
        self._decided()
        reason = self._reasons.pop(effect.switch, effect.reason)
        self._switches[effect.switch] = _Switch(self._now, self._next(), reason)

    def _decided(self) -> None:
        for record in self._switcher.decisions.since(self._decision):
            self._decision = record.id
            if record.switch is not None:
                self._reasons[record.switch] = record.reason
            self._put("decision", **document(record, -self._origin))

    def _hook_started(self, effect: fx.RunHook) -> None:
        if effect.kind is HookKind.ALIVE:
            return
        switch = self._switches.get(effect.switch)
        hooks = self._deepening if not effect.switch else None if switch is None else switch.hooks
        if hooks is not None:
            hooks[effect.hook] = _Hook(effect.model, effect.kind.value, self._now)

    def _switch_failed(self, effect: fx.SwitchFailed) -> None:
        if effect.switch in self._switches:
            self._switches[effect.switch].error = effect.error

    def _switch_ended(self, effect: fx.SwitchEnded) -> None:
        known = self._switches.pop(effect.switch, None)
        if known is None:  # it began before the record
            return
        self._put(
            "switch",
            id=effect.switch,
            **{"from": list(effect.sources), "to": effect.to},
            decided_s=self._at(known.decided),
            reason=known.reason,
            drain_s=round(effect.drain, DIGITS),
            cost_s=None if effect.cost is None else round(effect.cost, DIGITS),
            duration_s=round(effect.duration, DIGITS),
            result=effect.result,
            error=known.error or None,
            order=known.order,
            hooks=[hook.line(self._origin) for hook in known.hooks.values()],
        )

    def _next(self) -> int:
        self._order += 1
        return self._order

    def _at(self, moment: float) -> float:
        return round(moment - self._origin, DIGITS)

    def _put(self, kind: str, /, **fields: object) -> None:
        self.file.put({"type": kind, **fields})


def open_record(config: Config, log: EventLog) -> RecordFile | None:
    """Open the file that a configuration names. Raises ConfigError when it cannot be written."""
    path = config.record_path
    if path is None:
        return None
    try:
        return RecordFile(path, config.record_size, log.emit)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{path} cannot be written: {why}; give another file, or null", path="record") from error


def rules_line(rules: Rules) -> dict[str, Any]:
    """Return the guard rails for the first line of a record."""
    return {
        "request_timeout": rules.request_timeout,
        "max_wait": rules.max_wait,
        "min_active": rules.min_active,
        "drain_timeout": rules.drain_timeout,
        "capacity": rules.capacity,
        "host_memory": rules.host_memory,
        "default_model": rules.default_model,
        "default_after": rules.default_after,
    }


def _tokens(outcome: Outcome | None) -> dict[str, Any]:
    """Return the tokens that an answer reported, read and written; nothing if it reported none."""
    told = (None, None) if outcome is None else outcome.usage
    return {} if told == (None, None) else {"tokens": list(told)}


def outcome_of(ticket: Ticket, status: int | None, outcome: Outcome | None) -> str:
    """Say in a word how a request ended; ``status`` is None for a guard that was held."""
    if ticket.spilled:
        return "spilled"
    if status is None:
        return "held"
    if status == GONE:
        return "left"
    if ticket.rejection is not None:
        return "refused"
    if outcome is not None and outcome.broken is not None:
        return "broken"
    return "failed" if outcome is None or outcome.first_byte_at is None else "answered"


def model_line(model: Model) -> dict[str, Any]:
    """Return a model for the first line of a record."""
    spec = model.spec
    return {
        "name": spec.name,
        "phase": model.phase.value,
        "in_flight": len(model.in_flight),
        "queued": len(model.queue),
        "hooks": sorted(kind.value for kind in spec.hooks),
        "max_in_flight": spec.max_in_flight,
        "max_queued": spec.max_queued,
        "memory": spec.memory,
        "companions": None if spec.companions is None else sorted(spec.companions),
        "shared_address": spec.shared_address,
        "idle_sleep": spec.idle_sleep,
        "preload": spec.preload,
        "keep_awake": spec.keep_awake,
        "levels": [[level.name, level.host_memory] for level in spec.levels],
        "level": None if model.level is None else model.level.name,
    }
