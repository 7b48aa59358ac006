"""Spans as OpenTelemetry's own SDK gets them: which there are, in what they are, and when."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import pytest
from aiohttp import web
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from llmux import middleware_for
from llmux.errors import ConfigError
from llmux.observability import open_tracing
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE
from tests.server.house import SLEEP, held, until

CHAT = "/v1/chat/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Spans(InMemorySpanExporter):
    """What was exported."""

    def named(self, name: str):
        found = [span for span in self.get_finished_spans() if span.name == name]
        assert len(found) == 1, (name, [span.name for span in self.get_finished_spans()])
        return found[0]

    def below(self, parent) -> list[str]:
        """The names of a span's children, in the order of their beginnings."""
        spans = [span for span in self.get_finished_spans() if span.parent is not None]
        children = [span for span in spans if span.parent.span_id == parent.context.span_id]
        assert all(span.context.trace_id == parent.context.trace_id for span in children)
        return [span.name for span in sorted(children, key=lambda span: (span.start_time, span.end_time))]

    def __contains__(self, name: str) -> bool:
        return name in [span.name for span in self.get_finished_spans()]


@pytest.fixture
def spans(house):
    exporter = Spans()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    house.tracer_provider = provider
    yield exporter
    for span in exporter.get_finished_spans():
        assert span.start_time <= span.end_time, span.name
        assert abs(time.time_ns() - span.end_time) < 60e9, span.name


def sent(house, name: bytes) -> list[bytes]:
    lines = house.engine.heads[-1].split(b"\r\n")
    return [line.partition(b": ")[2] for line in lines if line.lower().startswith(name + b": ")]


async def test_a_request_that_switches(house, spans):
    house.up("a")
    await house.open({"a": {"sleep": f"{held('sleep')}; {SLEEP}"}, "b": {"verify": "true"}})
    first = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.in_flight("a"))
    second = await house.begin(
        "POST", CHAT + "?key=secret", {"model": "b"},
        traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="vendor=x", X_Request_ID="mine",
    )  # fmt: skip
    await until(lambda: house.queued("b"))
    await asyncio.sleep(0.005)  # uvloop counts milliseconds: the drain shall take some
    house.engine.go.set()
    await first.reply()
    house.release("sleep")
    assert (await second.reply()).status == 200
    await until(lambda: f"POST {CHAT}" in spans)

    root = spans.named(f"POST {CHAT}")
    assert root.kind is SpanKind.SERVER
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["http.request.method"] == "POST"
    assert root.attributes["url.path"] == CHAT
    assert root.attributes["llmux.model"] == "b"
    assert root.attributes["llmux.request_id"] == "mine"
    assert root.attributes["llmux.queue_seconds"] > 0
    assert root.status.status_code is StatusCode.UNSET
    assert "secret" not in root.to_json()

    assert spans.below(root) == ["queue", "engine"]
    queue = spans.named("queue")
    assert spans.below(queue) == ["drain", "switch"]
    mine = [
        span for span in spans.get_finished_spans() if span.parent and span.parent.span_id == queue.context.span_id
    ]
    drain, within = sorted(mine, key=lambda span: span.name)
    assert queue.start_time <= drain.start_time <= drain.end_time == within.start_time <= within.end_time
    assert within.end_time <= queue.end_time + 1_000_000

    engine = next(
        span
        for span in spans.get_finished_spans()
        if span.name == "engine" and span.context.trace_id == root.context.trace_id
    )
    assert engine.kind is SpanKind.CLIENT
    assert spans.below(engine) == ["first byte", "stream"]
    assert sent(house, b"traceparent") == [f"00-{TRACE}-{engine.context.span_id:016x}-01".encode()]
    assert sent(house, b"tracestate") == [b"vendor=x"]

    switch = spans.named("switch to b")
    assert switch.parent is None
    assert [link.context.span_id for link in within.links] == [switch.context.span_id]
    assert spans.below(switch) == ["drain", "sleep a", "wake b"]
    assert dict(switch.attributes) | {"llmux.switch.cost": 0, "llmux.switch.reason": ""} == {
        "llmux.switch.id": 1,
        "llmux.switch.from": ("a",),
        "llmux.switch.to": "b",
        "llmux.switch.reason": "",
        "llmux.switch.result": "success",
        "llmux.switch.cost": 0,
    }
    assert spans.named("wake b").attributes["process.exit.code"] == 0


async def test_what_is_awake_has_no_queue(house, spans):
    house.up("a")
    await house.open()
    for _ in range(2):  # the second would take the fast path
        assert (await house.chat("a")).status == 200
    await until(lambda: len(spans.get_finished_spans()) == 8)
    assert {span.name for span in spans.get_finished_spans()} == {f"POST {CHAT}", "engine", "first byte", "stream"}
    roots = [span for span in spans.get_finished_spans() if span.parent is None]
    assert len({span.context.trace_id for span in roots}) == 2
    assert sent(house, b"traceparent")
    assert not sent(house, b"tracestate")


async def test_a_failed_wake(house, spans):
    await house.open({"a": {"wake": f"{held('go')}; echo no GPU; exit 3"}, "b": {}})
    line = await house.begin("POST", CHAT, {"model": "a"}, traceparent="nonsense")
    await until(lambda: house.queued("a"))
    house.release("go")
    assert (await line.reply()).status == 503
    await until(lambda: f"POST {CHAT}" in spans and "switch to a" in spans)
    root = spans.named(f"POST {CHAT}")
    assert root.parent is None
    assert (root.attributes["error.type"], root.status.status_code) == ("wake_failed", StatusCode.ERROR)
    assert spans.below(root) == ["queue"]
    assert spans.below(spans.named("queue")) == ["switch"]
    switch = spans.named("switch to a")
    assert switch.status.status_code is StatusCode.ERROR
    assert "exit" in switch.status.description
    wake = spans.named("wake a")
    assert wake.attributes["process.exit.code"] == 3
    assert "no GPU" in wake.status.description
    assert spans.named("switch").links[0].context.span_id == switch.context.span_id


