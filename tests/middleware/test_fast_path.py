"""The short way of small requests: the same bytes as the long way, wherever a request is cut into segments."""

from __future__ import annotations

import asyncio
import gc
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.extract.json_object import MOST
from llmux.middleware import client_connection
from llmux.middleware.context import RequestContext
from llmux.middleware.fast_head import UNKNOWN, read
from llmux.middleware.fast_path import KNOWN, FastRequest
from llmux.proxy.relay import Relay
from llmux.upstream import ConnectionPool, EngineConnection, EngineRefusedError
from tests.harness.waiting import PATIENCE
from tests.server.house import House, message, until

BODY = b' {"model" : "a", "messages": [{"role": "user", "content": "h\\u00e9"}], "model": "a"}\n'


@pytest.fixture
async def house(tmp_path):
    async with asyncio.timeout(PATIENCE), House(tmp_path) as found:
        found.up("a")
        await found.open("a b")
        assert (await found.chat("a")).status == 200  # leaves a connection to the engine behind
        yield found


def request(**headers: str) -> bytes:
    return message("POST", "/v1/chat/completions?x=%2F&&y", BODY, X_Request_ID="mine", **headers)


def timeless(reply) -> tuple:
    return reply.status, reply.fields, reply.body


async def test_both_ways_say_the_same_to_the_engine_and_to_the_client(house, fast):
    data = request(Accept="*/*", Authorization="Bearer k", cOOkie="b=1")
    short = await house.raw(data)
    assert fast == [True]
    house.front.fast_path.open = False
    long = await house.raw(data)
    assert fast == [True]
    assert timeless(short) == timeless(long)
    assert house.engine.heads[-1] == house.engine.heads[-2]
    assert house.engine.bodies[-1] == house.engine.bodies[-2] == BODY


async def test_a_client_may_want_its_connection_closed_after_the_answer(house, fast):
    answers = []
    for open_ in (True, True, False):  # its head is new, then known
        house.front.fast_path.open = open_
        line = await house.line()
        line.send(request(Connection="close") + (request() if open_ else b""))  # which nothing answers
        answers.append(await line.closed())
        assert b"connection" not in house.engine.heads[-1].lower()
    assert fast == [True] * 2
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].lower().count(b"\r\nconnection: close\r\n") == 1
    assert len(house.engine.bodies) == 1 + 3


async def test_what_is_known_of_a_head_serves_requests_of_any_length(house, monkeypatch):
    """The same head again, with a longer body and with a shorter one; another field, another head."""
    judged = []
    decide = house.front.fast_path.match

    def noted(data, seen):
        judged.append(seen[0].target)
        return decide(data, seen)

    monkeypatch.setattr(house.front.fast_path, "match", noted)
    for words in (3, 300, 1, 30):
        body = {"model": "a", "prompt": "x " * words}
        data = message("POST", "/v1/completions", body, Accept="*/*", Authorization="Bearer k")
        short = await house.raw(data)
        house.front.fast_path.open = False
        long = await house.raw(data)
        house.front.fast_path.open = True
        assert (short.status, short.body) == (long.status, long.body) == (200, b"ok")
        heads = [re.sub(rb"X-Request-ID: \S+", b"", head) for head in house.engine.heads[-2:]]
        assert heads[0] == heads[1]
        assert house.engine.bodies[-1] == house.engine.bodies[-2] == json.dumps(body).encode()
    assert judged == ["/v1/completions"]
    await house.raw(message("POST", "/v1/completions", {"model": "a"}, Accept="text/html"))
    assert len(judged) == 2


