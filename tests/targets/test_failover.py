"""A remote that fails before the first byte: the next one is asked, and the breaker opens."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from llmux.proxy import guarded
from llmux.proxy import remote as remote_module
from llmux.proxy.guarded import begins_with_error
from tests.harness.waiting import PATIENCE
from tests.server.house import message, until
from tests.targets.remote_host import (
    CHAT,
    OPEN,
    SOON,
    STREAM_HEAD,
    RemoteHost,
    answer,
    broken,
    chunk,
    chunked,
    cut,
    error,
    hang,
    opened,
    then,
)

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")


async def two(house, certificates, first, second, timeouts=None, **more):
    remotes = {
        "r": first.settings(ca=certificates.authority, timeouts=timeouts or {}),
        "s": second.settings(ca=certificates.authority),
    }
    await house.open("a", remotes=remotes, virtual={"v": {"first": ["r/m", "s/m"]}}, **(OPEN | more))


@pytest.mark.parametrize(
    "says",
    [
        hang,
        cut,
        error("500 Oops"),
        error("503 Busy", Retry_After="3"),
        error("429 Too Many", Retry_After="3"),
        error("408 Timeout"),
        then(STREAM_HEAD),
        then(STREAM_HEAD + b"7\r\ndata: {", cut),
        b"nonsense\r\n\r\n",
        error("401 Unauthorized"),
    ],
    ids=["hangs", "cut", "500", "503", "429", "408", "head only", "half an event", "no HTTP", "401"],
)
async def test_the_next_one_is_asked_before_the_first_byte(house, certificates, says):
    async with (
        RemoteHost(says, tls=certificates.context()) as first,
        RemoteHost(tls=certificates.context()) as second,
    ):
        await two(house, certificates, first, second, SOON if says is hang else None)
        reply = await house.ask("POST", "/v1/chat/completions", {"model": "v", "stream": True})
        assert (reply.status, reply.headers["x-llmux-served-by"]) == (200, "s/m")
        assert reply.json() == CHAT
        assert (len(first.asked), len(second.asked)) == (1, 1)
        assert [name for name, _ in reply.fields].count("x-llmux-served-by") == 1


@pytest.mark.parametrize("status", ["400 Bad", "403 Forbidden", "404 No", "422 What", "402 Pay"])
async def test_what_the_client_is_to_blame_for_is_not_tried_elsewhere(house, certificates, status):
    async with (
        RemoteHost(error(status), tls=certificates.context()) as first,
        RemoteHost(tls=certificates.context()) as second,
    ):
        await two(house, certificates, first, second)
        reply = await house.ask("POST", "/v1/chat/completions", {"model": "v"})
        assert reply.status == int(status[:3])
        assert not second.asked


BUSY = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'
STARTED = b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","content":[]}}\n\n'
FAILED = b'data: {"error":{"message":"Provider returned error","code":502}}\n\n'
WAIT = b": OPENROUTER PROCESSING\n\n"
NOT_YET = b'data: {"type":"response.created","response":{"id":"r"}}\n\n'
NOT_AT_ALL = b'data: {"type":"response.failed","response":{"status":"failed","error":{"message":"no"}}}\n\n'


@pytest.mark.parametrize(
    ("path", "apis", "usage", "pieces"),
    [
        ("/v1/messages", None, "", [BUSY]),
        ("/v1/messages", None, "", [STARTED, BUSY]),
        ("/v1/messages", None, "", [STARTED + BUSY]),
        ("/v1/chat/completions", None, "", [WAIT, WAIT, FAILED]),
        ("/v1/chat/completions", None, "exact", [WAIT, WAIT, FAILED]),
        ("/v1/chat/completions", None, "exact", [FAILED]),
        ("/v1/chat/completions", None, "", [b'data: {"object":"error","message":"no"}\n\n']),
        ("/v1/responses", None, "", [NOT_YET, NOT_AT_ALL]),
        ("/v1/messages", ["chat"], "", [WAIT, FAILED]),
        ("/v1/chat/completions", ["messages"], "", [STARTED, BUSY]),
        ("/v1/responses", ["chat"], "", [FAILED]),
    ],
)
async def test_a_stream_that_begins_with_an_error_is_a_failure_and_the_next_one_is_asked(
    house, certificates, path, apis, usage, pieces
):
    says = STREAM_HEAD + b"".join(chunked(piece) for piece in pieces) + b"0\r\n\r\n"
    async with (
        RemoteHost(says, tls=certificates.context()) as first,
        RemoteHost(tls=certificates.context()) as second,
    ):
        second.says = [error("418 Teapot", "the other")]
        spoken = {} if apis is None else {"apis": apis}
        remotes = {
            "r": first.settings(ca=certificates.authority, **spoken),
            "s": second.settings(ca=certificates.authority),
        }
        more = {"usage": usage} if usage else {}
        await house.open("a", remotes=remotes, virtual={"v": {"first": ["r/m", "s/m"]}}, **OPEN, **more)
        body = {"stream": True, "max_tokens": 9, "messages": [], "input": "q"}
        reply = await house.ask("POST", path, {"model": "v", **body})
        assert (reply.status, reply.headers["x-llmux-served-by"]) == (418, "s/m")
        remote = house.switcher.remotes.document()["r"]
        assert (remote["failures"], remote["requests"]) == (1, {"failed": 1})
        # Without another one, the client gets what there is, and it is a failure all the same.
        reply = await house.ask("POST", path, {"model": "r/m", **body})
        assert reply.status == 200
        if apis is None:
            assert reply.body == b"".join(pieces)
        remote = house.switcher.remotes.document()["r"]
        assert (remote["failures"], remote["requests"]) == (2, {"failed": 2})


async def test_a_client_of_http_1_0_gets_the_next_one_too(house, certificates):
    first_says = then(STREAM_HEAD + chunked(STARTED), chunked(BUSY) + b"0\r\n\r\n")
    async with (
        RemoteHost(first_says, tls=certificates.context()) as first,
        RemoteHost(STREAM_HEAD + chunked(STARTED) + b"0\r\n\r\n", tls=certificates.context()) as second,
    ):
        await two(house, certificates, first, second)
        body = {"model": "v", "stream": True, "max_tokens": 9, "messages": []}
        asked = message("POST", "/v1/messages", body).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        reply = await house.raw(asked)
        assert (reply.body, reply.headers["x-llmux-served-by"]) == (STARTED, "s/m")


@pytest.mark.parametrize("more", [{}, {"usage": "exact"}])
async def test_what_only_announces_an_answer_is_passed_on_with_it(house, certificates, more):
    said = chunk("a")
    end = b"data: [DONE]\n\n"
    says = then(STREAM_HEAD + chunked(WAIT), chunked(WAIT + said[:9]) + chunked(said[9:] + end) + b"0\r\n\r\n")
    async with (
        RemoteHost(says, tls=certificates.context()) as first,
        RemoteHost(tls=certificates.context()) as second,
    ):
        await two(house, certificates, first, second, **more)
        reply = await house.ask("POST", "/v1/chat/completions", {"model": "v", "stream": True})
        assert (reply.body, reply.headers["x-llmux-served-by"]) == (WAIT + WAIT + said + end, "r/m")
        first.says = [STREAM_HEAD + chunked(WAIT) + b"0\r\n\r\n"]  # nothing else comes
        reply = await house.ask("POST", "/v1/chat/completions", {"model": "v", "stream": True})
        assert (reply.body, reply.headers["x-llmux-served-by"]) == (WAIT, "r/m")
        for half in (WAIT, said[:9], WAIT + said[:9]):
            first.says = [then(STREAM_HEAD + chunked(half), cut)]
            reply = await house.ask("POST", "/v1/chat/completions", {"model": "v", "stream": True})
            assert reply.headers["x-llmux-served-by"] == "s/m"
            house.switcher.remotes._remotes["r"].endpoint.breaker.succeeded(0)


@pytest.mark.parametrize(("model", "held_for"), [("v", 0.0), ("s/m", 60.0)])
@pytest.mark.parametrize("more", [{}, {"usage": "exact"}, {"apis": ["chat"]}])
async def test_what_announces_an_answer_is_not_held_for_long_nor_without_another_to_ask(
    house, certificates, monkeypatch, model, held_for, more
):
    monkeypatch.setattr(remote_module, "HELD_FOR", held_for)
    seen = asyncio.Event()

    async def after(_host, writer):
        await asyncio.wait_for(seen.wait(), PATIENCE)
        writer.write(chunked(chunk("a") + b"data: [DONE]\n\n") + b"0\r\n\r\n")

    says = then(STREAM_HEAD + chunked(WAIT), after)
    apis = {name: more[name] for name in ("apis",) if name in more}
    usage = {name: more[name] for name in ("usage",) if name in more}
    async with RemoteHost(says, tls=certificates.context()) as host:
        settings = host.settings(ca=certificates.authority, **apis)
        virtual = {"v": {"first": ["r/m", "s/m"]}}
        await house.open("a", remotes={"r": settings, "s": settings}, virtual=virtual, **OPEN, **usage)
        path = "/v1/messages" if apis else "/v1/chat/completions"
        line = await house.begin("POST", path, {"model": model, "stream": True, "max_tokens": 9, "messages": []})
        assert (await line.head()).status == 200
        await line.reader.readuntil(b": ping" if apis else WAIT)
        seen.set()
        assert b'"a"' in await line.reader.readuntil(b"0\r\n\r\n")


@pytest.mark.parametrize("more", [{}, {"usage": "exact"}])
async def test_what_announces_an_answer_is_read_once(house, certificates, monkeypatch, more):
    looked: list[int] = []

    def look(events: bytes) -> bool | None:
        looked.append(len(events))
        return begins_with_error(events)

    monkeypatch.setattr(guarded, "begins_with_error", look)

    async def slowly(_host, writer):
        for waits in range(1, 21):
            writer.write(chunked(WAIT))
            await until(lambda waits=waits: sum(looked) >= waits * len(WAIT))
        writer.write(chunked(FAILED) + b"0\r\n\r\n")

    async with (
        RemoteHost(then(STREAM_HEAD, slowly), tls=certificates.context()) as first,
        RemoteHost(tls=certificates.context()) as second,
    ):
        await two(house, certificates, first, second, **more)
        reply = await house.ask("POST", "/v1/chat/completions", {"model": "v", "stream": True})
        assert reply.headers["x-llmux-served-by"] == "s/m"
    assert looked == [*[len(WAIT)] * 20, len(FAILED)]


@pytest.mark.parametrize("apis", [{}, {"apis": ["chat"]}])
@pytest.mark.parametrize("usage", [{}, {"usage": "exact"}])
async def test_what_announces_an_answer_is_passed_on_in_time_though_nothing_follows(
    house, certificates, monkeypatch, apis, usage
):
    monkeypatch.setattr(remote_module, "HELD_FOR", 0.05)
    begun = chunk("a")[:9]
    async with RemoteHost(then(STREAM_HEAD + chunked(WAIT + begun), hang), tls=certificates.context()) as host:
        settings = host.settings(ca=certificates.authority, **apis)
        virtual = {"v": {"first": ["r/m", "s/m"]}}
        await house.open("a", remotes={"r": settings, "s": settings}, virtual=virtual, **OPEN, **usage)
        path = "/v1/messages" if apis else "/v1/chat/completions"
        line = await house.begin("POST", path, {"model": "v", "stream": True, "max_tokens": 9, "messages": []})
        assert (await line.head()).headers["x-llmux-served-by"] == "r/m"
        assert await line.reader.readuntil(b"\n\n\r\n") == chunked(b": ping\n\n" if apis else WAIT)
        assert len(host.asked) == 1


@pytest.mark.parametrize(
    ("apis", "said", "path", "told"),
    [
        ("messages", STARTED, "/v1/responses", b"event: response.in_progress"),
        ("responses", NOT_YET, "/v1/messages", b"event: message_start"),
    ],
)
async def test_what_announces_an_answer_in_another_dialect_is_held_and_passed_on_in_time(
    house, certificates, monkeypatch, apis, said, path, told
):
    async with (
        RemoteHost(tls=certificates.context()) as first,
        RemoteHost(tls=certificates.context()) as second,
    ):
        remotes = {
            "r": first.settings(ca=certificates.authority, apis=[apis]),
            "s": second.settings(ca=certificates.authority),
        }
        await house.open("a", remotes=remotes, virtual={"v": {"first": ["r/m", "s/m"]}}, **OPEN)

        def body(text):  # of another conversation each time
            given = {"messages": [{"role": "user", "content": text}], "input": text}
            return {"model": "v", "stream": True, "max_tokens": 9, **given}

        head = STREAM_HEAD + chunked(said)
        for text, says in (("cut", then(head, cut)), ("ends", head + b"0\r\n\r\n")):
            first.says = [says]
            assert (await house.ask("POST", path, body(text))).headers["x-llmux-served-by"] == "s/m"
        assert len(first.asked) == 2
        monkeypatch.setattr(remote_module, "HELD_FOR", 0.05)
        first.says = [then(head, hang)]
        line = await house.begin("POST", path, body("hangs"))
        assert (await line.head()).headers["x-llmux-served-by"] == "r/m"
        await line.reader.readuntil(told)


@pytest.mark.parametrize("kind", ["[]", "{}", "1", "null", '"\\ud800"'])
@pytest.mark.parametrize("more", [{}, {"usage": "exact"}])
async def test_an_event_of_no_kind_is_passed_on(house, host, certificates, kind, more):
    said = b'data: {"type":%b}\n\n' % kind.encode()
    host.says = [STREAM_HEAD + chunked(said) + b"0\r\n\r\n"]
    await opened(house, host, certificates, **more)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m", "stream": True})
    assert (reply.status, reply.body) == (200, said)


@pytest.mark.parametrize("says", [chunked(FAILED) + b"0\r\n\r\n", b""])
async def test_streams_that_never_say_anything_make_a_remote_rest(house, certificates, says):
    """Their heads are those of a success."""
    async with (
        RemoteHost(then(STREAM_HEAD + says, cut), tls=certificates.context()) as first,
        RemoteHost(tls=certificates.context()) as second,
    ):
        await two(house, certificates, first, second)
        for _ in range(4):
            reply = await house.ask("POST", "/v1/chat/completions", {"model": "v", "stream": True})
            assert reply.headers["x-llmux-served-by"] == "s/m"
        assert len(first.asked) == 3
        assert house.switcher.remotes.document()["r"]["state"] == "open"


async def test_after_the_first_byte_there_is_no_second_answer(house, certificates):
    async with (
        RemoteHost(then(STREAM_HEAD + chunked(chunk("a"))), tls=certificates.context()) as first,
        RemoteHost(tls=certificates.context()) as second,
    ):
        await two(house, certificates, first, second)
        head, sent = await broken(house, "v")
        assert head.headers["x-llmux-served-by"] == "r/m"
        assert chunk("a") in sent
        assert b'"error"' in sent
        assert not second.asked


async def test_a_model_of_this_host_that_does_not_wake_is_stood_in_for(house, host, certificates):
    virtual = {"safe": {"first": ["a", "r/m"]}}
    await opened(house, host, certificates, models={"a": {"wake": "false"}}, virtual=virtual)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "safe"})
    assert (reply.status, reply.headers["x-llmux-served-by"]) == (200, "r/m")


async def test_a_remote_that_rests_is_not_asked_until_it_has_rested(house, host, certificates):
    host.says = [error("429 Too Many", Retry_After="30"), answer()]
    await opened(house, host, certificates)
    first = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
    second = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
    assert (first.status, second.status, second.error["code"]) == (429, 503, "remote_resting")
    assert 25 <= int(second.headers["retry-after"]) <= 30
    assert len(host.asked) == 1
    assert house.switcher.remotes.document()["r"]["state"] == "resting"


async def test_a_remote_that_fails_again_and_again_is_left_alone(house, host, certificates):
    host.says = [error("500 Oops")]
    await opened(house, host, certificates)
    statuses = [(await house.ask("POST", "/v1/x", {"model": "r/m"})).status for _ in range(5)]
    assert statuses == [500, 500, 500, 503, 503]
    assert len(host.asked) == 3
    assert [fields["remote"] for fields in house.log.named("remote_left_alone")] == ["r"]
    text = (await house.ask("GET", "/metrics")).body.decode()
    assert 'llmux_remote_state{remote="r",state="open"} 1.0' in text
    assert 'llmux_remote_requests_total{outcome="failed",remote="r"} 3.0' in text


async def test_what_a_remote_serves_may_finish_when_llmux_stops(house, host, certificates):
    async def slow(host, writer):
        await host.go.wait()
        writer.write(answer())
        await writer.drain()

    host.says = [slow]
    await opened(house, host, certificates, shutdown_grace="60s")
    line = await house.begin("POST", "/v1/chat/completions", {"model": "r/m"})
    await until(lambda: host.asked)
    closing = asyncio.create_task(house.close())
    await until(lambda: house.switcher.core.state.stopping)
    host.go.set()
    assert (await line.reply()).json() == CHAT
    await closing


async def test_what_takes_longer_than_the_grace_is_ended(house, host, certificates):
    host.says = [hang]
    await opened(house, host, certificates, shutdown_grace="100ms")
    line = await house.begin("POST", "/v1/chat/completions", {"model": "r/m"})
    await until(lambda: host.asked)
    closing = asyncio.create_task(house.close())
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (503, "stopping")
    await closing


async def test_a_reload_keeps_what_is_known_of_a_remote_and_takes_its_new_key(house, host, certificates):
    host.says = [error("500 Oops")]
    await opened(house, host, certificates)
    for _ in range(3):
        await house.ask("POST", "/v1/x", {"model": "r/m"})
    remotes = {"r": host.settings(ca=certificates.authority, key="sk-new", models={"m": "m", "n": "n"})}
    config = house.config("a", remotes=remotes, **OPEN)
    house.switcher.replace(config)
    house.front.configure(config)
    assert house.switcher.remotes.document()["r"]["state"] == "open"
    assert (await house.ask("POST", "/v1/x", {"model": "r/n"})).error["code"] == "remote_resting"
    house.switcher.remotes._remotes["r"].endpoint.breaker.succeeded(0)
    host.says = [answer()]
    assert (await house.ask("POST", "/v1/x", {"model": "r/n"})).status == 200
    assert host.asked[-1].headers["authorization"] == "Bearer sk-new"
    config = house.config("a")
    house.switcher.replace(config)
    house.front.configure(config)
    assert (await house.ask("POST", "/v1/x", {"model": "r/n"})).status == 404


async def test_at_once_there_are_never_more_than_it_may_have(house, host, certificates):
    most = 0

    async def count(_host, writer):
        nonlocal most
        most = max(most, house.switcher.remotes.document()["r"]["in_flight"])
        await asyncio.sleep(0.02)
        writer.write(answer())
        await writer.drain()

    host.says = [count]
    await opened(house, host, certificates, remote={"max_in_flight": 3}, ledger="ledger.db", usage="exact")
    body = {"model": "r/m", "stream": True, "user": "x" * 100_000}  # looked at in turns before it is sent
    replies = await asyncio.gather(*(house.ask("POST", "/v1/chat/completions", body) for _ in range(30)))
    statuses = {reply.status for reply in replies}
    assert statuses == {200, 503}
    assert most <= 3
    assert house.switcher.remotes.document()["r"]["in_flight"] == 0
