"""Keys of the class ride_along: their requests never cause a switch."""

import asyncio
from datetime import datetime

import pytest

from llmux.core.phases import Phase
from llmux.errors import ConfigError
from llmux.middleware.fast_path import MOST
from llmux.observability.record import read_record
from tests.cli.invoking import said
from tests.server.house import until

CHAT = "/v1/chat/completions"
KEYS = [
    {"name": "alice", "key": "key-of-alice"},
    {"name": "nightly", "key": "key-of-nightly", "class": "ride_along"},
]


async def begin(house, model, key, padding=0, path=CHAT):
    body = {"model": model, "padding": "x" * padding}
    return await house.begin("POST", path, body, Authorization=f"Bearer key-of-{key}")


async def send(house, model, key, padding=0):
    return await (await begin(house, model, key, padding)).reply()


def riding(house):
    return dict(house.switcher.riders.waiting())


def switches(house):
    return house.switcher.core.state.models["a"].phase


@pytest.mark.parametrize("padding", [0, MOST])
async def test_it_is_served_when_its_model_is_awake_anyway(house, padding):
    await house.open(api_keys=KEYS)
    line = await begin(house, "a", "nightly", padding)
    await until(lambda: riding(house) == {"a": 1})
    await asyncio.sleep(0.5)
    assert house.switcher.core.state.models["a"].phase is Phase.ASLEEP
    assert not house.engine.heads
    assert (await send(house, "b", "alice")).status == 200  # it does not stay in the way
    assert (await send(house, "a", "alice")).status == 200
    reply = await line.reply()
    assert reply.status == 200
    assert float(reply.headers["x-llmux-queue-seconds"]) >= 0.5
    assert riding(house) == {}
    assert (await send(house, "a", "nightly", padding)).status == 200  # at once
    ended = house.switcher.requests.rows(9)
    assert max(one["waited"] for one in ended if one["key"] == "nightly") >= 0.5


async def test_through_a_gateway_it_rides_too(house):
    await house.open(api_keys=[*KEYS, {"name": "gateway", "key": "key-of-gateway", "gateway": True}])
    gateway = {"Authorization": "Bearer key-of-gateway"}
    line = await house.begin("POST", CHAT, {"model": "a"}, X_LLMux_Key="nightly", **gateway)
    await until(lambda: riding(house) == {"a": 1} or house.engine.heads)
    assert not house.engine.heads
    assert (await house.ask("POST", CHAT, {"model": "a"}, X_LLMux_Key="alice", **gateway)).status == 200
    assert (await line.reply()).status == 200


async def test_it_does_not_bring_a_model_back_that_leaves(house):
    await house.open(models={"a": {"max_in_flight": 1}, "b": {}}, api_keys=KEYS, policy={"use": "fifo"})
    held = await begin(house, "a", "alice", path="/v1/hold")
    await until(lambda: house.in_flight("a"))
    line = await begin(house, "a", "nightly")  # it is awake, but has no room
    await until(lambda: riding(house) == {"a": 1})
    other = await begin(house, "b", "alice")
    await until(lambda: house.switcher.core.state.models["a"].phase is Phase.DRAINING)
    house.engine.go.set()
    assert (await held.reply()).status == (await other.reply()).status == 200
    await asyncio.sleep(0.5)
    assert riding(house) == {"a": 1}
    assert house.switcher.core.state.models["b"].phase is Phase.AWAKE
    assert (await send(house, "a", "alice")).status == 200
    assert (await line.reply()).status == 200


async def test_in_its_window_it_may_cause_a_switch(house):
    await house.open(api_keys=KEYS, policy={"ride_along": {"window": "22:00-06:00"}})
    clock = [datetime(2026, 11, 29, 21, 59)]  # noqa: DTZ001 - the time of day here
    house.switcher.riders._clock = lambda: clock[0]
    line = await begin(house, "a", "nightly")
    await until(lambda: riding(house) == {"a": 1})
    clock[0] = datetime(2026, 11, 29, 22, 0)  # noqa: DTZ001
    assert (await line.reply()).status == 200
    clock[0] = datetime(2026, 11, 30, 6, 0)  # noqa: DTZ001
    line = await begin(house, "b", "nightly")
    await until(lambda: riding(house) == {"b": 1})
    clock[0] = datetime(2026, 11, 30, 5, 59)  # noqa: DTZ001
    assert (await line.reply()).status == 200


