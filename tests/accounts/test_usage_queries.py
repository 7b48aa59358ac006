"""Who used what, as `/llmux/usage`, `/llmux/activity` and the command line tell it."""

import asyncio
import contextlib
import csv
import io
import json
import sqlite3
import time

import pytest

from llmux.accounts.key_metrics import MOST as MOST_SERIES
from llmux.accounts.key_metrics import KeyMetrics
from llmux.accounts.ledger_file import Row, sums_of
from llmux.cli.terminal import Exit
from llmux.core.phases import Phase
from llmux.middleware.fast_path import MOST
from tests.cli.invoking import answered, llmux, said
from tests.server.house import WAKE, message, until

KEYS = [{"name": "alice", "key": "key-of-alice"}, {"name": "bob", "key": "key-of-bob"}, "key-of-none"]
USAGE = b'{"usage":{"prompt_tokens":12,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}'
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(USAGE), USAGE)
EVENTS = [b'data: {"delta":{"role":"assistant"}}\n\n', *[b'data: {"delta":{}}\n\n'] * 5, b"data: [DONE]\n\n", b""]
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM = STREAM_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS)
CHAT = "/v1/chat/completions"


async def opened(house, *, wake=WAKE, **more):
    models = {"a": {"aliases": ["alias"], "wake": wake}, "b": {}}
    return await house.open(models=models, ledger="ledger.db", api_keys=KEYS, admin_key="key-of-admin", **more)


async def send(house, model, key, *, path=CHAT, padding=0, **headers):
    body = {"model": model, "padding": "x" * padding}
    return await house.ask("POST", path, body, Authorization=f"Bearer key-of-{key}", **headers)


async def used(house, query="", key="alice", **headers):
    return await house.ask("GET", f"/llmux/usage{query}", Authorization=f"Bearer key-of-{key}", **headers)


def rows(house):
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM requests WHERE kind = 0 ORDER BY id")]


@pytest.mark.parametrize("padding", [0, MOST])  # the fast path, and the other
async def test_a_request_has_a_row(house, padding):
    await opened(house, wake=f"sleep 0.01; {WAKE}")  # by itself it may take less than the millisecond that counts
    assert (await send(house, "a", "alice")).status == 200  # wakes it
    house.engine.says = WHOLE
    assert (await send(house, "alias", "bob", padding=padding, X_Request_ID="mine")).status == 200
    document = (await used(house)).json()
    first, last = rows(house)
    assert (first["key"], first["asked"], first["served"], first["status"]) == ("alice", "a", "a", 200)
    assert (last["key"], last["asked"], last["served"], last["request_id"]) == ("bob", "alias", "a", "mine")
    assert (last["input"], last["cached"], last["output"], last["estimated"]) == (12, 4, 3, 0)
    assert first["waited"] > 0 == last["waited"]
    assert document["by"] == ["key", "model"]
    assert [(row["key"], row["model"], row["requests"]) for row in document["usage"]] == [
        ("alice", "a", 1),
        ("bob", "a", 1),
    ]
    assert document["usage"][1]["cached_tokens"] == 4
    assert [total["requests"] for total in document["total"]] == [2]
    assert document["lost"] == 0


@pytest.mark.parametrize("padding", [0, MOST])
async def test_a_stream_without_usage_is_estimated_from_its_events(house, padding):
    await opened(house)
    await send(house, "a", "alice")
    house.engine.says = STREAM
    await send(house, "a", "alice", padding=padding)
    (row,) = (await used(house, "?by=key")).json()["usage"]
    assert row["estimated"] == 2  # the first was answered without a report, too
    last = rows(house)[-1]
    assert (last["output"], last["estimated"]) == (4, 1)
    assert last["input"] > padding / 4


