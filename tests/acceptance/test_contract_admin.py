"""The admin API: what operators do, and who may."""

from __future__ import annotations

import asyncio
import re
import socket

import pytest

from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import Wire, request


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    found = Lab(tmp_path_factory.mktemp("admin"))
    found.write({"a": {"aliases": ["ali"]}, "b": {}}, cors=["https://good.example"])
    found.start()
    yield found
    found.finish()


async def switch_over(lab) -> None:
    async def over():
        return (await lab.status())["switch"] is None

    await lab.until(over)


async def test_wake_and_sleep(lab):
    lab.write("a b")
    lab.start()
    answer = await lab.post("/llmux/models/a/wake")
    assert answer.status == 202
    assert re.search(r"\d", answer.body.decode()), "the switch's id"
    await lab.until_phase("a", "AWAKE")
    answer = await lab.post("/llmux/models/b/wake")
    assert answer.status == 202
    await lab.until_phase("b", "AWAKE")
    assert await lab.phase("a") == "ASLEEP"
    answer = await lab.post("/llmux/models/b/sleep")
    assert answer.status == 202
    await lab.until_phase("b", "ASLEEP")
    await switch_over(lab)
    assert lab.order() == ["wake a", "sleep a", "wake b", "sleep b"]
    assert (await lab.status())["awake"] == []


async def test_sleep_drains(lab):
    lab.write("a")
    lab.start()
    line = await lab.begin("a", do={"sse": 5, "hold_after": [2, "x"]})
    head = await line.head()
    assert (await lab.post("/llmux/models/a/sleep")).status == 202
    await lab.until_phase("a", "DRAINING")
    lab.release("x")
    assert (await line.body(head)).whole
    await line.close()
    await lab.until_phase("a", "ASLEEP")


async def test_the_switch_id_is_the_one_of_the_status(lab):
    lab.write("a")
    lab.script("a", "wake", lab.hold("w"))
    lab.start()
    answer = await lab.post("/llmux/models/a/wake")
    switch = (await lab.status())["switch"]
    assert set(switch) >= {"id", "from", "to", "phase", "since"}
    assert (switch["to"], switch["from"]) == ("a", [])
    assert switch["id"] in answer.json().values()
    await lab.until(lambda: lab.count("wake", "a"))
    assert lab.hooks("wake", "a")[0].switch == str(switch["id"])
    lab.release("w")
    await lab.until_phase("a", "AWAKE")


async def test_names_of_nobody_are_404_and_aliases_work(shared):
    for verb in ("wake", "sleep", "pin", "unpin", "reset"):
        answer = await shared.post(f"/llmux/models/zz/{verb}")
        assert answer.status == 404, verb
        assert answer.json()["error"]["message"]
    assert (await shared.post("/llmux/models/a/explode")).status == 404
    assert (await shared.get("/llmux/models/a/sleep")).status == 405
    assert (await shared.get("/llmux/models/a/wake")).status == 405


async def test_pin_and_unpin(lab):
    lab.write("a b")
    lab.start()
    assert (await lab.post("/llmux/models/a/pin")).status == 202
    await lab.until_phase("a", "AWAKE")
    answer = await lab.chat("b")
    assert answer.status == 503
    assert int(answer.get("Retry-After")) >= 1
    assert (await lab.chat("a")).status == 200
    answer = await lab.post("/llmux/models/b/wake")
    assert answer.status == 409
    assert answer.json()["error"]["message"]
    assert (await lab.post("/llmux/models/a/unpin")).status == 202
    assert (await lab.chat("b")).status == 200
    assert lab.order() == ["wake a", "sleep a", "wake b"]


