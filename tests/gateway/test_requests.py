"""Requests through a gateway: to the right host, byte for byte, to another where that is safe, and never twice."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl

import pytest

from llmux.fleet.store import Store
from llmux.gateway.hosts import Hosts, words_of
from llmux.proxy import Forwarder
from llmux.upstream import EngineRefusedError
from tests.gateway.conftest import ASLEEP, AWAKE, answer
from tests.harness.ports import free_port
from tests.proxy.proxy_harness import deaf_host
from tests.server.house import held, message, until

CHAT = "/v1/chat/completions"


async def ask(door, model="a", path=CHAT, **headers):
    return await door.ask("POST", path, {"model": model}, **headers)


@pytest.mark.usefixtures("both_ways")
async def test_a_request_reaches_an_engine_and_the_answer_its_client_as_they_were(door):
    gateway = await door.open_all("one")
    door.hosts["one"].engine.says = b"HTTP/1.1 201 Made\r\nX-Odd: 1\r\nContent-Length: 3\r\n\r\n\x00\xff\n"
    body = b'{ "model":"a" , "odd": 1e400, "\\u006ddel": "x"}'
    reply = await door.ask("POST", f"{CHAT}?x=%2F", body, X_Own="kept", X_Request_ID="mine")
    assert (reply.status, reply.body, reply.headers["x-odd"]) == (201, b"\x00\xff\n", "1")
    assert (reply.headers["x-llmux-host"], reply.headers["x-request-id"]) == ("one", "mine")
    assert reply.marked
    engine = door.hosts["one"].engine
    assert engine.bodies == [body]
    head = engine.heads[0]
    assert head.startswith(b"POST /v1/chat/completions?x=%2F HTTP/1.1\r\n")
    assert b"\r\nX-Own: kept\r\n" in head
    assert b"\r\nX-Request-ID: mine\r\n" in head
    assert gateway.requests.rows(1)[0]["model"] == "a"


async def test_it_goes_where_its_model_is_awake(door):
    for name in ("one", "two", "three"):
        await door.host(name)
    door.hosts["two"].up("a")
    await door.hosts["two"].chat("a")
    await door.open_gateway()
    for _ in range(5):
        assert (await ask(door)).headers["x-llmux-host"] == "two"
    assert door.served() == {"one": 0, "two": 6, "three": 0}


async def test_aliases_variants_and_virtual_names_go_to_hosts_which_know_them(door):
    await door.host("one", {"x": {}})
    await door.host("two", {"a": {"aliases": ["gpt"]}}, virtual={"any": {"awake": ["a"]}})
    await door.open_gateway()
    for name in ("gpt", "any", "a"):
        assert (await ask(door, name)).headers["x-llmux-host"] == "two"
    assert json.loads(door.hosts["two"].engine.bodies[0]) == {"model": "gpt"}  # as the client wrote it


async def test_an_unknown_name_is_refused_with_the_known_ones(door):
    await door.open_all("one", {"a": {"aliases": ["gpt"]}, "b": {}})
    reply = await ask(door, "c")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert "a, b, gpt" in reply.error["message"]


async def test_all_ways_to_name_a_model_and_all_kinds_of_requests(door):
    await door.open_all("one")
    boundary = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--x--\r\n'
    form = await door.ask(
        "POST", "/v1/audio/transcriptions", boundary, Content_Type="multipart/form-data; boundary=x"
    )
    assert form.status == 200
    assert door.hosts["one"].engine.bodies[-1] == boundary
    assert (await door.ask("GET", "/v1/realtime?model=a")).body == b"ok"
    assert (await door.ask("POST", CHAT, {"none": 1})).error["code"] == "model_required"
    assert (await door.ask("POST", "/v1/load", {"model": "a"})).status == 404  # never, at whatever host
    assert (await door.ask("POST", "/upstream/a/x", {})).error["code"] == "path_not_forwarded"


@pytest.mark.usefixtures("both_ways")
async def test_streams_and_large_bodies(door):
    await door.open_all("one")
    line = await door.begin("POST", "/v1/stream", {"model": "a", "padding": "x" * 3_000_000})
    head = await line.head()
    assert (head.headers["content-type"], head.headers["x-accel-buffering"]) == ("text/event-stream", "no")
    assert await line.reader.readuntil(b"data: 1\n\n\r\n") == b"9\r\ndata: 1\n\n\r\n"
    assert len(door.hosts["one"].engine.bodies[0]) > 3_000_000
    line.abort()
    await until(lambda: not door.hosts["one"].in_flight("a"))


async def test_websockets(door):
    await door.open_all("one")
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "eA=="}
    line = await door.begin("GET", "/v1/realtime?model=a", **headers)
    head = await line.head()
    assert (head.status, head.headers["upgrade"]) == (101, "websocket")
    line.send(b"x")  # the engine closes after a byte
    assert await line.closed() == b""


@pytest.mark.usefixtures("both_ways")
async def test_a_client_that_leaves_is_noticed_by_the_host(door):
    gateway = await door.open_all("one")
    line = await door.begin("POST", "/v1/hold", {"model": "a"})
    host = door.hosts["one"]
    await until(lambda: host.in_flight("a"))
    line.abort()
    await until(lambda: not host.in_flight("a"))
    await until(lambda: not gateway.dispatcher.placement.requests)
    assert not gateway.view(gateway.hosts["one"]).own


async def test_a_host_that_never_woke_a_model_is_believed_to_take_as_long_as_others(door, puppet, other):
    puppet.report["models"] = {"a": {**ASLEEP, "wake": 1.0, "switch_cost": 2.0, "expected_wait": 2.0}}
    other.report["models"] = {
        "a": {**ASLEEP, "wake": 10.0, "switch_cost": 10.0, "expected_wait": 10.0, "measured": False}
    }
    other.does = [answer(b"fine")]
    gateway = await door.open_gateway({"one": puppet.url, "two": other.url})

    def believed():
        each = gateway.view(gateway.hosts["two"]).report.models["a"]
        return (each.wake, each.switch_cost, each.expected_wait)

    await until(lambda: believed() == (1.0, 1.0, 1.0))
    assert (await ask(door)).headers["x-llmux-host"] == "two"


# ---- the next host


@pytest.mark.usefixtures("both_ways")
async def test_what_a_host_refuses_goes_to_the_next_one(door):
    await door.host("one", {"a": {"wake": "exit 3", "cost": {"wake": 1}}})
    await door.host("two", {"a": {"cost": {"wake": 60}}})
    gateway = await door.open_gateway()
    reply = await ask(door)
    assert (reply.status, reply.headers["x-llmux-host"]) == (200, "two")
    assert "x-llmux-refused" not in reply.headers
    assert door.served() == {"one": 0, "two": 1}
    assert gateway.dispatcher.counts["refused", "one", "wake_failed"] == 1


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("padding", [0, 3_000_000])
async def test_the_body_is_sent_whole_to_the_next_one(door, puppet, other, padding):
    puppet.does = [answer(b"{}", "X-LLMux-Refused: leased", status="503 No")]
    other.does = [answer(b"fine")]
    await door.open_gateway({"one": puppet.url, "two": other.url})
    reply = await door.ask("POST", CHAT, {"model": "a", "padding": "x" * padding})
    assert (reply.status, reply.body, reply.headers["x-llmux-host"]) == (200, b"fine", "two")
    bodies = [each.requests[0].partition(b"\r\n\r\n")[2] for each in (puppet, other)]
    assert bodies[0] == bodies[1]


@pytest.mark.usefixtures("both_ways")
async def test_when_all_refuse_the_client_is_told_the_last_ones_words(door, puppet, other):
    words = json.dumps({"error": {"message": "no more room", "type": "x", "code": "queue_full"}}).encode()
    for each in (puppet, other):
        each.does = [answer(words, "X-LLMux-Refused: queue_full", "Retry-After: 7", status="429 No")]
    await door.open_gateway({"one": puppet.url, "two": other.url})
    reply = await ask(door, path="/v1/messages")
    assert (reply.status, reply.headers["retry-after"]) == (429, "7")
    assert reply.json()["error"] == {"type": "rate_limit_error", "message": "no more room"}
    assert [len(puppet.requests), len(other.requests)] == [1, 1]


@pytest.mark.usefixtures("both_ways")
async def test_errors_of_engines_are_answers(door, puppet, other):
    puppet.does = [answer(b"broken", status="503 Busy"), answer(b"worse", status="500 No")]
    await door.open_gateway({"one": puppet.url, "two": other.url})
    assert ((await ask(door)).status, (await ask(door)).status) == (503, 500)
    assert not other.requests


@pytest.mark.usefixtures("both_ways")
async def test_a_host_that_cannot_be_reached_is_passed_over(door, puppet, other):
    other.does = [answer(b"fine")] * 2
    gateway = await door.open_gateway({"one": puppet.url, "two": other.url})
    puppet.silent = True
    puppet._server.close()  # what it has said is still believed
    assert (await ask(door)).headers["x-llmux-host"] == "two"
    assert gateway.state(gateway.hosts["one"]) == "unreachable"
    assert (await ask(door)).headers["x-llmux-host"] == "two"
    assert not puppet.requests
    assert gateway.dispatcher.counts["ejected", "one"] == 1


async def test_it_comes_back_by_a_probe(door, puppet):
    puppet.does = [answer(b"fine")]
    gateway = await door.open_gateway({"one": puppet.url})
    await puppet.close()
    await until(lambda: gateway.state(gateway.hosts["one"]) == "unreachable")
    waiting = asyncio.create_task(ask(door))
    await until(gateway.dispatcher.queued)
    puppet.report["instance"] = "restarted"
    await puppet.open()
    assert (await waiting).body == b"fine"
    assert b"GET /ready HTTP/1.1" in puppet.asked


async def test_it_is_said_why_a_host_is_lost_that_falls_silent_or_takes_no_connection(door, puppet, monkeypatch):
    monkeypatch.setattr("llmux.gateway.hosts.SILENCE", 0.6)
    monkeypatch.setattr("llmux.gateway.hosts.PATIENCE", 0.3)
    gateway = await door.open_gateway({"one": puppet.url})
    puppet.silent = True
    await until(lambda: door.log.named("host_lost"))
    assert door.log.named("host_lost")[0]["error"] == "has said nothing for 0.6 s"
    with deaf_host() as deaf:
        gateway.hosts["one"].address = deaf
        await puppet.close()
        await until(lambda: door.log.named("host_lost")[-1]["error"] == "cannot be reached within 0.3 s")
        with pytest.raises(EngineRefusedError) as refused:
            await Forwarder(connect_timeout=0.05).connect(deaf)
    assert words_of(refused.value) == "cannot be reached in time"


def test_what_tls_says_is_no_error_of_the_system():
    """Its first number would be "operation not permitted"."""

    def words(cause):
        error = EngineRefusedError("No connection.")
        error.__cause__ = cause
        return words_of(error)

    untrusted = ssl.SSLCertVerificationError(1, "certificate verify failed")
    untrusted.verify_message = "self-signed certificate"
    assert words(untrusted) == "cannot be reached by TLS: self-signed certificate"
    assert words(ssl.SSLError(1, "wrong version number")).startswith("cannot be reached by TLS: ")
    assert words(ConnectionAbortedError()) == "cannot be reached: it closed the connection"
    assert words(ConnectionRefusedError(111, "")) == "cannot be reached: connection refused"


# ---- never twice


@pytest.mark.usefixtures("both_ways")
async def test_after_bytes_were_sent_an_end_is_final(door, puppet, other):
    puppet.does = [None]
    gateway = await door.open_gateway({"one": puppet.url, "two": other.url})
    reply = await ask(door)
    assert (reply.status, reply.error["code"]) == (502, "host_lost")
    assert [len(puppet.requests), len(other.requests)] == [1, 0]
    assert gateway.dispatcher.counts["broken", "one"] == 1


@pytest.mark.usefixtures("both_ways")
async def test_so_is_the_end_of_a_connection_that_was_kept(door, puppet, other):
    """The host may have passed the request on before it ended."""
    puppet.does = [answer(b"fine"), None]
    await door.open_gateway({"one": puppet.url, "two": other.url})
    assert (await ask(door)).body == b"fine"
    assert (await ask(door)).status == 502
    assert [len(puppet.requests), len(other.requests)] == [2, 0]


@pytest.mark.usefixtures("both_ways")
async def test_an_answer_that_breaks_off_is_left_without_its_end(door, puppet, other):
    events = b"9\r\ndata: 1\n\n\r\n"
    puppet.does = [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + events
    ]
    gateway = await door.open_gateway({"one": puppet.url, "two": other.url})
    line = await door.begin("POST", CHAT, {"model": "a"})
    assert (await line.head()).status == 200
    assert await line.reader.readexactly(len(events)) == events
    for task in list(puppet._tasks):
        task.cancel()
    rest = await line.closed()
    assert b'"code": "engine_lost"' in rest
    assert not rest.endswith(b"0\r\n\r\n")
    assert not other.requests
    await until(lambda: not gateway.dispatcher.placement.requests)


@pytest.mark.usefixtures("both_ways")
async def test_what_is_no_http_is_final(door, puppet, other):
    puppet.does = [b"hello\r\n\r\n"]
    await door.open_gateway({"one": puppet.url, "two": other.url})
    assert (await ask(door)).status == 502
    assert not other.requests


# ---- taken back


WAITS = b"HTTP/1.1 102 Processing\r\nX-LLMux-Position: 3\r\nX-LLMux-Expected-Seconds: 60\r\n\r\n"


def waiting(puppet, last):
    """A request that waits for long, until it is asked back."""

    async def write(writer):
        while not puppet.withdrawn.is_set():
            writer.write(WAITS)
            await asyncio.sleep(0.05)
        writer.write(last)

    return write


@pytest.mark.usefixtures("both_ways")
async def test_a_request_that_would_be_served_sooner_elsewhere_moves(door, puppet, other):
    puppet.does = [waiting(puppet, answer(b"{}", "X-LLMux-Refused: withdrawn", status="503 No"))]
    other.does = [answer(b"fine")]
    gateway = await door.open_gateway({"one": puppet.url, "two": other.url})
    reply = await door.ask("POST", CHAT, {"model": "a"}, X_Request_ID="mine")
    assert (reply.status, reply.body, reply.headers["x-llmux-host"]) == (200, b"fine", "two")
    assert b"POST /llmux/withdraw/mine HTTP/1.1" in puppet.asked
    assert gateway.dispatcher.counts["withdrawn", "one"] == 1
    assert gateway.dispatcher.counts["refused", "one", "withdrawn"] == 0


async def test_a_request_joins_the_host_that_wakes_its_model(door, puppet, other):
    """One wake is enough: it moves although it is hardly served sooner there."""
    stuck = {**ASLEEP, "queued": 1, "expected_wait": 40.0}
    puppet.report["models"]["a"] = {**ASLEEP, "expected_wait": 1.0}
    other.report["models"]["a"] = {**ASLEEP, "expected_wait": None}  # it would refuse it
    told = asyncio.Event()

    async def asks_for_it_back(writer):
        puppet.report["models"]["a"] = stuck
        other.report["models"]["a"] = {**ASLEEP, "phase": "waking", "expected_wait": 58.0}  # hardly sooner
        told.set()
        await waiting(puppet, answer(b"{}", "X-LLMux-Refused: withdrawn", status="503 No"))(writer)

    puppet.does = [asks_for_it_back]
    other.does = [answer(b"fine")]
    await door.open_gateway({"one": puppet.url, "two": other.url})
    reply = await ask(door)
    assert told.is_set()
    assert (reply.status, reply.body, reply.headers["x-llmux-host"]) == (200, b"fine", "two")


@pytest.mark.usefixtures("both_ways")
async def test_one_that_was_admitted_in_the_meantime_stays(door, puppet, other):
    puppet.does = [waiting(puppet, answer(b"mine after all"))]
    await door.open_gateway({"one": puppet.url, "two": other.url})
    reply = await ask(door)
    assert (reply.body, reply.headers["x-llmux-host"]) == (b"mine after all", "one")
    assert not other.requests


# ---- keys


@pytest.mark.usefixtures("both_ways")
async def test_a_host_is_shown_the_gateways_key_and_the_name_of_the_clients(door):
    keys = [{"name": "gateway", "key": "gate", "gateway": True}]
    host = await door.host("one", api_keys=keys)
    told = {"one": {"url": f"http://127.0.0.1:{host.port}", "key": "gate"}}
    await door.open_gateway(told, api_keys=[{"name": "alice", "key": "secret"}])
    assert (await ask(door)).status == 401
    assert (await ask(door, X_API_Key="secret", X_LLMux_Key="mallory")).status == 200
    assert host.switcher.requests.rows(1)[0]["key"] == "alice"
    head = host.engine.heads[0].lower()
    assert b"secret" not in head
    assert b"gate" not in head
    assert b"x-llmux" not in head


async def test_a_wrong_key_at_a_host_is_said(door):
    host = await door.host("one", api_keys=["right"])
    gateway = await door.open_gateway(
        {"one": {"url": f"http://127.0.0.1:{host.port}", "key": "wrong"}}, wait=False
    )
    await until(lambda: gateway.hosts["one"].lost)
    assert "hosts.NAME.key" in gateway.hosts["one"].trouble
    reply = await ask(door)
    assert (reply.status, reply.error["code"]) == (503, "no_host")
    assert "one" in reply.error["message"]
    assert int(reply.headers["retry-after"]) > 0


async def test_a_host_that_takes_the_key_no_longer_gets_nothing_until_it_does(door):
    def keys(key):
        return {"api_keys": [{"name": "gateway", "key": key, "gateway": True}]}

    told = {}
    for name in ("one", "two"):
        await door.host(name, "a", **keys("old"))
        told[name] = {"url": f"http://127.0.0.1:{door.hosts[name].port}", "key": "old"}
    gateway = await door.open_gateway(told)
    name = (await ask(door)).headers["x-llmux-host"]
    other, host, there = "two" if name == "one" else "one", gateway.hosts[name], door.hosts[name]
    there.front.configure(there.config("a", **keys("new")))
    await until(lambda: "wants another key: see `hosts.NAME.key`" in host.trouble)
    gateway.hosts.probe(name)  # which takes no key
    await until(lambda: not gateway.hosts._probes)
    for _ in range(3):
        reply = await ask(door)
        assert (reply.status, reply.headers["x-llmux-host"]) == (200, other)
    there.front.configure(there.config("a", **keys("old")))
    await until(lambda: gateway.state(host) == "ready")


# ---- progress


async def test_clients_are_told_of_the_hosts_queue_in_their_form(door):
    host = await door.host("one", {"a": {"wake": held("go")}}, progress_every="20ms")
    await door.open_gateway()
    line = await door.begin("POST", CHAT, {"model": "a", "stream": True}, X_LLMux_Progress="on")
    head = await line.head()
    assert (head.status, head.headers["x-llmux-host"]) == (200, "one")
    assert b": llmux waiting, position 1, about 10 s" in await line.reader.readuntil(b"\n\n")
    interim = await door.begin("POST", CHAT, {"model": "a"}, X_LLMux_Progress="1xx")
    first = await interim.head()
    assert (first.status, first.headers["x-llmux-position"]) == (102, "2")
    plain = await door.begin("POST", CHAT, {"model": "a"})
    await until(lambda: host.queued("a") == 3)
    queued = host.switcher.now()
    await until(lambda: host.switcher.now() > queued + 0.01)  # the clock of a loop may count milliseconds
    host.engine.says = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"9\r\ndata: 1\n\n\r\n0\r\n\r\n"
    )
    host.release("go")
    assert b"data: 1\n\n\r\n0\r\n\r\n" in await line.reader.readuntil(b"0\r\n\r\n")
    while (head := await interim.head()).status == 102:
        pass
    assert head.status == 200
    reply = await plain.reply()
    assert (reply.status, reply.marked) == (200, True)
    assert float(reply.headers["x-llmux-queue-seconds"]) > 0  # in the host's queue


async def test_a_refusal_after_progress_goes_to_the_next_host(door, puppet, other):
    waits = b"HTTP/1.1 102 Processing\r\nX-LLMux-Position: 3\r\nX-LLMux-Expected-Seconds: 9\r\n\r\n"
    puppet.does = [waits + answer(b"{}", "X-LLMux-Refused: wake_failed", status="503 No")]
    other.does = [answer(b'{"fine": 1}', "Content-Type: application/json")]
    await door.open_gateway({"one": puppet.url, "two": other.url})
    line = await door.begin("POST", CHAT, {"model": "a"}, X_LLMux_Progress="on")
    reply = await line.reply()
    assert (reply.status, reply.body) == (200, b'\n{"fine": 1}')
    assert b"x-llmux-progress: 1xx" in other.requests[0].lower()


# ---- waiting here


async def test_without_a_host_it_waits_for_the_first_reports(door, puppet):
    puppet.does = [answer(b"fine")]
    puppet.silent = True
    gateway = await door.open_gateway({"one": puppet.url}, wait=False)
    waiting = asyncio.create_task(ask(door))
    await until(lambda: gateway.dispatcher.queued() == {"a": 1})
    puppet.silent = False
    assert (await waiting).body == b"fine"


async def test_not_for_ever(door, puppet):
    puppet.report["ready"] = False
    await door.open_gateway({"one": puppet.url}, wait=False, fleet={"max_wait": "50ms", "report_every": "200ms"})
    reply = await ask(door)
    assert (reply.status, reply.error["code"]) == (503, "no_host")
    assert int(reply.headers["retry-after"]) > 0


async def test_and_not_without_limit(door, puppet):
    puppet.report["ready"] = False
    gateway = await door.open_gateway({"one": puppet.url}, wait=False, fleet={"max_queued": 1})
    await until(lambda: gateway.hosts["one"].heard)
    line = await door.begin("POST", CHAT, {"model": "a"})
    await until(gateway.dispatcher.queued)
    assert (await ask(door)).status == 429
    line.abort()
    await until(lambda: not gateway.dispatcher.queued())


async def test_a_report_that_is_not_understood_is_said_once(door, puppet):
    puppet.report["models"] = {"a": {"phase": "awake"}}
    await door.open_gateway({"one": puppet.url}, wait=False)
    await until(lambda: door.log.named("report_refused"))
    assert "another version" in door.log.named("report_refused")[0]["reason"]
    seq = puppet.report["seq"]
    await until(lambda: puppet.report["seq"] > seq + 3)
    assert len(door.log.named("report_refused")) == 1
    puppet.report["models"] = {"a": dict(AWAKE)}
    puppet.does = [answer(b"fine")]
    assert (await ask(door)).body == b"fine"


async def test_an_unknown_phase_of_a_newer_host_is_no_harm(door, puppet):
    puppet.report["models"] = {"a": {**ASLEEP, "phase": "dreaming"}}
    puppet.does = [answer(b"fine")]
    await door.open_gateway({"one": puppet.url})
    assert (await ask(door)).body == b"fine"


async def test_pipelined_requests_are_answered_in_their_order(door, puppet):
    puppet.does = [answer(b"first"), answer(b"second")]
    await door.open_gateway({"one": puppet.url})
    line = await door.line()
    line.send(message("POST", CHAT, {"model": "a"}) * 2)
    assert [(await line.reply()).body for _ in range(2)] == [b"first", b"second"]


@pytest.mark.parametrize(
    "nonsense",
    ["[" * 100_000, '{"seq": Infinity}', '{"seq": 1e999}', '{"lease": 1' + "0" * 400 + "}", '{"names": []}', "[]"],
    ids=["deep", "infinite", "large", "long", "list", "no object"],
)
async def test_whatever_a_host_reports_it_is_followed_on(door, puppet, nonsense):
    wrong = nonsense.encode()
    if nonsense.startswith("{"):
        wrong = json.dumps(puppet.report).encode()[:-1] + b"," + nonsense.encode()[1:]
    puppet.saying = wrong
    await door.open_gateway({"one": puppet.url}, wait=False)
    await until(lambda: door.log.named("report_refused"))
    assert "another version" in door.log.named("report_refused")[0]["reason"]
    puppet.saying = None
    puppet.does = [answer(b"fine")]
    await until(lambda: door.log.named("host_followed"))
    assert (await ask(door)).body == b"fine"


@pytest.mark.parametrize("nonsense", [b"[" * 100_000, b'{"data": {}}', b'{"data": [1]}', b"7"])
async def test_a_host_whose_list_of_models_is_nonsense_serves(door, puppet, nonsense):
    puppet.listed = nonsense
    puppet.does = [answer(b"fine")]
    await door.open_gateway({"one": puppet.url})
    await until(lambda: b"GET /v1/models HTTP/1.1" in puppet.asked)
    assert (await ask(door)).body == b"fine"
    assert (await door.ask("GET", "/v1/models")).json()["data"] == []


def mistaken(monkeypatch, kind, method):
    """Have a method raise what nothing foresees, the first time."""
    does, calls = getattr(kind, method), itertools.count()

    def once(*args):
        if not next(calls):
            raise RuntimeError("a mistake")
        return does(*args)

    monkeypatch.setattr(kind, method, once)


async def test_a_mistake_does_not_end_the_following_of_a_host(door, puppet, monkeypatch):
    mistaken(monkeypatch, Hosts, "_take")
    puppet.does = [answer(b"fine")]
    await door.open_gateway({"one": puppet.url})
    assert [line["error"] for line in door.log.named("internal_error")] == ["RuntimeError('a mistake')"]
    assert (await ask(door)).body == b"fine"


async def test_a_mistake_does_not_end_what_looks_into_the_store(door, puppet, monkeypatch):
    mistaken(monkeypatch, Store, "hosts")
    await door.open_gateway({"one": puppet.url}, fleet={"store": f"redis://127.0.0.1:{free_port()}"})
    await until(lambda: door.log.named("store_lost"))  # it is not there, as the next look finds
    assert len(door.log.named("internal_error")) == 1


async def test_an_alias_that_comes_before_the_first_report_waits_and_is_served(door, puppet):
    puppet.silent = True
    puppet.report["names"] = {"a": "a", "gpt": "a"}
    puppet.does = [answer(b"fine"), answer(b"well")]
    gateway = await door.open_gateway({"one": puppet.url}, wait=False)
    lines = [await door.begin("POST", CHAT, {"model": name}) for name in ("gpt", "a", "other")]
    await until(lambda: gateway.dispatcher.queued() == {"gpt": 1, "a": 1, "other": 1})
    puppet.silent = False
    replies = [await line.reply() for line in lines]
    assert [reply.status for reply in replies] == [200, 200, 404]
    assert replies[2].error["code"] == "model_not_found"
    for line in lines:
        line.close()
    assert [row["model"] for row in gateway.requests.rows(2)] == ["a", "a"]


async def test_what_is_reserved_is_in_the_file_as_soon_as_it_is(door, puppet, monkeypatch):
    monkeypatch.setattr("llmux.gateway.service.SAVE_EVERY", 1e6)
    file = door.folder / "spent.json"
    key = {"name": "alice", "key": "sk-a", "budget": {"usd": 1, "per": "month"}}
    prices = {"models": {"a": {"input": 1, "output": 1}}}
    go = asyncio.Event()

    async def held(writer):
        await go.wait()
        writer.write(answer(b'{"usage": {"prompt_tokens": 1, "completion_tokens": 2}}'))

    puppet.does = [held]
    await door.open_gateway({"one": puppet.url}, api_keys=[key], prices=prices, state=str(file))
    line = await door.begin("POST", CHAT, {"model": "a"}, authorization="Bearer sk-a")
    await until(lambda: file.exists() and json.loads(file.read_text())["reserved"])
    go.set()
    assert (await line.reply()).status == 200
    line.close()
    await until(lambda: not json.loads(file.read_text())["reserved"])
    assert list(json.loads(file.read_text())["spent"].values()) == [3]


@pytest.mark.usefixtures("both_ways")
async def test_what_loses_its_host_while_the_gateway_stops_is_told_so(door, puppet):
    refused = asyncio.Event()

    async def connect(_address):
        await refused.wait()
        raise EngineRefusedError("The engine refused the connection.")

    gateway = await door.open_gateway({"one": puppet.url})
    gateway.forwarder.pool.connect = connect
    line = await door.begin("POST", CHAT, {"model": "a"})
    await until(lambda: gateway.handler.under_way)
    stopping = asyncio.create_task(gateway.stop())
    await until(lambda: gateway.stopping)
    refused.set()
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (503, "stopping")
    line.close()
    await stopping
