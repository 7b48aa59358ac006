"""Every response, whoever makes it, carries both headers and speaks the client's dialect."""

import asyncio

import pytest

from tests.server.house import message, until

OWN = [
    ("GET", "/", 200),
    ("GET", "/health", 200),
    ("HEAD", "/health", 200),
    ("GET", "/ready", 200),
    ("GET", "/metrics", 200),
    ("GET", "/v1/models", 200),
    ("GET", "/v1/models/a", 200),
    ("GET", "/v1/models/nobody", 404),
    ("GET", "/llmux/status", 200),
    ("GET", "/llmux/nothing", 404),
    ("GET", "/llmux/ui", 200),
    ("DELETE", "/llmux/status", 405),
    ("PUT", "/v1/models", 405),
    ("GET", "/llmux/lease", 405),
    ("OPTIONS", "/llmux/status", 204),
    ("OPTIONS", "/v1/chat/completions", 204),
    ("OPTIONS", "/sleep", 204),
    ("OPTIONS", "*", 204),
    ("GET", "/nothing", 404),
    ("POST", "/sleep", 404),
    ("GET", "/v1/%zz", 400),
    ("GET", "/v1/a%00b", 400),
    ("GET", "/v1/../sleep", 404),
    ("POST", "/v1/chat/completions", 400),
    ("DELETE", "/llmux/lease", 409),
    ("POST", "/llmux/models/nobody/wake", 404),
    ("POST", "/llmux/models/a/dance", 404),
]


@pytest.mark.parametrize(("method", "target", "status"), OWN)
async def test_both_headers_are_on_what_llmux_answers_itself(house, method, target, status):
    await house.open()
    reply = await house.ask(method, target)
    assert reply.status == status
    assert reply.marked, reply.fields
    if status >= 400:
        assert set(reply.error) == {"message", "type", "code", "param"}


async def test_a_405_says_what_the_path_takes(house):
    await house.open()
    reply = await house.ask("DELETE", "/llmux/status")
    assert reply.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 40000 + b"\r\n\r\n",
        b"GET /" + b"x" * 40000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nBad Name: 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
async def test_malformed_http_is_a_400_and_one_line(house, caplog, data):
    await house.open()
    reply = await house.raw(data)
    assert reply.status == 400
    assert reply.marked, reply.fields
    assert reply.error["code"] == "malformed_request"
    assert len(house.log.named("malformed_request")) == 1
    assert not house.log.named("internal_error")
    assert not caplog.records


async def test_a_client_that_begins_with_http_2_is_told_so(house):
    await house.open()
    reply = await house.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
    assert (reply.status, reply.error["code"]) == (400, "malformed_request")
    assert "HTTP/2" in reply.error["message"]
    assert "HTTP/2" in house.log.named("malformed_request")[0]["error"]


@pytest.mark.parametrize(
    "empty", ["Content-Length: 0\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "\r\n"]
)
async def test_a_request_that_names_no_model_for_want_of_a_body_is_told_so(house, empty):
    await house.open()
    method = "GET" if empty == "\r\n" else "POST"  # a redirect can make a GET of a POST
    reply = await house.raw(f"{method} /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{empty}".encode())
    other = await house.ask("POST", "/v1/chat/completions", {"messages": []})
    assert [(each.status, each.error["code"]) for each in (reply, other)] == [(400, "model_required")] * 2
    assert "no body" in reply.error["message"]
    assert "no body" not in other.error["message"]


async def test_a_websocket_that_names_its_model_later_is_told_to_do_without(house):
    await house.open()
    # As Codex opens it. It sends its request by POST after a 426 at once; after a 400 not at all.
    fields = (
        b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nopenai-beta: responses_websockets=2026-02-06\r\n\r\n"
    )
    replies = [
        await house.raw(b"GET /v1/%b HTTP/1.1\r\n%b" % (path, fields))
        for path in (b"responses", b"responses?model=none", b"realtime")
    ]
    assert [(reply.status, reply.error["code"]) for reply in replies] == [
        (426, "model_required"),
        (404, "model_not_found"),
        (400, "model_required"),
    ]


@pytest.mark.parametrize("turns", range(7))  # of the loop: the request may not have begun, or just so
async def test_a_body_with_broken_chunks_is_one_400_and_no_traceback(house, caplog, turns):
    await house.open()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    line = await house.line()
    line.send(head + b'4\r\n{"a"\r\n')
    for _ in range(turns):
        await asyncio.sleep(0)
    line.send(b"zz\r\n\r\n")
    reply = await line.reply()
    assert reply.status == 400
    assert reply.marked
    assert await line.closed() == b""
    assert [(record.name, record.getMessage()) for record in caplog.records] == []
    assert not house.log.named("internal_error")


async def test_a_foreign_expectation_is_refused_in_the_envelope(house):
    await house.open()
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "a"}, Expect="the unexpected")
    assert reply.status == 400
    assert reply.marked
    assert reply.error["message"]


