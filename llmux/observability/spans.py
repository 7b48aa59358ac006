"""Where spans go, and what is traced: requests and switches.

Times are those of the event loop, put into calendar time by an offset that a trace takes once, at its beginning:
so its spans fit together, whatever the calendar's clock does meanwhile.

The trace of one request: how long it waited and for what, when its engine began to answer, until when it did.

POST /v1/chat/completions             all of it
├─ queue                              until it was admitted, or rejected
│  ├─ drain                           what had to leave finished its answers
│  └─ switch ↗                        hooks; a link leads to the trace of the switch
└─ engine                             its context is what the engine is given; one for each attempt
   ├─ first byte
   └─ stream
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import get_global_textmap
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, set_span_in_context

from llmux.core import effects as fx
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.hookrunner import HookResult

_LONGEST = 500  # characters of a hook's last words


class TracedSwitch(NamedTuple):
    """A switch as the requests see it that wait for its target. Times are the loop's."""

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
        self._last: dict[str, TracedSwitch] = {}  # by target
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

    def hook_ended(self, result: HookResult) -> None:
        """Take in how a hook ended."""
        for switch in self._open.values():
            span = switch.hooks.pop(result.id, None)
            if span is not None:
                if result.exit_code is not None:
                    span.set_attribute("process.exit.code", result.exit_code)
                if not result.ok:
                    span.set_status(Status(StatusCode.ERROR, result.detail[:_LONGEST]))
                span.end(switch.at(self._now()))

    def towards(self, model: str) -> TracedSwitch | None:
        """Return the switch to a model that is under way, or else the last one."""
        under_way = next((switch for switch in self._open.values() if switch.target == model), None)
        return self._last.get(model) if under_way is None else _traced(under_way, self._now())

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
            self._last[effect.to] = _traced(switch, now)


def _traced(switch: _Open, now: float) -> TracedSwitch:
    return TracedSwitch(switch.began, switch.drained, now, switch.span.get_span_context())


_CLIENT_ERROR, _SERVER_ERROR = 400, 500


class RequestTrace:
    """One request's spans. Times are the loop's; ``offset`` is from there to the calendar, in ns."""

    def __init__(
        self, tracing: Tracing, method: str, path: str, context: Context, began: float, offset: int
    ) -> None:
        self._tracing = tracing
        self._offset = offset
        attributes = {"http.request.method": method, "url.path": path}
        at = self._at(began)
        self._span = tracing.start(f"{method} {path}", context, at, kind=SpanKind.SERVER, attributes=attributes)
        self._context = set_span_in_context(self._span, context)
        self._engine: Any = None
        self._sent = 0.0

    @property
    def fields(self) -> frozenset[bytes]:
        """The headers of the client that its own context takes the place of."""
        return self._tracing.fields

    def queued(self, model: str, arrived: float, ended: float) -> None:
        """Tell that it waited for its model."""
        queue = self._tracing.start("queue", self._context, self._at(arrived))
        switch = self._tracing.switch_to(model)
        if switch is not None and switch.ended > arrived:
            context = set_span_in_context(queue, self._context)
            begins = max(arrived, switch.began)
            drained = switch.began if switch.drained is None else switch.drained
            if drained > begins:
                self._tracing.start("drain", context, self._at(begins)).end(self._at(drained))
                begins = drained
            links = [Link(switch.context)]
            span = self._tracing.start("switch", context, self._at(begins), links=links)
            span.end(self._at(min(ended, switch.ended)))
        queue.end(self._at(ended))

    def sending(self, now: float) -> list[tuple[bytes, bytes]]:
        """Begin an attempt; return the headers that tell the engine of it."""
        self._sent = now
        self._engine = self._tracing.start("engine", self._context, self._at(now), kind=SpanKind.CLIENT)
        return self._tracing.carried(set_span_in_context(self._engine, self._context))

    def sent(self, now: float, status: int | None, first_byte: float | None, failure: str | None) -> None:
        """End an attempt. ``status`` is the engine's, None if it gave none; ``failure`` an error's code."""
        engine = self._engine
        context = set_span_in_context(engine, self._context)
        if first_byte is not None:
            self._tracing.start("first byte", context, self._at(self._sent)).end(self._at(first_byte))
            self._tracing.start("stream", context, self._at(first_byte)).end(self._at(now))
        if status is not None:
            engine.set_attribute("http.response.status_code", status)
        if failure is not None or (status is not None and status >= _SERVER_ERROR):
            engine.set_status(Status(StatusCode.ERROR, failure))
        engine.end(self._at(now))

    def ended(self, now: float, status: int, failure: str | None, **attributes: str | float | None) -> None:
        """End it. ``failure`` is an error's code; ``attributes`` are llmux's own."""
        told = {f"llmux.{name}": value for name, value in attributes.items() if value is not None}
        self._span.set_attributes({"http.response.status_code": status, **told})
        if failure is not None:
            self._span.set_attribute("error.type", failure)
        if status >= _SERVER_ERROR or (failure is not None and status < _CLIENT_ERROR):
            self._span.set_status(Status(StatusCode.ERROR, failure))
        self._span.end(self._at(now))

    def _at(self, moment: float) -> int:
        return self._offset + int(moment * 1e9)


LAST_WORDS = 2.0  # seconds that what is still to be sent has at the end
_PATH = "/v1/traces"
_LONGEST_PATH = 200  # characters


class Tracing:
    """Makes spans with a tracer provider."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("llmux", __version__)
        self._propagator = get_global_textmap()
        self.fields = frozenset(name.lower().encode("ascii") for name in self._propagator.fields)
        """The headers that carry a trace's context, in lower case."""
        self._switches: SwitchTraces | None = None

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Send spans to an OTLP/HTTP endpoint, as http://localhost:4318. The ``OTEL_…`` variables say the rest."""
        url = endpoint.rstrip("/")
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        name: dict[str, Any] = {} if named else {"service.name": "llmux"}
        resource = Resource.create({**name, "service.version": __version__})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=url if url.endswith(_PATH) else url + _PATH)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def follow(self, now: Callable[[], float]) -> Callable[[fx.Effect], None]:
        """Begin to trace switches; return the function to call with every effect. ``now`` is the loop's clock."""
        self._switches = SwitchTraces(self._tracer, now)
        return self._switches.effect

    def hook_ended(self, result: HookResult) -> None:
        """Take in how a hook ended."""
        if self._switches is not None:
            self._switches.hook_ended(result)

    def request(
        self, method: str, path: str, headers: Mapping[str, str], began: float, now: float
    ) -> RequestTrace:
        """Begin the trace of a request, or go on with that of its client."""
        context = self._propagator.extract(headers)
        offset = time.time_ns() - int(now * 1e9)
        return RequestTrace(self, method, path[:_LONGEST_PATH], context, began, offset)

    # ---- for the traces

    def start(self, name: str, context: Context | None, at: int, **more: Any) -> Any:
        """Start a span."""
        return self._tracer.start_span(name, context, start_time=at, **more)

    def carried(self, context: Context) -> list[tuple[bytes, bytes]]:
        """Return a context as headers."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context)
        return [(name.encode("ascii"), value.encode("latin-1")) for name, value in carrier.items()]

    def switch_to(self, model: str) -> TracedSwitch | None:
        """Return the switch to a model that is under way, or else the last one."""
        return None if self._switches is None else self._switches.towards(model)

    def close(self) -> None:
        """Send what is still to be sent, for ``LAST_WORDS`` at most. Blocks."""
        thread = threading.Thread(target=self._provider.shutdown, name="llmux: last spans", daemon=True)
        thread.start()
        thread.join(LAST_WORDS)