async def test_a_head_that_comes_again_on_a_connection_is_read_again_in_its_length_only(house, fast, monkeypatch):
    recalled = []
    recall = house.front.fast_path.recall

    def noted(data):
        recalled.append(data)
        return recall(data)

    monkeypatch.setattr(house.front.fast_path, "recall", noted)
    line = await house.line()
    for words in (3, 300, 1, 30):
        body = {"model": "a", "prompt": "x " * words}
        line.send(message("POST", "/v1/completions", body, Accept="*/*"))
        assert (await line.reply()).body == b"ok"
        assert house.engine.bodies[-1] == json.dumps(body).encode()
    assert len(recalled) == 3  # the first, by the one that judged it, and the second
    line.send(message("POST", "/v1/completions", {"model": "a"}, Accept="text/html"))
    assert (await line.reply()).body == b"ok"
    assert b"Accept: text/html" in house.engine.heads[-1]
    assert fast == [True] * 5


@pytest.mark.parametrize(
    "answer",
    [
        b"200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 2\r\n\r\nok",
        b"200 OK\r\nX-A: 1\r\nCONTENT-LENGTH: 2\r\nX-Request-ID: theirs\r\n\r\nok",
        b"200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"200 OK\r\nConnection: X-A\r\nX-A: 1\r\nContent-Length: 2\r\n\r\nok",
        b"204 No Content\r\nX-A: 1\r\n\r\n",
        b"429 Too Many Requests\r\nContent-Length: 2\r\n\r\nno",
        b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ],
)
async def test_an_answer_is_told_alike_both_ways_however_often_it_comes(house, fast, answer):
    house.engine.says = b"HTTP/1.1 " + answer
    told = []
    for opened in (True, True, True, False, True):
        house.front.fast_path.open = opened
        told.append(timeless(await house.raw(request())))
    assert fast == [True] * 4
    assert told == [told[3]] * 5


@pytest.mark.parametrize("length", ["-2", "2x", "", "+2", "1" * 16, "2, 2", "2\r\nContent-Length: 3", "2\r\nX: 1"])
async def test_a_length_is_judged_anew_with_a_head_that_is_known(house, length):
    """On a connection that knows the head as on one that does not."""
    data = message("POST", "/v1/completions", {"model": "a"}, Accept="*/*")
    odd = re.sub(rb"Content-Length: \d+", b"Content-Length: " + length.encode(), data)
    used, fresh = await house.line(), await house.line()
    for _ in range(3):
        used.send(data)
        assert (await used.reply()).status == 200
    heads = len(house.engine.heads)
    replies = []
    for line in (used, fresh):
        line.send(odd)
        reply = await line.reply()
        replies.append((reply.status, reply.body))
    assert replies[0] == replies[1]
    assert replies[0][0] in {400, 413}
    assert len(house.engine.heads) == heads


async def test_what_a_connection_knows_of_a_head_ends_with_the_configuration(house, fast):
    data = message("POST", "/v1/completions", {"model": "alias"}, Accept="*/*")
    line = await house.line()
    statuses = []
    for aliases in (["alias"], [], ["alias"]):
        config = house.config(models={"a": {"aliases": aliases}, "b": {}})
        house.switcher.replace(config)
        house.front.configure(config)
        for _ in range(3):
            line.send(data)
            statuses.append((await line.reply()).status)
    assert statuses == [200] * 3 + [404] * 3 + [200] * 3
    assert True in fast


@pytest.mark.parametrize("most", [KNOWN - 1, KNOWN + 10])
async def test_what_is_known_is_bounded(house, fast, most):
    for number in range(most):
        data = message("POST", "/v1/completions", {"model": "a"}, X_Number=str(number))
        assert (await house.raw(data)).status == 200
    assert len(house.front.fast_path.known) <= KNOWN
    assert fast == [True] * most


async def test_a_request_that_is_over_is_freed_without_the_garbage_collector(house, fast):
    line = await house.line()
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            line.send(request())
            assert (await line.reply()).status == 200
        left = [thing for thing in gc.get_objects() if isinstance(thing, FastRequest | Relay | RequestContext)]
    finally:
        gc.enable()
    assert fast == [True] * 20
    assert not left


