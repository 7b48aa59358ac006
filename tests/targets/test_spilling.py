"""Requests that go to a remote because they would wait too long, and requests that `routes` lead elsewhere."""

from __future__ import annotations

import asyncio
import json

import pytest

from llmux.middleware.classes import Classes, RequestClass
from tests.server.house import held, until
from tests.targets.remote_host import CHAT, RemoteHost, answer, error, hang

OPEN = {"remotes_for_all": True}
SLOW = {"wake": f"{held('a')}; touch $LLMUX_MODEL.up"}
PRICES = {"models": {"r/m": {"input": 1, "output": 2}}}


@pytest.fixture
async def host():
    async with RemoteHost() as host:
        yield host


async def opened(house, host, spill, *, cost=60, **more):
    """Open a house whose model ``a`` takes until its release to wake, and is expected to take ``cost`` seconds."""
    model = {**SLOW, "cost": {"wake": cost}, "spill": {"to": "r/m", **spill}}
    await house.open({"a": model, "b": {}}, remotes={"r": host.settings()}, **(OPEN | more))


async def asked(house, model="a", **more):
    reply = await house.ask("POST", "/v1/chat/completions", {"model": model, **more})
    return reply, reply.headers.get("x-llmux-served-by")


def queued(house, model="a"):
    return len(house.switcher.core.state.models[model].queue)


def reasons(house):
    return [(choice["asked"], choice["target"], choice["reason"]) for choice in house.switcher.choices]


async def test_a_request_that_would_wait_too_long_goes_at_once_and_wakes_nothing(house, host):
    await opened(house, host, {"over": "20s"})
    reply, by = await asked(house)
    assert (reply.status, by, reply.json()) == (200, "r/m", CHAT)
    assert host.asked[0].json() == {"model": "theirs/m"}
    assert not house.log.named("switch_started")
    assert reasons(house) == [("a", "r/m", "spill")]
    [choice] = (await house.ask("GET", "/llmux/decisions")).json()["targets"]
    assert choice["way"] == ["a", "r/m"]
    text = (await house.ask("GET", "/metrics")).body.decode()
    assert 'llmux_targets_total{model="a",reason="spill",target="r/m"} 1.0' in text
    assert float(reply.headers["x-llmux-queue-seconds"]) == 0.0


async def test_one_that_will_not_wait_for_long_stays(house, host):
    await opened(house, host, {"over": "20s"}, cost=5)
    asking = asyncio.create_task(asked(house))
    await until(lambda: queued(house))
    house.release("a")
    reply, by = await asking
    assert (reply.status, by, reply.body) == (200, None, b"ok")
    assert not host.asked


async def test_one_that_has_waited_too_long_leaves_the_queue_in_one_step(house, host):
    await opened(house, host, {"over": "1s"}, cost=0.5)
    reply, by = await asked(house)
    assert (reply.status, by) == (200, "r/m")
    assert queued(house) == 0
    assert not house.switcher.inside.tickets
    assert float(reply.headers["x-llmux-queue-seconds"]) > 0.2
    house.release("a")
    await until(lambda: house.switcher.is_awake("a"))
    assert house.in_flight("a") == 0
    assert not house.engine.bodies
    assert len(host.asked) == 1


async def test_of_many_some_spill_and_each_is_served_once(house, host):
    await opened(house, host, {"over": "400ms"}, cost=0.2)
    numbers = range(40)

    async def one(number):
        await asyncio.sleep(number * 0.02)
        return await asked(house, user=str(number))

    asking = [asyncio.create_task(one(number)) for number in numbers]
    await until(lambda: len(host.asked) >= 5)
    house.release("a")
    replies = await asyncio.gather(*asking)
    assert {reply.status for reply, _ in replies} == {200}
    here = [json.loads(body)["user"] for body in house.engine.bodies]
    there = [request.json()["user"] for request in host.asked]
    assert sorted([*here, *there], key=int) == [str(number) for number in numbers]
    assert here
    assert {str(number) for number, (_, by) in zip(numbers, replies, strict=True) if by == "r/m"} == set(there)
    assert queued(house) == house.in_flight("a") == 0


