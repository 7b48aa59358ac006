"""`usage: exact`: streams tell their usage to the ledger, and to no client that did not ask for it."""

import asyncio
import contextlib
import json
import sqlite3
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.extract import BodyBudget, body_of
from llmux.extract.json_object import members_of
from llmux.middleware import exact_usage
from llmux.middleware.exact_usage import ExactUsage, UsageFilter
from llmux.targets.field_scanner import Rule, changes, tree
from tests.server.house import until

CHAT = "/v1/chat/completions"
CHUNK = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n'
STOP = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"
FOR_CLIENTS = b"".join([CHUNK % b"a", CHUNK % b"b", STOP, DONE])
SAID = b"".join([CHUNK % b"a", CHUNK % b"b", STOP, USAGE, DONE])


def stream(said, framing="chunked", status="200 OK"):
    head = b"HTTP/1.1 %b\r\nContent-Type: text/event-stream\r\n" % status.encode()
    if framing == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(said) + said
    assert framing == "chunked"
    pieces = [said[at : at + 31] for at in range(0, len(said), 31)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def tokens(house):
    """Return what the ledger says of each request so far."""
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection,
        connection,
    ):
        return connection.execute("SELECT input, output, estimated FROM requests ORDER BY id").fetchall()
    return []


async def ask(house, body, path=CHAT, **headers):
    return await house.ask("POST", path, {"model": "a", **body}, **headers)


@pytest.mark.parametrize("framing", ["chunked", "length"])
async def test_a_client_that_does_not_ask_sees_nothing_of_it(house, framing):
    await house.open(ledger="ledger.db", usage="exact")
    house.engine.says = stream(SAID, framing)
    for _ in range(2):  # the second finds its model awake
        reply = await ask(house, {"stream": True, "temperature": 1.50})
        assert reply.body == FOR_CLIENTS
        assert reply.headers["content-type"] == "text/event-stream"
    sent = house.engine.bodies[-1]
    assert json.loads(sent)["stream_options"] == {"include_usage": True}
    assert sent.endswith(b'"model": "a", "stream": true, "temperature": 1.5}')  # and no other byte is changed
    await until(lambda: len(tokens(house)) == 2)
    assert tokens(house) == [(12, 7, 0)] * 2


async def test_a_client_that_asks_sees_it(house):
    await house.open(ledger="ledger.db", usage="exact")
    house.engine.says = stream(SAID, "length")
    reply = await ask(house, {"stream": True, "stream_options": {"include_usage": True}})
    assert reply.body == SAID
    assert b"include_usage" in house.engine.bodies[-1]
    await until(lambda: tokens(house) == [(12, 7, 0)])


@pytest.mark.parametrize("asks", [True, False])
async def test_long_options_are_read_as_short_ones(house, asks):
    """Whether the request takes the fast path or, as its model sleeps, the handler."""
    await house.open(ledger="ledger.db", usage="exact")
    house.engine.says = stream(SAID)
    options = {"others": "x" * 70_000, "include_usage": asks}
    for _ in range(2):
        assert (await ask(house, {"stream": True, "stream_options": options})).body == (
            SAID if asks else FOR_CLIENTS
        )
        assert json.loads(house.engine.bodies[-1])["stream_options"] == {**options, "include_usage": True}


def written(pairs):
    return " , ".join(f'"{key}" : {value}' for key, value in pairs).join(["{ ", " }"])


VALUES = st.sampled_from(["true", "false", "null", " true ", '"true"', "1", "[true]", "{}"])
OPTIONS = st.lists(
    st.tuples(st.sampled_from(["include_usage", "include\\u005fusage", "others", "stream"]), VALUES), max_size=3
).map(written)
FIELDS = st.lists(
    st.tuples(st.sampled_from(["stream", "str\\u0065am", "stream_options", "other"]), VALUES | OPTIONS), max_size=4
)


@given(FIELDS)
async def test_both_ways_read_a_request_alike(fields):
    body = written([("model", '"a"'), *fields])
    members = members_of(body.encode())
    assert members is not None
    usage = ExactUsage(budget := BodyBudget(2**20))
    with body_of(body.encode(), "a", budget) as held:
        silent = exact_usage._is_silent(await exact_usage._options(held))
        assert silent is usage.is_silent(CHAT, members)
        asking = await usage.asking(CHAT, held)
        assert silent or asking is None
        if asking is not None:
            assert json.loads(b"".join(asking))["stream_options"]["include_usage"] is True


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, CHAT),
        ({"stream": False}, CHAT),
        ({"stream": "yes"}, CHAT),
        ({"stream": True}, "/v1/responses"),
        ({"stream": True}, "/v1/messages"),
        ({"stream": True, "stream_options": 5}, CHAT),  # the engine judges that
    ],
)
async def test_what_is_not_asked(house, body, path):
    await house.open(ledger="ledger.db", usage="exact")
    house.engine.says = stream(SAID)
    assert (await ask(house, body, path)).body == SAID
    assert json.loads(house.engine.bodies[-1]) == {"model": "a", **body}