async def test_what_asks_after_an_answer_finds_it_counted(house, fast):
    lines = [await house.line() for _ in range(5)]
    for number in range(1, 4):
        for line in lines:
            line.send(request())
        for line in lines:
            assert (await line.reply()).status == 200
            told = (await house.ask("GET", "/metrics")).body
        assert b'llmux_requests_total{model="a",status="200"} %d.0' % (1 + 5 * number) in told
        assert house.in_flight("a") == 0
    assert fast == [True] * 15


class Over:
    """A request that has ended."""

    def __init__(self, error=None):
        self.error, self.told = error, []

    def finish(self, status):
        self.told.append(status)
        if self.error is not None:
            raise self.error


async def test_a_mistake_at_the_end_of_one_request_concerns_no_other(house):
    loop, mistakes = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _loop, context: mistakes.append(context["exception"]))
    requests = [Over(), Over(ValueError("one")), Over(), Over(ValueError("two")), Over()]
    for one in requests:
        house.front.fast_path.finish_soon(loop, one, 200)
    await until(lambda: requests[-1].told)
    assert [one.told for one in requests] == [[200]] * 5
    assert [str(error) for error in mistakes] == ["one", "two"]


@pytest.mark.parametrize("step", [1, 7, 60, 200])
async def test_a_request_in_pieces(house, step):
    data = request()
    line = await house.line()
    for start in range(0, len(data), step):
        line.send(data[start : start + step])
        await line.writer.drain()
        await asyncio.sleep(0)
    assert (await line.reply()).status == 200
    assert house.engine.bodies[-1] == BODY


def large(size: int, model: str = "a") -> bytes:
    """Return a body of so many bytes, as a long conversation has."""
    before, after = b'{"messages":[{"content":"', b'"}],"model":"%b"}' % model.encode()
    room = size - len(before + after)
    return before + (b'\\"code\\"\\n' * (room // 10)).ljust(room, b"x") + after


@pytest.mark.parametrize("size", [70_000, 300_000, MOST])
@pytest.mark.parametrize("step", [4000, 65_536, 2 * MOST])
async def test_a_large_request_takes_it_however_it_is_cut(house, fast, size, step):
    body = large(size)
    line = await house.line()
    for _ in range(2):  # its head is new, then known
        data = message("POST", "/v1/chat/completions", body, Accept="*/*")
        for start in range(0, len(data), step):
            line.send(data[start : start + step])
            await line.writer.drain()
        assert (await line.reply()).status == 200
        assert house.engine.bodies[-1] == body
    assert fast == [True] * 2
    assert house.front.fast_path.budget.held == 0


async def test_a_large_request_is_held_once(house, fast, monkeypatch):
    """What goes to the engine, and what is kept in case that the engine is gone, are the same bytes."""
    begun = []
    begin = EngineConnection.begin

    def noted(connection, sink, **more):
        begun.append((sink._raw, *more["whole"]))
        begin(connection, sink, **more)

    monkeypatch.setattr(EngineConnection, "begin", noted)
    body = large(200_000)
    line = await house.line()
    line.send(message("POST", "/v1/chat/completions", body) + request())
    assert [(await line.reply()).status for _ in range(2)] == [200] * 2
    assert house.engine.bodies[-2:] == [body, BODY]
    (raw, _, rest), _ = begun
    assert rest.obj is raw
    assert fast == [True] * 2


async def test_a_request_that_is_too_large_for_it_is_served_alike(house, fast):
    body = large(MOST + 1)
    assert (await house.raw(message("POST", "/v1/chat/completions", body))).status == 200
    assert house.engine.bodies[-1] == body
    assert fast == []


async def test_the_rest_of_a_large_request_may_take_its_time(house, fast, monkeypatch):
    """aiohttp waits for it, with what had come until then."""
    monkeypatch.setattr(client_connection, "HOLD", 0.01)
    data = message("POST", "/v1/chat/completions", large(200_000))
    line = await house.line()
    line.send(data[:150_000])
    connection = await one_of(house)
    await until(lambda: connection._owed == len(data) - 150_000)
    line.send(data[150_000:])
    assert (await line.reply()).status == 200
    assert fast == []
    line.send(request())
    assert (await line.reply()).status == 200
    assert house.engine.bodies[-2:] == [large(200_000), BODY]
    assert fast == [True]
    assert house.front.fast_path.budget.held == 0


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        (b'{"model" : "a", "x": 1.50}', True),
        (large(80_000), True),
        (b'{"messages": [{"model": "x"}], "model":"a"}', False),  # it is looked for where it takes longer
        (b'{"mod\\u0065l": "a"}', False),
        (b'{"model": "b", "model": "a"}', False),
    ],
)
async def test_the_engines_name_of_a_model_takes_the_place_of_the_clients(
    tmp_path, fast, body, taken, monkeypatch
):
    handed = []
    hand_over = client_connection.ClientConnection.hand_over
    monkeypatch.setattr(
        client_connection.ClientConnection,
        "hand_over",
        lambda one, *given: (handed.append(True), hand_over(one, *given)),
    )
    async with House(tmp_path) as house:
        house.up("a")
        await house.open({"a": {"upstream_model": 'served/"name"'}})
        for _ in range(2):
            reply = await house.raw(message("POST", "/v1/chat/completions", body))
            assert reply.status == 200
            assert house.engine.bodies[-1] == re.sub(rb'"a"', rb'"served/\\"name\\""', body)
            assert f"content-length: {len(house.engine.bodies[-1])}".encode() in house.engine.heads[-1].lower()
        assert house.front.fast_path.budget.held == 0
    assert fast == [False, True]  # the first one met no connection to the engine
    assert handed == ([] if taken else [True])