async def test_a_rejected_request_goes_too(house, host):
    await opened(house, host, {"over": "20s"}, cost=1)
    await house.ask("POST", "/llmux/models/b/wake")
    await house.ask("POST", "/llmux/models/b/pin")
    reply, by = await asked(house)
    assert (reply.status, by) == (200, "r/m")


async def test_a_wake_that_fails_while_it_waits_sends_it_away(house, host):
    model = {"wake": "false", "spill": {"to": "r/m", "over": "20s"}}
    await house.open({"a": model}, remotes={"r": host.settings()}, **OPEN)
    reply, by = await asked(house)
    assert (reply.status, by) == (200, "r/m")
    assert not house.switcher.inside.tickets


@pytest.mark.parametrize("says", [error("500 Oops"), error("429 No", Retry_After="9"), None])
async def test_when_the_remote_fails_it_waits_here_after_all(house, host, says):
    if says is not None:
        host.says = [says]
    await opened(house, host, {"over": "20s"}, remotes_for_all=True)
    if says is None:
        house.switcher.remotes._remotes["r"].endpoint.max_in_flight = 0
    asking = asyncio.create_task(asked(house))
    await until(lambda: queued(house))
    house.release("a")
    reply, by = await asking
    assert (reply.status, by, reply.body) == (200, None, b"ok")
    assert len(host.asked) == (0 if says is None else 1)
    assert json.loads(house.engine.bodies[-1]) == {"model": "a"}


async def test_what_the_remote_says_of_the_request_is_final(house, host):
    host.says = [error("400 Bad", "their words")]
    await opened(house, host, {"over": "20s"})
    reply, by = await asked(house)
    assert (reply.status, by, reply.error["message"]) == (400, "r/m", "their words")


async def test_without_leave_it_waits(house, host):
    await opened(house, host, {"over": "20s"}, remotes_for_all=False)
    asking = asyncio.create_task(asked(house))
    await until(lambda: queued(house))
    house.release("a")
    assert (await asking)[1] is None
    assert not host.connections


@pytest.mark.parametrize(
    ("below", "more", "goes"),
    [
        (0.02, {"max_tokens": 100}, True),
        (0.0001, {"max_tokens": 100}, False),
        (0.02, {}, True),
        (0.01, {}, False),  # without a limit it counts as 8,192 tokens
        (0.02, {"n": 2}, False),
    ],
)
async def test_only_what_is_not_too_dear_goes(house, host, below, more, goes):
    await opened(house, host, {"over": "20s", "below": below}, prices=PRICES)
    asking = asyncio.create_task(asked(house, **more))
    if not goes:
        await until(lambda: queued(house))
        house.release("a")
    assert (await asking)[1] == ("r/m" if goes else None)


@pytest.mark.parametrize(("tokens", "goes"), [(100, True), (500, False)])
async def test_a_remote_without_a_price_counts_as_dear(house, host, tokens, goes):
    await opened(house, host, {"over": "20s", "below": 0.02})
    asking = asyncio.create_task(asked(house, max_tokens=tokens))
    if not goes:
        await until(lambda: queued(house))
        house.release("a")
    assert (await asking)[1] == ("r/m" if goes else None)


async def test_a_client_that_leaves_or_is_cancelled_at_the_remote(house, host):
    host.says = [hang]
    await opened(house, host, {"over": "20s"})
    line = await house.begin("POST", "/v1/chat/completions", {"model": "a"}, X_Request_ID="one")
    await until(lambda: host.asked)
    await house.ask("POST", "/llmux/requests/one/cancel")
    assert (await line.reply()).status == 410
    line = await house.begin("POST", "/v1/chat/completions", {"model": "a"})
    await until(lambda: len(host.asked) == 2)
    line.abort()
    await until(lambda: not house.switcher.elsewhere)
    assert queued(house) == 0


async def test_the_record_tells_of_those_that_left_the_queue(house, host):
    await opened(house, host, {"over": "1s"}, cost=0.5, record="record.jsonl")
    await asked(house)
    await house.close()
    lines = [json.loads(line) for line in (house.folder / "record.jsonl").read_text().splitlines()]
    [there] = [line for line in lines if line["type"] == "remote"]
    assert (there["asked"], there["target"], there["outcome"], there["status"]) == ("a", "r/m", "answered", 200)
    assert 0 <= there["first_byte_s"] <= there["service_s"]
    assert there["prompt_bytes"] == len(b'{"model": "a"}')
    [line] = [line for line in lines if line["type"] == "request"]
    assert (line["model"], line["outcome"], line["service_s"]) == ("a", "spilled", None)
    assert line["wait_s"] > 0.2


