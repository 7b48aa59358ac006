"""Upgrades: the handshake, and bytes both ways."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web
from proxy_harness import EXTRA_BYTES, OK, Client, EngineSide, Proxy, answering, until

from llmux.core.effects import CutReason
from llmux.proxy import ClientGoneError
from llmux.upstream import EngineAddress, EngineProtocolError

UPGRADE = (
    b"GET /v1/realtime?model=a HTTP/1.1\r\nHost: llmux\r\nConnection: keep-alive, Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nconnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
)


class Echo:
    """Accepts the upgrade, then sends back what it gets."""

    def __init__(self, greeting: bytes = b"") -> None:
        self.greeting = greeting
        self.sides: list[EngineSide] = []
        self.left = asyncio.Event()

    async def __call__(self, side: EngineSide) -> None:
        await side.head()
        await side.send(SWITCH + b"\r\n" + self.greeting)
        self.sides.append(side)
        try:
            while data := await side.reader.read(65536):
                await side.send(data)
        finally:
            self.left.set()


async def upgraded(proxy: Proxy, first: bytes = b"") -> Client:
    client = await proxy.client()
    await client.send(UPGRADE + first)
    await client.expect(SWITCH + EXTRA_BYTES + b"\r\n")
    return client


async def test_the_handshake_and_bytes_both_ways(proxy: Proxy) -> None:
    echo = Echo(b"hello at once")
    engine = await proxy.engine(echo)
    client = await upgraded(proxy)
    await client.expect(b"hello at once")
    for size in (1, 10, 1000, 2_000_000):
        sending = asyncio.create_task(client.send(b"x" * size))
        await client.expect(b"x" * size)
        await sending
    assert proxy.outcomes == []
    assert engine.heads == [
        UPGRADE.replace(b"Host: llmux", b"Host: 127.0.0.1:%d" % engine.port)
        .replace(b"keep-alive, ", b"")
        .replace(b"\r\n\r\n", b"\r\nX-Request-ID: req-1\r\n\r\n")
    ]
    assert proxy.exchange.status == 101
    client.close()
    await echo.left.wait()
    await proxy.finished()


async def test_bytes_in_the_same_segment_as_the_handshake(proxy: Proxy) -> None:
    await proxy.engine(Echo())
    client = await upgraded(proxy, b"early bird")
    await client.expect(b"early bird")


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_the_engine_closes(proxy: Proxy, how: str) -> None:
    echo = Echo(b"x")
    await proxy.engine(echo)
    client = await upgraded(proxy)
    await client.expect(b"x")
    getattr(echo.sides[0], how)()
    await client.expect_end()
    await proxy.finished()
    assert proxy.outcomes == [None]
    assert proxy.exchange.broken == (None if how == "close" else "engine_lost")


@pytest.mark.parametrize("how", ["close", "reset", "half"])
async def test_the_client_closes(proxy: Proxy, how: str) -> None:
    echo = Echo()
    await proxy.engine(echo)
    client = await upgraded(proxy)
    if how == "half":
        client.writer.write_eof()
    else:
        getattr(client, how)()
    await echo.left.wait()
    await proxy.finished()
    assert isinstance(proxy.outcomes[0], (asyncio.CancelledError, ClientGoneError))


async def test_it_is_cut(proxy: Proxy) -> None:
    echo = Echo()
    await proxy.engine(echo)
    client = await upgraded(proxy)
    proxy.exchange.cut(CutReason.DRAIN_DEADLINE)
    await client.expect_end()
    await echo.left.wait()
    await proxy.finished()
    assert proxy.exchange.broken == "drain_deadline"


async def test_a_refusal_is_relayed_and_the_connection_goes_on(proxy: Proxy) -> None:
    await proxy.engine(answering(b"HTTP/1.1 403 No\r\nContent-Length: 7\r\n\r\nrefused"))
    client = await proxy.client()
    # What follows a declined upgrade is the next request.
    await client.send(UPGRADE + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    for _ in range(2):
        await client.expect(b"HTTP/1.1 403 No\r\nContent-Length: 7\r\n" + EXTRA_BYTES + b"\r\nrefused")


async def test_an_upgrade_behind_another_request(proxy: Proxy) -> None:
    async def script(side: EngineSide) -> None:
        if b"Upgrade" not in await side.head():
            await side.send(OK)
            await side.head()
        await side.send(SWITCH + b"\r\n")
        while data := await side.reader.read(65536):
            await side.send(data)

    await proxy.engine(script)
    client = await proxy.client()
    await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + UPGRADE + b"early")
    await client.until(b"ok")
    await client.expect(SWITCH + EXTRA_BYTES + b"\r\nearly")


async def test_only_known_upgrades_are_passed_on(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.send(UPGRADE.replace(b"websocket", b"h2c"))
    await client.until(b"ok")
    assert b"pgrade" not in engine.heads[0]


async def test_an_upgrade_that_connection_does_not_name_is_not_passed_on(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.get(b"/v1/x", b"Connection: keep-alive", b"Upgrade: websocket")
    await client.until(b"ok")
    assert b"pgrade" not in engine.heads[0]


async def test_an_engine_that_switches_unasked_is_refused(proxy: Proxy) -> None:
    await proxy.engine(Echo())
    client = await proxy.client()
    await client.get()
    await client.until(b"HTTP/1.1 502 ")
    await proxy.finished()
    assert isinstance(proxy.outcomes[0], EngineProtocolError)


async def test_a_flood_before_the_handshake_is_answered(proxy: Proxy) -> None:
    """aiohttp holds the first bytes and stops reading; then the engine does not read either."""
    flood = b"x" * 30_000_000
    arrived = asyncio.Event()

    async def script(side: EngineSide) -> None:
        await side.head()
        transport = proxy.requests[0].transport
        assert transport is not None
        await until(lambda: not transport.is_reading())
        side.writer.transport.pause_reading()
        await side.send(SWITCH + b"\r\n")
        await proxy.until_sender_waits()
        connection = proxy.relay._connection
        assert connection is not None
        assert connection.transport.get_write_buffer_size() < 1_000_000
        side.writer.transport.resume_reading()
        assert await side.reader.readexactly(len(flood)) == flood
        arrived.set()

    await proxy.engine(script)
    client = await proxy.client()
    sending = asyncio.create_task(client.send(UPGRADE + flood))
    await arrived.wait()
    await sending


@pytest.mark.parametrize("slow", ["client", "engine"])
async def test_a_slow_side_stalls_the_other(proxy: Proxy, slow: str) -> None:
    total = 30_000_000
    taken = asyncio.Event()

    async def script(side: EngineSide) -> None:
        await side.head()
        await side.send(SWITCH + b"\r\n")
        if slow == "client":
            await side.send(b"x" * total)
            return
        side.writer.transport.pause_reading()
        await proxy.until_sender_waits()
        transport = proxy.requests[0].transport
        assert transport is not None
        connection = proxy.relay._connection
        assert connection is not None
        assert not transport.is_reading()
        assert connection.transport.get_write_buffer_size() < 1_000_000
        side.writer.transport.resume_reading()
        await side.reader.readexactly(total)
        taken.set()

    await proxy.engine(script)
    client = await upgraded(proxy)
    if slow == "client":
        client.writer.transport.pause_reading()
        await proxy.until_reading_paused()
        client.writer.transport.resume_reading()
        assert len(await client.reader.readexactly(total)) == total
    else:
        await client.send(b"x" * total)
        await taken.wait()


async def test_a_real_websocket(proxy: Proxy) -> None:
    async def handler(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=["realtime"])
        await socket.prepare(request)
        async for message in socket:
            if message.data == "bye":
                await socket.close(code=4001, message=b"so long")
            else:
                await socket.send_str(f"echo {message.data}")
        return socket

    app = web.Application()
    app.router.add_get("/v1/realtime", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    proxy.address = EngineAddress("127.0.0.1", runner.addresses[0][1])
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(
                f"http://127.0.0.1:{proxy.port}/v1/realtime", protocols=["realtime"], compress=15
            ) as socket,
        ):
            assert socket.protocol == "realtime"
            await socket.send_str("a" * 200_000)
            assert (await socket.receive_str()) == "echo " + "a" * 200_000
            await socket.send_str("bye")
            message = await socket.receive()
            assert (message.type, socket.close_code) == (aiohttp.WSMsgType.CLOSE, 4001)
        await proxy.finished()
    finally:
        await runner.cleanup()
    await until(lambda: proxy.forwarder.pool.idle_count == 0)
