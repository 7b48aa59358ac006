"""The native relay does what Python does: the same bytes, counts and ends. And it gives back what it has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import select
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as some
from proxy_harness import END, STREAM, Exchanging, chunk, until

from llmux.core.effects import CutReason
from llmux.proxy import ClientGoneError, Exchange
from llmux.proxy.relay import Relay
from llmux.upstream import EngineActivity, EngineAddress, EngineConnection, connection, native
from tests.harness.waiting import PATIENCE

pytestmark = pytest.mark.skipif(native.which() == "python", reason="it is not compiled here")

USAGE = '{"usage": {"prompt_tokens": 7, "completion_tokens": 3}}'
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture(autouse=True, scope="module")
def _early() -> Iterator[None]:
    """Lend again at once what has come back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "AT_ONCE", 1)
        patch.setattr(connection, "AFTER_LOSS", 1)
        patch.setattr(native.NativeRelay, "left", 0)  # by a server of another test
        yield


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    runner = asyncio.Runner(loop_factory=LOOPS[request.param])
    yield runner.run
    with warnings.catch_warnings():
        # Where that is an error, uvloop waits for ever for what a test that failed has left open.
        warnings.simplefilter("default", ResourceWarning)
        runner.close()


class Client(Exchanging, asyncio.Protocol):
    """The client's side of one exchange."""

    def __init__(self) -> None:
        super().__init__(None)
        self.writing_paused = self.lost = False
        self.flow = self
        self.relay: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, _exc: Exception | None) -> None:
        self.lost = True
        self.drained.set()
        if self.relay is not None and not self.relay.over:
            self.relay.client_closed()

    def pause_writing(self) -> None:
        self.writing_paused = True
        self.drained.clear()

    def resume_writing(self) -> None:
        self.writing_paused = False
        self.drained.set()


class Stream:
    """A stream from an engine's socket to a client's; ``engine`` and ``client`` are the far ends."""

    @classmethod
    async def begun(
        cls, *, relay: bool = True, room: int = 0, request: bytes = b"request", answer: bytes = STREAM
    ) -> Stream:
        """``room``: bytes that the client's socket buffers, about."""
        self, loop = cls(), asyncio.get_running_loop()
        self.engine, near = socket.socketpair()
        self.client, client_near = socket.socketpair()
        if room:
            client_near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        for sock in (self.engine, self.client):
            sock.setblocking(False)
        self.native = native.of(loop) if relay else None
        _, self.connection = await loop.create_connection(lambda: EngineConnection(loop, self.native), sock=near)
        _, self.side = await loop.create_connection(Client, sock=client_near)
        self.activity = EngineActivity(counting=True)
        self.exchange = Exchange(EngineAddress("127.0.0.1", 1), "id", self.activity)
        self.end: asyncio.Future[Exception | None] = loop.create_future()
        self.relay = self.side.relay = Relay(self.side, self.exchange, loop, self.end.set_result)  # type: ignore[arg-type]
        self.relay.attach(self.connection)
        self.connection.begin(self.relay, whole=[request])
        await self.send(answer)
        return self

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.engine, data)

    async def lent(self) -> Stream:
        """Send events until the stream is lent: not many, as they are not read, but patiently."""
        for number in range(100):
            if self.connection._lent:
                return self
            await self.send(chunk(f"before {number}"))
            await asyncio.sleep(0.001 * 1.08**number)
        raise AssertionError("it is never lent")

    async def read(self, most: int = 1 << 16) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.client, most)

    async def rest(self) -> bytes:
        """Return what the client gets until its connection ends."""
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while data := await self.read():
                got += data
        return got

    async def ended(self) -> Exception | None:
        """Wait for the end; the client's connection is closed with it."""
        error = await self.end
        self.side.transport.close()
        return error

    async def close(self) -> None:
        if not self.connection.lost:
            self.connection.abort()
        if not self.side.lost:
            self.side.transport.abort()
        self.engine.close()
        self.client.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if self.native is not None:
            self.native.let_go()