async def test_an_operators_request_is_passed_on_as_it_is(house):
    await house.open(ledger="ledger.db", usage="exact")
    house.engine.says = stream(SAID)
    sent = b'{"model": "a", "stream": true}'
    assert (await house.ask("POST", f"/upstream/a{CHAT}", sent)).body == SAID
    assert house.engine.bodies[-1] == sent


async def test_options_that_are_there_stay(house):
    await house.open({"a": {"upstream_model": "served-name"}}, ledger="ledger.db", usage="exact")
    house.engine.says = stream(SAID)
    given = {"stream_options": {"include_usage": False, "other": 1}, "stream": True}
    assert (await ask(house, given)).body == FOR_CLIENTS
    assert json.loads(house.engine.bodies[-1]) == {
        "model": "served-name",
        "stream": True,
        "stream_options": {"include_usage": True, "other": 1},
    }
    given = b'{"stream":false,"model":"a","stream":true,"stream_options":null}'  # the last one counts
    assert (await house.ask("POST", CHAT, given)).body == FOR_CLIENTS


@pytest.mark.parametrize(
    "variant",
    [
        {"set": {"stream_options.include_usage": False}},
        {"strip": ["stream_options"]},
        {"set": {"stream": True}},
        {"set": {"temperature": 0.5}},
    ],
)
async def test_variants_that_change_the_same_fields(house, variant):
    await house.open({"a": {"variants": {"a:v": variant}}}, ledger="ledger.db", usage="exact")
    house.engine.says = stream(SAID)
    given = {"model": "a:v", "stream": True, "stream_options": {"include_usage": False}}
    assert (await house.ask("POST", CHAT, given)).body == FOR_CLIENTS
    sent = json.loads(house.engine.bodies[-1])
    assert (sent["model"], sent["stream_options"]) == ("a", {"include_usage": True})
    await until(lambda: tokens(house) == [(12, 7, 0)])


async def test_errors_and_compressed_answers_pass(house):
    await house.open(ledger="ledger.db", usage="exact")
    error = b'{"error": {"message": "no"}}'
    house.engine.says = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(error), error)
    reply = await ask(house, {"stream": True}, Accept_Encoding="gzip")
    assert (reply.status, reply.body) == (400, error)
    assert b"accept-encoding" not in house.engine.heads[-1].lower()
    house.engine.says = stream(b"abc", "length").replace(b"Content-L", b"Content-Encoding: br\r\nContent-L")
    assert (await ask(house, {"stream": True})).body == b"abc"


async def test_a_stream_that_breaks_off(house):
    """What has come is told, and the tokens are estimated."""
    await house.open(ledger="ledger.db", usage="exact")
    line = await house.begin("POST", CHAT.replace("chat", "stream/chat"), {"model": "a", "stream": True})
    await line.reader.readuntil(b"data: 1")
    line.abort()
    house.engine.says = stream(CHUNK % b"a" + STOP + CHUNK[:20])[:-5]  # and its last chunk is missing
    line = await house.begin("POST", CHAT, {"model": "a", "stream": True})
    await line.reader.readuntil(b'"content":"a"')  # the other one waits for what follows
    line.abort()
    await until(lambda: len(tokens(house)) == 2)
    assert tokens(house)[1][2] == 1


@pytest.mark.parametrize(
    ("variant", "given"),
    [
        ({"set": {"stream": True}}, {}),
        (
            {"set": {"stream_options.include_usage": False}},
            {"stream": True, "stream_options": {"include_usage": True}},
        ),
        ({"strip": ["stream_options"]}, {"stream": True, "stream_options": {"include_usage": True}}),
    ],
)
async def test_what_a_variant_makes_of_a_request_counts_both_ways(house, variant, given):
    await house.open({"a": {"variants": {"a:v": variant}}}, ledger="ledger.db", usage="exact")
    house.engine.says = stream(SAID)
    for _ in range(2):  # the second finds its model awake
        assert (await ask(house, {**given, "model": "a:v"})).body == FOR_CLIENTS
        sent = json.loads(house.engine.bodies[-1])
        assert (sent["stream"], sent["stream_options"]) == (True, {"include_usage": True})
    await until(lambda: tokens(house) == [(12, 7, 0)] * 2)


