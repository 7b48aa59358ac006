"""Exchanges ended from outside, in every phase."""

from __future__ import annotations

import asyncio
import json
import socket

import anthropic
import openai
import pytest
from proxy_harness import EXTRA_BYTES, Body, EngineSide, Proxy, deaf_host, until

from llmux.core.effects import CutReason
from llmux.errors import UnavailableError
from llmux.upstream import EngineAddress, EngineConnection

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Held:
    """An engine that sends something and then waits until its connection is closed."""

    def __init__(self, *parts: bytes, read_body: bool = True) -> None:
        self.parts = parts
        self.read_body = read_body
        self.waiting = asyncio.Event()
        self.closed = asyncio.Event()

    async def __call__(self, side: EngineSide) -> None:
        await (side.request() if self.read_body else side.head())
        await side.send(*self.parts)
        self.waiting.set()
        if self.read_body:
            await side.closed()
        else:
            await asyncio.sleep(30)
        self.closed.set()


def unavailable(proxy: Proxy) -> UnavailableError:
    [error] = proxy.outcomes
    assert isinstance(error, UnavailableError)
    return error


async def test_the_engine_is_told_of_an_end_before_the_loop_turns() -> None:
    # A sleep hook may start in the same turn: it must find nothing in flight.
    with socket.create_server(("127.0.0.1", 0)) as server:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: EngineConnection(loop), *server.getsockname())
        engine, _ = server.accept()
        with engine:
            engine.settimeout(10)
            connection.abort()
            assert engine.recv(1) == b""
            connection.abort()  # once more does no harm
            await until(lambda: connection.lost)


async def test_before_it_was_sent(proxy: Proxy) -> None:
    engine = await proxy.engine(Held())
    proxy.on_arrival = lambda exchange: exchange.cut(CutReason.STOPPING)
    client = await proxy.client()
    await client.get()
    await client.until(b'"code": "stopping"')
    assert unavailable(proxy).retry_after is None
    assert engine.connections == 0


async def test_while_it_connects(proxy: Proxy) -> None:
    with deaf_host() as proxy.address:
        client = await proxy.client()
        await client.get()
        await proxy.until(lambda: proxy.exchanges)
        await until(lambda: proxy.exchange.on_cut)
        proxy.exchange.cut(CutReason.DRAIN_DEADLINE, 2.5)
        await client.until(b'"code": "drain_deadline"')
    assert unavailable(proxy).retry_after == 2.5


async def test_in_the_moment_when_its_connection_is_made(proxy: Proxy) -> None:
    """Neither is there anything to interrupt any more, nor a relay that could be told yet."""
    held = Held()
    engine = await proxy.engine(held)
    connect = proxy.forwarder.pool.connect

    async def connect_and_cut(address: EngineAddress) -> EngineConnection:
        connection = await connect(address)
        proxy.exchange.on_cut = None
        proxy.exchange.cut(CutReason.STOPPING)
        return connection

    proxy.forwarder.pool.connect = connect_and_cut  # type: ignore[method-assign]
    client = await proxy.client()
    await client.get()
    await client.until(b'"code": "stopping"')
    unavailable(proxy)
    assert engine.heads == []


async def test_while_its_answer_is_awaited(proxy: Proxy) -> None:
    held = Held()
    await proxy.engine(held)
    client = await proxy.client()
    await client.get()
    await held.waiting.wait()
    proxy.exchange.cut(CutReason.DRAIN_DEADLINE, 2.5)
    head = await client.until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 3\r\n" in head
    await held.closed.wait()
    assert proxy.exchange.status is None


async def test_while_its_body_is_sent(proxy: Proxy) -> None:
    held = Held(read_body=False)
    await proxy.engine(held)
    proxy.options["body"] = Body([b"x" * 1_000_000] * 30)
    client = await proxy.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    await held.waiting.wait()
    await proxy.until_sender_waits()
    proxy.exchange.cut(CutReason.DRAIN_DEADLINE, 1)
    await client.until(b'"code": "drain_deadline"')
    unavailable(proxy)


@pytest.mark.parametrize(
    ("target", "event"),
    [
        (
            b"/v1/chat/completions",
            (
                b'\n\ndata: {"error": {"message": "%s", "type": "service_unavailable", '
                b'"code": "drain_deadline", "param": null}}\n\n'
            ),
        ),
        (
            b"/v1/messages?beta=1",
            (
                b'\n\nevent: error\ndata: {"type": "error", "error": {"type": "overloaded_error", '
                b'"message": "%s"}, "request_id": "req-1"}\n\n'
            ),
        ),
    ],
)
async def test_an_event_stream_between_two_chunks(proxy: Proxy, target: bytes, event: bytes) -> None:
    held = Held(SSE + chunk(b"data: 1\n\n"))
    await proxy.engine(held)
    client = await proxy.client()
    await client.get(target)
    await client.until(b"data: 1\n\n\r\n")
    proxy.exchange.cut(CutReason.DRAIN_DEADLINE, 1)
    rest = await client.rest()
    message = b"The model had to make room for another one before this request was done."
    assert rest == chunk(event % message)
    await held.closed.wait()
    assert proxy.outcomes == [None]
    assert proxy.exchange.broken == "drain_deadline"
    assert proxy.exchange.status == 200