class Other:
    """A transport that has something else about it."""

    tapped = False

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


# ---- the same as Python's

odd = some.sampled_from([
    b"00a\r\n0123456789\r\n", b"A\r\n0123456789\r\n", b"a;x=y\r\n0123456789\r\n", b"a \r\n0123456789\r\n",
    b"5\r\ndata:\r\n" * 3, b"5\r\n0\r\n\r\n\r\n",
])  # fmt: skip
usual = some.one_of(
    some.integers(0, 300).map(lambda size: chunk("x" * size)),
    some.integers(1, 40).map(lambda many: chunk("several") * many),
)
large = some.sampled_from([0x1000, 0x3FF0, 0x4000, 0x5001]).map(lambda size: b"%x\r\n%b\r\n" % (size, b"z" * size))
ends = some.sampled_from(
    [END, b"0\r\nTrailer: x\r\n\r\n", b"", b"1f", b"5\r\nab", b"no chunk\r\n", b"5\r\nabcdefg\r\n", END + b"more"]
)


async def outcome(
    parts: list[bytes], reads: list[int], room: int, *, relay: bool, lent: list[bool]
) -> tuple[dict[str, Any], list[bytes]]:
    """Return what becomes of a stream in these parts, and its tail; add to ``lent`` whether it was, after each."""
    stream = await Stream.begun(relay=relay, room=room)

    async def write() -> None:
        with contextlib.suppress(OSError):
            for part in parts:
                await stream.send(part)
                for _ in range(3):
                    await asyncio.sleep(0)
                lent.append(bool(stream.connection._lent))
            stream.engine.shutdown(socket.SHUT_WR)

    async def read() -> bytes:
        got = b""
        for most in reads:
            got += await stream.read(most)
            await asyncio.sleep(0)
        return got + await stream.rest()

    writing, reading = asyncio.create_task(write()), asyncio.create_task(read())
    error = await stream.ended()
    got, exchange = await reading, stream.exchange
    await writing
    found = {
        "got": got,
        "out": exchange.bytes_out,
        "events": (exchange.events, stream.activity.streamed),
        "error": error,
        "broken": exchange.broken,
        "usage": exchange.usage,
        "untold": len(stream.activity.untold),
        "files": stream.connection._lent,
    }
    await stream.close()
    return found, exchange.tail


@pytest.mark.parametrize("loop", LOOPS)
def test_any_stream_in_any_pieces_is_passed_as_python_passes_it(loop) -> None:
    lent: list[bool] = []

    @settings(max_examples=60, deadline=None)
    @given(
        usage=some.booleans(),
        chunks=some.lists(some.one_of(usual, usual, usual, usual, large, odd), min_size=3, max_size=12),
        end=ends,
        cuts=some.lists(some.floats(0, 1), max_size=12),
        reads=some.lists(some.integers(1, 5000), max_size=10),
        room=some.sampled_from([0, 0, 1]),
    )
    def check(usage, chunks, end, cuts, reads, room) -> None:
        if usage:
            chunks = [*chunks, chunk(USAGE), chunk("[DONE]")]
        body = b"".join([*chunks, end])
        inner = [int(cut * len(body)) for cut in cuts]
        if not cuts:  # at the chunks' borders
            inner = [len(b"".join(chunks[:many])) for many in range(len(chunks) + 1)]
        # What an event begins with is found in one piece only.
        at = sorted({0, *(cut for cut in inner if b"data:" not in body[max(cut - 4, 0) : cut + 4]), len(body)})
        parts = [body[one:other] for one, other in pairwise(at)]
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            here, tail = runner.run(outcome(parts, reads, room, relay=True, lent=lent))
            there, _ = runner.run(outcome(parts, reads, room, relay=False, lent=[]))
        if max(map(len, chunks)) > 0x1000:  # may be received in several pieces, too
            del here["events"], there["events"]
        told = here.pop("usage"), there.pop("usage")
        assert here == there
        if not cuts:  # else both may have it in more pieces than are kept
            assert told == ((7, 3) if usage else (None, None),) * 2
        assert here["out"] == len(here["got"])
        assert b"".join(tail)[-1000:] in here["got"].partition(b"\r\n\r\n")[2]

    check()
    assert any(lent)


