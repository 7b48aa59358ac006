"""Whole chunks go past the relay: all the same what is counted is exact, and their client is looked after."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from proxy_harness import END, STREAM, Exchanging, chunk

from llmux.core.effects import CutReason
from llmux.proxy import ClientGoneError, Exchange
from llmux.proxy.relay import Relay
from llmux.upstream import EngineActivity, EngineAddress, EngineConnection
from llmux.upstream.connection import AT_ONCE


class Pipe:
    """A transport that only takes."""

    def __init__(self) -> None:
        self.taken = b""
        self.closing = False
        self.reading = True

    def write(self, data: bytes) -> None:
        self.taken += data

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, _name: str) -> None:
        return None


class Flow:
    writing_paused = False


class Reader(Exchanging):
    """The client of one exchange, and what became of it."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.pipe, self.flow = pipe, Flow()
        self.ends: list[Exception | None] = []


class Stream:
    """An event stream whose head and first event have passed."""

    def __init__(self, client: Any = None) -> None:
        loop = asyncio.get_running_loop()
        self.reader, self.activity = Reader(client or Pipe()), EngineActivity(counting=True)
        self.exchange = Exchange(EngineAddress("127.0.0.1", 1), "id", self.activity)
        self.relay = Relay(self.reader, self.exchange, loop, self.reader.ends.append)  # type: ignore[arg-type]
        self.connection = EngineConnection(loop)
        self.pipe = Pipe()
        self.connection.connection_made(self.pipe)  # type: ignore[arg-type]
        self.relay.attach(self.connection)
        self.connection.begin(self.relay)
        self.connection.write_whole(b"request")
        self.sent = b""
        self.feed(STREAM)
        self.feed(chunk("first"))

    def feed(self, data: bytes) -> None:
        self.sent += data
        self.connection.data_received(data)

    @property
    def passed(self) -> bytes:
        """What the client got of the body."""
        return self.reader.pipe.taken.partition(b"\r\n\r\n")[2]

    def right(self, events: int) -> bool:
        """Whether all is counted."""
        counted = self.exchange.bytes_out, self.exchange.events, self.activity.streamed
        return counted == (len(self.reader.pipe.taken), events, events)


@pytest.mark.parametrize("events", [0, 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE + 2])
@pytest.mark.parametrize("usage", [True, False])
async def test_what_is_counted_is_exact_at_the_end(events: int, usage: bool) -> None:
    stream = Stream()
    for number in range(events):
        stream.feed(chunk(str(number)))
        assert stream.passed == stream.sent[len(STREAM) :]  # each at once
    if usage:
        stream.feed(chunk('{"usage": {"prompt_tokens": 7, "completion_tokens": 3}}'))
    stream.feed(chunk("[DONE]"))
    stream.feed(END)
    assert stream.reader.ends == [None]
    assert stream.passed == stream.sent[len(STREAM) :]
    assert stream.right(events + 2 + usage)
    assert stream.exchange.usage == ((7, 3) if usage else (None, None))
    assert stream.connection.reusable
    assert not stream.activity.untold


async def test_a_block_that_is_no_whole_chunk_comes_in_its_order() -> None:
    stream = Stream()
    whole = [chunk(name) for name in "abcdef"]
    for data in (whole[0], whole[1][:-3], whole[1][-3:], whole[2] + whole[3], *whole[4:], END):
        stream.feed(data)
    assert stream.passed == stream.sent[len(STREAM) :]
    assert stream.right(7)
    assert b"".join(stream.exchange.tail).endswith(b"".join([*whole[2:], END]))


async def test_several_chunks_in_one_block_pass_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    asked: list[bytes] = []
    monkeypatch.setattr(Relay, "response_data", lambda _relay, data: asked.append(data))
    for _ in range(AT_ONCE):
        stream.feed(chunk("x") + chunk("y") + chunk("z"))
    assert not asked
    assert stream.passed == stream.sent[len(STREAM) :]
    stream.activity.look()
    assert stream.right(1 + 3 * AT_ONCE)


async def test_whoever_asks_meanwhile_is_told_the_latest() -> None:
    stream = Stream()
    stream.activity.last_byte = None
    for number in range(2, 2 * AT_ONCE):
        stream.feed(chunk("x"))
        stream.activity.look()
        assert stream.right(number)
        assert stream.activity.last_byte is not None


async def test_a_client_that_has_closed_is_noticed_soon() -> None:
    stream = Stream()
    stream.reader.pipe.closing = True
    for _ in range(AT_ONCE):
        stream.feed(chunk("x"))
    assert isinstance(stream.reader.ends[0], ClientGoneError)
    assert len(stream.reader.ends) == 1
    assert stream.pipe.closing
    assert not stream.activity.untold


async def test_a_client_that_does_not_read_stops_the_engine_soon() -> None:
    stream = Stream()
    stream.reader.flow.writing_paused = True
    for _ in range(AT_ONCE):
        assert stream.pipe.reading
        stream.feed(chunk("x"))
    assert not stream.pipe.reading
    stream.reader.flow.writing_paused = False
    stream.reader.drained.set()
    while not stream.pipe.reading:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
    stream.feed(END)
    assert stream.reader.ends == [None]


@pytest.mark.parametrize("how", ["cut", "engine", "client", "framing"])
async def test_nothing_is_left_uncounted_when_it_breaks_off(how: str) -> None:
    stream = Stream()
    for _ in range(AT_ONCE // 2):
        stream.feed(chunk("x"))
    if how == "cut":
        stream.relay.cut(CutReason.DRAIN_DEADLINE, None)
    elif how == "engine":
        stream.connection.connection_lost(None)
    elif how == "client":
        stream.relay.client_closed()
    else:
        stream.connection.data_received(b"no chunk\r\n")
    assert stream.exchange.bytes_out == len(stream.reader.pipe.taken)
    assert stream.exchange.events == 1 + AT_ONCE // 2
    (error,) = stream.reader.ends
    assert error is None or how == "client"
    assert (b"error" in stream.passed) is (how != "client")
    assert not stream.activity.untold


@pytest.mark.parametrize("turns", [0, 3])
async def test_an_event_that_comes_as_the_client_has_just_left_ends_the_stream_and_is_no_mistake(turns) -> None:
    """A handler is told by its cancellation, in a later turn of the loop; uvloop's transport is closed before."""
    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    with far:
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=near)
        stream = Stream(transport)
        stream.feed(chunk("second"))
        transport.abort()
        for _ in range(turns):
            await asyncio.sleep(0)
        for number in range(AT_ONCE + 1):
            if stream.reader.ends:
                break
            stream.feed(chunk(f"more {number}"))
        assert [type(error) for error in stream.reader.ends] == [ClientGoneError]
        assert stream.pipe.closing