async def test_it_waits_no_longer_than_it_may(house):
    await house.open(api_keys=KEYS, policy={"ride_along": {"max_wait": "300ms"}})
    reply = await send(house, "a", "nightly")
    assert reply.status == 200
    assert float(reply.headers["x-llmux-queue-seconds"]) >= 0.3


async def test_a_client_that_leaves_rides_no_more(house):
    await house.open(api_keys=KEYS)
    line = await begin(house, "a", "nightly")
    await until(lambda: riding(house) == {"a": 1})
    line.abort()
    await until(lambda: riding(house) == {})


async def test_no_more_ride_than_may_wait(house):
    await house.open(models={"a": {"max_queued": 2}}, api_keys=KEYS)
    lines = [await begin(house, "a", "nightly") for _ in range(2)]
    await until(lambda: riding(house) == {"a": 2})
    refused = await send(house, "a", "nightly")
    assert (refused.status, refused.error["code"]) == (429, "queue_full")
    for line in lines:
        line.abort()


async def test_a_stop_ends_their_wait(house):
    await house.open(api_keys=KEYS)
    line = await begin(house, "a", "nightly")
    await until(lambda: riding(house) == {"a": 1})
    closing = asyncio.create_task(house.close())
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (503, "stopping")
    await closing


async def test_it_is_told(house):
    await house.open(api_keys=KEYS, policy={"ride_along": {"window": "1:00-2:00", "max_wait": "1h"}})
    house.switcher.riders._clock = lambda: datetime(2026, 11, 29, 12)  # noqa: DTZ001
    line = await begin(house, "a", "nightly")
    await until(lambda: riding(house) == {"a": 1})
    status = await house.ask("GET", "/llmux/status", Authorization="Bearer key-of-alice")
    assert status.json()["models"]["a"]["riding"] == 1
    text = await said(house, "explain", LLMUX_API_KEY="key-of-alice")
    assert "1 ride along for a: they cause no switch" in text
    assert "from 01:00 to 02:00" in text
    line.abort()


@pytest.mark.parametrize(
    ("window", "said"),
    [("22-6", "is not a window"), ("24:00-06:00", "is not a window"), (1320, "is not a window")],
)
async def test_what_is_no_window(house, window, said):
    with pytest.raises(ConfigError, match=said):
        house.config(policy={"ride_along": {"window": window}})


async def test_the_record_has_it_from_when_it_enters(house):
    await house.open(api_keys=KEYS, record="record.jsonl")
    gone = await begin(house, "b", "nightly")
    await until(lambda: riding(house) == {"b": 1})
    line = await begin(house, "a", "nightly")
    await until(lambda: riding(house) == {"a": 1, "b": 1})
    gone.abort()
    await until(lambda: riding(house) == {"a": 1})
    await asyncio.sleep(0.3)
    assert (await send(house, "a", "alice")).status == (await line.reply()).status == 200
    await house.close()
    (run,) = read_record(house.folder / "record.jsonl")
    first, second = sorted(run.requests, key=lambda one: one["arrival_s"])
    assert [one["model"] for one in (first, second)] == ["a", "a"]
    assert first["wait_s"] > second["wait_s"] == 0.0  # that of alice caused the switch, the other came after it
    assert first["order"][0] < second["order"][0]


async def test_an_operator_may_cancel_it(house):
    await house.open(api_keys=KEYS)
    line = await house.begin(
        "POST", CHAT, {"model": "a"}, Authorization="Bearer key-of-nightly", **{"X-Request-ID": "mine"}
    )
    await until(lambda: riding(house) == {"a": 1})
    assert house.switcher.cancel("mine") == ("a",)
    reply = await line.reply()
    assert reply.error["code"] == "cancelled"
    assert riding(house) == {}


async def test_a_model_that_is_removed_ends_its_ride(house):
    switcher = await house.open(api_keys=KEYS)
    line = await begin(house, "a", "nightly")
    await until(lambda: riding(house) == {"a": 1})
    switcher.replace(house.config(models={"b": {}}, api_keys=KEYS))
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
