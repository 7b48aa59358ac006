"""Slow readers, and clients that leave."""

from __future__ import annotations

import asyncio
import hashlib
import socket

import pytest
from proxy_harness import Body, EngineSide, Proxy, answering, deaf_host, until

from llmux.proxy import ClientGoneError
from llmux.upstream import ConnectionPool, EngineAddress

PIECE = b"x" * 100_000
COUNT = 300
# A transport's high-water mark, and the largest block that a loop reads at once.
BOUND = (1 << 16) + (1 << 18) + 1024


@pytest.mark.parametrize("framing", ["chunked", "length", "until close", "unchunked"])
async def test_a_slow_client_stalls_the_engine_and_costs_no_memory(proxy: Proxy, framing: str) -> None:
    sent = 0

    async def script(side: EngineSide) -> None:
        nonlocal sent
        await side.request()
        head = {
            "chunked": b"Transfer-Encoding: chunked\r\n",
            "unchunked": b"Transfer-Encoding: chunked\r\n",
            "length": b"Content-Length: %d\r\n" % (len(PIECE) * COUNT),
            "until close": b"",
        }[framing]
        chunked = framing in {"chunked", "unchunked"}
        piece = b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if chunked else PIECE
        await side.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        for _ in range(COUNT):
            await side.send(piece)
            sent += len(PIECE)
        if chunked:
            await side.send(b"0\r\n\r\n")
        elif framing == "until close":
            side.close()

    await proxy.engine(script)
    client = await proxy.client()
    client.writer.transport.pause_reading()
    await client.get(version=b"1.0" if framing == "unchunked" else b"1.1")
    await proxy.until_reading_paused()
    transport = proxy.requests[0].transport
    assert transport is not None
    connection = proxy.relay._connection
    assert connection is not None
    for _ in range(20):  # however long it lasts
        await asyncio.sleep(0)
        assert 0 < transport.get_write_buffer_size() < BOUND
        assert not connection.transport.is_reading()
    assert sent < len(PIECE) * COUNT
    assert proxy.outcomes == []

    client.writer.transport.resume_reading()
    head = await client.until(b"\r\n\r\n")
    if b"Transfer-Encoding" in head:
        got = 0
        while size := int(await client.until(b"\r\n"), 16):
            got += len((await client.reader.readexactly(size + 2)).rstrip(b"\r\n"))
        await client.until(b"\r\n")
    else:
        got = len(await client.reader.readexactly(len(PIECE) * COUNT))
    assert got == len(PIECE) * COUNT
    await proxy.finished()
    assert proxy.outcomes == [None]


async def test_every_byte_of_a_large_answer_arrives_in_order(proxy: Proxy) -> None:
    parts = [hashlib.sha256(b"%d" % n).digest() * 1000 for n in range(300)]
    size = sum(map(len, parts))
    await proxy.engine(answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"".join(parts)))
    client = await proxy.client()
    for _ in range(2):
        await client.get()
        await client.until(b"\r\n\r\n")
        await client.expect(b"".join(parts))


async def test_pipelined_answers_wait_for_the_client(proxy: Proxy) -> None:
    await proxy.engine(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000))
    client = await proxy.client()
    client.writer.transport.pause_reading()
    await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
    await proxy.until(lambda: proxy.requests)
    transport = proxy.requests[0].transport
    assert transport is not None
    await until(transport.get_write_buffer_size)
    for _ in range(50):
        await asyncio.sleep(0)
        assert transport.get_write_buffer_size() < BOUND
    assert len(proxy.exchanges) < 200
    client.writer.transport.resume_reading()
    for _ in range(200):
        await client.until(b"\r\n\r\n")
        await client.reader.readexactly(200_000)


# ---- clients that leave