# ---- when it is lent


@pytest.mark.parametrize("head", ["together", "before"])
@pytest.mark.parametrize("first", [chunk("first"), chunk("first") + chunk("second")])
def test_it_is_lent_with_its_first_chunks(run, first, head) -> None:
    async def main() -> None:
        if head == "together":
            stream = await Stream.begun(answer=STREAM + first)
        else:
            stream = await Stream.begun(answer=STREAM + first[:9])
            await until(lambda: stream.exchange.bytes_out)
            assert not stream.connection._lent
            await stream.send(first[9:])
        got = b""
        while not got.endswith(b"\r\n\r\n" + first):
            got += await stream.read()
        assert stream.connection._lent
        await stream.send(chunk("natively") + END)
        assert await stream.ended() is None
        assert await stream.rest() == chunk("natively") + END
        assert stream.exchange.events == first.count(b"data:") + 1
        await stream.close()

    run(main())


def test_uvloop_does_not_wait_for_what_it_does_not_read() -> None:
    """It would be woken up by the next chunk, only to find that it reads no more."""

    async def main() -> None:
        stream = await Stream.begun()
        loop: Any = asyncio.get_running_loop()
        number = stream.connection.transport.get_extra_info("socket").fileno()
        poller = Path(f"/proc/self/fdinfo/{loop._get_backend_id()}")

        def waits() -> bool:
            lines = [line.split() for line in poller.read_text().splitlines()]
            return any(int(line[3], 16) & select.EPOLLIN for line in lines if line[:2] == ["tfd:", str(number)])

        await until(waits)
        await stream.send(chunk("first"))
        await until(lambda: stream.connection._lent)
        assert not waits()
        await stream.send(chunk("natively") + END)
        assert await stream.ended() is None
        await until(waits)
        assert (await stream.rest()).endswith(chunk("first") + chunk("natively") + END)
        await stream.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_nothing_is_passed_on_that_follows_a_mistake(run, monkeypatch) -> None:
    lent = []
    monkeypatch.setattr(native.NativeRelay, "lend", lambda *given: lent.append(given) or 0)

    async def main() -> None:
        stream = await Stream.begun()
        await stream.send(chunk("sound") + b"no chunk\r\n")
        assert await stream.ended() is None
        assert stream.exchange.broken == "engine_protocol_error"
        assert chunk("sound") in await stream.rest()
        assert not lent
        await stream.close()

    run(main())


def test_behind_what_its_client_has_still_to_take_it_is_lent_with_a_later_chunk(run) -> None:
    class Later(Other):
        buffered = 1

        def get_write_buffer_size(self) -> int:
            return self.buffered

    async def main() -> None:
        stream = await Stream.begun()
        transport = stream.relay._transport = Later(stream.side.transport)
        sent = chunk("first")
        await stream.send(sent)
        await until(lambda: stream.exchange.bytes_out)
        assert not stream.connection._lent
        transport.buffered = 0
        await stream.send(chunk("second"))
        await until(lambda: stream.connection._lent)
        await stream.send(chunk("third") + END)
        assert await stream.ended() is None
        assert (await stream.rest()).endswith(sent + chunk("second") + chunk("third") + END)
        assert stream.exchange.events == 3
        await stream.close()

    run(main())


def test_an_engine_that_answers_before_it_has_read_all_gets_the_rest_meanwhile(run) -> None:
    request = b"x" * (8 << 20)

    async def main() -> None:
        stream = await (await Stream.begun(request=request)).lent()
        assert stream.connection.transport.get_write_buffer_size()
        read, loop = 0, asyncio.get_running_loop()
        while read < len(request):
            read += len(await loop.sock_recv(stream.engine, 1 << 20))
        await stream.send(chunk("natively"))
        await stream.send(END)
        assert await stream.ended() is None
        assert (await stream.rest()).endswith(chunk("natively") + END)
        await stream.close()

    run(main())