async def test_what_is_refused_at_once(house, spans):
    await house.open(api_keys=["k"])
    assert (await house.chat("a")).status == 401
    assert (await house.ask("POST", CHAT, {"model": "x"}, X_API_Key="k")).status == 404
    assert (await house.ask("GET", "/v1/models", X_API_Key="k")).status == 200
    assert (await house.ask("POST", "/no/such/path", X_API_Key="k")).status == 404
    found = spans.get_finished_spans()
    assert [span.attributes["error.type"] for span in found] == ["invalid_api_key", "model_not_found"]
    assert {span.status.status_code for span in found} == {StatusCode.UNSET}


async def test_a_client_that_leaves_and_an_engine_that_breaks_off(house, spans):
    house.up("a")
    await house.open(api_keys=[{"name": "laptop", "key": "k"}])
    line = await house.begin("POST", "/v1/hold", {"model": "a"}, X_API_Key="k")
    await until(lambda: house.in_flight("a"))
    line.abort()
    await until(lambda: "POST /v1/hold" in spans)
    assert spans.named("POST /v1/hold").attributes["http.response.status_code"] == 499
    assert spans.named("engine").status.status_code is StatusCode.UNSET
    spans.clear()
    line = await house.begin("POST", "/v1/stream", {"model": "a"}, X_API_Key="k")
    await line.reader.readuntil(b"data: 1")
    for task in list(house.engine._tasks):
        task.cancel()
    await line.closed()
    await until(lambda: "POST /v1/stream" in spans)
    root, engine = spans.named("POST /v1/stream"), spans.named("engine")
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["llmux.key"] == "laptop"
    for span in (root, engine):
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "engine_lost")
    assert spans.below(engine) == ["first byte", "stream"]


async def test_who_waits_without_a_switch(house, spans):
    house.up("a")
    await house.open({"a": {"max_in_flight": 1}})
    first = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.in_flight("a"))
    second = await house.begin("POST", CHAT, {"model": "a"})
    await until(lambda: house.queued("a"))
    house.engine.go.set()
    assert [(await line.reply()).status for line in (first, second)] == [200, 200]
    await until(lambda: f"POST {CHAT}" in spans)
    assert spans.below(spans.named("queue")) == []


async def test_a_model_that_goes_to_sleep_and_one_that_is_removed(house, spans):
    house.up("a")
    await house.open()
    assert (await house.ask("POST", "/llmux/models/a/sleep")).status == 202
    await until(lambda: "sleep" in spans)
    assert spans.below(spans.named("sleep")) == ["drain", "sleep a"]
    assert (await house.chat("b")).status == 200
    assert house.front._tracing.switch_to("b") is not None
    config = house.config("a")
    house.switcher.replace(config)
    await until(lambda: "b" not in house.switcher.core.state.models)
    assert house.front._tracing.switch_to("b") is None


def test_without_opentelemetry_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("opentelemetry", "llmux.observability.spans"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    assert open_tracing(None) is None
    with pytest.raises(ConfigError, match=r"otlp: takes OpenTelemetry.*pip install 'llmux\[otel\]'"):
        open_tracing("http://127.0.0.1:4318")


async def test_a_collector_that_is_not_there_holds_nothing_up(house, monkeypatch):
    made: list[OTLPSpanExporter] = []

    def exporter(**given):
        made.append(OTLPSpanExporter(**given))
        return made[0]

    monkeypatch.setattr("llmux.observability.spans.OTLPSpanExporter", exporter)
    monkeypatch.setattr("llmux.observability.spans.LAST_WORDS", 0.1)
    house.up("a")
    await house.open(otlp=f"http://127.0.0.1:{free_port()}")
    assert (await house.chat("a")).status == 200
    async with asyncio.timeout(PATIENCE):
        await house.close()
    # It would try again for ten seconds, with pauses drawn from the random numbers that all tests share.
    (last_words,) = (thread for thread in threading.enumerate() if thread.name == "llmux: last spans")
    made[0].shutdown()
    await asyncio.to_thread(last_words.join, PATIENCE)
    assert not last_words.is_alive()


async def test_in_an_application_of_ones_own(house, spans):
    house.up("a")
    front, switcher = middleware_for(house.config(), tracer_provider=house.tracer_provider)
    app = web.Application(middlewares=[front.middleware()])

    async def life(_app):
        switcher.start()
        yield

    async def stop(_app):
        await switcher.stop()

    app.cleanup_ctx.append(life)
    app.on_shutdown.append(stop)
    await house.serve(app, plain=True, handler_cancellation=True, auto_decompress=False)
    await until(lambda: switcher.core.state.ready)
    assert (await house.chat("b")).status == 200
    await until(lambda: f"POST {CHAT}" in spans)
    assert spans.below(spans.named("queue")) == ["switch"]
    assert spans.below(spans.named("switch to b")) == ["drain", "sleep a", "wake b"]


async def test_an_attempt_at_a_remote_that_is_not_there_has_failed(house, spans):
    remotes = {"r": {"url": f"http://127.0.0.1:{free_port()}", "models": {"m": "theirs"}}}
    await house.open(remotes=remotes, remotes_for_all=True)
    assert (await house.chat("r/m")).status == 502
    await until(lambda: f"POST {CHAT}" in spans)
    attempt = spans.named("engine")
    assert (attempt.status.status_code, attempt.status.description) == (StatusCode.ERROR, "remote_unreachable")