async def one_of(house):
    """Return the server's side of the only client's connection."""
    server = house._runner.server
    await until(lambda: server.open_count == 1)
    ((found, _),) = server.open_connections()
    return found


async def test_what_has_come_of_a_request_counts_as_held(house, fast, monkeypatch):
    monkeypatch.setattr(client_connection, "HOLD", 60.0)
    budget = house.front.fast_path.budget
    data = message("POST", "/v1/chat/completions", large(200_000))
    line = await house.line()
    line.send(data[:150_000])
    await until(lambda: budget.held == 150_000)
    line.abort()
    await until(lambda: budget.held == 0)
    budget.max_buffered = 100_000
    reply = await house.raw(data)
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (503, "bodies_full")
    assert budget.held == 0
    assert fast == []


@pytest.mark.parametrize("hold", [60.0, 0.01])
async def test_a_request_that_is_still_arriving_at_the_end_is_refused(house, fast, monkeypatch, hold):
    """Its client is told, whichever of the two waits for the rest."""
    monkeypatch.setattr(client_connection, "HOLD", hold)
    data = message("POST", "/v1/chat/completions", large(200_000))
    line = await house.line()
    line.send(data[:150_000])
    connection = await one_of(house)
    await until(lambda: connection._missing if hold > 1 else connection._owed)
    await house.close()
    reply = await line.reply()
    assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "stopping", "5")
    assert fast == []
    assert house.front.fast_path.budget.held == 0


async def test_pipelined_requests_are_answered_in_order_whichever_way_they_take(house, fast):
    line = await house.line()
    line.send(request() + message("GET", "/v1/models") + request() + request() + message("GET", "/health"))
    found = [(await line.reply()).body for _ in range(5)]
    assert [found[i] for i in (0, 2, 3)] == [b"ok"] * 3
    assert b'"list"' in found[1]
    assert b'"status"' in found[4]
    assert True in fast
    assert len(house.engine.bodies) == 1 + 3


async def test_an_engine_connection_that_has_died_is_replaced_and_the_request_delivered_once(house):
    for task in list(house.engine._tasks):
        task.cancel()
    assert (await house.raw(request())).status == 200
    assert len(house.engine.bodies) == 2


async def test_a_client_that_leaves_frees_its_place_and_the_engine(house):
    line = await house.begin("POST", "/v1/hold", BODY)
    await until(lambda: len(house.engine.bodies) == 2)
    assert house.in_flight("a") == 1
    line.abort()
    await until(lambda: house.in_flight("a") == 0)
    await until(lambda: house.engine.open == 0)