# ---- it comes back whenever it has to


async def write_on(stream: Stream, dice: random.Random, sent: bytearray) -> None:
    """Send events as long as they are taken, in one piece or two."""
    with contextlib.suppress(OSError):
        for number in range(10_000):
            data = chunk(f"{number} " + "x" * dice.randrange(400))
            sent += data
            at = dice.choice((len(data), 2, dice.randrange(12, len(data))))
            await stream.send(data[:at])
            if at < len(data):
                await asyncio.sleep(0)
                await stream.send(data[at:])
            if dice.random() < 0.1:
                await asyncio.sleep(dice.random() * 0.003)


async def read_on(stream: Stream, got: bytearray) -> None:
    with contextlib.suppress(ConnectionResetError):
        while data := await stream.read():
            got += data


@pytest.mark.parametrize("how", ["cut", "client", "client resets", "engine"])
def test_a_stream_that_ends_at_any_moment_has_lost_and_doubled_nothing(run, how) -> None:
    """What the client has is the beginning of what the engine sent, and the error; all of it is counted."""

    async def end(stream: Stream, writing: asyncio.Task[None], reading: asyncio.Task[None]) -> None:
        if how == "cut":
            stream.relay.cut(CutReason.DRAIN_DEADLINE, None)
            assert not stream.connection._lent
        elif how == "engine":
            writing.cancel()
            stream.engine.close()
        else:
            reading.cancel()
            if how == "client resets":
                stream.client.shutdown(socket.SHUT_RD)  # an error where it is written to
                await asyncio.sleep(0.01)
            stream.client.close()

    async def one(seed: int) -> None:
        dice = random.Random(seed)
        stream = await Stream.begun(room=dice.choice((0, 1)))
        sent, got = bytearray(), bytearray()
        writing = asyncio.create_task(write_on(stream, dice, sent))
        reading = asyncio.create_task(read_on(stream, got))
        await asyncio.sleep(dice.random() * 0.1)
        stream.activity.look()
        await asyncio.sleep(dice.random() * 0.1)
        await end(stream, writing, reading)
        error = await stream.ended()
        await asyncio.wait([reading, writing])
        assert isinstance(error, ClientGoneError) is how.startswith("client")
        whole, mark, _ = bytes(got).partition(b"\r\n\r\n")[2].partition(b'\r\n\n\ndata: {"error"')
        if mark:
            whole = whole[: whole.rindex(b"\n") + 1]
        assert sent.startswith(whole)
        assert stream.exchange.events == stream.activity.streamed
        if not error:
            assert stream.exchange.bytes_out == len(got)
            assert whole.count(b"data:") == stream.exchange.events
        await stream.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(one(seed) for seed in range(20)))

    run(all_of_them())


@pytest.mark.parametrize("whole", [True, False])
def test_an_engine_that_dies_breaks_the_answer_off(run, whole) -> None:
    async def main() -> None:
        stream = await (await Stream.begun()).lent()
        files = open_files()
        await stream.send(chunk("last"))
        if not whole:
            await stream.send(b"5\r\nab")
        stream.engine.close()
        assert await stream.ended() is None
        got = await stream.rest()
        assert stream.exchange.broken == "engine_lost"
        assert not got.endswith(END)
        assert (b"engine_lost" in got) is whole  # in the middle of a chunk there is no place for an event
        assert stream.exchange.bytes_out == len(got)
        assert open_files() < files
        await stream.close()

    run(main())