async def test_the_activity_tells_what_the_ledger_knows_of_a_request(house):
    """Each by its own row, also where clients give several requests one id."""
    prices = {"currency": "EUR", "gpu_hour": 3600, "models": {"b": {"input": 1000, "output": 2000}}}
    await house.open(models={"a": {}, "b": {}}, ledger="ledger.db", api_keys=KEYS, prices=prices)
    house.engine.says = WHOLE
    for model, key in (("b", "alice"), ("a", "bob"), ("b", "bob")):
        assert (await send(house, model, key, X_Request_ID="same")).status == 200
    assert (await send(house, "nothing", "alice", X_Request_ID="same")).status == 404
    house.engine.says = STREAM
    assert (await send(house, "b", "alice")).status == 200
    await used(house)  # by then it has looked at all of them
    reply = await house.ask("GET", "/llmux/activity", Authorization="Bearer key-of-alice")
    stream, refused, last, by_time, first = reply.json()["requests"]
    assert [(one["model"], one["key"], one["cost"], one["currency"]) for one in (first, last)] == [
        ("b", "alice", 0.018, "eur"),
        ("b", "bob", 0.018, "eur"),
    ]
    assert by_time["cost"] > 0
    assert by_time["cost"] == pytest.approx(by_time["gpu_seconds"] + by_time["switch_seconds"], abs=2e-6)
    assert by_time["switch_seconds"] > 0
    assert (first["input_tokens"], first["cached_tokens"], first["output_tokens"], first["estimated"]) == (
        12, 4, 3, False,
    )  # fmt: skip
    assert (refused["cost"], refused["input_tokens"]) == (0, None)
    assert (stream["output_tokens"], stream["estimated"]) == (4, True)
    text = await said(house, "activity", LLMUX_API_KEY="key-of-alice", COLUMNS="200")
    assert text.count("0.018000 eur") >= 2  # what goes by time may be the same
    assert "cost" in text


async def past(house, query=""):
    reply = await house.ask("GET", f"/llmux/activity?from=ledger{query}", Authorization="Bearer key-of-alice")
    assert reply.status == 200
    return reply.json()


async def test_the_activity_of_the_past_is_in_the_ledger(house):
    await opened(house)
    house.engine.says = WHOLE
    for model, key in (("a", "alice"), ("alias", "bob"), ("a", "alice"), ("b", "alice")):
        assert (await send(house, model, key)).status == 200
    assert (await send(house, "nothing", "alice")).status == 404
    document = await past(house)
    refused, b, *others = document["requests"]
    memory = (await house.ask("GET", "/llmux/activity", Authorization="Bearer key-of-alice")).json()["requests"]
    assert document["next"] is None
    for one, same in zip(document["requests"], memory, strict=True):
        for name in ("request_id", "asked", "model", "key", "status", "error", "input_tokens", "output_tokens"):
            assert one[name] == same[name], name
        assert one["time"] == pytest.approx(same["time"], abs=0.2)
        assert one["duration"] <= same["duration"] + 0.001
    assert (refused["error"], refused["model"], refused["input_tokens"]) == ("model_not_found", None, None)
    assert (b["model"], b["cached_tokens"], b["first_byte"]) == ("b", 4, None)
    first = await past(house, "&limit=2")
    assert [one["id"] for one in first["requests"]] == [refused["id"], b["id"]]
    rest = await past(house, f"&limit=9&before={first['next']}")
    assert [one["id"] for one in rest["requests"]] == [one["id"] for one in others]
    assert [one["asked"] for one in (await past(house, "&key=bob&model=alias"))["requests"]] == ["alias"]
    assert (await past(house, f"&until={time.time() + 60}"))["requests"] == document["requests"]
    assert (await past(house, "&until=1000.5"))["requests"] == []
    for query in ("from=disk", "from=ledger&until=now", "from=ledger&until=1e9", "from=ledger&before=x"):
        reply = await house.ask("GET", f"/llmux/activity?{query}", Authorization="Bearer key-of-alice")
        assert reply.status == 400


START = b'data: {"message":{"usage":{"input_tokens":5,"cache_read_input_tokens":20,"output_tokens":1}}}\n\n'
DELTA = b'data: {"usage":{"output_tokens":42}}\n\n'


