"""Where spans go, and what is traced: requests and switches.

Times are those of the event loop, put into calendar time by an offset that a trace takes once, at its beginning:
so its spans fit together, whatever the calendar's clock does meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import get_global_textmap
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from llmux.core import effects as fx
from llmux.tracing.request_trace import RequestTrace
from llmux.tracing.switch_traces import Ended, SwitchSeen, SwitchTraces
from llmux.version import __version__

LAST_WORDS = 2.0  # seconds that what is still to be sent has at the end
_PATH = "/v1/traces"
_LONGEST = 200  # characters of a path


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
        """Begin to trace switches; return what is to be called with every effect. ``now`` is the loop's clock."""
        self._switches = SwitchTraces(self._tracer, now)
        return self._switches.effect

    def hook_ended(self, result: Ended) -> None:
        """Take in how a hook ended."""
        if self._switches is not None:
            self._switches.hook_ended(result)

    def request(
        self, method: str, path: str, headers: Mapping[str, str], began: float, now: float
    ) -> RequestTrace:
        """Begin the trace of a request, or go on with that of its client."""
        context = self._propagator.extract(headers)
        offset = time.time_ns() - int(now * 1e9)
        return RequestTrace(self, method, path[:_LONGEST], context, began, offset)

    # ---- for the traces

    def start(self, name: str, context: Context | None, at: int, **more: Any) -> Any:
        """Start a span."""
        return self._tracer.start_span(name, context, start_time=at, **more)

    def carried(self, context: Context) -> list[tuple[bytes, bytes]]:
        """Return a context as headers."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context)
        return [(name.encode("ascii"), value.encode("latin-1")) for name, value in carrier.items()]

    def switch_to(self, model: str) -> SwitchSeen | None:
        """Return the switch to a model that is under way, or else the last one."""
        return None if self._switches is None else self._switches.towards(model)

    def close(self) -> None:
        """Send what is still to be sent, for ``LAST_WORDS`` at most. Blocks."""
        thread = threading.Thread(target=self._provider.shutdown, name="llmux: last spans", daemon=True)
        thread.start()
        thread.join(LAST_WORDS)
