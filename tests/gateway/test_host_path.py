"""The short way through a gateway: which requests take it, and that it says the same as the long way."""

from __future__ import annotations

import asyncio
import re

import pytest

from llmux.gateway import host_path
from llmux.middleware.fast_path import FastRequest
from llmux.proxy.relay import Relay
from llmux.upstream import ConnectionPool, EngineConnection, EngineRefusedError
from llmux.upstream.native import which
from tests.gateway.conftest import AWAKE, answer
from tests.middleware.conftest import fast
from tests.server.house import message, until

__all__ = ["fast"]

CHAT = "/v1/chat/completions"
STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-LLMux-Queue-Seconds: 1.250\r\n"
    b"X-LLMux-Host: theirs\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n0\r\n\r\n"
)


async def until_close(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok")
    raise ConnectionResetError


def request(path: str = CHAT, model: str = "a", **headers: str) -> bytes:
    return message("POST", path, {"model": model, "n": 1}, **{"X_Request_ID": "mine", **headers})


def timeless(reply) -> tuple:
    fields = [
        (name, "" if name in {"date", "x-ratelimit-reset-requests"} else value) for name, value in reply.fields
    ]
    return reply.status, fields, reply.body


async def both(door, data: bytes) -> list:
    """Send a request on the fast path and on the long way."""
    replies = []
    for opened in (True, False):
        door.open_fast_path(opened)
        replies.append(await door.raw(data))
    return replies


@pytest.mark.parametrize(
    "does",
    [
        answer(b"ok", "X-Request-ID: mine", "X-LLMux-Queue-Seconds: 0.000", "X-Odd: 1"),
        answer(b"ok", "X-Request-ID: mine", "X-LLMux-Queue-Seconds: 2.500"),
        answer(b"mine", "x-request-id: theirs"),
        answer(b"\r\nX-Request-ID: mine\r\n"),
        answer(b"", status="204 Gone"),
        answer(b'{"error": 1}', "Retry-After: 7", status="503 No"),
        until_close,
        STREAM,
    ],
)
async def test_both_ways_say_the_same_to_the_host_and_to_the_client(door, puppet, fast, does):
    await door.open_gateway({"one": {**puppet.url, "key": "gate"}})
    for more in ({}, {"Connection": "close"}):
        puppet.requests.clear()
        puppet.does = [does] * 2
        ours, theirs = await both(door, request(Authorization="Bearer own", X_LLMux_Key="eve", **more))
        assert timeless(ours) == timeless(theirs)
        assert puppet.requests[0] == puppet.requests[1]
        assert b"X-LLMux-Progress: 1xx\r\nAuthorization: Bearer gate\r\n" in puppet.requests[0]
        assert b"own" not in puppet.requests[0] + puppet.requests[1]
        assert b"eve" not in puppet.requests[0]
    assert fast == [True, True]
    assert not door.gateway.handler.under_way
    assert not door.gateway.dispatcher.placement.requests


async def test_each_has_an_id_of_its_own(door, puppet, fast):
    puppet.does = [answer(b"ok")] * 4
    await door.open_gateway({"one": puppet.url})
    data = message("POST", CHAT, {"model": "a"})
    replies = await both(door, data) + await both(door, data)
    ids = [reply.headers["x-request-id"] for reply in replies]
    assert len(set(ids)) == 4
    assert [re.search(rb"X-Request-ID: (\w+)", each)[1].decode() for each in puppet.requests] == ids
    heads = {re.sub(rb"X-Request-ID: \w+", b"", each) for each in puppet.requests}
    assert len(heads) == 1
    assert fast == [True, True]


async def test_a_host_that_repeats_the_id_has_a_head_that_is_known(door, puppet, fast, monkeypatch):
    """With the ID in it each head would be another one, and parsed."""
    parsed = []
    ids = iter(["first", "second", "third"])
    monkeypatch.setattr("llmux.upstream.connection.parse_head", noting(parsed))
    puppet.does = [
        answer(b"ok", "X-A: 1", f"X-Request-ID: {each}", "X-B: 1") for each in ("first", "second", "third")
    ]
    await door.open_gateway({"one": puppet.url})
    parsed.clear()
    for each in ids:
        reply = await door.raw(request(X_Request_ID=each))
        assert (reply.headers["x-request-id"], reply.headers["x-a"], reply.headers["x-b"]) == (each, "1", "1")
    assert len([head for head in parsed if b"X-A" in head]) == 1
    assert fast == [True] * 3


def noting(parsed):
    from llmux.upstream.head import parse_head  # noqa: PLC0415 - before it is replaced

    def noted(data, **more):
        parsed.append(data)
        return parse_head(data, **more)

    return noted


async def test_limits_are_told_and_counted_alike_both_ways(door, puppet, fast):
    keys = [
        {"name": name, "key": f"key-of-{name}", "models": ["a"], "limits": {"requests": "3/d", "concurrent": 1}}
        for name in ("alice", "clara")
    ]
    puppet.report["names"] = {"a": "a", "b": "b"}
    puppet.report["models"]["b"] = dict(AWAKE)
    puppet.does = [answer(b"ok")] * 6
    await door.open_gateway({"one": puppet.url}, api_keys=keys)
    told = []
    for opened, name in ((True, "alice"), (False, "clara")):
        door.open_fast_path(opened)
        models = ["a", "b", "nobodys", "a", "a", "a"]
        replies = [await door.raw(request(model=model, Authorization=f"Bearer key-of-{name}")) for model in models]
        assert [reply.status for reply in replies] == [200, 403, 404, 200, 200, 429]
        assert replies[0].headers["x-ratelimit-remaining-requests"] == "2"
        told.append([timeless(reply)[:2] for reply in replies[:5]])
        rows = door.gateway.requests.rows(6)[::-1]
        told[-1] += [(row["model"], row["asked"], row["status"]) for row in rows]
        assert [row["model"] for row in rows] == ["a", "b", None, "a", "a", "a"]
    assert told[0] == told[1]
    assert fast == [True, True, False, True, True, True]
    assert len(puppet.requests) == 6
    assert {balance.running for balance in door.gateway.handler.gate._balances.values()} == {0}


PAID = {
    "api_keys": [{"name": "alice", "key": "key", "budget": {"usd": 1000, "per": "month"}}],
    "prices": {"currency": "usd", "gpu_hour": 3600},
    "fleet": {"report_every": "200ms", "max_wait": "100ms"},
}


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("refuses", [True, False])
async def test_nothing_is_paid_for_what_no_host_took(door, puppet, tmp_path, refuses):
    """However long it waited here, and was known to no host."""
    puppet.does = [answer(b"{}", "X-LLMux-Refused: queue_full", "Retry-After: 1", status="429 No")] * 99
    gateway = await door.open_gateway({"one": puppet.url}, state=str(tmp_path / "state.json"), **PAID)
    if not refuses:
        puppet.silent = True
        gateway.forwarder.pool.connect = unreachable
    reply = await door.raw(request(Authorization="Bearer key"))
    assert reply.status == (429 if refuses else 503)
    budget = gateway.handler.gate.budgets()["alice"]
    assert (budget.spent, budget.reserved) == (0, 0)


async def unreachable(address):
    await asyncio.sleep(0.01)
    raise EngineRefusedError(f"No connection to the engine at {address}.")


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("queued", ["-inf", "nan", "-5", "1e400"])
async def test_a_wait_that_cannot_be_is_none(door, puppet, tmp_path, queued):
    puppet.does = [answer(b"ok", f"X-LLMux-Queue-Seconds: {queued}")]
    gateway = await door.open_gateway({"one": puppet.url}, state=str(tmp_path / "state.json"), **PAID)
    reply = await door.raw(request(Authorization="Bearer key"))
    assert (reply.status, reply.headers["x-llmux-queue-seconds"]) == (200, "0.000")
    budget = gateway.handler.gate.budgets()["alice"]
    assert budget.spent < 5_000_000  # of these five seconds nothing
    assert budget.reserved == gateway.handler.gate._balances["alice"].running == 0


@pytest.mark.usefixtures("both_ways")
async def test_an_answer_that_is_counted_is_not_asked_for_in_a_compressed_form(door, puppet):
    puppet.does = [answer(b"ok")] * 2
    keys = [{"name": "alice", "key": "one", "limits": {"tokens": "9000/d"}}, {"name": "bob", "key": "two"}]
    await door.open_gateway({"one": puppet.url}, api_keys=keys)
    for key in ("one", "two"):
        await door.raw(request(Authorization=f"Bearer {key}", Accept_Encoding="gzip"))
    assert [b"Accept-Encoding: gzip" in sent for sent in puppet.requests] == [False, True]


async def test_one_that_goes_to_another_host_passes_its_limits_once(door, puppet, other, fast):
    puppet.does = [answer(b"{}", "X-LLMux-Refused: queue_full", status="429 No")]
    other.does = [answer(b"ok")]
    key = {"name": "alice", "key": "key", "limits": {"requests": "3/d"}}
    await door.open_gateway({"one": puppet.url, "two": other.url}, api_keys=[key])
    reply = await door.raw(request(Authorization="Bearer key"))
    assert (reply.status, reply.headers["x-llmux-host"]) == (200, "two")
    assert reply.headers["x-ratelimit-remaining-requests"] == "2"
    assert fast == [True]
    assert door.gateway.dispatcher.counts["placed", "one"] == door.gateway.dispatcher.counts["placed", "two"] == 1


async def test_clients_that_want_progress_take_the_long_way(door, puppet, fast):
    puppet.does = [answer(b"ok")] * 9
    keys = [{"name": "alice", "key": "one-key", "progress": True}, {"name": "bob", "key": "another"}]
    await door.open_gateway({"one": puppet.url}, api_keys=keys)
    for more in ({}, {"X_LLMux_Progress": "on"}, {"x_llmux_PROGRESS": "1xx"}, {"X_LLMux_Progress": "off"}):
        assert (await door.raw(request(Authorization="Bearer another", **more))).status == 200
    assert fast == [True, False, False, False]
    assert (await door.raw(request(Authorization="Bearer one-key"))).status == 200
    assert fast[4:] == [False]


@pytest.mark.usefixtures("both_ways")
async def test_what_was_sent_is_not_sent_again_though_a_reload_takes_its_host(door, puppet):
    """Nor is it refused as if no host had seen it."""
    gone = asyncio.Event()
    puppet.does = [lambda _writer: hang_up(gone)]
    gateway = await door.open_gateway({"one": puppet.url})
    line = await door.line()
    line.send(request())
    await until(lambda: puppet.requests)
    gateway.replace(door.gateway_config({"two": {"url": "http://127.0.0.1:1"}}))
    gone.set()
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (502, "host_lost")
    assert gateway.dispatcher.counts["broken", "one"] == 1
    assert not gateway.dispatcher.placement.requests


async def hang_up(when):
    await when.wait()
    raise ConnectionResetError


async def test_names_that_come_and_go_with_hosts(door, puppet, fast):
    puppet.does = [answer(b"ok")] * 9
    await door.open_gateway({"one": puppet.url})
    assert (await door.raw(request(model="new"))).status == 404
    puppet.report["names"] = {"a": "a", "new": "a"}
    await until(lambda: door.gateway.hosts.model_of("new"))
    assert (await door.raw(request(model="new"))).status == 200
    puppet.report["names"] = {"a": "a"}
    await until(lambda: not door.gateway.hosts.model_of("new"))
    assert (await door.raw(request(model="new"))).status == 404
    assert fast == [False, True, False]


async def test_what_is_cut_on_the_fast_path_is_told_so(door, puppet, fast):
    hold = asyncio.Event()
    puppet.does = [lambda _writer: hold.wait()]
    gateway = await door.open_gateway({"one": puppet.url}, shutdown_grace="50ms")
    line = await door.line()
    line.send(request())
    await until(lambda: puppet.requests)
    stopping = asyncio.create_task(gateway.stop())
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (503, "stopping")
    line.close()
    await stopping
    hold.set()
    assert fast == [True]
    assert not gateway.handler.under_way


@pytest.mark.skipif(which() != "native", reason="there was no C compiler")
@pytest.mark.parametrize(
    ("owner", "what", "status"),
    [
        ("dispatcher", "enter", 200),
        (host_path, "extra_fields", 500),  # from here on it has a host
        (host_path, "Exchange", 500),
        (host_path, "HostRequest", 500),
        (host_path, "changes_for", 500),
        (ConnectionPool, "take", 500),
        (EngineConnection, "begin", 500),
    ],
)
async def test_a_mistake_of_the_gateway_leaves_no_request_without_an_answer(
    door, puppet, fast, monkeypatch, owner, what, status
):
    puppet.does = [answer(b"ok")] * 2
    await door.open_gateway({"one": puppet.url})
    owner = getattr(door.gateway, owner) if isinstance(owner, str) else owner
    mistakes = [LookupError("odd")]
    done = getattr(owner, what)

    def once(*given, **more):
        # A report of the host has begun on a connection, too.
        if mistakes and (what != "begin" or isinstance(given[1], FastRequest)):
            raise mistakes.pop()
        return done(*given, **more)

    monkeypatch.setattr(owner, what, once)
    for expected in (status, 200):
        assert (await door.raw(request())).status == expected
        await until(lambda: not door.gateway.dispatcher.placement.requests)
        assert not door.gateway.handler.under_way
        assert not door.gateway.handler.budget.held
    assert fast == [True, True]
    assert not mistakes


async def test_streams_of_hosts_are_lent_to_the_native_relay(door, fast, monkeypatch):
    """And their events are counted all the same."""
    passed = []
    counted = Relay.passed_natively

    def noted(relay, each):
        passed.append(each.events)
        counted(relay, each)

    monkeypatch.setattr(Relay, "passed_natively", noted)
    gateway = await door.open_all("one")
    event = b"data: 1\n\n"
    chunk = b"%x\r\n%b\r\n" % (len(event), event)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    door.hosts["one"].engine.says = [head + chunk, *[chunk] * 40, b"0\r\n\r\n"]
    reply = await door.raw(request())
    assert reply.body.count(event) == 41
    assert fast[0]
    assert passed
    assert not gateway.handler.under_way