@pytest.mark.parametrize("cut", [0, 1, 4, 30])
async def test_the_beginning_of_a_stream_may_come_in_pieces(house, cut):
    """Anthropic's input stands there; engines send the head by itself, and the size of a chunk."""
    one = house.engine._one
    head = STREAM[: STREAM.index(b"\r\n\r\n") + 4]
    first = b"%x\r\n%b\r\n" % (len(START), START)
    rest = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in [*[b"data: {}\n\n"] * 9, DELTA, b""])

    async def in_pieces(reader, writer):
        await one(reader, writer)
        for piece in (head, first[:cut], first[cut:], rest) if house.engine.says == b"" else ():
            writer.write(piece)
            await asyncio.sleep(0.02)

    house.engine._one = in_pieces
    await opened(house)
    await send(house, "a", "alice")
    house.engine.says = b""
    line = await house.begin("POST", "/v1/messages", {"model": "a"}, Authorization="Bearer key-of-alice")
    assert (await line.reply()).status == 200
    await used(house)
    last = rows(house)[-1]
    assert (last["input"], last["cached"], last["output"], last["estimated"]) == (25, 20, 42, 0)


@pytest.mark.parametrize("padding", [0, MOST])  # the fast path, and the other
async def test_a_stream_to_a_client_of_http_1_0_tells_its_beginning_too(house, padding):
    """nginx speaks HTTP/1.0 unless told otherwise."""
    told = [
        b'event: message_start\ndata: {"message":{"usage":{"input_tokens":25,"output_tokens":1}}}\n\n',
        *[b'data: {"delta":{"text":"x"}}\n\n'] * 12,
        b'data: {"type":"message_delta","usage":{"output_tokens":42}}\n\n',
        b"",
    ]
    await opened(house)
    house.engine.says = STREAM_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in told)
    body = {"model": "a", "stream": True, "padding": "x" * padding}
    asked = message("POST", "/v1/messages", body, Authorization="Bearer key-of-alice")
    reply = await house.raw(asked.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    assert reply.body == b"".join(told)
    await used(house)
    (row,) = rows(house)
    assert (row["input"], row["output"], row["estimated"]) == (25, 42, 0)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_report_before_many_embeddings_is_found(house, chunked):
    """llama.cpp's stands there; they are sent in blocks of any size, and come in more than are kept."""
    vectors = ",".join(f'{{"embedding":[{"0.0123456789," * 2000}0],"index":{index}}}' for index in range(40))
    usage = '{"prompt_tokens":3000,"total_tokens":3000}'
    body = f'{{"model":"a","object":"list","usage":{usage},"data":[{vectors}]}}'.encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    if chunked:
        pieces = [body[at : at + 4000] for at in range(0, len(body), 4000)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
        head += b"Transfer-Encoding: chunked\r\n\r\n"
    else:
        head += b"Content-Length: %d\r\n\r\n" % len(body)
    await opened(house)
    house.engine.says = head + body
    assert (await send(house, "a", "alice", path="/v1/embeddings")).status == 200
    await used(house)
    (row,) = rows(house)
    assert (row["input"], row["output"], row["estimated"]) == (3000, 0, 0)


async def test_every_end_has_a_row(house):
    await house.open(models={"a": {}, "broken": {"wake": "exit 1"}}, ledger="ledger.db", api_keys=KEYS)
    assert (await send(house, "nothing", "alice")).status == 404
    assert (await send(house, "broken", "alice")).status == 503
    assert (await house.ask("POST", CHAT, {"model": "a"}, Authorization="Bearer wrong")).status == 401
    line = await house.begin("POST", "/v1/hold", {"model": "a"}, Authorization="Bearer key-of-bob")
    await until(lambda: house.engine.heads)
    line.abort()
    await until(lambda: len(house.switcher.requests.rows(9)) == 4)
    await used(house)
    assert [(row["key"], row["served"], row["status"], row["reason"]) for row in rows(house)] == [
        ("alice", "", 404, "model_not_found"),
        ("alice", "broken", 503, "wake_failed"),
        ("bob", "a", 499, ""),
    ]
    assert (await used(house, "?by=")).json()["usage"][0]["failed"] == 3  # a flood without a key fills no disk


async def test_questions(house):
    await opened(house)
    for model, key in (("a", "alice"), ("b", "alice"), ("a", "none")):
        await send(house, model, key)
    document = (await used(house, "?by=key,model,day&since=30d")).json()
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert [(row["key"], row["model"], row["day"]) for row in document["usage"]] == [
        (None, "a", today),
        ("alice", "a", today),
        ("alice", "b", today),
    ]
    assert document["since"] % 86400 == 0
    assert len((await used(house, "?by=hour")).json()["usage"]) in {1, 2}
    assert [row["requests"] for row in (await used(house, "?by=key&key=alice")).json()["usage"]] == [2]
    assert [row["requests"] for row in (await used(house, "?by=model&model=alias")).json()["usage"]] == [2]
    assert (await used(house, f"?since={today}&by=")).json()["usage"][0]["requests"] == 3
    assert (await used(house, "?since=2100-01-01")).json()["usage"] == []
    assert {row["key"] for row in (await used(house, "?by=key&top=1")).json()["usage"]} == {"alice", "(others)"}
    wrong = ("by=key,colour", "since=yesterday", "since=", "top=0", "top=1001", "top=", "top=x")
    for query in wrong:
        param = query.partition("=")[0]
        reply = await used(house, f"?{query}")
        assert (reply.status, reply.error["param"]) == (400, param)


async def test_csv(house):
    await opened(house)
    house.engine.says = WHOLE
    await send(house, "a", "alice")
    reply = await used(house, "?by=key,model,day", Accept="text/csv")
    assert reply.headers["content-type"].startswith("text/csv")
    (row,) = csv.DictReader(io.StringIO(reply.body.decode()))
    assert (row["key"], row["model"], row["requests"], row["input_tokens"], row["cost"]) == (
        "alice",
        "a",
        "1",
        "12",
        "",
    )
    assert await said(house, "usage", "--by", "key", "--csv", LLMUX_API_KEY="key-of-alice")


async def test_without_a_key_it_is_not_told(house):
    await opened(house)
    assert (await house.ask("GET", "/llmux/usage")).status == 401


async def test_without_a_ledger_there_is_no_past(house):
    await house.open()
    reply = await house.ask("GET", "/llmux/activity?from=ledger")
    assert (reply.status, reply.error["code"]) == (404, "no_ledger")


async def test_no_ledger(house):
    await house.open()
    reply = await house.ask("GET", "/llmux/usage")
    assert (reply.status, reply.error["code"]) == (404, "no_ledger")
    told = await said(house, "usage", exit_code=Exit.USAGE)
    assert told.startswith("there is no ledger; set `ledger: true`")
    assert "is it llmux" not in told


async def test_keys_are_in_none_of_it(house):
    await opened(house, access_log=True)
    await send(house, "a", "alice")
    await send(house, "nothing", "alice")
    await used(house)
    await house.close()
    seen = b"".join(file.read_bytes() for file in house.folder.glob("ledger.db*"))
    assert b"alice" in seen
    assert b"key-of-" not in seen
    assert "key-of-" not in repr(house.log.__dict__)


async def test_a_ledger_that_cannot_be_written_stops_no_request(house):
    await opened(house)
    await send(house, "a", "alice")
    await used(house)
    other = sqlite3.connect(house.folder / "ledger.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for _ in range(20):
        assert (await send(house, "a", "alice")).status == 200
    assert (await used(house, "?by=")).json()["usage"][0]["requests"] == 1
    other.execute("COMMIT")
    other.close()

    async def all_there():
        return (await used(house, "?by=")).json()["usage"][0]["requests"] == 21

    while not await all_there():
        pass


async def test_the_last_rows_are_written_at_the_end(house):
    await opened(house)
    await send(house, "a", "alice")
    waiting = await house.begin("POST", CHAT, {"model": "a"}, Authorization="Bearer key-of-alice")
    await waiting.reply()
    await house.close()
    assert len(rows(house)) == 2


async def test_the_last_requests_of_a_key(house):
    await opened(house)
    for model, key in (("a", "alice"), ("b", "bob"), ("a", "alice")):
        await send(house, model, key)

    async def told(query):
        reply = await house.ask("GET", f"/llmux/activity{query}", Authorization="Bearer key-of-alice")
        return [(one["key"], one["model"]) for one in reply.json()["requests"]]

    assert await told("?key=alice") == [("alice", "a"), ("alice", "a")]
    assert await told("?key=bob&model=b&limit=5") == [("bob", "b")]
    assert await told("?key=carol") == []
    text = await said(house, "activity", LLMUX_API_KEY="key-of-alice")
    assert "alice" in text
    assert "bob" not in await said(house, "activity", "--key", "alice", LLMUX_API_KEY="key-of-alice")
    await send(house, "nothing-of-that-name", "alice")
    for width in ("60", "80"):
        narrow = await said(house, "activity", LLMUX_API_KEY="key-of-alice", COLUMNS=width)
        assert narrow.count("alice") == 3  # no name is broken
        assert "404 model_not_found" in narrow


@pytest.mark.parametrize("command", ["activity", "usage"])
async def test_a_key_that_is_not_known(house, command):
    """One that has sent nothing yet is; so is one that was deleted, as long as there is something of it."""
    await opened(house)
    known = {"LLMUX_API_KEY": "key-of-alice"}
    assert await said(house, command, "--key", "alice", **known) == EMPTY[command]
    await send(house, "a", "bob")
    for more in ((), ("--json",)):
        done = await llmux(house, command, "--key", "alise", *more, **known)
        assert (done.exit_code, done.stdout) == (Exit.NO_SUCH_MODEL, "")
        assert "no key has the name 'alise'; did you mean 'alice'?" in done.stderr
    done = await llmux(house, command, "--key", "nothing-like-it", **known)
    assert (done.exit_code, "did you mean" in done.stderr) == (Exit.NO_SUCH_MODEL, False)
    config = house.config(models={"a": {}}, ledger="ledger.db", api_keys=KEYS[:1], admin_key="key-of-admin")
    house.switcher.replace(config)
    house.front.configure(config)
    assert "bob" in await said(house, command, "--key", "bob", **known)


EMPTY = {"activity": "no request has ended yet", "usage": "no request has ended since then"}


async def test_the_table_of_usage(house):
    await house.open(ledger="ledger.db")
    assert await said(house, "usage") == "no request has ended since then"
    house.engine.says = WHOLE
    await house.chat("a")
    await house.chat("a")
    text = await said(house, "usage", "--by", "model,day")
    assert "total" in text
    assert "24" in text
    document = await answered(house, "usage", "--by", "key")
    assert document["usage"][0]["requests"] == 2
    done = await llmux(house, "usage", "--by", "colour")
    assert done.exit_code != 0
    assert json.dumps(document)


WAKE = 'sleep 0.3; touch "$LLMUX_MODEL.up"'


@pytest.mark.parametrize("padding", [0, MOST])
async def test_what_the_gpu_was_held_for_is_paid_for(house, padding):
    """A switch by those whose requests waited for it, an answer by its own, and the rest by none."""
    models = {"a": {"wake": WAKE}, "b": {}}
    prices = {"currency": "EUR", "gpu_hour": 3.6, "models": {"b": {"input": 1000, "cached": 0, "output": 2000}}}
    manual = {"manual": True}  # all three wait when the switch begins
    await house.open(models=models, ledger="ledger.db", api_keys=KEYS, prices=prices, policy=manual)
    began = house.switcher.now()
    lines = [
        await house.begin("POST", CHAT, {"model": "a"}, Authorization=f"Bearer key-of-{key}")
        for key in ("alice", "alice", "bob")
    ]
    await until(lambda: house.queued("a") == 3)
    await house.switcher.force_switch("a")
    for line in lines:
        assert (await line.reply()).status == 200
    body = {"model": "a", "padding": "x" * padding}
    held = await house.begin("POST", "/v1/hold", body, Authorization="Bearer key-of-bob")
    await until(lambda: house.in_flight("a"))
    await asyncio.sleep(0.2)
    house.engine.go.set()
    assert (await held.reply()).status == 200
    house.engine.says = WHOLE
    await house.switcher.force_switch("b")
    await until(lambda: house.switcher.core.state.models["b"].phase is Phase.AWAKE)
    assert (await send(house, "b", "alice")).status == 200
    document = (await used(house, "?by=key")).json()
    took = house.switcher.now() - began
    by_key = {row["key"]: row for row in document["usage"]}
    alice, bob = by_key["alice"], by_key["bob"]
    assert set(by_key) == {"(house)", "alice", "bob"}
    first, second, third, hold, b = rows(house)
    switches = sorted((row["key"], row["switch"]) for row in (first, second, third))
    assert abs(switches[0][1] - switches[1][1]) <= 1  # each half of what its key owes
    assert abs(switches[0][1] + switches[1][1] - switches[2][1]) <= 2
    assert switches[2][1] >= 150_000
    assert hold["gpu"] >= 190_000  # the clock of a loop may count milliseconds
    assert bob["gpu_seconds"] >= 0.19
    micros = sum(row["cost"] for row in (first, second, third, hold))
    spent = sum(row["gpu"] + row["switch"] for row in (first, second, third, hold))
    assert abs(micros - spent / 1000) <= 5  # 3.60 an hour is a millionth for each millisecond
    assert b["cost"] == 8 * 1000 + 3 * 2000
    assert alice["currency"] == "eur"
    assert alice["cost"] == alice["cost_micros"] / 1e6 > 0.014
    total = sum(row["gpu_seconds"] + row["switch_seconds"] for row in document["usage"])
    assert house.switcher.accounts.shares.held - 0.05 <= total <= took


async def test_a_guard_is_paid_for_by_the_house(house):
    await house.open(ledger="ledger.db", prices={"gpu_hour": 1})
    async with house.switcher.hold("a"):
        await asyncio.sleep(0.1)
    await house.chat("a")
    (row,) = (await used(house, "?by=key&key=")).json()["usage"]
    assert row["gpu_seconds"] >= 0.099  # a timer may be early by its clock's resolution


async def test_prices_change_at_a_reload(house):
    await opened(house, prices={"gpu_hour": 1})
    await send(house, "a", "alice")
    await used(house)
    more = {"prices": {"gpu_hour": 2}, "charge": {"switch": "house"}}
    config = house.config("a b", ledger="ledger.db", api_keys=KEYS, **more)
    house.switcher.replace(config)
    await send(house, "b", "alice")
    await used(house)
    first, last = rows(house)
    assert first["price"] != last["price"]
    assert (first["switch"] > 0, last["switch"]) == (True, 0)
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
        assert connection.execute("SELECT count(*) FROM prices").fetchone() == (2,)


async def test_metrics_by_key(house):
    await opened(house, prices={"gpu_hour": 36, "models": {"b": {"input": 1000}}})
    house.engine.says = WHOLE
    await send(house, "a", "alice")
    await send(house, "b", "alice")
    await send(house, "b", "none")
    await used(house)
    text = (await house.ask("GET", "/metrics", Authorization="Bearer key-of-bob")).body.decode()
    assert 'llmux_key_requests_total{key="alice",model="a"} 1.0' in text
    assert 'llmux_key_requests_total{key="",model="b"} 1.0' in text
    assert 'llmux_key_tokens_total{key="alice",kind="cached",model="a"} 4.0' in text
    assert 'llmux_key_cost_total{currency="usd",key="alice",model="b"} 0.012' in text
    assert 'llmux_key_gpu_seconds_total{for="switches",key="alice",model="a"}' in text
    assert "llmux_ledger_rows_lost_total 0.0" in text
    assert "key-of-" not in text


def test_metrics_by_key_are_bounded():
    metrics = KeyMetrics(lambda: 0)
    row = Row(**dict.fromkeys(Row._fields, 0))
    for number in range(3 * MOST_SERIES):
        metrics.add(sums_of([row._replace(key=f"key-{number}", served="m", currency="")]))
    (requests, *_) = metrics.collect()
    assert len(requests.samples) == MOST_SERIES + 1
    assert sum(sample.value for sample in requests.samples) == 3 * MOST_SERIES