def test_a_client_that_leaves_ends_it(run) -> None:
    async def main() -> None:
        await (await (await Stream.begun()).lent()).close()  # loops open files of their own with the first
        before = open_files()
        stream = await (await Stream.begun()).lent()
        stream.client.close()
        assert isinstance(await stream.end, ClientGoneError)
        assert not stream.connection._lent
        async with asyncio.timeout(30):
            while await asyncio.get_running_loop().sock_recv(stream.engine, 100):
                pass  # the request; then the engine is told
        await stream.close()
        assert open_files() == before

    run(main())


def test_a_client_that_is_gone_when_a_chunk_comes_is_noticed(run) -> None:
    async def main() -> None:
        stream = await (await Stream.begun()).lent()
        stream.client.close()
        for number in range(3):  # the thread finds out before the loop does
            stream.engine.send(chunk(f"more {number}"))
            time.sleep(0.02)  # noqa: ASYNC251
        assert isinstance(await stream.end, ClientGoneError)
        assert not stream.connection._lent
        await stream.close()

    run(main())


def test_a_client_that_does_not_read_holds_the_engine_up_and_misses_nothing(run) -> None:
    async def main() -> None:
        stream = await (await Stream.begun(room=1)).lent()
        sent = 0
        event = chunk("x" * 1000)
        with contextlib.suppress(TimeoutError):
            while True:  # as much as all the buffers take
                async with asyncio.timeout(0.5):
                    await stream.send(event)
                sent += 1
        assert sent * len(event) < 4 << 20
        async with asyncio.timeout(PATIENCE):
            while stream.connection._lent:  # noqa: ASYNC110 - a thread gives it back, which tells nobody
                await asyncio.sleep(0.001)
        reading = asyncio.create_task(stream.rest())
        stream.engine.shutdown(socket.SHUT_WR)
        await stream.ended()
        got = await reading
        assert got.count(event) == sent  # and a part of the last one, perhaps
        assert stream.exchange.bytes_out == len(got)
        await stream.close()

    run(main())


def test_what_was_passed_is_known_while_it_is_lent(run) -> None:
    async def main() -> None:
        stream = await (await Stream.begun()).lent()
        stream.activity.look()
        events, size = stream.exchange.events, stream.exchange.bytes_out
        stream.activity.last_byte = None
        data = chunk("one") + chunk("two")
        await stream.send(data)
        async with asyncio.timeout(30):
            while stream.exchange.bytes_out == size:
                await asyncio.sleep(0.001)
                stream.activity.look()
        assert stream.connection._lent
        assert stream.exchange.bytes_out == size + len(data)
        assert (stream.exchange.events, stream.activity.streamed) == (events + 2, events + 2)
        assert stream.activity.last_byte == pytest.approx(asyncio.get_running_loop().time(), abs=30)
        await stream.close()

    run(main())


def test_the_relay_ends_with_the_last_of_its_pools_and_its_streams_go_on(run) -> None:
    async def main() -> None:
        await (await (await Stream.begun()).lent()).close()  # loops open files of their own with the first
        threads, files = tasks(), open_files()
        stream = await (await Stream.begun()).lent()
        other = native.of(asyncio.get_running_loop())
        assert other is stream.native
        (thread,) = tasks() - threads
        stream.native.let_go()
        assert stream.connection._lent
        other.let_go()
        assert not stream.connection._lent
        await until(lambda: thread not in tasks())  # the kernel shows one a moment after it has been joined
        sent = b"".join([chunk("python"), chunk("again"), chunk("and again"), END])
        await stream.send(sent)
        assert await stream.ended() is None
        assert (await stream.rest()).endswith(sent)
        stream.native = None
        await stream.close()
        assert open_files() == files

    run(main())


class ClosedLoop:
    """A loop that was closed; another one begins while it is asked, and another thread lets go of it."""

    def __init__(self, relays: dict[Any, Any], other: asyncio.AbstractEventLoop) -> None:
        self._relays = relays
        self._other = other

    def is_closed(self) -> bool:
        self._relays.pop(self, None)
        self._relays[self._other] = None
        return True