async def test_continue_is_said_before_the_body_is_sent(house):
    await house.open()
    line = await house.line()
    whole = message("POST", "/v1/chat/completions", {"model": "a"}, Expect="100-continue")
    head, _, body = whole.partition(b"\r\n\r\n")
    line.send(head + b"\r\n\r\n")
    assert (await line.head()).status == 100
    line.send(body)
    reply = await line.reply()
    assert (reply.status, reply.body) == (200, b"ok")
    assert reply.marked


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v1/messages", 400),
        ("/v1/messages?beta=true", 400),
        ("/v1/messages/count_tokens", 400),
        ("/v1/messages/%zz", 400),
        ("/v1//messages", 400),
        ("http://llmux/v1/messages", 400),
        ("/v1/messages/../x", 404),
        ("/v1/messages;x", 404),
    ],
)
async def test_anthropic_clients_get_their_envelope(house, target, status):
    await house.open()
    reply = await house.ask("POST", target, {"nothing": 1})
    assert reply.status == status
    assert reply.json()["type"] == "error"
    assert reply.json()["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("target", ["/v1/messagesque", "/v1/chat/completions?x=/v1/messages"])
async def test_others_get_openais_envelope(house, target):
    await house.open()
    reply = await house.ask("POST", target, {"nothing": 1})
    assert reply.status == 400
    assert set(reply.json()) == {"error"}
    assert reply.error["code"] == "model_required"


async def test_a_relayed_answer_carries_both_headers(house):
    await house.open()
    for reply in (
        await house.ask("POST", "/v1/chat/completions", {"model": "a"}, X_Request_ID="mine 1"),
        await house.ask("HEAD", "/v1/x?model=a", X_Request_ID="mine 1"),
    ):
        assert reply.status == 200
        assert reply.marked
        assert reply.headers["x-request-id"] == "mine 1"
    assert house.engine.heads[0].lower().count(b"x-request-id: mine 1") == 1


async def test_a_switched_protocol_carries_both_headers(house):
    await house.open()
    reply = await house.ask("GET", "/v1/realtime?model=a", Connection="Upgrade", Upgrade="websocket")
    assert reply.status == 101
    assert reply.marked


async def test_the_event_stream_carries_all_headers(house):
    await house.open(cors=["http://page.test"])
    line = await house.begin("GET", "/llmux/events", Origin="http://page.test", X_Request_ID="mine")
    head = await line.head()
    assert head.status == 200
    assert head.marked
    assert head.headers["x-request-id"] == "mine"
    assert head.headers["access-control-allow-origin"] == "http://page.test"
    assert (await house.ask("HEAD", "/llmux/events")).status == 200


async def test_an_operators_body_that_is_too_large_is_refused_in_the_envelope(house):
    await house.open()
    reply = await house.ask("POST", "/llmux/models/a/pin", b" " * 2_000_000)
    assert reply.status == 413
    assert reply.marked
    assert reply.error["code"] == "body_too_large"


async def test_a_mistake_of_llmux_is_a_500_in_the_envelope(house):
    await house.open()

    def broken(*_):
        raise TimeoutError("broken")

    house.switcher.enter = broken
    reply = await house.ask("POST", "/v1/messages", {"model": "a"}, X_Request_ID="mine")
    assert reply.status == 500
    assert reply.marked
    assert reply.headers["x-request-id"] == "mine"
    assert reply.json()["type"] == "error"
    assert len(house.log.named("internal_error")) == 1


async def test_a_client_that_leaves_is_no_mistake_of_llmux(house):
    await house.open()
    line = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.engine.bodies)
    line.abort()
    await until(lambda: not house.in_flight("a"))
    assert not house.log.named("internal_error")
    assert house.log.named("client_left")


@pytest.mark.parametrize("codings", ["gzip, chunked", "identity, chunked"])
async def test_a_coding_that_is_not_understood_ends_the_connection(house, codings):
    await house.open("a")
    line = await house.line()
    line.send(message("POST", "/v1/x", Transfer_Encoding=codings) + b"0\r\n\r\n")
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (400, "malformed_request")
    assert reply.headers["connection"] == "close"
    assert await line.closed() == b""
