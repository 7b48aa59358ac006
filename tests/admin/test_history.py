"""The last hour, what hooks do, and the event stream as the page reads it."""

import json
import time

import pytest

from llmux.runtime import history
from tests.server.house import WAKE, held, until


class Events:
    """The server-sent events of one connection."""

    def __init__(self, line):
        self.line = line

    async def next(self, name):
        while True:
            event = await self.line.reader.readuntil(b"\n\n")
            found, _, data = event.rpartition(b"event: ")[2].partition(b"\ndata: ")
            if found.decode() == name:
                return json.loads(data.partition(b"\n")[0])


async def listen(house, query="?every=60s", **headers):
    line = await house.begin("GET", f"/llmux/events{query}", **headers)
    assert (await line.head()).status == 200
    events = Events(line)
    await events.next("status")
    return events


async def test_the_last_hour_tells_phases_switches_and_failures(house):
    began = time.time()
    await house.open(models={"a": {}, "b": {}, "c": {"wake": "echo no; exit 3"}})
    for model, status in (("a", 200), ("b", 200), ("c", 503)):
        assert (await house.chat(model)).status == status
    await until(lambda: house.switcher.core.state.switch is None)
    told = (await house.ask("GET", "/llmux/history")).json()
    assert began - 1 < told["begins"] <= told["now"] < time.time() + 1
    assert told["phases"] == {"a": "asleep", "b": "asleep", "c": "asleep"}
    moves = [(move["model"], move["from"], move["to"]) for move in told["moves"]]
    assert moves[:7] == [
        *((name, "unknown", "asleep") for name in "abc"),
        ("a", "asleep", "waking"),
        ("a", "waking", "awake"),
        ("a", "awake", "draining"),
        ("a", "draining", "sleeping"),
    ]
    assert [move["id"] for move in told["moves"]] == list(range(1, len(moves) + 1))
    times = [move["time"] for move in told["moves"]]
    assert times == sorted(times)
    assert told["begins"] <= times[0]
    notes = [(note["event"], note.get("switch"), note.get("result")) for note in told["notes"]]
    assert notes[:4] == [
        ("switch_started", 1, None),
        ("switch_ended", 1, "success"),
        ("switch_started", 2, None),
        ("switch_ended", 2, "success"),
    ]
    failed = next(note for note in told["notes"] if note["event"] == "switch_failed")
    assert (failed["model"], "exited with 3" in failed["error"]) == ("c", True)
    (line,) = [line for line in told["output"] if line["line"] == "no"]
    assert (line["model"], line["hook"]) == ("c", "wake")


async def test_what_is_older_than_an_hour_is_told_no_more(house):
    switcher = await house.open()
    assert (await house.chat("a")).status == 200
    assert len((await house.ask("GET", "/llmux/history")).json()["moves"]) == 4
    real = switcher.now
    switcher.now = lambda: real() + history.HOUR + 1
    told = switcher.history.document(output=True, base_url="")
    assert told["moves"] == told["notes"] == []
    assert told["phases"]["a"] == "awake"
    assert told["now"] - told["begins"] == pytest.approx(history.HOUR)


async def test_the_last_hour_says_where_to_mend(house):
    await house.open(models={"a": {"sleep": "exit 1", "alive": "false"}, "b": {}})
    house.log.base_url = "http://127.0.0.1:4711"
    assert (await house.chat("a")).status == 200
    assert (await house.chat("b")).status == 503
    notes = (await house.ask("GET", "/llmux/history")).json()["notes"]
    (faulted,) = [note for note in notes if note["event"] == "model_faulted"]
    assert faulted["repair"] == "curl -X POST http://127.0.0.1:4711/llmux/models/a/reset"


async def test_a_full_ring_says_from_when_on_it_knows(house):
    switcher = await house.open()
    moves = switcher.timeline.moves
    moves.extend([moves[-1]._replace(id=n, time=switcher.now()) for n in range(3, moves.maxlen + 3)])
    told = switcher.history.document(output=False, base_url="")
    assert len(told["moves"]) == moves.maxlen
    assert told["begins"] == pytest.approx(told["moves"][0]["time"])


async def test_phases_are_streamed_and_the_status_follows_at_once(house):
    await house.open()
    events = await listen(house)
    assert (await house.chat("a")).status == 200
    waking = await events.next("phase")
    assert (waking["model"], waking["from"], waking["to"]) == ("a", "asleep", "waking")
    assert abs(waking["time"] - time.time()) < 5
    assert (await events.next("phase"))["to"] == "awake"
    assert (await events.next("status"))["models"]["a"]["phase"] == "awake"  # not after a minute


async def test_the_status_comes_again_and_again(house):
    await house.open()
    events = await listen(house, "?every=200ms")
    one, other = await events.next("status"), await events.next("status")
    assert 0.1 < other["time"] - one["time"] < 5


@pytest.mark.parametrize("every", ["0", "0.1", "61s", "soon", "", "1e999"])
async def test_how_often_the_status_cannot_come(house, every):
    await house.open()
    reply = await house.ask("GET", f"/llmux/events?every={every}")
    assert (reply.status, "every" in reply.error["message"]) == (400, True)


