"""What the engine and the client see, byte for byte."""

from __future__ import annotations

import pytest
from proxy_harness import EXTRA_BYTES, OK, Body, EngineSide, Proxy, answering

from llmux.upstream import EngineAddress


async def test_the_request_reaches_the_engine_as_it_was_written(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.send(
        b"POST /v1/a%2Fb?x=%41&&y=%c3%A4 HTTP/1.1\r\n"
        b"hOsT: llmux\r\n"
        b"X-Custom:   spaced   value  \r\n"
        b"x-request-id: client-s\r\n"
        b"Accept: */*\r\n"
        b"Authorization: Bearer k\r\n"
        b"CONTENT-length: 5\r\n"
        b"X-Dup: 1\r\n"
        b"X-Dup: 2\r\n"
        b"\r\nhello"
    )
    await client.expect(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + EXTRA_BYTES + b"\r\nok")
    assert engine.heads == [
        b"POST /v1/a%2Fb?x=%41&&y=%c3%A4 HTTP/1.1\r\n"
        b"hOsT: 127.0.0.1:" + str(engine.port).encode() + b"\r\n"
        b"X-Custom: spaced   value\r\n"
        b"x-request-id: req-1\r\n"
        b"Accept: */*\r\n"
        b"Authorization: Bearer k\r\n"
        b"CONTENT-length: 5\r\n"
        b"X-Dup: 1\r\n"
        b"X-Dup: 2\r\n"
        b"\r\n"
    ]
    assert engine.bodies == [b"hello"]


async def test_hop_by_hop_fields_stay_behind_and_a_chunked_body_gets_its_length(proxy: Proxy) -> None:
    proxy.options["drop_headers"] = frozenset({b"x-api-key"})
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.send(
        b"POST /v1/x HTTP/1.1\r\nHost: llmux\r\n"
        b"Connection: keep-alive, X-Private\r\nX-Private: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\n"
        b"Proxy-Authorization: x\r\nTransfer-Encoding: chunked\r\nX-API-Key: secret\r\n"
        b"Trailer: X-T\r\nUpgrade: h2c\r\nExpect: 100-continue\r\nX-Kept: 1\r\n\r\n"
        b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    await client.until(b"\r\n\r\n")  # aiohttp's 100 Continue
    await client.until(b"ok")
    assert engine.heads == [
        b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:" + str(engine.port).encode() + b"\r\n"
        b"Content-Length: 5\r\nX-Kept: 1\r\nX-Request-ID: req-1\r\n\r\n"
    ]
    assert engine.bodies == [b"abcde"]


async def test_what_an_old_client_leaves_out_is_added(proxy: Proxy) -> None:
    proxy.options["body"] = Body([b"abc"])
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.send(b"POST /v1/x HTTP/1.0\r\nA: b\r\n\r\n")
    await client.until(b"ok")
    assert engine.heads == [
        b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nA: b\r\nContent-Length: 3\r\n"
        b"X-Request-ID: req-1\r\n\r\n" % engine.port
    ]


async def test_the_base_path_goes_before_the_target(proxy: Proxy) -> None:
    engine = await proxy.engine(answering(OK))
    proxy.address = EngineAddress.from_url(f"http://127.0.0.1:{engine.port}/base/")
    client = await proxy.client()
    await client.get(b"/v1/x?y=1")
    await client.until(b"ok")
    assert engine.heads[0].startswith(b"GET /base/v1/x?y=1 HTTP/1.1\r\n")
    assert b"Content-Length" not in engine.heads[0]


@pytest.mark.parametrize(
    ("base", "below", "engines", "clients"),
    [
        (b"", b"", b"http://%(host)s/v1/x/?a=b#c", b"/v1/x/?a=b#c"),
        (b"", b"", b"HTTPS://%(host)s", b"/"),
        (b"", b"", b"//%(host)s?q", b"/?q"),
        (b"", b"", b"http://%(host)s//evil.example/", b"/evil.example/"),
        (b"", b"", b"http://elsewhere.example/v1", None),
        (b"", b"", b"http://127.0.0.1:1/v1", None),
        (b"", b"", b"//elsewhere.example/v1", None),
        (b"", b"", b"/v1/x/", None),
        (b"", b"", b"x/", None),
        (b"", b"/upstream/a", b"http://%(host)s/login", b"/upstream/a/login"),
        (b"", b"/upstream/a", b"/login?next=/", b"/upstream/a/login?next=/"),
        (b"", b"/upstream/a", b"login", None),
        (b"", b"/upstream/a", b"/upstream/a/login", None),  # an engine that was told where it is
        (b"", b"/upstream/a", b"http://%(host)s/upstream/a?x", b"/upstream/a?x"),
        (b"", b"/upstream/a", b"/upstream/ab", b"/upstream/a/upstream/ab"),
        (b"", b"", b"http://%(host)s/\\elsewhere.example", b"/elsewhere.example"),  # as browsers read it: "//"
        (b"", b"/upstream/a", b"https://elsewhere.example/login", None),
        (b"/base", b"", b"http://%(host)s/base/v1/x/", b"/v1/x/"),
        (b"/base", b"", b"/base", b"/"),
        (b"/base", b"/upstream/a", b"/base/login", b"/upstream/a/login"),
        (b"/base", b"", b"/basement", None),
        (b"/base", b"", b"http://%(host)s/other", None),
    ],
)
async def test_a_redirect_leads_back_to_the_proxy(
    proxy: Proxy, base: bytes, below: bytes, engines: bytes, clients: bytes | None
) -> None:
    async def redirect(side: EngineSide) -> None:
        for _ in range(2):
            host = b"127.0.0.1:%d" % side.engine.port
            await side.request()
            location = engines.replace(b"%(host)s", host)
            await side.send(b"HTTP/1.1 307 T\r\nlocation: " + location + b"\r\nContent-Length: 0\r\n\r\n")

    engine = await proxy.engine(redirect)
    proxy.address = EngineAddress.from_url(f"http://127.0.0.1:{engine.port}{base.decode()}")
    proxy.options["below"] = below
    client = await proxy.client()
    for _ in range(2):
        await client.get()
        if clients is None:
            location = engines.replace(b"%(host)s", b"127.0.0.1:%d" % engine.port)
            fields = b"location: " + location + b"\r\nContent-Length: 0\r\n" + EXTRA_BYTES
        else:
            fields = b"Content-Length: 0\r\n" + EXTRA_BYTES + b"Location: " + clients + b"\r\n"
        await client.expect(b"HTTP/1.1 307 T\r\n" + fields + b"\r\n")


async def test_a_location_of_what_is_no_redirect_stays(proxy: Proxy) -> None:
    async def created(side: EngineSide) -> None:
        await side.request()
        host = b"127.0.0.1:%d" % side.engine.port
        await side.send(b"HTTP/1.1 201 C\r\nLocation: http://" + host + b"/x\r\nContent-Length: 0\r\n\r\n")

    engine = await proxy.engine(created)
    client = await proxy.client()
    await client.get()
    assert b"Location: http://127.0.0.1:%d/x\r\n" % engine.port in await client.until(b"\r\n\r\n")


BODIES = [
    pytest.param([b"3\r\nabc\r\n0\r\n\r\n"], id="at once"),
    pytest.param([bytes([byte]) for byte in b"1a;x=y\r\n" + b"z" * 26 + b"\r\n0\r\nA: b\r\n\r\n"], id="bytewise"),
    pytest.param([b"3", b"\r", b"\nabc\r", b"\n0\r\n", b"\r\n"], id="split lines"),
    pytest.param([b"A;e=1\r\n0123456789\r\n00000\r\nX-T: 1\r\nX-U: 2\r\n\r\n"], id="extension and trailers"),
    pytest.param([b"1\r\na\r\n1\r\nb\r\n", b"1\r\nc\r\n", b"0\r\n\r", b"\n"], id="events"),
]


@pytest.mark.parametrize("parts", BODIES)
async def test_a_chunked_body_passes_verbatim_and_connections_are_reused(proxy: Proxy, parts: list[bytes]) -> None:
    head = b"HTTP/1.1 201 Fine Indeed\r\nServer: e\r\nTransfer-Encoding: chunked\r\nX-b: 1\r\n\r\n"
    engine = await proxy.engine(answering(head, *parts))
    client = await proxy.client()
    for _ in range(2):
        await client.get()
        await client.expect(
            b"HTTP/1.1 201 Fine Indeed\r\nServer: e\r\nX-b: 1\r\nTransfer-Encoding: chunked\r\n"
            + EXTRA_BYTES
            + b"\r\n"
            + b"".join(parts)
        )
    assert engine.connections == 1
    assert proxy.exchange.status == 201


@pytest.mark.parametrize("parts", BODIES)
async def test_an_old_client_gets_the_chunks_contents_and_a_close(proxy: Proxy, parts: list[bytes]) -> None:
    await proxy.engine(answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts[0], *parts[1:]))
    client = await proxy.client()
    await client.get(b"/", b"Connection: keep-alive", version=b"1.0")
    head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert head + b"\r\n" == b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + EXTRA_BYTES or (
        head + b"\r\n" == b"HTTP/1.1 200 OK\r\n" + EXTRA_BYTES
    )
    assert body in {b"abc", b"z" * 26, b"0123456789"}


async def test_an_old_client_may_keep_its_connection_when_the_length_is_known(proxy: Proxy) -> None:
    await proxy.engine(answering(OK))
    client = await proxy.client()
    for _ in range(2):
        await client.get(b"/", b"Connection: keep-alive", version=b"1.0")
        await client.expect(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n" + EXTRA_BYTES + b"\r\nok"
        )
    await client.get(b"/", version=b"1.0")
    await client.expect(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + EXTRA_BYTES + b"\r\nok")
    await client.expect_end()


async def test_a_client_that_wants_its_connection_closed_gets_that(proxy: Proxy) -> None:
    await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.get(b"/", b"Connection: close")
    await client.expect(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n" + EXTRA_BYTES + b"\r\nok")
    await client.expect_end()


@pytest.mark.parametrize(
    ("method", "head"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\nX: y\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 99\r\n"),
        (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"),
    ],
)
async def test_responses_without_a_body(proxy: Proxy, method: bytes, head: bytes) -> None:
    engine = await proxy.engine(answering(head + b"\r\n"))
    client = await proxy.client()
    for _ in range(2):
        await client.send(method + b" / HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.expect(head + EXTRA_BYTES + b"\r\n")
    assert engine.connections == 1


async def test_interim_responses_are_skipped(proxy: Proxy) -> None:
    engine = await proxy.engine(
        answering(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 10",
            b"3 Early Hints\r\nLink: x\r\n\r\n",
            b"HTTP/1.1 102 Processing\r\n\r\n" + OK,
        )
    )
    client = await proxy.client()
    for _ in range(2):
        await client.get()
        await client.expect(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + EXTRA_BYTES + b"\r\nok")
    assert engine.connections == 1


@pytest.mark.parametrize("begins", [[b"abc"], [b"", b"abc"]], ids=["with the head", "after the head"])
async def test_a_body_until_close_is_chunked_for_a_client_that_knows_chunks(
    proxy: Proxy, begins: list[bytes]
) -> None:
    head, *more = begins
    parts = b"HTTP/1.0 200 OK\r\nServer: e\r\n\r\n" + head, *more, b"0123456789"
    await proxy.engine(answering(*parts, close=True))
    client = await proxy.client()
    for _ in range(2):
        await client.get()
        await client.expect(
            b"HTTP/1.1 200 OK\r\nServer: e\r\nTransfer-Encoding: chunked\r\n"
            + EXTRA_BYTES
            + b"\r\n3\r\nabc\r\na\r\n0123456789\r\n0\r\n\r\n"
        )


async def test_a_body_until_close_is_closed_for_a_client_that_does_not(proxy: Proxy) -> None:
    await proxy.engine(answering(b"HTTP/1.1 200 OK\r\nServer: e\r\n\r\nabc", b"0123456789", close=True))
    client = await proxy.client()
    await client.get(version=b"1.0")
    assert await client.rest() == b"HTTP/1.1 200 OK\r\nServer: e\r\n" + EXTRA_BYTES + b"\r\nabc0123456789"


async def test_an_event_stream_is_not_to_be_buffered_on_its_way(proxy: Proxy) -> None:
    await proxy.engine(
        answering(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nX-Accel-Buffering: yes\r\n"
            b"X-Request-Id: engine-s\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n"
            b"transfer-encoding: chunked\r\n\r\n",
            b"9\r\ndata: 1\n\n\r\n",
            b"0\r\n\r\n",
        )
    )
    client = await proxy.client()
    await client.get()
    await client.expect(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
        + EXTRA_BYTES
        + b"X-Accel-Buffering: no\r\n\r\n9\r\ndata: 1\n\n\r\n0\r\n\r\n"
    )


async def test_the_engines_own_errors_pass_untouched(proxy: Proxy) -> None:
    await proxy.engine(answering(b"HTTP/1.1 503 Loading\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nwait"))
    client = await proxy.client()
    await client.get()
    await client.expect(
        b"HTTP/1.1 503 Loading\r\nRetry-After: 7\r\nContent-Length: 4\r\n" + EXTRA_BYTES + b"\r\nwait"
    )
    assert proxy.outcomes == [None]


async def test_a_compressed_body_is_not_touched(proxy: Proxy) -> None:
    body = b"\x1f\x8bnot really"
    await proxy.engine(
        answering(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 12\r\n\r\n" + body)
    )
    client = await proxy.client()
    await client.get(b"/", b"Accept-Encoding: gzip")
    await client.expect(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 12\r\n" + EXTRA_BYTES + b"\r\n" + body
    )


async def test_a_huge_header_passes_and_a_larger_one_does_not(proxy: Proxy) -> None:
    huge = b"x" * 60000
    await proxy.engine(answering(b"HTTP/1.1 200 OK\r\nX: " + huge, b"\r\nContent-Length: 0\r\n\r\n"))
    client = await proxy.client()
    await client.get()
    await client.expect(b"HTTP/1.1 200 OK\r\nX: " + huge + b"\r\nContent-Length: 0\r\n" + EXTRA_BYTES + b"\r\n")
    await proxy.engine(answering(b"HTTP/1.1 200 OK\r\nX: " + huge + huge))
    proxy.activity = type(proxy.activity)()
    await client.get()
    assert (await client.until(b"\r\n")) == b"HTTP/1.1 502 Bad Gateway\r\n"


async def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    async def script(side: EngineSide) -> None:
        while True:
            head = await side.head()
            path = head.split()[1]
            await side.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await side.send(b"%x\r\n%b\r\n" % (len(path), path), b"0\r\n\r\n")

    engine = await proxy.engine(script)
    client = await proxy.client()
    await client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(40)))
    for number in range(40):
        path = b"/%d" % number
        await client.expect(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
            + EXTRA_BYTES
            + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(path), path)
        )
    assert engine.connections == 1


async def test_a_large_body_in_pieces(proxy: Proxy) -> None:
    parts = [bytes([n]) * 300_000 for n in range(30)]
    proxy.options["body"] = Body(parts)
    engine = await proxy.engine(answering(OK))
    client = await proxy.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    await client.until(b"ok")
    assert engine.bodies == [b"".join(parts)]
    assert engine.connections == 1


async def test_an_early_answer_ends_the_upload(proxy: Proxy) -> None:
    async def script(side: EngineSide) -> None:
        await side.head()
        await side.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await side.closed()

    proxy.options["body"] = Body([b"x" * 100_000] * 100)
    engine = await proxy.engine(script)
    client = await proxy.client()
    for number in range(2):
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await client.expect(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n" + EXTRA_BYTES + b"\r\nbig")
        assert engine.connections == number + 1


async def test_an_early_answer_and_a_close_with_the_body_unread(proxy: Proxy) -> None:
    """The engine's system resets the connection then; what it said before counts."""

    async def script(side: EngineSide) -> None:
        await side.head()
        await proxy.until_sender_waits()
        await side.send(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbig")

    proxy.options["body"] = Body([b"x" * 100_000] * 300)
    await proxy.engine(script)
    client = await proxy.client()
    for _ in range(3):
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await client.expect(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n" + EXTRA_BYTES + b"\r\nbig")


async def test_an_answer_may_stream_while_the_body_is_still_going_out(proxy: Proxy) -> None:
    async def script(side: EngineSide) -> None:
        head = await side.head()
        assert b"Content-Length: 10000000\r\n" in head
        await side.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await side.reader.readexactly(10_000_000)
        await side.send(b"1\r\nb\r\n0\r\n\r\n")

    proxy.options["body"] = Body([b"x" * 100_000] * 100)
    await proxy.engine(script)
    client = await proxy.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    await client.until(b"1\r\na\r\n")
    await client.expect(b"1\r\nb\r\n0\r\n\r\n")
