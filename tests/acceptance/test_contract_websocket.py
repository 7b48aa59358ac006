"""WebSockets: the engine's own handshake, then bytes both ways."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import request, uid
from tests.harness.waiting import PATIENCE

UPGRADE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"),
    ("Sec-WebSocket-Protocol", "realtime, x.y"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    found = Lab(tmp_path_factory.mktemp("ws"))
    found.write("a b")
    found.start()
    yield found
    found.finish()


def handshake(target: str = "/v1/realtime?model=a", **more) -> bytes:
    return request("GET", target, headers=UPGRADE, **more)


async def test_bytes_pass_both_ways_unparsed(shared):
    async with await shared.wire() as line:
        await line.send(handshake(do={"greeting": "hello at once"}))
        head = await line.head()
        assert head.status == 101
        assert head.get("Sec-WebSocket-Accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert head.get("Upgrade").lower() == "websocket"
        assert "upgrade" in head.get("Connection").lower()
        assert head.get("X-Engine") == "a"
        assert len(head.all("X-Request-ID")) == 1
        assert len(head.all("X-LLMux-Queue-Seconds")) == 1
        assert await asyncio.wait_for(line.reader.readexactly(13), PATIENCE) == b"hello at once"
        for size in (1, 5, 1000, 2_000_000):
            data = os.urandom(size)
            sending = asyncio.create_task(line.send(data))
            assert await asyncio.wait_for(line.reader.readexactly(size), PATIENCE) == data
            await sending
        await shared.until_model("a", in_flight=1)
    await shared.until_model("a", in_flight=0)


async def test_the_engine_gets_the_clients_handshake(shared):
    answer = await shared.raw(handshake(do={"ws_refuse": 403}), method="GET")
    assert (answer.status, answer.body, answer.get("X-Engine")) == (403, b"refused", "a")
    await shared.until_model("a", in_flight=0)


async def test_the_engine_closing_ends_it(shared):
    data = handshake()
    async with await shared.wire() as line:
        await line.send(data)
        assert (await line.head()).status == 101
        await line.send(b"x")
        assert await asyncio.wait_for(line.reader.readexactly(1), PATIENCE) == b"x"
    await shared.until(lambda: [r for r in shared.journal("gone") if r["uid"] == uid(data)])


async def test_the_engine_closing_in_order_closes_the_client_too(shared):
    async with await shared.wire() as line:
        await line.send(handshake(do={"greeting": "bye", "ws_close": 0.05}))
        assert (await line.head()).status == 101
        assert await asyncio.wait_for(line.reader.read(), PATIENCE) == b"bye"
    await shared.until_model("a", in_flight=0)


async def test_control_paths_are_refused_here_too(shared):
    for target in (
        "/sleep?model=a",
        "/v1/../sleep?model=a",
        "/v1/realtime/..?model=a",
        "/v1/load_lora_adapter?model=a",
    ):
        assert (await shared.raw(handshake(target))).status == 404
    assert (await shared.raw(handshake("/v1/realtime?model=zz"))).status == 404
    assert (await shared.raw(handshake("/v1/realtime"))).status == 400


async def test_an_open_websocket_holds_the_switch(lab):
    lab.write("a b")
    lab.start()
    line = await lab.wire()
    await line.send(handshake())
    assert (await line.head()).status == 101
    other = asyncio.create_task(lab.chat("b"))
    await lab.until_phase("a", "DRAINING")
    await line.send(b"still here")
    assert await asyncio.wait_for(line.reader.readexactly(10), PATIENCE) == b"still here"
    assert lab.order() == ["wake a"]
    await line.close()
    assert (await other).status == 200


async def test_the_engine_dying_closes_the_clients_side(lab):
    lab.write("a")
    lab.start()
    async with await lab.wire() as line:
        await line.send(handshake())
        assert (await line.head()).status == 101
        lab.crash("a")
        assert await asyncio.wait_for(line.reader.read(), PATIENCE) == b""
    await lab.until_model("a", in_flight=0)
