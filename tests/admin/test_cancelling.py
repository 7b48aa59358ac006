"""An operator ends a request by the id that its client has for it."""

import pytest

from tests.server.house import held, until


async def cancel(house, name, **more):
    return await house.ask("POST", f"/llmux/requests/{name}/cancel", {}, **more)


@pytest.mark.parametrize("path", ["/v1/hold", "/v1/hold?model=a"])
async def test_a_request_in_flight(house, path):
    await house.open("a b")
    body = {} if "?" in path else {"model": "a"}  # on the fast path, and beside it
    await house.chat("a")
    line = await house.begin("POST", path, body, X_Request_ID="mine")
    other = await house.begin("POST", path, body, X_Request_ID="other")
    await until(lambda: len(house.engine.heads) == 3)
    reply = await cancel(house, "mine")
    assert (reply.status, reply.json()) == (202, {"request_id": "mine", "models": ["a"]})
    told = await line.reply()
    assert (told.status, told.error["code"]) == (410, "cancelled")
    assert told.headers["x-request-id"] == "mine"
    await until(lambda: house.in_flight("a") == 1)
    house.engine.go.set()
    assert (await other.reply()).status == 200
    metrics = (await house.ask("GET", "/metrics")).body.decode()
    assert 'llmux_requests_cut_total{model="a",reason="cancelled"} 1.0' in metrics
    [logged] = house.log.named("request_cancelled")
    assert (logged["model"], logged["request_id"]) == ("a", "mine")


async def test_a_stream_ends_with_an_error_event(house):
    await house.open("a b")
    await house.chat("a")
    line = await house.begin("POST", "/v1/stream", {"model": "a"}, X_Request_ID="mine")
    await line.reader.readuntil(b"data: 1\n\n")
    assert (await cancel(house, "mine")).status == 202
    rest = await line.closed()
    assert b'"code": "cancelled"' in rest
    assert not rest.endswith(b"0\r\n\r\n")
    await until(lambda: house.in_flight("a") == 0)


async def test_a_request_that_waits(house):
    await house.open({"a": {}, "b": {"wake": f"{held('b')}; touch $LLMUX_MODEL.up"}})
    lines = [await house.begin("POST", "/v1/x", {"model": "b"}, X_Request_ID=name) for name in ("one", "two")]
    await until(lambda: house.queued("b") == 2)
    assert (await cancel(house, "one")).json()["models"] == ["b"]
    told = await lines[0].reply()
    assert (told.status, told.error["code"]) == (410, "cancelled")
    assert house.queued("b") == 1
    house.release("b")
    assert (await lines[1].reply()).status == 200
    assert not house.switcher.inside.tickets


@pytest.mark.parametrize("path", ["/v1/hold", "/v1/hold?model=a"])
async def test_what_a_drain_waits_for_has_a_name(house, path):
    await house.open("a b")
    body = {} if "?" in path else {"model": "a"}  # on the fast path, and beside it
    await house.chat("a")
    stream = await house.begin("POST", "/v1/stream", {"model": "a"}, X_Request_ID="stream")
    await stream.reader.readuntil(b"data: 1\n\n")
    line = await house.begin("POST", path, body, X_Request_ID="mine")
    await until(lambda: house.in_flight("a") == 2)
    waits = await house.begin("POST", "/v1/x", {"model": "b"}, X_Request_ID="other")
    await until(lambda: house.queued("b") == 1)
    status = (await house.ask("GET", "/llmux/status")).json()["models"]
    serving = status["a"]["serving"]
    assert [(one["request_id"], one["key"], one["answering"]) for one in serving] == [
        ("stream", None, True),
        ("mine", None, False),
    ]
    assert serving[0]["for"] >= serving[1]["for"] >= 0
    assert status["b"]["serving"] == []
    for one in serving:
        assert (await cancel(house, one["request_id"])).status == 202
    assert (await line.reply()).status == 410
    assert (await waits.reply()).status == 200


async def test_one_that_does_not_exist(house):
    await house.open("a")
    reply = await cancel(house, "nobody-knows")
    assert (reply.status, reply.error["code"]) == (404, "request_not_found")
    assert (await house.ask("GET", "/llmux/requests/x/cancel")).status == 405


async def test_only_operators_may(house):
    await house.open("a", admin_key="secret", api_keys=["client"])
    assert (await cancel(house, "x", Authorization="Bearer client")).status == 401
    assert (await cancel(house, "x", Authorization="Bearer secret")).status == 404