async def test_an_event_stream_before_its_first_chunk(proxy: Proxy) -> None:
    held = Held(SSE)
    await proxy.engine(held)
    client = await proxy.client()
    await client.get()
    await client.until(b"\r\n\r\n")
    proxy.exchange.cut(CutReason.STOPPING)
    assert b'"code": "stopping"' in await client.rest()


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(SSE + b"9", id="inside a size line"),
        pytest.param(SSE + b"9\r\ndata", id="inside a chunk"),
        pytest.param(SSE + b"9\r\ndata: 1\n\n\r", id="inside its end"),
        pytest.param(SSE + b"9\r\ndata: 1\n\n\r\n0\r\n", id="after the last chunk"),
        pytest.param(
            SSE[:-2] + b"Content-Encoding: gzip\r\n\r\n9\r\n012345678\r\n",
            id="compressed",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", id="not an event stream"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\ndata: 1\n\n",
            id="sized",
        ),
    ],
)
async def test_where_no_event_can_be_put(proxy: Proxy, sent: bytes) -> None:
    held = Held(sent)
    await proxy.engine(held)
    client = await proxy.client()
    await client.get()
    await client.until(b"\r\n\r\n")
    _, _, body = sent.partition(b"\r\n\r\n")
    await client.expect(body)
    proxy.exchange.cut(CutReason.DRAIN_DEADLINE)
    await client.expect_end()
    await held.closed.wait()
    assert proxy.exchange.broken == "drain_deadline"


async def test_an_event_stream_that_ends_with_its_connection(proxy: Proxy) -> None:
    held = Held(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1")
    await proxy.engine(held)
    client = await proxy.client()
    await client.get()
    await client.until(chunk(b"data: 1"))
    proxy.exchange.cut(CutReason.STOPPING)
    rest = await client.rest()
    assert b'\n\ndata: {"error": ' in rest
    assert not rest.endswith(b"0\r\n\r\n")


async def test_an_old_client_is_not_told_that_it_was_all(proxy: Proxy) -> None:
    held = Held(SSE + chunk(b"data: 1\n\n"))
    await proxy.engine(held)
    client = await proxy.client()
    await client.get(version=b"1.0")
    await client.until(b"data: 1\n\n")
    proxy.exchange.cut(CutReason.STOPPING)
    with pytest.raises(ConnectionResetError):
        await client.rest()
    await held.closed.wait()


async def test_after_the_end_it_does_nothing(proxy: Proxy) -> None:
    async def script(side: EngineSide) -> None:
        while True:
            await side.request()
            await side.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    engine = await proxy.engine(script)
    client = await proxy.client()
    for number in range(2):
        await client.get()
        await client.expect(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + EXTRA_BYTES + b"\r\nok")
        await proxy.finished(number + 1)
        proxy.exchange.cut(CutReason.STOPPING)
        assert proxy.exchange.cut_off is None
    assert engine.connections == 1


async def test_a_stalled_client_does_not_hold_it_up(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmux.proxy.relay._FLUSH_TIMEOUT", 0.01)

    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(SSE)
        for _ in range(400):
            await side.send(chunk(b"x" * 100_000))

    await proxy.engine(script)
    client = await proxy.client()
    client.writer.transport.pause_reading()
    await client.get()
    await proxy.until_reading_paused()
    proxy.exchange.cut(CutReason.DRAIN_DEADLINE)
    await proxy.finished()
    assert proxy.exchange.broken == "drain_deadline"
    await until(lambda: proxy.requests[0].transport is None)


# ---- with the official SDKs

OPENAI_CHUNK = {
    "id": "c",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
}


@pytest.mark.parametrize("how", ["cut", "engine died", "inside a chunk"])
async def test_openais_sdk_raises(proxy: Proxy, how: str) -> None:
    event = chunk(b"data: " + json.dumps(OPENAI_CHUNK).encode() + b"\n\n")
    held = Held(SSE + event + (event[:30] if how == "inside a chunk" else b""))
    await proxy.engine(held)
    got = []
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key="k", max_retries=0
    ) as client:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        )
        # What the SDK lets through when a chunk is cut in two is its HTTP library's error.
        expected = openai.APIError if how != "inside a chunk" else Exception
        with pytest.raises(expected) as caught:  # noqa: PT012
            async for part in stream:
                got.append(part.choices[0].delta.content)
                if how == "engine died":
                    for writer in held_writers(proxy):
                        writer.transport.abort()
                else:
                    proxy.exchange.cut(CutReason.DRAIN_DEADLINE)
    assert got == ["a"]
    if how == "cut":
        assert "make room" in str(caught.value)


def held_writers(proxy: Proxy) -> list[asyncio.StreamWriter]:
    assert proxy.engines
    return list(proxy.engines[-1].open)


@pytest.mark.parametrize("how", ["cut", "engine died"])
async def test_anthropics_sdk_raises(proxy: Proxy, how: str) -> None:
    start = {
        "type": "message_start",
        "message": {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": "m",
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 1},
        },
    }
    held = Held(SSE + chunk(b"event: message_start\ndata: " + json.dumps(start).encode() + b"\n\n"))
    await proxy.engine(held)
    got = []
    async with anthropic.AsyncAnthropic(
        base_url=f"http://127.0.0.1:{proxy.port}", api_key="k", max_retries=0
    ) as client:
        stream = await client.messages.create(
            model="m", max_tokens=5, messages=[{"role": "user", "content": "x"}], stream=True
        )
        with pytest.raises(anthropic.APIStatusError):  # noqa: PT012
            async for part in stream:
                got.append(part.type)
                if how == "engine died":
                    for writer in held_writers(proxy):
                        writer.transport.abort()
                else:
                    proxy.exchange.cut(CutReason.DRAIN_DEADLINE)
    assert got == ["message_start"]
