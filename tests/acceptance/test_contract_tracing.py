"""Traces, as a collector gets them from the real process."""

from __future__ import annotations

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


async def test_a_collector_gets_the_spans(lab):
    received: list[ExportTraceServiceRequest] = []
    seen: list[str] = []

    async def take(request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        seen.append(request.headers["X-Tenant"])
        received.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.add_routes([web.post("/v1/traces", take)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        lab.env = {"OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=me", "OTEL_RESOURCE_ATTRIBUTES": "gpu=h200"}
        lab.write("a", otlp=f"http://127.0.0.1:{runner.addresses[0][1]}")
        lab.start()
        trace = "0af7651916cd43dd8448eb211c80319c"
        answer = await lab.chat("a", headers=[("traceparent", f"00-{trace}-b7ad6b7169203331-01")])
        assert answer.status == 200
        at_engine = {name.lower(): value for name, value in answer.seen_headers()}["traceparent"]
        lab.signal(15)
        await lab.until(lambda: lab.process.poll() is not None)
        assert lab.ended() == 0
    finally:
        await runner.cleanup()
    resources = [spans for request in received for spans in request.resource_spans]
    named = {each.key: each.value.string_value for each in resources[0].resource.attributes}
    assert (named["service.name"], named["gpu"]) == ("llmux", "h200")
    assert set(seen) == {"me"}
    spans = {span.name: span for spans in resources for scope in spans.scope_spans for span in scope.spans}
    below = {"queue", "switch", "engine", "first byte", "stream"}
    assert set(spans) == {"POST /v1/chat/completions", "switch to a", "wake a"} | below
    assert spans["POST /v1/chat/completions"].trace_id.hex() == trace
    assert spans["engine"].span_id.hex() == at_engine.split("-")[2]
    assert spans["switch"].links[0].trace_id == spans["switch to a"].trace_id
    assert spans["wake a"].parent_span_id == spans["switch to a"].span_id