def forget_idle_connections(house) -> None:
    house.switcher.on_sleep(house.switcher.open_activity("a"))


@pytest.fixture
def gate(monkeypatch):
    """Hold up those who open a connection to an engine until it is set; count them."""
    gate = asyncio.Event()
    gate.callers = 0
    connect = ConnectionPool.connect

    async def held(pool, address):
        gate.callers += 1
        await gate.wait()
        return await connect(pool, address)

    monkeypatch.setattr(ConnectionPool, "connect", held)
    return gate


async def test_without_an_idle_connection_one_is_opened(house, fast):
    forget_idle_connections(house)
    lines = [await house.line() for _ in range(3)]
    for line in lines:
        line.send(request())
    assert [(await line.reply()).body for line in lines] == [b"ok"] * 3
    assert fast == [True] * 3
    assert len(house.engine.bodies) == 4


async def test_a_fresh_connection_that_dies_without_an_answer_is_a_502_and_no_second_try(house, fast):
    forget_idle_connections(house)
    line = await house.begin("POST", "/v1/hold", BODY)
    await until(lambda: len(house.engine.bodies) == 2)
    for task in list(house.engine._tasks):
        task.cancel()
    assert (await line.reply()).status == 502
    assert fast == [True]
    assert len(house.engine.bodies) == 2


@pytest.mark.parametrize("mistake", [EngineRefusedError("nobody there"), LookupError("odd")])
async def test_one_whose_engine_is_not_there_is_queued_again_and_served(house, fast, monkeypatch, mistake):
    forget_idle_connections(house)
    (house.folder / "a.up").unlink()
    connect = ConnectionPool.connect
    mistakes = [mistake]

    async def refused_once(pool, address):
        if mistakes:
            raise mistakes.pop()
        return await connect(pool, address)

    monkeypatch.setattr(ConnectionPool, "connect", refused_once)
    reply = await house.raw(request())
    assert reply.status == 200
    assert float(reply.headers["x-llmux-queue-seconds"]) > 0
    assert fast == [True]
    assert len(house.engine.bodies) == 2
    assert house.in_flight("a") == 0


async def test_a_client_that_leaves_while_a_connection_is_opened(house, gate):
    forget_idle_connections(house)
    line = await house.begin("POST", "/v1/x", BODY)
    await until(lambda: gate.callers == 1)
    assert house.in_flight("a") == 1
    line.abort()
    await until(lambda: house.in_flight("a") == 0)
    gate.set()
    await until(lambda: house.engine.open == 0)
    assert len(house.engine.bodies) == 1


async def test_one_that_is_cut_while_a_connection_is_opened(tmp_path, gate):
    async with asyncio.timeout(PATIENCE), House(tmp_path) as house:
        gate.set()
        house.up("a")
        await house.open("a b", policy={"drain_timeout": 0})
        await house.chat("a")
        forget_idle_connections(house)
        gate.clear()
        before = gate.callers
        line = await house.begin("POST", "/v1/x", BODY)
        await until(lambda: gate.callers == before + 1)
        other = asyncio.create_task(house.chat("b"))
        assert (await line.reply()).status == 503
        gate.set()
        assert (await other).status == 200
        assert b"a" not in [json.loads(body).get("model", "").encode() for body in house.engine.bodies[1:]]


async def test_what_breaks_off_before_its_head_is_a_502(house):
    line = await house.begin("POST", "/v1/hold", BODY)
    for delivered in (2, 3):  # a pooled connection that died counts as not sent: it is tried once more, fresh
        await until(lambda delivered=delivered: len(house.engine.bodies) == delivered)
        for task in list(house.engine._tasks):
            task.cancel()
    reply = await line.reply()
    assert reply.status == 502
    assert reply.marked
    assert house.in_flight("a") == 0


