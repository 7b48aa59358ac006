"""Who is told where it stands, and how; who is not."""

from __future__ import annotations

import asyncio
import json

import pytest

from llmux.extract import BodyBudget
from llmux.extract.body import Body, Store, streams
from llmux.middleware.progress import about
from llmux.upstream import ConnectionPool, EngineRefusedError
from tests.server.fixtures import one_loop
from tests.server.house import WAKE, held, message, until

CHAT = "/v1/chat/completions"
SLOW = {"wake": f"{held('go')}; {WAKE}"}
ON = ("X-LLMux-Progress", "on")


async def open_house(house, **settings):
    await house.open({"a": SLOW, "b": {}}, **{"progress": True, "progress_every": "10ms", **settings})


async def wait_for_turns(house, turns: int = 3) -> None:
    """Wait until the notifier has looked so many times more."""
    notifier = house.front._handler._notifier
    turned = 0
    tell = notifier._turn

    def turn():
        nonlocal turned
        turned += 1
        tell()

    notifier._turn = turn
    await until(lambda: turned >= turns)
    notifier._turn = tell


@pytest.mark.parametrize(
    ("settings", "headers", "early"),
    [
        ({"progress": False}, {}, False),
        ({"progress": False}, {"X-LLMux-Progress": "on"}, True),
        ({}, {"X-LLMux-Progress": " OFF "}, False),
        ({}, {}, True),
        ({"api_keys": [{"key": "k", "progress": True}], "progress": False}, {}, True),
        ({"api_keys": [{"key": "k", "progress": False}]}, {}, False),
        ({"api_keys": [{"key": "k", "progress": False}]}, {"X-LLMux-Progress": "on"}, True),
        ({"api_keys": [{"key": "k"}]}, {}, True),
    ],
)
async def test_the_header_counts_before_the_key_and_the_key_before_the_setting(house, settings, headers, early):
    await open_house(house, **settings)
    line = await house.begin("POST", CHAT, {"model": "a", "stream": True}, **headers | {"X-API-Key": "k"})
    listener = await house.begin(
        "POST", CHAT, {"model": "a", "stream": True}, **{"X-API-Key": "k", "X-LLMux-Progress": "on"}
    )
    await listener.reader.readuntil(b": llmux waiting, position 2, about ")
    house.release("go")
    reply = await line.reply() if not early else await line.head()
    assert reply.headers.get("content-type", "").startswith("text/event-stream") is early
    assert reply.marked
    assert reply.status == 200


REQUESTS = [
    message("POST", CHAT, {"model": "a"}).replace(b"HTTP/1.1", b"HTTP/1.0"),
    message("POST", "/v1/audio/speech", {"model": "a"}),
    message("POST", "/v1/embeddings", {"model": "a", "stream": True}),
    message("GET", "/v1/x?model=a"),
    message("POST", CHAT + "?model=a", b"\x1f\x8b", Content_Encoding="gzip"),
    message("POST", CHAT + "?model=a", b"--x--", Content_Type="multipart/form-data; boundary=x"),
    message("POST", "/upstream/a" + CHAT, {"model": "a"}),
]


async def test_nothing_is_begun_whose_kind_nobody_knows(house):
    await open_house(house)
    lines = [await house.line() for _ in REQUESTS]
    for line, data in zip(lines, REQUESTS, strict=True):
        line.send(data)
    listener = await house.begin("POST", CHAT, {"model": "a"})
    await until(lambda: house.queued("a") == len(REQUESTS) + 1)
    await listener.reader.readuntil(b"\n\r\n")
    house.release("go")
    for line in lines:
        reply = await line.reply()
        assert (reply.status, reply.body) == (200, b"ok")
        assert reply.marked


async def test_interim_responses_are_for_whoever_asks_for_them(house):
    await open_house(house, progress=False)
    asks = [message("GET", "/v1/x?model=a", X_LLMux_Progress="1xx")]
    asks += [asks[0].replace(b"HTTP/1.1", b"HTTP/1.0"), message("GET", "/v1/x?model=a")]
    lines = [await house.line() for _ in asks]
    for number, (line, data) in enumerate(zip(lines, asks, strict=True), 1):
        line.send(data)
        await until(lambda number=number: house.queued("a") == number)
    for _ in range(2):
        head = await lines[0].head()
        assert (head.status, head.headers["x-llmux-position"]) == (102, "1")
        assert int(head.headers["x-llmux-expected-seconds"]) >= 1
    house.release("go")
    while (final := await lines[0].head()).status == 102:
        pass
    assert (final.status, await lines[0].reader.readexactly(2)) == (200, b"ok")
    assert int(final.headers["x-llmux-expected-seconds"]) >= 1
    for line in lines[1:]:
        reply = await line.reply()
        assert reply.status == 200
        assert "x-llmux-expected-seconds" not in reply.headers


async def test_a_word_that_means_nothing_is_refused(house):
    await open_house(house)
    reply = await house.ask("POST", CHAT, {"model": "a"}, X_LLMux_Progress="please")
    assert (reply.status, reply.error["param"]) == (400, "X-LLMux-Progress")
    assert house.queued("a") == 0


async def test_a_client_that_leaves_is_told_nothing_more(house):
    await open_house(house)
    line = await house.begin("POST", CHAT, {"model": "a", "stream": True})
    await line.reader.readuntil(b": llmux waiting")
    line.abort()
    await until(lambda: not house.queued("a"))
    notifier = house.front._handler._notifier
    assert not notifier._listeners
    await until(lambda: notifier._timer is None)
    assert not house.log.named("internal_error")
    house.release("go")