async def test_a_lease_empties_the_gpu_until_it_ends(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    answer = await lab.post("/llmux/lease")
    assert answer.status == 202
    await lab.until_phase("a", "ASLEEP")
    await switch_over(lab)
    for name in "ab":
        answer = await lab.chat(name)
        assert answer.status == 503
        assert answer.get("Retry-After")
    assert (await lab.post("/llmux/models/a/wake")).status == 409
    assert lab.order() == ["wake a", "sleep a"]
    answer = await lab.ask("DELETE", "/llmux/lease")
    assert answer.status == 202
    assert (await lab.chat("b")).status == 200


async def test_reset_clears_a_backoff(lab):
    lab.write("a", backoff={"first": "30s", "max": "30s"})
    lab.script("a", "wake", "exit 1", times=1)
    lab.start()
    assert (await lab.chat("a")).status == 503
    assert (await lab.chat("a")).status == 503
    await switch_over(lab)
    assert (await lab.post("/llmux/models/a/reset")).status == 202
    assert (await lab.chat("a")).status == 200


async def test_an_admin_key(lab):
    lab.write("a", admin_key="sekrit")
    lab.start()
    for headers in ([], [("Authorization", "Bearer nope")]):
        answer = await lab.post("/llmux/models/a/wake", headers=headers)
        assert answer.status == 401
        assert answer.json()["error"]["message"]
        assert (await lab.get("/upstream/a/props", headers=headers)).status == 401
    assert lab.order() == []
    answer = await lab.post("/llmux/models/a/wake", headers=[("Authorization", "Bearer sekrit")])
    assert answer.status == 202
    await lab.until_phase("a", "AWAKE")


def outside() -> str | None:
    """Return an address of this host that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return None
        found = sock.getsockname()[0]
        return None if found.startswith(("127.", "0.")) else found


async def test_others_than_this_host_may_not_administer(lab):
    address = outside()
    if address is None:
        pytest.skip("this host has only loopback")
    lab.write("a", host="0.0.0.0", insecure=True)
    lab.start()

    async def ask(data: bytes):
        async with Wire(*await asyncio.open_connection(address, lab.port)) as line:
            return await line.ask(data)

    # spoofed headers must not help
    more = [("X-Forwarded-For", "127.0.0.1"), ("X-Real-IP", "127.0.0.1"), ("Forwarded", "for=127.0.0.1")]
    for target in ("/llmux/models/a/wake", "/llmux/lease", "/upstream/a/sleep", "/upstream/a/v1/x"):
        answer = await ask(request("POST", target, headers=more, body={}, host="127.0.0.1"))
        assert answer.status == 404 if target.endswith("/sleep") else answer.status == 403, target
        assert answer.json()["error"]["message"]
    assert lab.order() == []
    answer = await ask(request("POST", "/v1/x", body={"model": "a"}))
    assert answer.status == 200


async def test_foreign_origins_are_refused(shared):
    own = f"http://127.0.0.1:{shared.port}"
    asks = [
        ("POST", "/v1/chat/completions", {"model": "a"}),
        ("POST", "/llmux/models/b/reset", {}),
        ("GET", "/llmux/status", None),
        ("GET", "/v1/models", None),
    ]
    bad = (
        "https://evil.example", "null", "http://127.0.0.1:1", "https://good.example.evil", "http://good.example",
        f"http://127.0.0.1:{shared.port}.evil.example", f"https://127.0.0.1:{shared.port}",
    )  # fmt: skip
    for method, target, body in asks:
        for origin in bad:
            answer = await shared.ask(method, target, body=body, headers=[("Origin", origin)])
            assert answer.status == 403, (target, origin, answer.status)
            assert answer.json()["error"]["message"]
            assert answer.get("X-Request-ID")
        for origin in (own, "https://good.example"):
            more = {"host": f"127.0.0.1:{shared.port}"}
            answer = await shared.ask(method, target, body=body, headers=[("Origin", origin)], **more)
            assert answer.status < 300, (target, origin, answer.status)
        assert answer.get("Access-Control-Allow-Origin") in ("https://good.example", "*")


async def test_dns_rebinding_is_no_way_round(shared):
    """The page's own name resolves to loopback: Origin and Host agree, and neither is llmux's."""
    host = f"evil.example:{shared.port}"
    answer = await shared.post("/llmux/models/a/reset", headers=[("Origin", f"http://{host}")], host=host)
    assert answer.status == 403


async def test_options_are_answered_here(shared):
    before = len(shared.journal("request"))
    headers = [
        ("Origin", "https://good.example"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization, content-type, x-stainless-os"),
    ]
    answer = await shared.ask("OPTIONS", "/v1/chat/completions", headers=headers)
    assert answer.status == 204
    assert answer.get("Access-Control-Allow-Origin") == "https://good.example"
    assert "POST" in answer.get("Access-Control-Allow-Methods")
    allowed = answer.get("Access-Control-Allow-Headers").lower()
    assert {"authorization", "content-type", "x-stainless-os"} <= set(re.split(r",\s*", allowed))
    assert (await shared.ask("OPTIONS", "/v1/x", headers=[("Origin", "https://evil.example")])).status == 403
    assert (await shared.ask("OPTIONS", "/v1/x?model=a")).status == 204
    assert len(shared.journal("request")) == before


async def test_a_streamed_answer_carries_the_cors_header_too(shared):
    answer = await shared.chat("a", do={"sse": 2}, headers=[("Origin", "https://good.example")])
    assert answer.get("Access-Control-Allow-Origin") in ("https://good.example", "*")


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"not json", "application/json", 400),
        (b"[" * 50_000, "application/json", 400),
        (b"\xff\xfe\x00", "application/json", 400),
        (b"{}", "application/json; charset=no-such", 400),
        (b'{"for":"soon"}', "application/json", 400),
        (b'{"for":-1}', "application/json", 400),
        (b'{"for":1e400}', "application/json", 400),
        (b'{"for":NaN}', "application/json", 400),
        (b'{"until":1}', "application/json", 400),
        (b'{"for":[1]}', "application/json", 400),
        (b"[]", "application/json", 400),
        (b" " * 3_000_000, "application/json", 413),
    ],
)
async def test_bodies_that_the_admin_api_does_not_understand(shared, body, kind, status):
    before = len(shared.log)
    data = request("POST", "/llmux/models/a/pin", headers=[("Content-Type", kind)], body=body)
    answer = await shared.raw(data)
    assert answer.status == status or (kind.endswith("such") and answer.status == 202), answer.body
    if answer.status != 202:
        assert set(answer.json()["error"]) == {"message", "type", "code", "param"}
    else:
        assert (await shared.post("/llmux/models/a/unpin")).status == 202
    assert len(answer.all("X-Request-ID")) == 1
    assert len(answer.all("X-LLMux-Queue-Seconds")) == 1
    assert "Traceback" not in shared.log[before:]


@pytest.mark.parametrize("data", [
    b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n",
    b"TRACE /v1/x HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"BREW /v1/x?model=zz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models/%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models/%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http:///health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://[::1/health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://x:99999999/health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: [::1\r\nOrigin: http://[::1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x:abc\r\nOrigin: http://x:abc\r\n\r\n",
])  # fmt: skip
async def test_odd_requests_cause_no_accident(shared, data):
    before = len(shared.log)
    answer = await shared.raw(data)
    assert answer.status < 500 or answer.status in (501, 505), (answer.status, answer.body)
    assert len(answer.all("X-Request-ID")) == 1, answer
    assert len(answer.all("X-LLMux-Queue-Seconds")) == 1
    assert "Traceback" not in shared.log[before:]


async def test_foreign_origins_may_not_open_websockets(shared):
    headers = [
        ("Origin", "https://evil.example"), ("Connection", "Upgrade"), ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ]  # fmt: skip
    answer = await shared.raw(request("GET", "/v1/realtime?model=a", headers=headers))
    assert answer.status == 403
