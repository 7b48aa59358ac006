"""Engines that refuse, die, or do not speak HTTP; and who is written to how often."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from proxy_harness import EXTRA_BYTES, OK, Body, EngineSide, Proxy, answering, deaf_host, until

from llmux.proxy import EngineActivity, Forwarder
from llmux.upstream import (
    EngineAddress,
    EngineLostError,
    EngineProtocolError,
    EngineRefusedError,
    connection,
    pool,
)
from llmux.upstream.names import Found, connect

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nNo colon here\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nnonsense",
    ],
)
async def test_what_is_not_http_is_a_502(proxy: Proxy, answer: bytes) -> None:
    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(answer)
        await side.closed()

    engine = await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    assert await client.until(b"\r\n") == b"HTTP/1.1 502 Bad Gateway\r\n"
    assert isinstance(proxy.outcomes[0], EngineProtocolError)
    assert engine.connections == 1


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_an_engine_that_dies_before_its_head_is_a_502_and_not_asked_again(
    proxy: Proxy, how: str, said: bytes
) -> None:
    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(said, b"")
        getattr(side, how)()

    engine = await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    assert await client.until(b"\r\n") == b"HTTP/1.1 502 Bad Gateway\r\n"
    await client.until(b'"code": "engine_lost"')
    assert isinstance(proxy.outcomes[0], EngineLostError)
    assert len(engine.heads) == 1
    # The client's own connection has done nothing wrong.
    await client.until(b"}}")
    await proxy.engine(answering(OK))
    await client.get()
    await client.until(b"ok")


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    ("sent", "client_head"),
    [
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfour",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n" + EXTRA_BYTES + b"\r\nfour",
            id="length",
        ),
        pytest.param(
            CHUNKED + b"4\r\nfour\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + EXTRA_BYTES + b"\r\n4\r\nfour\r\n",
            id="between chunks",
        ),
        pytest.param(
            CHUNKED + b"5\r\nfour",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + EXTRA_BYTES + b"\r\n5\r\nfour",
            id="inside a chunk",
        ),
        pytest.param(
            CHUNKED + b"4\r\nfour\r\n0\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + EXTRA_BYTES + b"\r\n4\r\nfour\r\n0\r\n",
            id="in the trailers",
        ),
    ],
)
async def test_an_answer_that_breaks_off_has_no_proper_end(
    proxy: Proxy, how: str, sent: bytes, client_head: bytes
) -> None:
    received = asyncio.Event()

    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(sent)
        await received.wait()
        getattr(side, how)()

    await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    await client.expect(client_head)
    received.set()
    await client.expect_end()
    await proxy.finished()
    assert proxy.outcomes == [None]
    assert proxy.exchange.broken == "engine_lost"
    assert proxy.forwarder.pool.idle_count == 0


@pytest.mark.parametrize(
    ("sent", "passed", "event"),
    [
        (b"3\r\nabcX", b"3\r\nabc", False),
        (b"3\r\nabc\rX", b"3\r\nabc", False),
        (b"3\r\nabc\r\nxyz\r\n", b"3\r\nabc\r\n", True),
        (b"3\r\nabc\r\n0x5\r\n", b"3\r\nabc\r\n", True),
        (b"3\r\nabc\r\n-1\r\n", b"3\r\nabc\r\n", True),
        (b"3\r\nabc\r\n" + b"1" * 17, b"3\r\nabc\r\n", True),
        (b"3\r\nabc\r\n1;" + b"x" * 5000, b"3\r\nabc\r\n", True),
        (b"3\r\nabc\r\n0\r\n" + b"x" * 70000, b"3\r\nabc\r\n0\r\n", False),
    ],
)
async def test_a_malformed_chunk_breaks_the_answer_off_where_it_was_sound(
    proxy: Proxy, sent: bytes, passed: bytes, *, event: bool
) -> None:
    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(SSE + sent)
        await side.closed()

    await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    await client.until(b"\r\n\r\n")
    rest = await client.rest()
    assert rest.startswith(passed)
    assert (b'"code": "engine_protocol_error"' in rest) is event
    assert not rest.endswith(b"0\r\n\r\n")


async def test_a_malformed_chunk_seen_late(proxy: Proxy) -> None:
    """The beginning of the bad line has been passed on: nothing may be put behind it."""
    await proxy.engine(answering(SSE, b"3\r\nabc\r\n4", b"X\r\n"))
    client = await proxy.client()
    await client.get()
    await client.until(b"\r\n\r\n")
    assert await client.rest() == b"3\r\nabc\r\n4"


async def test_what_comes_after_the_end_is_kept_from_the_client(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK + b"HTTP/1.1 200 OK\r\n"))
    client = await proxy.client()
    for number in range(2):
        await client.get()
        await client.expect(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + EXTRA_BYTES + b"\r\nok")
        await proxy.finished(number + 1)
        assert proxy.forwarder.pool.idle_count == 0
    assert engine.connections == 2


async def test_bytes_on_an_idle_connection_end_it(proxy: Proxy) -> None:
    answered = asyncio.Event()

    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(OK)
        await answered.wait()
        await side.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await side.closed()

    engine = await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    await proxy.finished()
    assert proxy.forwarder.pool.idle_count == 1
    answered.set()
    await until(lambda: proxy.forwarder.pool.idle_count == 0)
    await client.get()
    await client.until(b"ok")
    assert engine.connections == 2


# ---- who is written to how often


def dropping(*, per_connection: int, connections: int, said: bytes = b"", how: str = "close"):
    """Each of the first connections answers some requests, then reads one more and dies."""

    async def script(side: EngineSide) -> None:
        number = side.engine.connections
        answered = 0
        while True:
            await side.request()
            if number <= connections and answered == per_connection:
                await side.send(said)
                getattr(side, how)()
                return
            answered += 1
            await side.send(OK)

    return script


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_pooled_connection_that_died_unheard_counts_as_not_sent(proxy: Proxy, how: str) -> None:
    engine = await proxy.engine(dropping(per_connection=1, connections=1, how=how))
    proxy.options["body"] = Body([b"a" * 100_000, b"b" * 100_000])
    client = await proxy.client()
    for _ in range(2):
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await client.until(b"ok")
    assert engine.connections == 2
    assert engine.bodies == [b"a" * 100_000 + b"b" * 100_000] * 3
    assert proxy.outcomes == [None, None]


async def test_it_is_sent_to_a_fresh_connection_once(proxy: Proxy) -> None:
    async def script(side: EngineSide) -> None:
        await side.request()
        if side.engine.connections == 1:
            await side.send(OK)
            await side.request()

    engine = await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    await client.get()
    await client.until(b"HTTP/1.1 502 ")
    assert len(engine.heads) == 3
    assert engine.connections == 2


async def test_one_byte_of_an_answer_means_that_it_was_sent(proxy: Proxy) -> None:
    engine = await proxy.engine(dropping(per_connection=1, connections=1, said=b"H"))
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    await client.get()
    await client.until(b"HTTP/1.1 502 ")
    assert len(engine.heads) == 2
    assert engine.connections == 1


async def test_a_refused_connection_means_that_nothing_was_sent(proxy: Proxy) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        proxy.address = EngineAddress("127.0.0.1", sock.getsockname()[1])
        client = await proxy.client()
        await client.get()
        await client.until(b'"code": "engine_refused"')
    assert isinstance(proxy.outcomes[0], EngineRefusedError)
    assert not proxy.activity.connected
    assert proxy.exchange.ended_at is not None


async def test_a_pooled_connection_died_with_its_engine_which_had_the_request(proxy: Proxy) -> None:
    """It may have run it: the request is not offered again, as one that was refused is."""

    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(OK)
        await side.request()
        side.engine.stop_listening()

    engine = await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    assert proxy.activity.connected
    await client.get()
    await client.until(b'"code": "engine_lost"')
    assert isinstance(proxy.outcomes[1], EngineLostError)
    assert len(engine.heads) == 2


async def test_a_pooled_connection_died_with_its_engine_which_had_not_the_whole_request(proxy: Proxy) -> None:
    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(OK)
        await side.head()
        side.engine.stop_listening()
        side.reset()

    engine = await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    proxy.options["body"] = Body([b"a" * (32 << 20)])  # more than a kernel takes
    await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    await client.until(b'"code": "engine_refused"')
    assert isinstance(proxy.outcomes[1], EngineRefusedError)
    assert len(engine.heads) == 2


async def test_a_pooled_connection_that_dies_after_a_while_has_not_died_of_age(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALE_WITHIN", 0.0)
    engine = await proxy.engine(dropping(per_connection=1, connections=1))
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    await client.get()
    await client.until(b'"code": "engine_lost"')
    assert len(engine.heads) == 2
    assert engine.connections == 1


async def test_a_request_that_was_returned_gets_a_fresh_connection(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    proxy.options["fresh_only"] = True
    await client.get()
    await client.until(b"ok")
    assert engine.connections == 2


async def test_a_host_that_does_not_answer_is_refused_in_time(proxy: Proxy) -> None:
    proxy.forwarder = Forwarder(connect_timeout=0.05)
    with deaf_host() as proxy.address:
        client = await proxy.client()
        await client.get()
        await client.until(b'"code": "engine_refused"')
    assert isinstance(proxy.outcomes[0], EngineRefusedError)


# ---- hosts that are known by name


def known_as(monkeypatch: pytest.MonkeyPatch, **hosts: Callable[[], list[Any]]) -> None:
    """Have names lead to addresses."""
    real = socket.getaddrinfo

    def look_up(host: str, *args: Any, **more: Any) -> Any:
        if host not in hosts:
            return real(host, *args, **more)
        families = {2: socket.AF_INET, 4: socket.AF_INET6}
        return [(families[len(place)], socket.SOCK_STREAM, 6, "", place) for place in hosts[host]()]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


async def test_of_several_addresses_one_that_answers_is_taken(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await proxy.engine(answering(OK))
    here = proxy.address.host, proxy.address.port
    with deaf_host() as deaf:
        known_as(monkeypatch, two=lambda: [(deaf.host, deaf.port), here])
        proxy.address = EngineAddress("two", 80)
        client = await proxy.client()
        await client.get()
        assert (await client.until(b"ok")).startswith(b"HTTP/1.1 200 OK")


async def test_an_address_with_a_scope_keeps_it(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    await proxy.engine(answering(OK))
    here, link_local, asked = (proxy.address.host, proxy.address.port), ("fe80::1", 80, 0, 7), []

    async def connected(found: Found) -> socket.socket:
        asked.extend(place for *_, place in found)
        return await connect([(socket.AF_INET, socket.SOCK_STREAM, 6, "", here)])

    monkeypatch.setattr(pool, "connect", connected)
    known_as(monkeypatch, near=lambda: [link_local])
    proxy.address = EngineAddress("near", 80)
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    assert asked == [link_local]


async def test_a_name_that_is_not_found_holds_up_no_other_and_is_looked_up_once(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await proxy.engine(answering(OK))
    here, found = (proxy.address.host, proxy.address.port), threading.Event()
    asked = []

    def slow(number: int) -> list[tuple[str, int]]:
        asked.append(number)
        found.wait(30)
        return [here]

    many = {f"slow{number}": functools.partial(slow, number) for number in range(40)}
    known_as(monkeypatch, fast=lambda: [here], **many)
    waiting = []
    try:
        for name in [*many, *many]:
            proxy.address = EngineAddress(name, 80)
            waiting.append(await proxy.client())
            await waiting[-1].get()
        await until(lambda: len(asked) == len(many))
        proxy.address = EngineAddress("fast", 80)
        client = await proxy.client()
        await client.get()
        await client.until(b"ok")
    finally:
        found.set()
    for client in waiting:
        await client.until(b"ok")
    assert sorted(asked) == list(range(len(many)))


@pytest.mark.parametrize(
    "error", [socket.gaierror(socket.EAI_NONAME, "Name or service not known"), UnicodeError("label too long")]
)
async def test_a_name_that_there_is_not_is_refused_until_it_is_there(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    await proxy.engine(answering(OK))
    answers = [error, [(proxy.address.host, proxy.address.port)]]

    def next_answer() -> list[tuple[str, int]]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    known_as(monkeypatch, gone=next_answer)
    proxy.address = EngineAddress("gone", 80)
    for expected in (b'"code": "engine_refused"', b"ok"):
        client = await proxy.client()
        await client.get()
        await client.until(expected)


# ---- idle connections


async def test_idle_connections_expire_and_dead_ones_go_at_once(proxy: Proxy) -> None:
    closed = asyncio.Event()

    async def script(side: EngineSide) -> None:
        await side.request()
        await side.send(OK)
        await side.closed()
        closed.set()

    proxy.forwarder = Forwarder(idle_timeout=0.05)
    await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    await closed.wait()
    await until(lambda: proxy.forwarder.pool.idle_count == 0)

    proxy.forwarder = Forwarder(idle_timeout=60)
    engine = await proxy.engine(answering(OK, close=True))
    await client.get()
    await client.until(b"ok")
    await until(lambda: proxy.forwarder.pool.idle_count == 0)
    assert engine.connections == 1
    await proxy.forwarder.close()


async def test_a_connection_that_is_too_old_is_not_taken(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    await proxy.finished()
    [[connection]] = proxy.forwarder.pool._idle.values()
    connection.idle_since -= 60  # as if the timer were late
    await client.get()
    await client.until(b"ok")
    assert engine.connections == 2


async def test_a_connection_that_is_closing_is_not_taken(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    await proxy.finished()
    [[connection]] = proxy.forwarder.pool._idle.values()
    connection.transport.abort()  # and its end has not been announced yet
    assert proxy.forwarder.pool.take(proxy.activity) is None
    assert engine.connections == 1


async def test_the_timer_goes_on_while_there_are_idle_connections(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK))
    first, second = await proxy.client(), await proxy.client()
    proxy.forwarder = Forwarder(idle_timeout=1.0)
    await first.get()
    await first.until(b"ok")
    await proxy.finished()
    [[connection]] = proxy.forwarder.pool._idle.values()
    proxy.activity = EngineActivity()
    await second.get()
    await second.until(b"ok")
    await proxy.finished(2)
    connection.idle_since -= 1.0
    proxy.forwarder.pool._sweep()
    assert proxy.forwarder.pool.idle_count == 1
    await until(lambda: proxy.forwarder.pool.idle_count == 0)
    await until(lambda: not engine.open)


async def test_a_connection_serves_one_stretch_of_being_awake_only(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.get()
    await client.until(b"ok")
    first, proxy.activity = proxy.activity, EngineActivity()
    await client.get()
    await client.until(b"ok")
    await proxy.finished(2)
    assert engine.connections == 2
    assert proxy.forwarder.pool.idle_count == 2
    proxy.forwarder.discard_idle(first)
    assert proxy.forwarder.pool.idle_count == 1
    await until(lambda: len(engine.open) == 1)
    await proxy.forwarder.close()
    await until(lambda: not engine.open)


async def test_the_last_used_connection_is_used_first(proxy: Proxy) -> None:
    together = asyncio.Barrier(2)

    async def script(side: EngineSide) -> None:
        number = side.engine.connections
        await side.request()
        await together.wait()
        while True:
            await side.send(b"HTTP/1.1 200 OK\r\nX-N: %d\r\nContent-Length: 2\r\n\r\nok" % number)
            await side.request()

    await proxy.engine(script)
    one, two = await proxy.client(), await proxy.client()
    await one.get()
    await two.get()
    await one.until(b"ok")
    await two.until(b"ok")
    await proxy.finished(2)
    seen = []
    for _ in range(3):
        await one.get()
        seen.append(await one.until(b"ok"))
    assert len(set(seen)) == 1


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.1 103 E\r\nLink: </x>\r\n\r\n"])
async def test_interim_responses_without_end_are_a_502(proxy: Proxy, interim: bytes) -> None:
    sent = 0

    async def script(side: EngineSide) -> None:
        nonlocal sent
        await side.request()
        while sent < 50_000_000:
            try:
                await side.send(interim * 1000)
            except ConnectionError:
                return
            sent += 1000 * len(interim)

    await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    assert await client.until(b"\r\n") == b"HTTP/1.1 502 Bad Gateway\r\n"
    assert isinstance(proxy.outcomes[0], EngineProtocolError)
    assert sent < 50_000_000


async def test_interim_responses_that_come_now_and_then_may_be_many(proxy: Proxy, monkeypatch) -> None:
    monkeypatch.setattr("llmux.upstream.connection.INTERIM_BURST", 1000)
    monkeypatch.setattr("llmux.upstream.connection.INTERIM_RATE", 1_000_000)

    async def script(side: EngineSide) -> None:
        await side.request()
        for _ in range(40):
            await side.send(b"HTTP/1.1 102 P\r\n\r\n")
            await asyncio.sleep(0.002)
        await side.send(OK)
        await side.closed()

    await proxy.engine(script)
    client = await proxy.client()
    await client.get()
    assert await client.until(b"\r\n") == b"HTTP/1.1 200 OK\r\n"