async def test_a_large_body_that_a_variant_has_changed_holds_nothing_up():
    message = {"role": "user", "content": "words \n" * 10}
    raw = json.dumps({"model": "a", "messages": [message] * 60_000, "stream": True}).encode()
    usage, longest, now = ExactUsage(budget := BodyBudget(2**30)), 0.0, time.thread_time
    with body_of(raw, "a", budget) as received:
        body = received.edit(await changes(received, tree({"temperature": Rule(always=0.5, given=True)})))
        asking = asyncio.create_task(usage.asking(CHAT, body))
        while not asking.done():
            began = now()
            await asyncio.sleep(0)
            longest = max(longest, now() - began)
        sent = await asking
        began = now()
        assert json.loads(b"".join(sent))["stream_options"] == {"include_usage": True}
        assert longest < (now() - began) / 2
        sent.close()
    assert budget.held == 0


async def test_an_answer_that_begins_while_the_model_wakes(house):
    wake = {"wake": "until [ -e go ]; do sleep 0.01; done; touch a.up"}
    await house.open({"a": wake}, ledger="ledger.db", usage="exact", progress=True, progress_every=0.05)
    house.engine.says = stream(SAID)
    line = await house.begin("POST", CHAT, {"model": "a", "stream": True})
    await line.reader.readuntil(b": llmux waiting")
    (house.folder / "go").touch()
    rest = await line.reader.readuntil(b"\r\n0\r\n\r\n")
    assert b'"finish_reason":"stop"' in rest
    assert b"prompt_tokens" not in rest
    await until(lambda: tokens(house) == [(12, 7, 0)])


async def test_a_reload_turns_it_off(house):
    await house.open(ledger="ledger.db", usage="exact")
    assert house.front._handler.exact_usage is not None
    house.front.configure(house.config(ledger="ledger.db"))
    house.engine.says = stream(SAID)
    assert (await ask(house, {"stream": True})).body == SAID
    house.front.configure(house.config(usage="exact"))  # of no use without a ledger
    assert (await ask(house, {"stream": True})).body == SAID


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_in_pieces_of_any_size(size, end):
    said = SAID.replace(b"\n\n", end) + b": the last one is not whole"
    usage, told, seen = UsageFilter(), b"", b""
    for at in range(0, len(said), size):
        told += usage.feed(said[at : at + size])
        seen, usage.event = seen + usage.event, b""
    assert told + usage.end() == said.replace(seen, b"")
    assert seen == USAGE.replace(b"\n\n", end)


def test_timings_go_back_where_they_were():
    """llama.cpp puts them into the chunk with the usage, when there is one."""
    usage = UsageFilter()
    with_timings = USAGE.replace(b"}}\n\n", b'},"timings":{"prompt_ms":1.5}}\n\n')
    told = usage.feed(CHUNK % b"a" + STOP + with_timings + DONE)
    assert told == CHUNK % b"a" + STOP.replace(b"}]}", b'}],"timings":{"prompt_ms":1.5}}') + DONE


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"choices":[{}],"usage":{}}\n\n',
        b'data: {"usage":{}}\n\n',
        b'data: ["usage"]\n\n',
        b'data: "usage\n\n',
        b'event: x\ndata: {"choices":[],"usage":{}}\n\n',
        b': "usage"\n\n',
    ],
)
def test_what_is_no_usage_stays(event):
    assert UsageFilter().feed(event) == event


def test_an_event_without_end_is_not_kept(monkeypatch):
    monkeypatch.setattr(exact_usage, "MOST", 100)
    usage = UsageFilter()
    assert usage.feed(STOP) == b""
    assert usage.feed(b"x" * 99) == b""
    assert usage.feed(b"yy") == STOP + b"x" * 99 + b"yy"
    assert usage.feed(USAGE) == USAGE
    assert usage.end() == b""


async def test_both_ways_at_once(house):
    """Other clients are not touched by it."""
    await house.open(ledger="ledger.db", usage="exact")
    house.engine.says = stream(SAID)
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    replies = await asyncio.gather(*(ask(house, asked if at % 2 else {"stream": True}) for at in range(40)))
    assert [reply.body for reply in replies] == [FOR_CLIENTS, SAID] * 20