def test_a_stream_of_a_loop_that_was_closed_ends_as_any(run) -> None:
    """Its task ends when it is freed, and by then the relay is closed."""

    async def main() -> None:
        stream = await (await Stream.begun()).lent()
        loop, relay = asyncio.get_running_loop(), stream.native
        del native._relays[loop]
        loop.remove_reader(relay._library.relay_wake(relay._relay))
        relay._loop = ClosedLoop({}, loop)
        relay.close()  # as with the next loop's first
        assert stream.connection._lent
        stream.connection.tell_passed()
        stream.native = None
        await stream.close()
        assert not stream.connection._lent

    run(main())


def test_loops_of_other_threads_come_and_go_meanwhile(run, monkeypatch) -> None:
    async def main() -> None:
        loop, relays = asyncio.get_running_loop(), {}
        monkeypatch.setattr(native, "_relays", relays)
        with contextlib.closing(asyncio.new_event_loop()) as other:
            relays[ClosedLoop(relays, other)] = None
            assert native.of(loop) is relays[loop]
            assert set(relays) == {loop, other}

    run(main())


def test_many_at_once(run) -> None:
    many = min(500, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)

    async def one(number: int) -> int:
        stream = await Stream.begun()
        sent = b""
        lent = 0
        for event in range(6):
            data = chunk(f"{number}: {event}")
            sent += data
            await stream.send(data)
            await asyncio.sleep(0)
            lent += bool(stream.connection._lent)
        await stream.send(END)
        assert await stream.ended() is None
        assert (await stream.rest()).partition(b"\r\n\r\n")[2] == sent + END
        assert stream.exchange.events == 6
        await stream.close()
        return lent

    async def main() -> None:
        pool = native.of(asyncio.get_running_loop())
        assert sum(await asyncio.gather(*map(one, range(many)))) >= many // 2
        pool.let_go()

    run(main())


def test_a_number_that_means_another_file_by_now_is_not_written_to(run) -> None:
    async def main() -> None:
        stream = await (await Stream.begun()).lent()
        one, other = socket.socketpair()
        stream.side.relay = None  # nothing tells of the client's end
        number = stream.side.transport.get_extra_info("socket").fileno()
        stream.side.transport.abort()
        await asyncio.sleep(0.01)
        with one, other, socket.socket(fileno=os.dup2(one.fileno(), number)):
            other.setblocking(False)
            for _ in range(20):
                await stream.send(chunk("not for this one"))
                await asyncio.sleep(0.001)
            with pytest.raises(BlockingIOError):
                other.recv(1)
            stream.connection.abort()
        await stream.close()

    run(main())


# ---- what is not lent


def test_what_cannot_be_lent_is_passed_all_the_same(run, monkeypatch) -> None:
    async def main(change: Callable[[Stream], object]) -> None:
        stream = await Stream.begun()
        change(stream)
        sent = [chunk(f"{number}") for number in range(10)]
        for data in sent:
            await stream.send(data)
            await asyncio.sleep(0.001)
            assert not stream.connection._lent
        await stream.send(END)
        assert await stream.ended() is None
        assert (await stream.rest()).endswith(b"".join([*sent, END]))
        await stream.close()

    class Tapped(Other):
        tapped = True

    class Encrypted(Other):
        def get_extra_info(self, name: str) -> Any:
            return "TLS" if name == "ssl_object" else self._transport.get_extra_info(name)

    class Buffered(Other):
        def get_write_buffer_size(self) -> int:
            return 1

    for kind in (Tapped, Encrypted, Buffered):
        run(main(lambda stream, kind=kind: setattr(stream.relay, "_transport", kind(stream.side.transport))))
    run(main(lambda stream: setattr(stream.connection, "transport", Encrypted(stream.connection.transport))))
    run(main(lambda stream: setattr(stream.connection, "_request_sent", False)))
    monkeypatch.setattr(native.NativeRelay, "_open", lambda _self: False)
    run(main(lambda _stream: None))


