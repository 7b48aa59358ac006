"""What a host says of itself to gateways."""

import asyncio
import json

import pytest

from tests.harness.waiting import PATIENCE
from tests.server.house import held, until

CHAT = "/v1/chat/completions"


class Reports:
    """The reports on one connection."""

    def __init__(self, line):
        self.line = line

    async def next(self):
        event = await self.line.reader.readuntil(b"\n\n")
        return json.loads(event.partition(b"event: report\ndata: ")[2])

    async def until(self, wanted):
        while not wanted(report := await self.next()):
            pass
        return report


async def listen(house, query="?report=60s"):
    line = await house.begin("GET", f"/llmux/events{query}")
    head = await line.head()
    assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
    return Reports(line)


async def test_a_report_comes_at_once_and_when_something_changes(house):
    await house.open(models={"a": {"max_in_flight": 4, "aliases": ["gpt"], "cost": {"wake": 30}}, "b": {}})
    reports = await listen(house)
    first = await reports.next()
    assert (first["ready"], first["leased"], first["lease"]) == (True, False, 6.0)
    a = first["models"]["a"]
    assert (a["phase"], a["queued"], a["in_flight"], a["slots"]) == ("asleep", 0, 0, 4)
    assert (a["wake"], a["switch_cost"], a["expected_wait"], a["measured"]) == (30, 30, 30, True)
    assert not first["models"]["b"]["measured"]
    assert (a["idle_for"], a["awake_for"], a["arrival_rate"]) == (None, 0, 0)
    assert first["names"] == {"a": "a", "gpt": "a", "b": "b"}
    await house.chat("a")
    awake = await reports.until(lambda report: report["models"]["a"]["phase"] == "awake")
    assert (awake["instance"], awake["seq"] > first["seq"]) == (first["instance"], True)
    assert awake["models"]["a"]["expected_wait"] == awake["models"]["a"]["switch_cost"] == 0
    assert awake["models"]["b"]["switch_cost"] >= awake["models"]["a"]["sleep"]
    await house.ask("POST", "/llmux/lease")
    leased = await reports.until(lambda report: report["leased"])
    assert leased["models"]["a"]["expected_wait"] is None
    await house.ask("DELETE", "/llmux/lease")
    assert not (await reports.until(lambda report: not report["leased"]))["leased"]


async def test_a_stream_of_events_ends_with_its_key(house):
    old, kept, root = {"name": "g", "key": "old"}, {"name": "k", "key": "kept"}, "root"
    await house.open(api_keys=[old, kept], admin_key=root)
    streams = {
        key: await house.begin("GET", f"/llmux/events?{what}", X_API_Key=key)
        for key, what in (("old", "report=60s"), ("kept", "report=60s"), (root, "every=60s"))
    }
    for line in streams.values():
        assert (await line.head()).status == 200
        await line.reader.readuntil(b"\n\n")
    house.front.configure(house.config("a b", api_keys=[kept, "root"], admin_key="other"))
    for key in ("old", root):  # the latter is a client's now, and may not read what hooks print
        await asyncio.wait_for(streams[key].closed(), PATIENCE)
    assert (await house.ask("POST", CHAT, {"model": "a"}, X_API_Key="kept")).status == 200
    assert (await Reports(streams["kept"]).until(lambda report: report["models"]["a"]["phase"] == "awake"))[
        "ready"
    ]


async def test_a_stream_of_events_that_is_not_read_ends_with_its_key(house):
    await house.open(api_keys=["old", "kept"])
    line = await house.begin("GET", "/llmux/events?every=200ms", X_API_Key="old")
    await line.head()
    line.writer.transport.pause_reading()
    [request] = house.front._readers.values()
    request.transport.write(b" " * 2**23)  # more than the system takes
    request.writer.buffer_size = 2**20  # the next event waits until that has been read
    await until(lambda: request.protocol._drain_waiter is not None)
    house.front.configure(house.config("a", api_keys=["kept"]))
    await until(lambda: not house.front._readers)
    line.abort()


async def test_it_is_told_again_and_again(house):
    await house.open()
    reports = await listen(house, "?report=200ms")
    numbers = [(await reports.next())["seq"] for _ in range(4)]
    assert numbers == sorted(set(numbers))


async def test_the_switch_under_way_and_those_that_wait(house):
    await house.open(models={"a": {"wake": held("go"), "cost": {"wake": 40}}, "b": {"cost": {"wake": 5}}})
    assert (await house.ask("GET", "/llmux/status")).json()["fleet"]["free_in"] == 0
    line = await house.begin("POST", CHAT, {"model": "a"})
    await until(lambda: house.switcher.core.state.switch)
    report = (await house.ask("GET", "/llmux/status")).json()["fleet"]
    assert 30 < report["free_in"] <= 40
    assert (report["models"]["a"]["queued"], report["models"]["a"]["idle_for"]) == (1, 0)
    assert report["models"]["b"]["expected_wait"] > 35
    house.release("go")
    assert (await line.reply()).status == 200


async def test_other_names_stand_for_models(house):
    virtual = {"any": {"awake": ["b", "a"]}}
    await house.open(models={"a": {"variants": {"a:hot": {"set": {"temperature": 1}}}}, "b": {}}, virtual=virtual)
    fleet = (await house.ask("GET", "/llmux/status")).json()["fleet"]
    assert fleet["names"] == {"a": "a", "a:hot": "a", "b": "b", "any": "b"}
    await house.chat("a")
    assert (await house.ask("GET", "/llmux/status")).json()["fleet"]["names"]["any"] == "a"


async def test_a_host_that_stops_says_so_last(house):
    await house.open(shutdown_grace=60)
    reports = await listen(house)
    assert (await reports.next())["ready"]
    line = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.in_flight("a"))
    task = asyncio.create_task(house.switcher.stop())
    report = await reports.until(lambda report: not report["ready"])
    assert report["models"]["a"]["expected_wait"] is None
    house.engine.go.set()
    assert (await line.reply()).status == 200
    await task
    assert (await reports.line.reader.readuntil(b"0\r\n\r\n")).endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("query", ["?report=soon", "?report=1ms", "?report=1s&every=1s"])
async def test_what_makes_no_sense_is_refused(house, query):
    await house.open()
    reply = await house.ask("GET", f"/llmux/events{query}")
    assert (reply.status, reply.error["param"]) == (400, "report")


async def test_head_has_no_reports(house):
    await house.open()
    assert (await house.ask("HEAD", "/llmux/events?report=1s")).status == 200
