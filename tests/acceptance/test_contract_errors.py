"""Every refusal: its status, its envelope, its headers."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import request
from tests.harness.waiting import PATIENCE

OPENAI = {"message", "type", "code", "param"}


def envelope(answer, path: str = "") -> str:
    """Check the shape and return the message."""
    assert answer.get("Content-Type").startswith("application/json"), answer.headers
    assert len(answer.all("X-Request-ID")) == 1
    assert len(answer.all("X-LLMux-Queue-Seconds")) == 1
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"
        assert {"type", "message"} <= set(body["error"])
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == OPENAI
        assert isinstance(body["error"]["type"], str)
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    return body["error"]["message"]


def retry_after(answer) -> int:
    (value,) = answer.all("Retry-After")
    assert value.isdigit(), value
    assert 1 <= int(value) <= 3600
    return int(value)


PATHS = ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    found = Lab(tmp_path_factory.mktemp("errors"))
    found.write("a b", max_body="300KiB")
    found.start()
    yield found
    found.finish()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b'{"messages":[]}', b"not json", b'{"model":"a"', b'{"model":}', b"[]", b'"a"', b"null",
        b'{"model":null}', b'{"model":7}', b'{"model":["a"]}', b'{"model":""}', b'{"a":{"model":"a"}}',
        b"\xff\xfe{}", b'{"model":"a"}}', b"{'model':'a'}", b"model=a",
    ],
)  # fmt: skip
async def test_400_without_a_model_or_not_json(shared, path, body):
    before = shared.order()
    answer = await shared.raw(request("POST", path, body=body, headers=[("Content-Type", "application/json")]))
    assert answer.status == 400, (answer.status, answer.body)
    envelope(answer, path)
    assert shared.order() == before, "nothing woke for it"


@pytest.mark.parametrize("path", PATHS)
async def test_404_unknown_model(shared, path):
    answer = await shared.chat('nö"pe', path=path)
    assert answer.status == 404
    message = envelope(answer, path)
    assert "not found" in message
    assert 'nö"pe' in message
    if path.startswith("/v1/messages"):
        assert answer.json()["error"]["type"] == "not_found_error"
    else:
        assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", PATHS[:2])
async def test_413(shared, path, chunked):
    body = json.dumps({"model": "a", "x": "y" * 310_000}).encode()
    if chunked:
        data = request("POST", path, headers=[("Transfer-Encoding", "chunked")], body=b"")
        data += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        data = request("POST", path, body=body)
    answer = await shared.raw(data)
    assert answer.status == 413
    envelope(answer, path)
    if path == "/v1/messages":
        assert answer.json()["error"]["type"] == "request_too_large"


@pytest.mark.parametrize("more", [[], [("Expect", "100-continue")]], ids=["unasked", "asked"])
async def test_413_is_said_before_the_body_has_come(shared, more):
    async with await shared.wire() as line:
        await line.send(request("POST", "/v1/x", headers=[("Content-Length", str(10**12)), *more]))
        status = await asyncio.wait_for(line.reader.readline(), PATIENCE)
    assert status.startswith(b"HTTP/1.1 413 ")  # no 100, which would invite what is not wanted


async def test_404_for_a_path_of_nobody(shared):
    for method, target in (("GET", "/"), ("GET", "/favicon.ico"), ("POST", "/nowhere"), ("GET", "/llmux/x")):
        answer = await shared.ask(method, target)
        assert answer.status == 404 or (method, target) == ("GET", "/"), (target, answer.status)
        if answer.status == 404:
            envelope(answer)


async def test_a_wrong_method_is_in_the_envelope_too(shared):
    answer = await shared.ask("DELETE", "/health")
    assert answer.status in (404, 405)
    envelope(answer)


@pytest.mark.parametrize("path", PATHS[:2])
async def test_502_when_the_engine_breaks_off_before_its_headers(shared, path):
    for how in ("eof", "reset"):
        answer = await shared.chat("a", path=path, do={"fail": how})
        assert answer.status == 502, (how, answer.status, answer.body)
        envelope(answer, path)
    partial = {"raw": ["SFRUUC8xLjEgMjAwIE9LDQpYLVk6IDEN"], "raw_close": True}
    answer = await shared.chat("a", path=path, do=partial)
    assert answer.status == 502
    assert (await shared.chat("a")).status == 200


@pytest.mark.parametrize("path", PATHS[:2])
async def test_429_when_the_queue_is_full(lab, path):
    lab.write({"a": {"max_queued": 2, "env": {"KEY": "a"}}, "b": {}})
    lab.script("a", "wake", lab.hold("go"))
    lab.start()
    waiting = [asyncio.create_task(lab.chat("a", path=path)) for _ in range(2)]
    await lab.until_model("a", queued=2)
    answer = await lab.chat("a", path=path)
    assert answer.status == 429
    envelope(answer, path)
    retry_after(answer)
    if path == "/v1/messages":
        assert answer.json()["error"]["type"] == "rate_limit_error"
    lab.release("go")
    assert [(await w).status for w in waiting] == [200, 200]


@pytest.mark.parametrize("path", PATHS[:2])
async def test_503_when_the_wake_fails_shows_what_the_hook_said(lab, path):
    lab.write("a b")
    lab.script("a", "wake", "echo out of magic smoke >&2; echo on stdout; exit 3")
    lab.start()
    answer = await lab.chat("a", path=path)
    assert answer.status == 503
    message = envelope(answer, path)
    assert "out of magic smoke" in message
    assert "on stdout" in message
    retry_after(answer)
    again = await lab.chat("a", path=path)
    assert again.status == 503
    retry_after(again)
    await lab.until(lambda: lab.count("sleep", "a", "end") >= 1)
    assert (await lab.chat("b")).status == 200


@pytest.mark.parametrize("path", PATHS[:2])
async def test_504_after_request_timeout(lab, path):
    lab.write("a b", policy={"request_timeout": "300ms"} if path == PATHS[0] else {"request_timeout": 0.3})
    lab.script("a", "wake", lab.hold("go"))
    lab.start()
    before = time.monotonic()
    answer = await lab.chat("a", path=path)
    assert time.monotonic() - before >= 0.25
    assert answer.status == 504
    envelope(answer, path)
    assert float(answer.get("X-LLMux-Queue-Seconds")) >= 0.29
    lab.release("go")
    await lab.until_phase("a", "AWAKE")
    assert (await lab.chat("a", do={"delay": 0.5})).status == 200, "the time in the engine does not count"


async def test_408_when_the_client_falls_silent(lab):
    lab.write("a", body_idle_timeout="1s")
    lab.start()
    async with await lab.wire() as line:
        await line.send(request("POST", "/v1/x", headers=[("Content-Length", "50")]) + b'{"model"')
        answer = await line.body(await line.head())
    assert answer.status == 408
    envelope(answer)
    async with await lab.wire() as line:
        await line.send(request("POST", "/v1/x", headers=[("Content-Length", "25")]))
        for byte in b'{"model":"a",  "x":"123"}':
            await line.send(bytes([byte]))
            await asyncio.sleep(0.06)
        assert (await line.head()).status == 200, "slow is not silent"


async def test_api_keys(lab):
    lab.write("a", api_keys=["sk-one", "sk-two"])
    lab.start()
    for headers in (
        [],
        [("Authorization", "Bearer nope")],
        [("x-api-key", "sk-on")],
        [("Authorization", "Basic x")],
    ):
        for path in PATHS[:2]:
            answer = await lab.chat("a", path=path, headers=headers)
            assert answer.status == 401
            envelope(answer, path)
            if path == "/v1/messages":
                assert answer.json()["error"]["type"] == "authentication_error"
    assert lab.order() == []
    answer = await lab.chat("a", headers=[("Authorization", "Bearer sk-two"), ("X-Other-Key", "stays")])
    assert answer.status == 200
    seen = {n.lower(): v for n, v in answer.seen_headers()}
    assert "authorization" not in seen
    assert seen["x-other-key"] == "stays"
    answer = await lab.chat("a", headers=[("x-api-key", "sk-one"), ("Authorization", "Bearer for-the-engine")])
    assert answer.status == 200
    seen = {n.lower(): v for n, v in answer.seen_headers()}
    assert "x-api-key" not in seen
    assert seen["authorization"] == "Bearer for-the-engine"
    assert (await lab.get("/health")).status == 200


async def test_503_beyond_max_buffered(lab):
    lab.write("a", max_buffered="2MiB")
    lab.script("a", "wake", lab.hold("go"))
    lab.start()
    big = {"model": "a", "x": "y" * 1_500_000}
    first = asyncio.create_task(lab.post("/v1/x", body=big))
    await lab.until_model("a", queued=1)
    answer = await lab.post("/v1/x", body=big)
    assert answer.status == 503
    envelope(answer)
    retry_after(answer)
    lab.release("go")
    assert (await first).status == 200
    assert (await lab.post("/v1/x", body=big)).status == 200