async def test_an_engine_that_is_found_dead_is_waited_for_on_the_same_answer(house, monkeypatch):
    house.up("a")
    await house.open({"a": {"max_in_flight": 1}}, progress=True, progress_every="10ms")
    first = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.in_flight("a"))
    line = await house.begin("POST", CHAT, {"model": "a"})
    await line.reader.readuntil(b"\n\r\n")
    connect, refused = ConnectionPool.connect, []

    async def refuse(pool, address):
        if not refused:
            refused.append(address)
            (house.folder / "a.up").unlink()
            raise EngineRefusedError("nobody there")
        return await connect(pool, address)

    monkeypatch.setattr(ConnectionPool, "connect", refuse)
    monkeypatch.setattr(ConnectionPool, "take", lambda _pool, _owner: None)
    house.engine.go.set()
    assert (await first.reply()).status == 200
    rest = await line.reader.readuntil(b"0\r\n\r\n")
    assert rest.endswith(b"2\r\nok\r\n0\r\n\r\n")
    assert refused
    line.send(message("GET", "/v1/models"))
    assert (await line.reply()).status == 200


async def test_a_client_that_does_not_read_is_not_written_to_without_end(house, monkeypatch):
    await open_house(house)
    line = await house.begin("POST", CHAT, {"model": "a"})
    await line.reader.readuntil(b"\n\r\n")
    early = next(iter(house.front._handler._notifier._listeners.values())).channel.early
    monkeypatch.setattr("llmux.proxy.early_response._MOST_UNREAD", -1)
    written = early._request.writer.output_size
    await wait_for_turns(house)
    assert early._request.writer.output_size == written
    house.release("go")


async def test_who_need_not_wait_is_answered_as_ever(house):
    house.up("a")
    await open_house(house)
    for fast in (True, False):
        house.front.fast_path.open = fast
        reply = await house.ask("POST", CHAT, {"model": "a"}, X_LLMux_Progress="on")
        assert (reply.status, reply.body) == (200, b"ok")
        assert "x-llmux-expected-seconds" not in reply.headers
    assert not house.front._handler._notifier._listeners


async def test_the_status_says_who_waits_where(house):
    await open_house(house, progress=False)
    lines = [await house.begin("POST", CHAT, {"model": "a"}, X_Request_ID=f"mine {n}") for n in range(3)]
    await until(lambda: house.queued("a") == 3)
    models = (await house.ask("GET", "/llmux/status")).json()["models"]
    assert [(each["position"], each["request_id"]) for each in models["a"]["waiting"]] == [
        (1, "mine 0"),
        (2, "mine 1"),
        (3, "mine 2"),
    ]
    assert all(each["waited"] >= 0 and each["expected"] >= 0 for each in models["a"]["waiting"])
    assert models["a"]["expected_wait"] == pytest.approx(10, abs=1)  # a wake that was never seen
    assert models["b"]["waiting"] == []
    house.release("go")
    for line in lines:
        assert (await line.reply()).status == 200
    assert (await house.ask("GET", "/llmux/status")).json()["models"]["a"]["expected_wait"] == 0


BODIES = [
    ({"stream": True}, True),
    ({"a": 1, "stream": True, "b": [{}]}, True),
    ({"stream": False}, False),
    ({"stream": None}, False),
    ({"stream": 1}, False),
    ({"stream": "true"}, False),
    ({"stream": {"stream": True}}, False),
    ({"stream": [True]}, False),
    ({"x": {"stream": True}}, False),
    ({"x": '"stream": true'}, False),
    ({"model": "m" * 5000, "x": "y" * 200_000, "stream": True}, True),
    ({"stream": "y" * 200_000}, False),
    ({}, False),
    (b'{"stream": true, "stream": false}', False),
    (b'{"stream": false, "stream": true}', True),
    (b'{"stream": true, "stream": "x"}', False),
    (b'{"str\\u0065am": true}', True),
    (b'{"stream":true}', True),
    (b"[1]", None),
    (b"", None),
    (b'{"stream" true}', None),
]


@one_loop
@pytest.mark.parametrize("step", [1, 7, 10**6])
@pytest.mark.parametrize(("document", "found"), BODIES)
async def test_whether_a_body_asks_for_a_stream(document, found, step, monkeypatch):
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    if step == 1 and len(data) > 1000:
        return
    store = Store(BodyBudget(2**30))
    store.add(data)
    monkeypatch.setattr("llmux.extract.body.SLICE", step)
    with Body(store, None) as body:
        assert await streams(body) is found
    assert await streams(Body(Store(BodyBudget(9)), None, compressed=True)) is None


@pytest.mark.parametrize(("seconds", "whole"), [(0.0, 1), (0.2, 1), (1.0, 1), (13.2, 14)])
def test_seconds_for_people(seconds, whole):
    assert about(seconds) == whole


async def test_two_clients_that_read_at_their_own_times(house):
    await open_house(house)
    first = await house.begin("POST", "/v1/messages", {"model": "a", "stream": True})
    await asyncio.gather(first.reader.readuntil(b'data: {"type": "ping"}\n\n'))
    second = await house.begin("POST", "/v1/messages/count_tokens", {"model": "a"})
    assert b"application/json" in await second.reader.readuntil(b"\n\r\n")
    house.release("go")
    assert b'event: error\ndata: {"type": "error"' in await first.closed()  # the engine has answered plain text
    assert (await second.reader.readuntil(b"0\r\n\r\n")).endswith(b"ok\r\n0\r\n\r\n")