async def test_what_is_cut_before_its_head_is_a_503(tmp_path):
    async with asyncio.timeout(PATIENCE), House(tmp_path) as house:
        house.up("a")
        await house.open("a b", policy={"drain_timeout": 0})
        await house.chat("a")
        line = await house.begin("POST", "/v1/hold", BODY)
        await until(lambda: len(house.engine.bodies) == 2)
        other = asyncio.create_task(house.chat("b"))
        reply = await line.reply()
        assert reply.status == 503
        assert reply.marked
        assert int(reply.headers["retry-after"]) >= 1
        assert (await other).status == 200


@pytest.mark.parametrize(
    "data",
    [
        message("POST", "/v1/x", BODY, Expect="100-continue"),
        message("POST", "/v1/x", BODY, Origin="http://127.0.0.1"),
        message("POST", "/v1/x#part", BODY),
        message("POST", "/v1/x", BODY).replace(b"HTTP/1.1", b"HTTP/1.0"),
        b"POST /v1/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (len(BODY), BODY),
    ],
)
async def test_what_needs_judging_takes_the_long_way(house, fast, data):
    line = await house.line()
    line.send(data)
    reply = await line.head()
    if reply.status == 100:
        reply = await line.head()
    assert reply.status in {200, 403}
    assert True not in fast


FIELDS_ONCE = ["Content-Length: 5", "Host: y", "Content-Type: text/plain", "User-Agent: b"]


@pytest.mark.parametrize("field", FIELDS_ONCE)
async def test_what_says_a_thing_twice_is_never_fast(house, fast, field):
    data = message("POST", "/v1/x", BODY, Content_Type="application/json", User_Agent="a").replace(
        b"\r\n\r\n", f"\r\n{field}\r\n\r\n".encode(), 1
    )
    line = await house.line()
    line.send(data)
    assert (await line.head()).status in {200, 400}
    assert True not in fast


NAMES = st.sampled_from(["Host", "Content-Length", "X-A", "connection", "Accept", "Transfer-Encoding", "Cookie"])
VALUES = st.sampled_from(["x", "7", "0", "keep-alive", "close", "chunked", "a, b", "1 2", " 7", "+7", "\u0667"])


@given(st.lists(st.tuples(NAMES, VALUES), max_size=6), st.sampled_from(["POST", "GET", "post"]))
def test_a_length_is_only_claimed_where_there_is_exactly_one(fields, method):
    head = f"{method} /v1/x HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields) + "\r\n"
    seen, _, total, _ = read(head.encode() + b"1234567890")
    lengths = [v for n, v in fields if n == "Content-Length"]
    framed = any(n == "Transfer-Encoding" for n, _ in fields)
    if total != UNKNOWN:
        assert not framed
        assert len(lengths) <= 1
        assert all(re.fullmatch("[0-9]+", v) for v in lengths)
        assert total == len(head.encode()) + sum(map(int, lengths))
    if seen.plain:
        assert len(lengths) == 1
        assert [n for n, _ in fields].count("Host") == 1


@pytest.mark.parametrize(
    ("path", "name", "taken"),
    [
        ("/v1/chat/completions", "talks", True),
        ("/chat/completions", "alias", True),
        ("/v1/embeddings", "talks", True),  # is never translated
        ("/v1/messages", "talks", False),
        ("/v1/responses", "alias", False),
        ("/v1/messages", "a", True),
        ("/v1/messages/count_tokens", "a", False),
        ("/v1/messages/count_tokens", "talks", False),
    ],
)
async def test_model_with_apis_takes_it_where_nothing_is_translated(tmp_path, fast, path, name, taken):
    async with asyncio.timeout(PATIENCE), House(tmp_path) as house:
        house.up("a" if name == "a" else "talks")
        await house.open({"a": {}, "talks": {"apis": ["chat"], "aliases": ["alias"]}})
        body = {"model": name, "max_tokens": 1, "messages": [{"role": "user", "content": "q"}]}
        await house.chat(name)  # leaves a connection to the engine behind
        for _ in range(2):
            fast.clear()
            await house.raw(message("POST", path, body))
            assert set(fast) == {taken}