# ---- routes


async def test_a_rule_leads_a_name_elsewhere(house, host):
    routes = [
        {"when": {"model": "gpt-4*", "tools": True}, "to": "r/m"},
        {"when": {"model": "gpt-4*"}, "to": "b"},
        {"when": {"tokens_over": 1000}, "to": "r/m"},
    ]
    await house.open("a b", remotes={"r": host.settings()}, routes=routes, **OPEN)
    reply, by = await asked(house, "gpt-4o")
    assert (reply.status, by) == (200, "b")
    assert json.loads(house.engine.bodies[-1])["model"] == "b"
    assert (await asked(house, "gpt-4o", tools=[{}]))[1] == "r/m"
    assert (await asked(house, "b", user="word " * 800))[1] == "r/m"
    reply, by = await asked(house, "b")
    assert (reply.status, by) == (200, None)
    assert reasons(house) == [("gpt-4o", "b", "route"), ("gpt-4o", "r/m", "route"), ("b", "r/m", "route")]
    assert house.switcher.choices[0]["way"] == ["gpt-4o", "b"]
    assert (await asked(house, "gpt-5"))[0].status == 404
    text = (await house.ask("GET", "/metrics")).body.decode()
    assert 'llmux_targets_total{model="r/m",reason="route",target="r/m"} 1.0' in text
    assert "gpt-4o" not in text


async def test_a_rule_refuses_or_keeps_within_regions(house, host):
    keys = [{"name": name, "key": f"k-{name}", "remote": True} for name in ("eu-team", "boss", "intern")]
    routes = [
        {"when": {"key": "boss"}},
        {"when": {"key": "eu-team"}, "regions": ["eu"], "to": None},
        {"when": {"model": "r/*"}, "to": None},
    ]
    remotes = {"r": host.settings(region="us"), "e": host.settings(region="eu")}
    virtual = {"v": {"first": ["r/m", "e/m"]}}
    await house.open("a", remotes=remotes, virtual=virtual, routes=routes, api_keys=keys)

    async def found(key, model):
        reply = await house.ask("POST", "/v1/x", {"model": model}, Authorization=f"Bearer k-{key}")
        return reply.status, reply.headers["x-llmux-served-by"] if reply.status == 200 else reply.error["code"]

    assert await found("boss", "r/m") == (200, "r/m")
    assert await found("eu-team", "r/m") == (403, "region_not_allowed")
    assert await found("eu-team", "e/m") == (200, "e/m")
    assert await found("eu-team", "v") == (200, "e/m")
    assert await found("intern", "v") == (200, "r/m")
    assert await found("intern", "r/m") == (403, "route_refused")
    reply = await house.ask("POST", "/v1/x", {"model": "a"}, Authorization="Bearer k-eu-team")
    assert (reply.status, reply.body) == (200, b"ok")


async def test_a_rule_for_a_name_that_a_key_may_use(house, host):
    keys = [{"name": "n", "key": "k-n", "models": ["b", "r/m"], "remote": True}]
    routes = [{"when": {"model": "gpt-*"}, "to": "b"}, {"when": {"model": "b", "tools": True}, "to": "a"}]
    await house.open("a b", remotes={"r": host.settings()}, routes=routes, api_keys=keys)

    async def status(model, **more):
        body = {"model": model, **more}
        return (await house.ask("POST", "/v1/x", body, Authorization="Bearer k-n")).status

    assert [await status(name) for name in ("gpt-5", "b", "a", "r/m")] == [200, 200, 403, 200]
    assert await status("b", tools=[{}]) == 200


async def test_what_no_rule_concerns_takes_the_fast_path(house, host):
    routes = [{"when": {"model": "b*"}, "to": "a"}]
    classes = Classes(house.config("a b", remotes={"r": host.settings()}, routes=routes, **OPEN))
    assert [classes.of(None, name) for name in "ab"] == [RequestClass.PLAIN, RequestClass.MANAGED]


