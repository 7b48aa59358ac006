"""Models on other hosts: what leaves this one, what comes back, and what happens when a remote misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import shutil
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.proxy import guarded
from llmux.proxy import remote as remote_module
from llmux.proxy.guarded import MOST_HELD, begins_with_error, end_of_events, retry_after_of
from llmux.upstream import ResponseHead
from tests.harness.sdks import anthropic_client, openai_client
from tests.harness.waiting import PATIENCE
from tests.server.house import HOST, until
from tests.targets.remote_host import (
    CHAT,
    KEY,
    STREAM_HEAD,
    Certificates,
    RemoteHost,
    answer,
    chunked,
    cut,
    error,
    hang,
    make_certificates,
    then,
)

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")

OPEN = {"remotes_for_all": True}
SOON = {"first_byte": "200ms", "idle": "200ms"}
IDLE = {"idle": "300ms"}
ENDS = "(broke off in the middle|has sent nothing)"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def host(certificates: Certificates):
    async with RemoteHost(tls=certificates.context()) as host:
        yield host


async def opened(house: Any, host: RemoteHost, certificates: Certificates, models: Any = "a", **more: Any) -> None:
    given = more.pop("remote", {})
    remotes = {"r": host.settings(ca=certificates.authority, **given)}
    await house.open(models, remotes=remotes, **(OPEN | more))


async def broken(house: Any, model: str) -> tuple[Any, bytes]:
    """Ask for a stream that breaks off; return its head, and what came before its connection's end."""
    line = await house.begin("POST", "/v1/chat/completions", {"model": model, "stream": True})
    return await line.head(), await line.closed()


async def collect(stream: Any, got: list[Any]) -> None:
    async for each in stream:
        got.append(each)  # noqa: PERF401 - what came before the error is looked at


def chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    document = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "x", "choices": [choice]}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


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


# ---- failover and the breaker


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