async def test_hooks_are_streamed_as_they_print(house):
    wake = f"echo '<b>begins</b>'; {held('go')}; {WAKE}"
    await house.open(models={"a": {"wake": wake, "alive": "echo no; false"}, "b": {"wake": "exit 3"}})
    events = await listen(house)
    chat = await house.begin("POST", "/v1/x", {"model": "a"})
    started = await events.next("hook_started")
    assert (started["model"], started["hook"]) == ("a", "wake")
    line = await events.next("hook_output")  # of wake, not of alive; while it runs
    assert (line["model"], line["hook"], line["line"]) == ("a", "wake", "<b>begins</b>")
    house.release("go")
    ended = await events.next("hook_completed")
    assert (ended["model"], ended["exit_code"]) == ("a", 0)
    assert ended["duration_secs"] >= 0
    assert (await chat.reply()).status == 200
    assert (await house.chat("b")).status == 503
    failed = await events.next("hook_failed")
    assert (failed["model"], failed["hook"], failed["exit_code"]) == ("b", "wake", 3)


async def test_hooks_that_only_ask_are_not_streamed(house):
    await house.open(models={"a": {"verify": "echo free"}, "b": {"wake": f"echo last; {WAKE}"}})
    events = await listen(house)
    assert (await house.chat("a")).status == 200
    assert (await house.chat("b")).status == 200
    seen = await events.line.reader.readuntil(b'"line": "last"')
    assert seen.count(b"event: hook_started") == seen.count(b"event: hook_completed") + 1 == 3
    assert b"verify" not in seen


async def test_nobody_listens_and_nothing_is_kept_but_the_last_lines(house):
    switcher = await house.open(models={"a": {"wake": f"seq 1 900; {WAKE}"}})
    events = await listen(house)
    assert len(switcher.history._listeners) == 1
    events.line.abort()
    await until(lambda: not switcher.history._listeners)
    assert (await house.chat("a")).status == 200
    await until(lambda: switcher.history._lines and switcher.history._lines[-1][3] == "900")
    assert len(switcher.history._lines) == history.LINES


@pytest.mark.parametrize(
    ("settings", "headers", "may"),
    [
        ({}, {}, True),
        ({}, {"Host": "localhost:1"}, True),
        ({}, {"Host": "[::1]:1"}, True),
        ({"admin_key": "root"}, {}, False),
        ({"admin_key": "root"}, {"X_API_Key": "root"}, True),
        ({"admin_key": "root"}, {"X_API_Key": "root", "Host": "gpu.example.org"}, True),
        ({"api_keys": ["user"], "admin_key": "root"}, {"X_API_Key": "user"}, False),
        ({"api_keys": ["user"], "admin_key": "root"}, {"Authorization": "Bearer root"}, True),
    ],
)
async def test_what_hooks_print_is_for_operators(house, settings, headers, may):
    await house.open(models={"a": {"wake": f"echo secret; {WAKE}"}}, **settings)
    events = await listen(house, **headers)
    key = {"X_API_Key": settings["api_keys"][0]} if "api_keys" in settings else {}
    assert (await house.ask("POST", "/v1/x", {"model": "a"}, **key)).status == 200
    if may:
        assert (await events.next("hook_output"))["line"] == "secret"
    seen = await events.line.reader.readuntil(b"event: hook_completed")
    assert b"secret" not in seen
    told = (await house.ask("GET", "/llmux/history", **headers)).json()
    assert ([line["line"] for line in told["output"]] if may else told["output"]) == (["secret"] if may else None)


async def test_a_name_that_points_here_is_told_nothing(house):
    await house.open(models={"a": {"wake": f"echo secret; {WAKE}"}})
    assert (await house.chat("a")).status == 200
    for path in ("/llmux/history", "/llmux/events"):
        reply = await house.ask("GET", path, Host="rebound.example")
        assert (reply.status, reply.error["code"]) == (403, "host_not_allowed")
        assert b"secret" not in reply.body


async def test_streamed_events_are_counted_while_somebody_watches(house):
    switcher = await house.open()
    stream = await house.begin("POST", "/v1/stream", {"model": "a"})
    await stream.reader.readuntil(b"data: 1")
    assert switcher.activities.streamed("a") == 0
    events = await listen(house)
    again = await house.begin("POST", "/v1/stream", {"model": "a"})
    await again.reader.readuntil(b"data: 1")
    assert (await house.ask("GET", "/llmux/status")).json()["models"]["a"]["streamed"] == 1
    plain = await house.chat("a")
    assert plain.status == 200
    events.line.abort()
    await until(lambda: not switcher.activities["a"][1].counting)
    last = await house.begin("POST", "/v1/stream", {"model": "a"})
    await last.reader.readuntil(b"data: 1")
    assert switcher.activities.streamed("a") == 1


async def test_gpus_are_told_on_their_own_and_beside_the_status(house):
    await house.open()
    told = (await house.ask("GET", "/llmux/gpus")).json()
    assert set(told) == {"gpus", "error"}
    assert told["gpus"] or told["error"]
    events = await listen(house, "?every=200ms")
    assert await events.next("gpus") == told