def test_files_are_left_for_others(run, monkeypatch) -> None:
    async def main() -> None:
        pool = native.of(asyncio.get_running_loop())
        streams = [await Stream.begun() for _ in range(3)]
        for number in range(4):
            for stream in streams:
                await stream.send(chunk(f"{number}"))
                await asyncio.sleep(0.001)
        assert sum(bool(stream.connection._lent) for stream in streams) == 2
        for stream in streams:
            await stream.send(END)
            assert await stream.ended() is None
            await stream.close()
        pool.let_go()

    monkeypatch.setattr(native, "MOST", 2)
    run(main())


@pytest.mark.parametrize("left", range(6))
def test_a_stream_that_finds_too_few_files_goes_on_and_a_later_one_is_lent(run, monkeypatch, left) -> None:
    """The relay opens some for itself with the first stream, and the last of them may be one too many."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def without_files(stream: Stream) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest_file() + 20, limits[1]))
        with contextlib.ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            held = []
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            for number in held[left:]:
                stack.callback(os.close, number)
            for number in held[:left]:
                os.close(number)
            for number in range(3):
                data, got = chunk(f"{number}"), b""
                await stream.send(data)
                while not got.endswith(data):
                    piece = await stream.read()
                    assert piece
                    got += piece

    async def main() -> None:
        pool = native.of(asyncio.get_running_loop())
        stream = await Stream.begun()
        await without_files(stream)
        await stream.send(END)
        assert await stream.ended() is None
        await stream.close()
        await (await (await Stream.begun()).lent()).close()
        pool.let_go()

    monkeypatch.setattr(native, "_open_files", lambda: limits[0])
    run(main())


def test_short_streams_are_soon_left_to_python_and_long_ones_are_lent_again(run) -> None:
    async def lent_of(events: int) -> int:
        stream = await Stream.begun()
        lent = 0
        for number in range(events):
            await stream.send(chunk(f"{number}"))
            await stream.read()  # one by one, however slow the machine is
            lent += bool(stream.connection._lent)
        await stream.send(END)
        assert await stream.ended() is None
        await stream.close()
        return lent

    async def main() -> None:
        pool = native.of(asyncio.get_running_loop())
        assert pool.patience == 0
        for _ in range(50):
            if pool.patience:
                break
            await lent_of(5)
        assert pool.patience == native.PATIENCE
        assert not await lent_of(native.PATIENCE)
        for _ in range(50):
            if not pool.patience:
                break
            assert await lent_of(5 * native.WORTHWHILE)
        assert pool.patience == 0
        pool.let_go()

    run(main())


def test_it_can_be_left_out() -> None:
    show = [sys.executable, "-c", "from llmux.upstream import native; print(native.which())"]
    for value, found in (("0", "python"), ("1", "native")):
        told = subprocess.run(show, env={**os.environ, native.SWITCH: value}, capture_output=True, check=True)
        assert told.stdout.decode().strip() == found


FINALIZED = """
import sysconfig, setuptools
from distutils.core import run_setup
given = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: {free} if name == "Py_GIL_DISABLED" else given(name)
wheel = run_setup("setup.py", stop_after="config").get_command_obj("bdist_wheel")
wheel.ensure_finalized()
print(wheel.py_limited_api)
"""


@pytest.mark.parametrize(("free", "limited"), [(0, "cp311"), (1, "False")])
def test_it_is_installed_with_free_threading_too(free, limited) -> None:
    """A wheel for each Python is not to be had there, and to ask for it is an error."""
    root = Path(__file__).parents[2]
    show = [sys.executable, "-W", "ignore", "-c", FINALIZED.format(free=free)]
    told = subprocess.run(show, cwd=root, capture_output=True, check=False)
    assert (told.returncode, told.stdout.decode().split()[-1:]) == (0, [limited]), told.stderr.decode()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def highest_file() -> int:
    return max(int(file.name) for file in Path("/proc/self/fd").iterdir())


def tasks() -> set[str]:
    return {thread.name for thread in Path("/proc/self/task").iterdir()}