class Watched:
    """An engine that tells when it has been written to and when it was left."""

    def __init__(self, *parts: bytes, forever: bytes = b"") -> None:
        self.parts = parts
        self.forever = forever
        self.waiting = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, side: EngineSide) -> None:
        await side.request()
        await side.send(*self.parts)
        self.waiting.set()
        try:
            while self.forever:
                await side.send(self.forever)
            await side.closed()
        finally:
            self.left.set()


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"186a0\r\n" + PIECE + b"\r\n"


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize(
    ("parts", "forever", "reads"),
    [
        pytest.param((), b"", True, id="before the head"),
        pytest.param((HEAD, b"5\r\nhel"), b"", True, id="in a pause"),
        pytest.param((HEAD,), CHUNK, True, id="in full flow"),
        pytest.param((HEAD,), CHUNK, False, id="while it does not read"),
    ],
)
async def test_the_engine_is_left_when_the_client_leaves(
    proxy: Proxy,
    how: str,
    parts: tuple[bytes, ...],
    forever: bytes,
    *,
    reads: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmux.proxy.relay._LOOK_EVERY", 0.01)
    watched = Watched(*parts, forever=forever)
    await proxy.engine(watched)
    client = await proxy.client()
    if not reads:
        client.writer.transport.pause_reading()
    await client.get()
    await watched.waiting.wait()
    if reads and parts:
        await client.until(b"\r\n\r\n")
    if not reads:
        await proxy.until_reading_paused()
    if how == "half":
        client.writer.write_eof()
    elif how == "close":
        client.writer.transport.abort()
    else:
        client.reset()
    await watched.left.wait()
    await proxy.finished()
    assert isinstance(proxy.outcomes[0], (asyncio.CancelledError, ClientGoneError))
    assert proxy.forwarder.pool.idle_count == 0
    assert proxy.exchange.ended_at is not None
    assert proxy.exchange.on_cut is None


async def test_leaving_while_the_body_is_sent(proxy: Proxy) -> None:
    left = asyncio.Event()

    async def script(side: EngineSide) -> None:
        await side.head()
        side.writer.transport.pause_reading()
        await proxy.until_sender_waits()
        client.reset()
        await proxy.finished()
        side.writer.transport.resume_reading()
        await side.closed()
        left.set()

    await proxy.engine(script)
    proxy.options["body"] = Body([b"x" * 1_000_000] * 30)
    client = await proxy.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    await left.wait()


async def test_leaving_while_it_connects(proxy: Proxy) -> None:
    with deaf_host() as proxy.address:
        client = await proxy.client()
        await client.get()
        await proxy.until(lambda: proxy.exchanges)
        await until(lambda: proxy.exchange.on_cut)
        client.reset()
        await proxy.finished()
    assert isinstance(proxy.outcomes[0], asyncio.CancelledError)


async def test_a_client_that_goes_at_the_very_end(proxy: Proxy) -> None:
    go_on = asyncio.Event()

    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await go_on.wait()

    await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    await client.until(b"abc\r\n")
    proxy.relay._transport = Closing()  # type: ignore[assignment]
    go_on.set()
    await proxy.finished()
    assert isinstance(proxy.outcomes[0], ClientGoneError)


async def test_a_client_that_reads_again_after_a_while(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmux.proxy.relay._LOOK_EVERY", 0.005)
    size = 30_000_000
    await proxy.engine(answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, b"x" * size))
    client = await proxy.client()
    client.writer.transport.pause_reading()
    await client.get()
    await proxy.until_reading_paused()
    look = proxy.relay._look
    await until(lambda: proxy.relay._look is not look)
    client.writer.transport.resume_reading()
    await client.until(b"\r\n\r\n")
    assert len(await client.reader.readexactly(size)) == size


async def test_a_closing_client_is_noticed_by_writing_to_it(proxy: Proxy) -> None:
    """Without waiting for aiohttp to cancel the handler."""
    watched = Watched(HEAD)
    go_on = asyncio.Event()

    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(HEAD)
        await go_on.wait()
        await side.send(b"1\r\na\r\n")
        await side.closed()
        watched.left.set()

    await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    await client.until(b"\r\n\r\n")
    transport = proxy.requests[0].transport
    assert transport is not None
    proxy.relay._transport = Closing()  # type: ignore[assignment]
    go_on.set()
    await watched.left.wait()
    await proxy.finished()
    assert isinstance(proxy.outcomes[0], ClientGoneError)


class Closing:
    def is_closing(self) -> bool:
        return True

    def abort(self) -> None:
        pass


async def test_what_an_engine_is_sent_goes_at_once_and_what_it_sends_is_acknowledged_in_pairs() -> None:
    """Also on a fresh connection. The first is the loops' doing; and an engine's host that has died is noticed."""
    with socket.create_server(("127.0.0.1", 0)) as engine:
        pool = ConnectionPool()
        connection = await pool.connect(EngineAddress("127.0.0.1", engine.getsockname()[1]))
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if hasattr(socket, "TCP_QUICKACK"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) == 0
        connection.abort()
        await pool.close()


async def test_the_death_of_another_machine_is_noticed_within_minutes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as engine:
        pool = ConnectionPool()
        elsewhere = await pool.connect(EngineAddress("0.0.0.0", engine.getsockname()[1]))
        sock = elsewhere.transport.get_extra_info("socket")
        idle, every, probes = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + every * probes <= 120
        elsewhere.abort()
        await pool.close()
