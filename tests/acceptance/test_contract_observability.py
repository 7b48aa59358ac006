"""What llmux tells of itself: metrics, status, models, health, events, page."""

from __future__ import annotations

import asyncio
import json
import re

from tests.harness.lease.raw import request
from tests.harness.waiting import PATIENCE

METRICS = {
    "llmux_switch_total": {"from", "to", "result"},
    "llmux_switch_duration_seconds": {"from", "to"},
    "llmux_switch_drain_duration_seconds": {"from", "to"},
    "llmux_model_active_duration_seconds": {"model"},
    "llmux_switch_cost_ema_seconds": {"from", "to"},
    "llmux_request_queue_depth": {"model"},
    "llmux_request_queue_wait_seconds": {"model"},
    "llmux_model_in_flight": {"model"},
    "llmux_requests_total": {"model", "status"},
    "llmux_request_duration_seconds": {"model", "status"},
    "llmux_hook_duration_seconds": {"model", "hook"},
    "llmux_hook_failures_total": {"model", "hook"},
}


async def test_all_metrics_with_their_labels(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    await lab.chat("b")
    lab.script("a", "wake", "exit 1", times=1)
    await lab.chat("a")
    await lab.chat("nobody-knows-me")
    await lab.chat("b", do={"status": 418})
    answer = await lab.get("/metrics")
    assert answer.get("Content-Type").startswith("text/plain")
    text = answer.body.decode()
    assert "nobody-knows-me" not in text
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(llmux_\w+)(?:\{(.*?)\})? ", line):
            name = re.sub(r"_(bucket|sum|count|created)$", "", match[1])
            labels = set(re.findall(r'(\w+)="', match[2] or "")) - {"le"}
            found.setdefault(name, labels)
    for name, labels in METRICS.items():
        assert found.get(name) == labels, (name, found.get(name))
    values = await lab.metrics()
    assert values['llmux_switch_total{from="idle",result="success",to="a"}'] == 1
    assert values['llmux_switch_total{from="a",result="success",to="b"}'] == 1
    assert values['llmux_switch_total{from="b",result="failure",to="a"}'] == 1
    assert values['llmux_requests_total{model="a",status="200"}'] == 1
    assert values['llmux_requests_total{model="b",status="418"}'] == 1
    assert values['llmux_requests_total{model="a",status="503"}'] == 1
    assert values['llmux_model_in_flight{model="a"}'] == 0
    assert values['llmux_request_queue_depth{model="a"}'] == 0
    assert values['llmux_request_queue_wait_seconds_count{model="a"}'] >= 1
    assert values['llmux_model_active_duration_seconds_count{model="a"}'] == 1


async def test_gauges_move(lab):
    lab.write("a b")
    lab.start()
    line = await lab.begin("a", do={"hold": "x"})
    await lab.until_model("a", in_flight=1)
    waiter = await lab.begin("b")
    await lab.until_model("b", queued=1)
    values = await lab.metrics()
    assert values['llmux_model_in_flight{model="a"}'] == 1
    assert values['llmux_request_queue_depth{model="b"}'] == 1
    lab.release("x")
    for one in (line, waiter):
        assert (await one.head()).status == 200
        await one.close()


async def test_polls_keep_nothing_awake_and_wake_nothing(lab):
    lab.write("a", idle_sleep="400ms")
    lab.start()
    await lab.chat("a")

    async def asleep():
        for page in ("/metrics", "/v1/models", "/health", "/llmux/status", "/v1/models/a"):
            await lab.get(page)
        return await lab.phase("a") == "ASLEEP"

    await lab.until(asleep)
    assert lab.order() == ["wake a", "sleep a"]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


async def test_the_status_has_exactly_its_shape(lab):
    lab.write("a b", policy={"use": "fifo"})
    lab.script("b", "wake", lab.hold("w"))
    lab.start()
    status = await lab.status()
    assert set(status) >= {"version", "uptime", "ready", "policy", "awake", "switch", "models", "switch_costs"}
    assert isinstance(status["version"], str)
    assert is_number(status["uptime"])
    assert status["ready"] is True
    assert set(status["policy"]) == {"use", "options"}
    assert (status["policy"]["use"], status["awake"], status["switch"]) == ("fifo", [], None)
    await lab.chat("a")
    waiter = await lab.begin("b")
    await lab.until_phase("b", "WAKING")
    status = await lab.status()
    assert set(status["switch"]) >= {"id", "from", "to", "phase", "since"}
    assert (status["switch"]["from"], status["switch"]["to"]) == (["a"], "b")
    assert is_number(status["switch"]["since"])
    model = status["models"]["b"]
    assert set(model) >= {
        "phase",
        "queued",
        "in_flight",
        "oldest_wait",
        "awake_for",
        "backoff_until",
        "last_error",
    }
    assert (model["queued"], model["in_flight"]) == (1, 0)
    assert is_number(model["oldest_wait"])
    assert model["awake_for"] is None
    lab.release("w")
    assert (await waiter.head()).status == 200
    await waiter.close()
    status = await lab.status()
    assert is_number(status["models"]["b"]["awake_for"])
    assert status["models"]["a"]["phase"].lower() == "asleep"
    for cost in status["switch_costs"]:
        assert set(cost) == {"from", "to", "seconds", "samples"}


async def test_models_tell_their_state(lab):
    lab.write({"a": {"aliases": ["ali"]}, "b": {}})
    lab.start()
    await lab.chat("a")
    listed = (await lab.get("/v1/models")).json()["data"]
    assert "awake" in json.dumps(next(m for m in listed if m["id"] == "a")).lower()
    one = await lab.get("/v1/models/a")
    assert one.json()["id"] == "a"
    answer = await lab.get("/v1/models/zz")
    assert answer.status == 404
    assert set(answer.json()["error"]) == {"message", "type", "code", "param"}


async def test_health_stays_well_during_drains_and_backoffs(lab):
    lab.write("a b", backoff={"first": "20s", "max": "20s"})
    lab.start()
    line = await lab.begin("a", do={"hold": "x"})
    await lab.until_model("a", in_flight=1)
    waiter = await lab.begin("b")
    await lab.until_phase("a", "DRAINING")
    answer = await lab.get("/health")
    assert answer.status == 200
    assert "a" in answer.body.decode()
    lab.release("x")
    for one in (line, waiter):
        assert (await one.head()).status == 200
        await one.close()
    lab.script("a", "wake", "exit 1")
    assert (await lab.chat("a")).status == 503
    assert (await lab.get("/health")).status == 200


async def test_events_stream_what_happens(lab):
    lab.write("a")
    lab.start()
    line = await lab.wire()
    await line.send(request("GET", "/llmux/events"))
    head = await line.head()
    assert head.status == 200
    assert head.get("Content-Type").startswith("text/event-stream")
    assert head.get("X-Accel-Buffering") == "no"
    await lab.chat("a")
    seen = b""
    async with asyncio.timeout(PATIENCE):
        while b"a" not in seen or b"data:" not in seen or b"\n\n" not in seen:
            seen += await line.reader.read(65536)
    await line.close()
    assert (await lab.get("/health")).status == 200


async def test_the_page_is_there(lab):
    lab.write("a")
    lab.start()
    answer = await lab.get("/llmux/ui")
    assert answer.status == 200
    assert answer.get("Content-Type").startswith("text/html")
