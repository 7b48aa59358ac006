"""The trace of one request: how long it waited and for what, when its engine began to answer, until when it did.

POST /v1/chat/completions             all of it
├─ queue                              until it was let through, or turned away
│  ├─ drain                           what had to leave finished its answers
│  └─ switch ↗                        hooks; a link leads to the trace of the switch
└─ engine                             its context is what the engine is given; one for each attempt
   ├─ first byte
   └─ stream
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanKind, Status, StatusCode, set_span_in_context

if TYPE_CHECKING:
    from llmux.tracing.tracing import Tracing

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
