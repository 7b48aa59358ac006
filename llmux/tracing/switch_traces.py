"""A trace for each switch: its drain and its hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, set_span_in_context

from llmux.core import effects as fx

_LONGEST = 500  # characters of a hook's last words


class Ended(Protocol):
    """How a hook ended."""

    @property
    def id(self) -> int:
        """Its number."""

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""

    @property
    def exit_code(self) -> int | None:
        """Its exit code, if there is one."""

    @property
    def detail(self) -> str:
        """How it ended, for people."""


class SwitchSeen(NamedTuple):
    """A switch as those see it who wait for its target. Times are the loop's."""

    began: float
    drained: float | None  # None: nothing had to leave, or it never came so far
    ended: float  # or how far it has come
    context: SpanContext


@dataclass(slots=True)
class _Open:
    span: Any
    target: str | None
    began: float
    offset: int  # from the loop's clock to the calendar, in ns
    drained: float | None = None
    hooks: dict[int, Any] = field(default_factory=dict)

    def at(self, moment: float) -> int:
        return self.offset + int(moment * 1e9)


class SwitchTraces:
    """Makes them from the core's effects."""

    def __init__(self, tracer: Any, now: Callable[[], float]) -> None:
        self._tracer = tracer
        self._now = now
        self._open: dict[int, _Open] = {}
        self._last: dict[str, SwitchSeen] = {}  # by target
        self._handlers: Mapping[type, Callable[[Any], None]] = {
            fx.SwitchStarted: self._started,
            fx.SwitchDrained: self._drained,
            fx.RunHook: self._hook_started,
            fx.SwitchFailed: self._failed,
            fx.SwitchEnded: self._ended,
            fx.ModelRemoved: self._removed,
        }

    def effect(self, effect: fx.Effect) -> None:
        """Take in an effect."""
        handler = self._handlers.get(effect.__class__)
        if handler is not None:
            handler(effect)

    def hook_ended(self, result: Ended) -> None:
        """Take in how a hook ended."""
        for switch in self._open.values():
            span = switch.hooks.pop(result.id, None)
            if span is not None:
                if result.exit_code is not None:
                    span.set_attribute("process.exit.code", result.exit_code)
                if not result.ok:
                    span.set_status(Status(StatusCode.ERROR, result.detail[:_LONGEST]))
                span.end(switch.at(self._now()))

    def towards(self, model: str) -> SwitchSeen | None:
        """Return the switch to a model that is under way, or else the last one."""
        under_way = next((switch for switch in self._open.values() if switch.target == model), None)
        return self._last.get(model) if under_way is None else _seen(under_way, self._now())

    def _started(self, effect: fx.SwitchStarted) -> None:
        now = self._now()
        offset = time.time_ns() - int(now * 1e9)
        span = self._tracer.start_span(
            f"switch to {effect.to}" if effect.to is not None else "sleep",
            Context(),  # a trace of its own
            kind=SpanKind.INTERNAL,
            start_time=offset + int(now * 1e9),
            attributes={
                "llmux.switch.id": effect.switch,
                "llmux.switch.from": list(effect.sources),
                "llmux.switch.to": effect.to or "",
                "llmux.switch.reason": effect.reason,
            },
        )
        self._open[effect.switch] = _Open(span, effect.to, now, offset)

    def _drained(self, effect: fx.SwitchDrained) -> None:
        switch = self._open.get(effect.switch)
        if switch is not None:
            now = switch.drained = self._now()
            context = set_span_in_context(switch.span)
            self._tracer.start_span("drain", context, start_time=switch.at(switch.began)).end(switch.at(now))

    def _hook_started(self, effect: fx.RunHook) -> None:
        switch = self._open.get(effect.switch)
        if switch is not None:
            switch.hooks[effect.hook] = self._tracer.start_span(
                f"{effect.kind.value} {effect.model}",
                set_span_in_context(switch.span),
                start_time=switch.at(self._now()),
                attributes={"llmux.model": effect.model, "llmux.hook": effect.kind.value},
            )

    def _failed(self, effect: fx.SwitchFailed) -> None:
        switch = self._open.get(effect.switch)
        if switch is not None:
            switch.span.set_status(Status(StatusCode.ERROR, effect.error[:_LONGEST]))

    def _removed(self, effect: fx.ModelRemoved) -> None:
        self._last.pop(effect.model, None)

    def _ended(self, effect: fx.SwitchEnded) -> None:
        switch = self._open.pop(effect.switch, None)
        if switch is None:
            return
        now = self._now()
        for span in switch.hooks.values():  # a prefetch that goes on to its end
            span.end(switch.at(now))
        switch.span.set_attribute("llmux.switch.result", effect.result)
        if effect.cost is not None:
            switch.span.set_attribute("llmux.switch.cost", effect.cost)
        switch.span.end(switch.at(now))
        if effect.to is not None:
            self._last[effect.to] = _seen(switch, now)


def _seen(switch: _Open, now: float) -> SwitchSeen:
    return SwitchSeen(switch.began, switch.drained, now, switch.span.get_span_context())