async def test_a_reload_takes_over_and_those_that_wait_still_spill(house, host):
    await opened(house, host, {"over": "1s"}, cost=0.5)
    asking = asyncio.create_task(asked(house))
    await until(lambda: queued(house))
    model = {**SLOW, "cost": {"wake": 0.5}, "spill": {"to": "r/m", "over": "1s"}}
    config = house.config({"a": model, "b": {}}, remotes={"r": host.settings(max_in_flight=5)}, **OPEN)
    house.front.configure(config)
    house.switcher.replace(config)
    reply, by = await asking
    assert (reply.status, by) == (200, "r/m")
    host.says = [answer({"changed": True})]
    assert (await asked(house, "r/m"))[0].json() == {"changed": True}


async def test_what_cannot_be_answered_in_time_goes_too(house, host):
    model = {**SLOW, "cost": {"wake": 60}, "deadline": "10s", "spill": {"to": "r/m", "over": "1h"}}
    await house.open({"a": model}, remotes={"r": host.settings()}, **OPEN)
    reply, by = await asked(house)
    assert (reply.status, by) == (200, "r/m")
    assert not house.log.named("switch_started")


async def test_it_goes_to_the_next_remote_when_the_first_fails(house, host):
    async with RemoteHost(error("500 Oops")) as first:
        remotes = {"r": first.settings(), "s": host.settings()}
        virtual = {"far": {"first": ["r/m", "s/m"]}}
        model = {**SLOW, "cost": {"wake": 60}, "spill": {"to": "far", "over": "20s"}}
        await house.open({"a": model}, remotes=remotes, virtual=virtual, **OPEN)
        reply, by = await asked(house)
        assert (reply.status, by) == (200, "s/m")
        assert house.switcher.choices[0]["way"] == ["a", "far", "r/m"]


async def test_a_key_that_rides_along_waits(house, host):
    keys = [{"name": "n", "key": "k", "remote": True, "class": "ride_along"}]
    model = {**SLOW, "cost": {"wake": 60}, "spill": {"to": "r/m", "over": "1s"}}
    await house.open({"a": model}, remotes={"r": host.settings()}, api_keys=keys)
    line = await house.begin("POST", "/v1/x", {"model": "a"}, Authorization="Bearer k")
    await until(lambda: house.switcher.inside.tickets)
    await asyncio.sleep(1.5)  # longer than `over`
    assert not host.asked
    line.abort()


async def test_a_variant_and_a_virtual_model_of_it_spill_too(house, host):
    variants = {"a:hot": {"set": {"temperature": 2.0}}}
    model = {**SLOW, "cost": {"wake": 60}, "variants": variants, "spill": {"to": "r/m", "over": "20s"}}
    virtual = {"v": {"first": ["a:hot"]}}
    await house.open({"a": model}, remotes={"r": host.settings()}, virtual=virtual, **OPEN)
    for name in ("a:hot", "v"):
        reply, by = await asked(house, name)
        assert (reply.status, by) == (200, "r/m")
        assert host.asked[-1].json() == {"model": "theirs/m", "temperature": 2.0}


async def test_no_more_leave_the_queue_than_the_remote_takes(house, host):
    async def slow(host, writer):
        await host.go.wait()
        writer.write(answer())
        await writer.drain()

    host.says = [slow]
    model = {**SLOW, "cost": {"wake": 0.5}, "spill": {"to": "r/m", "over": "1s"}}
    await house.open({"a": model}, remotes={"r": host.settings(max_in_flight=2)}, **OPEN)
    asking = [asyncio.create_task(asked(house, user=str(number))) for number in range(8)]
    await until(lambda: queued(house) == 8)  # none has gone as it came
    await until(lambda: len(host.asked) == 2)
    await asyncio.sleep(0.6)  # two more looks
    waiting = [request.id for request in house.switcher.core.state.models["a"].queue.values()]
    assert len(waiting) == 6
    assert max(waiting) <= 8  # none has come back, to the end of the queue
    assert not house.log.named("remote_failed")
    house.release("a")
    host.go.set()
    replies = await asyncio.gather(*asking)
    assert [by for _, by in replies].count("r/m") == len(host.asked)
    assert len(house.engine.bodies) + len(host.asked) == 8
