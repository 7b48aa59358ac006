"""Models on other hosts: what leaves this one, what comes back, and what happens when a remote misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import shutil
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.proxy.guarded import MOST_HELD, end_of_events, retry_after_of
from llmux.upstream import ResponseHead, names
from tests.harness.sdks import anthropic_client, openai_client
from tests.server.house import HOST, until
from tests.targets.remote_host import (
    CHAT,
    KEY,
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

IDLE = {"idle": "300ms"}
ENDS = "(broke off in the middle|has sent nothing)"


async def collect(stream: Any, got: list[Any]) -> None:
    async for each in stream:
        got.append(each)  # noqa: PERF401 - what came before the error is looked at


# ---- what goes out and what comes back


async def test_a_remotes_model_serves_over_tls_and_its_connection_is_kept(house, host, certificates):
    await opened(house, host, certificates)
    body = b'{ "model":"r/m" , "n" : 1.0 }'
    for _ in range(3):
        reply = await house.ask("POST", "/v1/chat/completions", body, Authorization="Bearer mine", Cookie="c=1")
        assert (reply.status, reply.json(), reply.marked) == (200, CHAT, True)
        assert reply.headers["x-llmux-served-by"] == "r/m"
    assert host.connections == 1
    asked = host.asked[0]
    assert asked.line == "POST /v1/chat/completions HTTP/1.1"
    assert asked.body == b'{ "model":"theirs/m" , "n" : 1.0 }'
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["host"] == f"localhost:{host.port}"
    assert "cookie" not in asked.headers
    assert [name for name, _ in asked.raw].count("Authorization") == 1
    assert not house.log.named("switch_started")


@pytest.mark.parametrize(
    ("base", "path", "expected"),
    [
        ("", "/v1/chat/completions?x=1", "/v1/chat/completions?x=1"),
        ("/api", "/v1/chat/completions", "/api/v1/chat/completions"),
        ("/api/v4", "/v1/chat/completions", "/api/v4/chat/completions"),
        ("/v1beta/openai", "/v1/chat/completions", "/v1beta/openai/chat/completions"),
        ("/v1/", "/chat/completions", "/v1/chat/completions"),
    ],
)
async def test_where_a_request_goes(house, host, certificates, base, path, expected):
    await opened(house, host, certificates, remote={"url": host.url + base})
    assert (await house.ask("POST", path, {"model": "r/m"})).status == 200
    assert host.asked[0].path == expected


@pytest.mark.parametrize(("auth", "bearer"), [(None, False), ("bearer", True), ("x-api-key", False)])
async def test_how_the_key_is_carried_on_messages(house, host, certificates, auth, bearer):
    await opened(house, host, certificates, remote={"auth": auth})
    assert (await house.ask("POST", "/v1/messages", {"model": "r/m"}, X_API_Key="mine")).status == 200
    headers = host.asked[0].headers
    assert headers.get("authorization") == (f"Bearer {KEY}" if bearer else None)
    assert headers.get("x-api-key") == (None if bearer else KEY)
    assert headers["anthropic-version"]


async def test_what_a_remote_does_not_speak_is_translated_or_refused(house, host, certificates):
    await opened(house, host, certificates, remote={"apis": ["chat"]})
    async with anthropic_client(f"http://{HOST}:{house.port}") as client:
        message = await client.messages.create(
            model="r/m", max_tokens=9, messages=[{"role": "user", "content": "hi"}]
        )
        assert message.content[0].text == "from afar"
        count = await client.messages.count_tokens(model="r/m", messages=[{"role": "user", "content": "hi"}])
        assert count.input_tokens > 0
    assert [asked.path for asked in host.asked] == ["/v1/chat/completions"]
    assert host.asked[0].json()["model"] == "theirs/m"
    assert host.asked[0].headers["authorization"] == f"Bearer {KEY}"
    reply = await house.ask("POST", "/v1/embeddings", {"model": "r/m"})
    assert (reply.status, reply.error["code"]) == (400, "api_not_spoken")
    assert len(host.asked) == 1


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("api.openai.com", "max_completion_tokens"),
        ("eu.api.openai.com", "max_completion_tokens"),
        ("api.openai.com.example", "max_tokens"),
    ],
)
async def test_openai_itself_is_told_the_limit_as_all_of_its_models_take_it(house, monkeypatch, name, field):
    found = socket.getaddrinfo

    def find(host, port, **more):
        return found(HOST if host == name else host, port, **more)

    monkeypatch.setattr(names.socket, "getaddrinfo", find)
    async with RemoteHost() as host:
        remote = host.settings(url=host.url.replace("localhost", name), apis=["chat"])
        await house.open(remotes={"r": remote}, **OPEN)
        body = {"model": "r/m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
        for path in ("/v1/messages", "/v1/chat/completions"):
            assert (await house.ask("POST", path, body)).status == 200
        translated, as_it_is = (asked.json() for asked in host.asked)
    assert [each for each in translated if each.startswith("max_")] == [field]
    assert translated[field] == as_it_is["max_tokens"] == 9


@pytest.mark.parametrize("status", ["404 Not Found", "405 Not Allowed", "501 Not Implemented"])
async def test_tokens_are_estimated_for_a_remote_that_does_not_count_them(house, host, certificates, status):
    host.says = [error(status)]
    await opened(house, host, certificates, remote={"models": {"m": "theirs/m", "n": "theirs/n"}})
    count, turn = "/v1/messages/count_tokens", {"role": "user", "content": "hi" * 40}
    for _ in range(3):  # it is asked once
        reply = await house.ask("POST", count, {"model": "r/m", "messages": [turn]})
        assert (reply.status, reply.headers["x-llmux-estimated"]) == (200, "true")
        assert reply.json()["input_tokens"] > 20
    assert [asked.path for asked in host.asked] == [count]
    assert not house.log.named("remote_failed")
    assert house.switcher.remotes.document()["r"]["failures"] == 0
    assert (await house.ask("POST", "/v1/messages", {"model": "r/m"})).status == int(status[:3])
    host.says = [answer({"input_tokens": 5})]
    reply = await house.ask("POST", count, {"model": "r/n", "messages": [turn]})  # 404 may be about the model
    assert reply.json() == {"input_tokens": 5}
    host.says = [error(status)]
    reply = await house.ask("POST", count, {"model": "r/m"})  # there is nothing to count
    assert reply.status == int(status[:3])
    host.says = [answer({"input_tokens": 7})]
    house.switcher.remotes._remotes["r"].lacks_until.clear()  # an hour later
    reply = await house.ask("POST", count, {"model": "r/m", "messages": [turn]})
    assert (reply.json(), "x-llmux-estimated" in reply.headers) == ({"input_tokens": 7}, False)


async def test_a_stream_passes_as_it_comes_and_is_translated_too(house, host, certificates):
    whole = chunk("a") + chunk("b") + b"data: [DONE]\n\n"
    # cut into pieces that are no events
    pieces = b"".join(chunked(whole[at : at + 50]) for at in range(0, len(whole), 50))
    host.says = [STREAM_HEAD + pieces + b"0\r\n\r\n"]
    await opened(house, host, certificates, remote={"apis": ["chat"]})
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m", "stream": True})
    assert reply.body == whole
    url, turn = f"http://{HOST}:{house.port}", {"role": "user", "content": "hi"}
    async with (
        anthropic_client(url) as client,
        client.messages.stream(model="r/m", max_tokens=9, messages=[turn]) as stream,
    ):
        assert [text async for text in stream.text_stream] == ["a", "b"]


# ---- who may leave


async def test_without_leave_nothing_goes_out(house, host, certificates):
    await opened(house, host, certificates, remotes_for_all=False)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
    assert (reply.status, reply.error["code"]) == (403, "remote_not_allowed")
    assert not host.connections


async def test_a_keys_own_word_goes_before_its_roles(house, host, certificates):
    keys = [
        {"name": "in", "key": "k-in"},
        {"name": "out", "key": "k-out", "remote": True},
        {"name": "role", "key": "k-role", "role": "far"},
        {"name": "not", "key": "k-not", "role": "far", "remote": False},
    ]
    await opened(house, host, certificates, api_keys=keys, roles={"far": {"remote": True}})
    found = {
        name: (await house.ask("POST", "/v1/x", {"model": "r/m"}, Authorization=f"Bearer k-{name}")).status
        for name in ("in", "out", "role", "not")
    }
    assert found == {"in": 403, "out": 200, "role": 200, "not": 403}
    assert len(host.asked) == 2
    assert {asked.headers["authorization"] for asked in host.asked} == {f"Bearer {KEY}"}


# ---- certificates


async def test_through_a_gateway_the_word_of_the_key_that_it_names_counts(house, host, certificates):
    keys = [
        {"name": "out", "key": "k-out", "remote": True},
        {"name": "in", "key": "k-in"},
        {"name": "far", "key": "k-far", "gateway": True, "remote": True},
        {"name": "near", "key": "k-near", "gateway": True},
    ]
    await opened(house, host, certificates, api_keys=keys)
    told = {}
    for gateway in ("far", "near"):
        for name in ("out", "in", "nobodys"):
            headers = {"X_API_Key": f"k-{gateway}", "X_LLMux_Key": name}
            reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"}, **headers)
            told[gateway, name] = reply.status
    assert told == {
        ("far", "out"): 200,
        ("far", "in"): 403,
        ("far", "nobodys"): 200,
        ("near", "out"): 200,
        ("near", "in"): 403,
        ("near", "nobodys"): 403,
    }
    assert len(host.asked) == 3


@pytest.mark.parametrize("name", ["other", "expired", "self"])
async def test_a_certificate_that_does_not_hold_means_that_nothing_is_sent(house, certificates, name):
    async with RemoteHost(tls=certificates.context(name)) as host:
        await opened(house, host, certificates)
        reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
        assert (reply.status, reply.error["code"]) == (502, "remote_unreachable")
        assert not host.asked
        assert "certificate" in house.switcher.remotes.document()["r"]["last_error"]


async def test_an_authority_that_is_not_the_systems_must_be_named(house, host):
    await house.open("a", remotes={"r": host.settings()}, **OPEN)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
    assert (reply.status, reply.error["code"]) == (502, "remote_unreachable")
    assert not host.asked


# ---- each step may hang, break off or fail


async def test_a_host_that_takes_the_connection_and_says_nothing(house, certificates):
    async def silent(reader, writer):
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, HOST, 0)
    try:
        port = server.sockets[0].getsockname()[1]
        remote = {"url": f"https://localhost:{port}", "key": KEY, "models": {"m": "m"}}
        limits = {"timeouts": {"connect": "200ms"}, "ca": certificates.authority}
        await house.open("a", remotes={"r": remote | limits}, **OPEN)
        reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
        assert (reply.status, reply.error["code"]) == (502, "remote_unreachable")
    finally:
        server.close()


async def test_an_answer_that_does_not_begin(house, host, certificates):
    host.says = [hang]
    await opened(house, host, certificates, remote={"timeouts": SOON})
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
    assert (reply.status, reply.error["code"]) == (504, "remote_timeout")
    await until(lambda: host.open == 0)


async def test_an_answer_that_goes_on_for_too_long(house, host, certificates):
    async def drip(_host, writer):
        writer.write(STREAM_HEAD)
        while not writer.is_closing():
            writer.write(chunked(chunk("x")))
            await asyncio.sleep(0.02)

    host.says = [drip]
    await opened(house, host, certificates, remote={"timeouts": {"total": "500ms"}})
    async with openai_client(f"http://{HOST}:{house.port}") as client:
        stream = await client.chat.completions.create(model="r/m", messages=[], stream=True)
        got = []
        with pytest.raises(openai.APIError, match=r"has not answered all within 0\.5 s"):
            await collect(stream, got)
    assert got
    await until(lambda: host.open == 0)


async def test_a_slow_drip_is_no_reason_to_give_up(house, host, certificates):
    async def drip(_host, writer):
        writer.write(STREAM_HEAD)
        for _ in range(10):
            for byte in chunked(chunk("x")):
                writer.write(bytes([byte]))
            await asyncio.sleep(0.12)
        writer.write(b"0\r\n\r\n")

    host.says = [drip]
    await opened(house, host, certificates, remote={"timeouts": {"first_byte": "60s", "idle": "1s"}})
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m", "stream": True})
    assert reply.body == chunk("x") * 10


@pytest.mark.parametrize("end", [cut, hang], ids=["cut", "hangs"])
@pytest.mark.parametrize("part", [0, 20], ids=["between events", "within one"])
@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
async def test_a_stream_that_breaks_off_makes_the_sdks_raise(house, host, certificates, end, part, sdk):
    if sdk == "openai":
        events = chunk("a") + chunk("b")
    else:
        start = {
            "type": "message_start",
            "message": {"id": "m", "type": "message", "role": "assistant", "content": []},
        }
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "a"}}
        events = b"".join(
            f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in (start, block)
        )
    sent = events + events[:part]
    host.says = [then(STREAM_HEAD + chunked(sent) + (b"ff\r\nda" if part else b""), end)]
    await opened(house, host, certificates, remote={"timeouts": IDLE})
    url = f"http://{HOST}:{house.port}"
    got = []
    if sdk == "openai":
        async with openai_client(url) as client:
            stream = await client.chat.completions.create(model="r/m", messages=[], stream=True)
            with pytest.raises(openai.APIError, match=rf"^r {ENDS}"):
                await collect(stream, got)
    else:
        async with anthropic_client(url) as client:
            stream = await client.messages.create(model="r/m", max_tokens=9, messages=[], stream=True)
            with pytest.raises(anthropic.APIError, match=rf"r {ENDS}"):
                await collect(stream, got)
    assert len(got) == 2
    assert len(host.asked) == 1


async def test_a_stream_whose_end_is_its_connections_must_say_that_it_is_whole(house, host, certificates):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"

    async def close(_host, writer):
        writer.close()
        raise ConnectionResetError

    host.says = [then(head + chunk("a"), close), then(head + chunk("a") + b"data: [DONE]\n\n", close)]
    await opened(house, host, certificates)
    _, sent = await broken(house, "r/m")
    assert b"broke off in the middle" in sent
    assert not sent.endswith(b"0\r\n\r\n")
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m", "stream": True})
    assert reply.body == chunk("a") + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("status", "retry"),
    [("400 Bad Request", None), ("404 Not Found", None), ("429 Too Many", "7"), ("500 Oops", None)],
)
async def test_a_remotes_error_is_passed_on_as_it_is(house, host, certificates, status, retry):
    host.says = [error(status, "their words", **({} if retry is None else {"Retry_After": retry}))]
    await opened(house, host, certificates)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
    assert reply.status == int(status[:3])
    assert reply.error["message"] == "their words"
    assert reply.headers.get("retry-after") == retry
    assert reply.marked


async def test_the_key_never_comes_back(house, host, certificates):
    masked = f"{KEY[:6]}***{KEY[-4:]}"
    says = f"Incorrect API key provided: {masked}"
    host.says = [error("401 Unauthorized", says), error("400 Bad", f"You sent: Bearer {KEY}"), answer()]
    await opened(house, host, certificates, record="record.jsonl", access_log=True)
    told = [await house.ask("POST", "/v1/chat/completions", {"model": "r/m"}) for _ in range(3)]
    assert [reply.status for reply in told] == [502, 400, 200]
    assert told[0].error["code"] == "remote_key"
    texts = [reply.body.decode() for reply in told]
    paths = ("/llmux/status", "/llmux/decisions", "/metrics", "/v1/models")
    texts += [(await house.ask("GET", path)).body.decode() for path in paths]
    texts += [repr(house.log.events), repr(house.switcher.config), (house.folder / "record.jsonl").read_text()]
    assert not [text for text in texts if KEY in text or masked in text]


async def test_hooks_do_not_see_the_key(house, host, certificates, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setenv("HEADER", f"Authorization: Bearer {KEY}")
    monkeypatch.setenv("SHORT", "bin")
    monkeypatch.setenv("HARMLESS", "x")
    wake = "env >seen; touch $LLMUX_MODEL.up"
    remotes = {"r": host.settings(ca=certificates.authority), "s": host.settings(key="bin")}
    await house.open({"a": {"wake": wake}}, remotes=remotes, **OPEN)
    assert (await house.chat("a")).status == 200
    seen = (house.folder / "seen").read_text()
    assert "HARMLESS=x" in seen
    assert "/bin" in seen
    assert KEY not in seen
    assert "SHORT=" not in seen


async def test_a_redirect_is_an_error_for_its_client_would_follow_it(house, host, certificates):
    host.says = [answer(b"", "307 Temporary Redirect", Location="https://elsewhere.example/v1/chat/completions")]
    await opened(house, host, certificates)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
    assert (reply.status, reply.error["code"]) == (502, "remote_error")
    assert "elsewhere" not in repr(reply)


async def test_a_client_that_leaves_ends_the_request(house, host, certificates):
    host.says = [hang]
    await opened(house, host, certificates)
    line = await house.begin("POST", "/v1/chat/completions", {"model": "r/m"})
    await until(lambda: host.asked)
    assert house.switcher.remotes.document()["r"]["in_flight"] == 1
    line.abort()
    await until(lambda: host.open == 0)
    await until(lambda: house.switcher.remotes.document()["r"]["in_flight"] == 0)
    assert house.switcher.remotes.document()["r"]["requests"] == {"left": 1}


async def test_an_operator_cancels_it(house, host, certificates):
    host.says = [hang]
    await opened(house, host, certificates)
    line = await house.begin("POST", "/v1/chat/completions", {"model": "r/m"}, X_Request_ID="mine")
    await until(lambda: host.asked)
    assert (await house.ask("POST", "/llmux/requests/mine/cancel")).status == 202
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (410, "cancelled")
    await until(lambda: host.open == 0)


async def test_no_more_at_once_than_it_may_have(house, host, certificates):
    host.says = [hang]
    await opened(house, host, certificates, remote={"max_in_flight": 1})
    await house.begin("POST", "/v1/chat/completions", {"model": "r/m"})
    await until(lambda: host.asked)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})
    assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "remote_busy", "1")


# ---- in another dialect


@pytest.fixture
async def claude(house):
    async def made():
        url = f"http://{HOST}:{house.port}"
        return await stack.enter_async_context(anthropic_client(url))

    async with contextlib.AsyncExitStack() as stack:
        yield made


@pytest.mark.parametrize("end", [cut, hang], ids=["cut", "hangs"])
async def test_a_translated_stream_that_breaks_off(house, host, certificates, claude, end):
    host.says = [then(STREAM_HEAD + chunked(chunk("a") + chunk("b")), end)]
    await opened(house, host, certificates, remote={"apis": ["chat"], "timeouts": IDLE})
    client, got = await claude(), []
    stream = await client.messages.create(model="r/m", max_tokens=9, messages=[], stream=True)
    with pytest.raises(anthropic.APIError, match=rf"{ENDS}|broke off"):
        await collect(stream, got)
    assert "".join(event.delta.text for event in got if event.type == "content_block_delta") == "ab"
    assert len(host.asked) == 1
    await until(lambda: host.open == 0)


@pytest.mark.parametrize(
    ("status", "kind", "retry"),
    [
        ("429 Too Many", anthropic.RateLimitError, "7"),
        ("400 Bad", anthropic.BadRequestError, None),
        ("500 Oops", anthropic.InternalServerError, None),
    ],
)
async def test_a_translated_error(house, host, certificates, claude, status, kind, retry):
    host.says = [error(status, "their words", **({"Retry_After": retry} if retry else {}))]
    await opened(house, host, certificates, remote={"apis": ["chat"]})
    client = await claude()
    with pytest.raises(kind) as raised:
        await client.messages.create(model="r/m", max_tokens=9, messages=[])
    assert raised.value.body["error"]["message"] == "their words"
    assert raised.value.response.headers.get("retry-after") == retry


async def test_the_next_one_may_speak_another_dialect(house, claude):
    async with RemoteHost(error("503 Busy")) as first, RemoteHost() as second:
        remotes = {"r": first.settings(), "s": second.settings(apis=["chat"])}
        await house.open("a", remotes=remotes, virtual={"v": {"first": ["r/m", "s/m"]}}, **OPEN)
        client = await claude()
        message = await client.messages.create(
            model="v", max_tokens=9, messages=[{"role": "user", "content": "x"}]
        )
        assert message.content[0].text == "from afar"
        assert first.asked[0].path == "/v1/messages"
        assert second.asked[0].path == "/v1/chat/completions"
        assert second.asked[0].headers["authorization"] == f"Bearer {KEY}"
        assert "x-api-key" not in second.asked[0].headers


async def test_what_an_answer_in_one_piece_says_that_cannot_be_translated(house, host, certificates, claude):
    host.says = [answer(b"[]"), answer(b"no JSON")]
    await opened(house, host, certificates, remote={"apis": ["chat"]})
    client = await claude()
    for _ in range(2):
        with pytest.raises(anthropic.InternalServerError, match="cannot be translated"):
            await client.messages.create(model="r/m", max_tokens=9, messages=[])


# ---- large, slow, and again


async def test_a_large_body_arrives_as_it_was(house, host, certificates):
    await opened(house, host, certificates)
    data = b'{"messages": "' + b"x" * 5_000_000 + b'", "model": "r/m", "n": 1}'
    assert (await house.ask("POST", "/v1/chat/completions", data)).status == 200
    assert host.asked[0].body == data.replace(b'"r/m"', b'"theirs/m"')


async def test_a_connection_that_died_while_it_was_idle_is_no_failure(house, host, certificates):
    async def once(_host, writer):
        writer.write(answer())
        await writer.drain()
        writer.transport.abort()
        raise ConnectionResetError

    host.says = [once]
    await opened(house, host, certificates)
    for _ in range(5):
        assert (await house.ask("POST", "/v1/chat/completions", {"model": "r/m"})).status == 200
    assert house.switcher.remotes.document()["r"]["requests"] == {"ok": 5}


async def test_one_probe_at_a_time(house, host, certificates):
    host.says = [error("500 Oops"), error("500 Oops"), error("500 Oops"), hang]
    await opened(house, host, certificates)
    breaker = house.switcher.remotes._remotes["r"].endpoint.breaker
    breaker._pause = 0.05
    for _ in range(3):
        await house.ask("POST", "/v1/x", {"model": "r/m"})
    await until(lambda: breaker.wait(house.switcher.now()) is None)
    probe = await house.begin("POST", "/v1/x", {"model": "r/m"})
    await until(lambda: len(host.asked) == 4)
    replies = [await house.ask("POST", "/v1/x", {"model": "r/m"}) for _ in range(4)]
    assert {(reply.status, reply.error["code"]) for reply in replies} == {(503, "remote_resting")}
    probe.abort()
    await until(lambda: host.open == 0)
    host.says = [answer()]
    await until(lambda: not house.switcher.elsewhere)
    assert (await house.ask("POST", "/v1/x", {"model": "r/m"})).status == 200
    assert house.switcher.remotes.document()["r"]["state"] == "closed"
    assert [fields["remote"] for fields in house.log.named("remote_is_back")] == ["r"]
    assert len(host.asked) == 5


async def test_progress_in_the_body_is_not_begun_for_what_may_go_elsewhere(house, host, certificates):
    model = {"wake": "until [ -e go ]; do sleep 0.01; done; exit 1"}
    virtual = {"v": {"first": ["a", "r/m"]}}
    await opened(house, host, certificates, {"a": model}, virtual=virtual, progress=True, progress_every="10ms")
    body = {"model": "v", "stream": True, "messages": []}
    line = await house.begin("POST", "/v1/chat/completions", body)
    await until(lambda: house.queued("a"))
    await asyncio.sleep(0.1)
    (house.folder / "go").touch()
    reply = await line.reply()
    assert (reply.status, reply.headers["x-llmux-served-by"], reply.json()) == (200, "r/m", CHAT)


async def test_an_event_that_is_too_long_to_be_held_back_passes_in_pieces(house, host, certificates):
    event = b"data: " + b"x" * (MOST_HELD + 300_000) + b"\n\n"
    pieces = [event[at : at + 50_000] for at in range(0, len(event), 50_000)]

    async def slow(_host, writer):
        writer.write(STREAM_HEAD)
        for piece in pieces:
            writer.write(chunked(piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    host.says = [slow]
    await opened(house, host, certificates)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "r/m", "stream": True})
    assert reply.body == event


async def test_a_client_that_does_not_read_is_no_reason_to_give_up(house, host, certificates):
    sent = 0

    async def flood(_host, writer):
        nonlocal sent
        writer.write(STREAM_HEAD)
        for _ in range(400):
            writer.write(chunked(b"data: " + b"x" * 50_000 + b"\n\n"))
            await writer.drain()
            sent += 1
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    host.says = [flood]
    await opened(house, host, certificates, remote={"timeouts": IDLE})
    line = await house.begin("POST", "/v1/chat/completions", {"model": "r/m", "stream": True})
    await until(lambda: sent)
    await asyncio.sleep(1)  # longer than `idle`
    assert sent < 400
    reply = await line.reply()
    assert len(reply.body) == 400 * 50_008


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"7", 7.0),
        (b" 0 ", 0.0),
        (b"soon", None),
        (b"-1", None),
        (b"Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        (None, None),
    ],
)
def test_when_a_remote_wants_to_be_asked_again(value, seconds):
    fields = [] if value is None else [(b"retry-after", b"Retry-After", value)]
    assert retry_after_of(ResponseHead(429, fields=fields)) == seconds


def test_a_date_to_come():
    when = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True).encode()
    seconds = retry_after_of(ResponseHead(503, fields=[(b"retry-after", b"Retry-After", when)]))
    assert 80 < seconds <= 90


@pytest.mark.parametrize("apis", [None, ["chat"]], ids=["passed through", "translated"])
async def test_a_stream_of_responses_that_breaks_off(house, host, certificates, apis):
    created = {"type": "response.created", "sequence_number": 0, "response": {"id": "r", "object": "response"}}
    event = f"event: response.created\ndata: {json.dumps(created)}\n\n".encode()
    host.says = [then(STREAM_HEAD + chunked(event if apis is None else chunk("a")), cut)]
    await opened(house, host, certificates, remote={"apis": apis})
    url, got = f"http://{HOST}:{house.port}", []
    async with openai_client(url) as client:
        stream = await client.responses.create(model="r/m", input="hi", stream=True)
        with pytest.raises(openai.APIError, match="broke off"):
            await collect(stream, got)
    assert got[0].type == "response.created"


@given(st.lists(st.sampled_from([b"data: x", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b": ping"]), max_size=12))
def test_where_the_last_whole_event_ends(parts):
    data = b"".join(parts)
    end = end_of_events(data)
    assert end == 0 or data[:end].endswith((b"\n\n", b"\n\r\n"))
    assert b"\n\n" not in data[end:]
    assert b"\n\r\n" not in data[end:]
