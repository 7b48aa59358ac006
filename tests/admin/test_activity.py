"""The last requests, as `/llmux/activity` tells them, and what the metrics make of them."""

import time

import pytest

from llmux.middleware.fast_path import MOST
from tests.server.house import message, until

USAGE = b'{"usage":{"prompt_tokens":12,"completion_tokens":3}}'
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(USAGE), USAGE)
EVENTS = b'data: {"x":1}\n\n', b"data: " + USAGE + b"\n\n", b"data: [DONE]\n\n", b""
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
    b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS
)


async def told(house, query=""):
    reply = await house.ask("GET", f"/llmux/activity{query}")
    assert reply.status == 200
    return reply.json()["requests"]


@pytest.mark.parametrize("answer", [WHOLE, STREAM])
@pytest.mark.parametrize("padding", [0, MOST])  # the lane, and the long way
async def test_a_request_is_told_with_its_tokens(house, answer, padding):
    began = time.time()
    await house.open()
    assert (await house.chat("a")).status == 200  # wakes it
    house.engine.says = answer
    body = {"model": "a", "padding": "x" * padding}
    reply = await house.ask("POST", "/v1/chat/completions", body, X_Request_ID="mine")
    assert reply.status == 200
    last, first = await told(house)
    assert last["id"] > first["id"]
    assert (last["model"], last["status"], last["request_id"], last["error"]) == ("a", 200, "mine", None)
    assert (last["input_tokens"], last["output_tokens"]) == (12, 3)
    assert began - 1 < first["time"] <= last["time"] < time.time() + 1
    assert first["waited"] > 0 == last["waited"]
    assert 0 <= last["first_byte"] <= last["duration"]
    assert (first["input_tokens"], first["output_tokens"], first["tokens_per_second"]) == (None, None, None)
    metrics = (await house.ask("GET", "/metrics")).body.decode()
    assert 'llmux_tokens_total{kind="input",model="a"} 12.0' in metrics
    assert 'llmux_tokens_total{kind="output",model="a"} 3.0' in metrics
    assert 'llmux_request_full_duration_seconds_count{model="a",status="200"} 2.0' in metrics


async def test_what_was_refused_or_left_is_told_too(house):
    await house.open(models={"a": {}, "broken": {"wake": "exit 1"}})
    assert (await house.chat("nothing")).status == 404
    assert (await house.chat("broken")).status == 503
    line = await house.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: house.engine.heads)
    line.abort()
    await until(lambda: len(house.switcher.requests.rows(9)) == 3)
    found = await told(house)
    assert [(one["model"], one["status"], one["error"]) for one in found] == [
        ("a", 499, None),
        ("broken", 503, "wake_failed"),
        (None, 404, "model_not_found"),
    ]
    assert found[0]["first_byte"] is None


async def test_which_ones(house):
    await house.open(models={"a": {"aliases": ["alias"]}, "b": {}})
    for model in ("a", "b", "a"):
        await house.chat(model)
    ids = [one["id"] for one in await told(house)]
    assert ids == sorted(ids, reverse=True)
    assert [one["id"] for one in await told(house, "?limit=1")] == ids[:1]
    assert [one["id"] for one in await told(house, f"?before={ids[0]}")] == ids[1:]
    assert [one["id"] for one in await told(house, f"?after={ids[2]}")] == ids[:2]
    assert await told(house, f"?after={ids[0]}") == []
    await house.chat("alias")
    assert [(one["asked"], one["model"]) for one in await told(house, f"?after={ids[0]}")] == [("alias", "a")]
    await house.chat("none")
    assert [(one["asked"], one["model"]) for one in await told(house, f"?after={ids[0] + 1}")] == [(None, None)]
    assert [one["id"] for one in await told(house, "?model=alias&limit=9")][-2:] == [ids[0], ids[2]]
    assert (await house.ask("GET", "/llmux/activity?model=c")).status == 404
    for query in ("limit=x", "before=-1", "limit=", "after=1.5"):
        reply = await house.ask("GET", f"/llmux/activity?{query}")
        assert (reply.status, reply.error["param"]) == (400, query.partition("=")[0])


def add(log, model, status, first_byte, request_id, error=None) -> None:
    log.add(0.0, model, status, 0.0, first_byte, 1.0, request_id, (None, None), error, None, False)


async def test_only_the_last_ones_are_kept(house):
    await house.open()
    log = house.switcher.requests
    for number in range(1500):
        add(log, "a", 200, None, str(number))
    assert len(await told(house, "?limit=5000")) == 1000
    assert (await told(house))[0]["request_id"] == "1499"


async def test_a_flood_of_refusals_does_not_push_out_what_was_served(house):
    await house.open(models={"a": {"max_queued": 0}, "b": {}})
    for _ in range(3):
        assert (await house.chat("b")).status == 200
    line = await house.line()
    for _ in range(300):
        line.send(message("POST", "/v1/x", {"model": "nothing"}))
        assert (await line.reply()).status == 404
    await house.chat("b")
    found = await told(house)
    assert [one["status"] for one in found] == [200, *[404] * 100, 200, 200, 200]
    assert [one["id"] for one in found] == sorted((one["id"] for one in found), reverse=True)
    log = house.switcher.requests
    for number in range(1500):
        add(log, "a", 499, None, str(number))  # left while they waited
        add(log, "a", 502, 1.0, str(number), error="engine_broke_off")
    assert [one["status"] for one in await told(house)].count(200) == 4


async def test_tokens_per_second_of_an_answer_in_one_piece_count_from_its_admission(house):
    await house.open()
    log = house.switcher.requests
    now = log._now()
    log.add(now, "a", 200, 1.0, 4.9, 5.0, "whole", (7, 40), None, None, False)
    log.add(now, "a", 200, 1.0, 3.0, 5.0, "streamed", (7, 40), None, None, True)
    streamed, whole = await told(house)
    assert whole["tokens_per_second"] == pytest.approx(10, rel=0.2)
    assert streamed["tokens_per_second"] == pytest.approx(20, rel=0.2)


@pytest.mark.parametrize("answer", [WHOLE, STREAM])
async def test_what_is_streamed_is_known_by_its_type(house, answer):
    await house.open()
    house.engine.says = answer
    await house.chat("a")
    (one,) = house.switcher.requests._matching(None, None, None)
    assert one.streamed == (answer == STREAM)


async def test_a_browser_is_sent_to_the_page_and_a_program_is_not(house):
    await house.open(api_keys=["k"])
    reply = await house.ask("GET", "/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert (reply.status, reply.headers["location"]) == (302, "llmux/ui")
    assert (await house.ask("GET", "/", Accept="*/*")).status == 401
    assert (await house.ask("GET", "/", Accept="*/*", Authorization="Bearer k")).json()["see"]


async def test_what_models_take_is_in_the_status_where_a_capacity_is_set(house):
    sizes = {"a": {"memory": "18GiB"}, "b": {"memory": "4GiB"}}
    await house.open(models=sizes, capacity="24GiB")
    await house.chat("a")
    memory = (await house.ask("GET", "/llmux/status")).json()["memory"]
    assert memory == {"capacity": 24 << 30, "taken": {"a": 18 << 30}}
