"""Variants and virtual models on the short way: the same as the long way."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from llmux.core.phases import Phase
from llmux.middleware.client_connection import ClientConnection
from llmux.targets.conversation import Conversations
from tests.harness.waiting import PATIENCE
from tests.server.house import HOST, House, message, until

CHAT = "/v1/chat/completions"
MODELS = {
    "a": {
        "variants": {
            "a:low": {"strip": ["reasoning"], "default": {"top_p": 0.9}, "cap": {"max_tokens": 10}},
            "a:same": {},
            "a:思": {"set": {"temperature": 0.2}},
        },
        "upstream_model": "served",
    },
    "b": {"variants": {"b:high": {"set": {"reasoning.effort": "high"}}}},
    "模": {"variants": {"模:low": {"cap": {"max_tokens": 10}}}},
    "asleep": {},
}
VIRTUAL = {
    "warm": {"awake": ["asleep", "b", "a"]},
    "safe": {"first": ["a:low", "b"]},
    "best": {"ladder": ["asleep", "b:high", "a"], "floor": {"poor": "b:high"}},
    "some": {"split": {"a": 1, "b:high": 1, "模": 1}},
    "deep": {"first": ["warm", "a"]},
}
AWAKE = ("a", "b", "模")
BODIES = [
    {"messages": [{"role": "user", "content": "hello"}]},
    {"max_tokens": 99, "reasoning": {"effort": "low"}, "messages": [{"role": "user", "content": "grüß\n" * 30}]},
    {"max_tokens": 5, "top_p": None, "messages": "x" * 70_000},
]
BROKEN = b'{"model":"a:low","max_tokens":"many"}'
KEYS = [
    {"name": "rich", "key": "key-of-rich"},
    {"name": "limited", "key": "key-of-limited", "models": ["a", "warm"], "limits": {"requests": "999/h"}},
    {"name": "poor", "key": "key-of-poor", "role": "poor"},
]


@pytest.fixture
async def house(tmp_path):
    """A house in which the engine has an address for each model, so that several can be awake."""
    async with asyncio.timeout(PATIENCE), contextlib.AsyncExitStack() as stack:
        found = await stack.enter_async_context(House(tmp_path))
        found.models = {}
        for name, settings in MODELS.items():
            server = await asyncio.start_server(found.engine._serve, HOST, 0)
            stack.callback(server.close)
            port = server.sockets[0].getsockname()[1]
            found.models[name] = {"port": port, "shared_address": False, "memory": "1GiB", **settings}
        yield found


@pytest.fixture
def handed(monkeypatch):
    """The requests that the fast path has handed over."""
    found = []
    hand_over = ClientConnection.hand_over

    def noted(client, context, raw):
        found.append(context.asked)
        hand_over(client, context, raw)

    monkeypatch.setattr(ClientConnection, "hand_over", noted)
    return found


def served(house):
    """What is known of the last request; what the choice was; the counts of choices."""
    (row,) = house.switcher.requests.rows(1)
    known = {name: row[name] for name in ("asked", "model", "status", "key")}
    choice = dict(house.switcher.choices[-1]) if house.switcher.choices else {}
    choice.pop("time", None)
    return known, choice


def chosen(house):
    text = house.switcher.metrics.render()[0].decode()
    return sorted(line for line in text.splitlines() if line.startswith("llmux_targets_total"))


async def both_ways(house, body, *, anew=True, **headers):
    """Send it by both ways, and return what became of each. ``anew``: no conversation is known."""
    found = []
    for opened in (True, False):
        house.front.fast_path.open = opened
        if anew:
            house.front._handler.targeting.conversations = Conversations()
        before = len(house.engine.heads)
        reply = await house.raw(message("POST", CHAT, body, X_Request_ID="mine", **headers))
        fields = [(name, "" if name.startswith("x-ratelimit") else value) for name, value in reply.fields]
        bodies = [
            one if len(one) < 999 else hash(one) for one in house.engine.bodies[before:]
        ]  # for pytest's report
        went = list(zip(house.engine.heads[before:], bodies, strict=True))
        found.append((reply.status, sorted(fields), reply.body, went, served(house)))
    house.front.fast_path.open = True
    return found


async def opened(house, fast, handed, **more):
    for name in AWAKE:
        house.up(name)
    await house.open(house.models, virtual=VIRTUAL, capacity="4GiB", **more)
    for name in AWAKE:  # leaves connections to the engine behind
        await house.ask("POST", CHAT, {"model": name}, Authorization="Bearer key-of-rich")
    for noted in (fast, handed):
        noted.clear()


@pytest.mark.parametrize("name", [name for model in MODELS.values() for name in model.get("variants", {})])
async def test_a_variant(house, fast, handed, name):
    await opened(house, fast, handed)
    for body in BODIES:
        short, long = await both_ways(house, {"model": name, **body})
        assert short == long
        assert short[0] == 200
    assert fast == [True] * 3
    assert not handed
    assert len(set(chosen(house))) == 1
    assert chosen(house)[0].endswith(" 6.0")


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize("key", ["rich", "poor"])
async def test_a_virtual_model(house, fast, handed, name, key):
    await opened(house, fast, handed, api_keys=KEYS, roles={"poor": {}})
    for number, body in enumerate([*BODIES, BODIES[0]]):
        headers = {"X_LLMux_Conversation": f"talk-{number}"} if number % 2 else {}
        short, long = await both_ways(
            house, {"model": name, **body}, Authorization=f"Bearer key-of-{key}", **headers
        )
        assert short == long
        assert short[0] == 200
    assert fast == [True] * 4
    assert not handed


async def test_conversations_are_kept_on_both_ways(house, fast, handed):
    await opened(house, fast, handed)
    for number in range(12):
        short, long = await both_ways(house, {"model": "some"}, anew=False, X_LLMux_Conversation=f"talk-{number}")
        assert short[-1][1]["target"] == long[-1][1]["target"]
        assert long[-1][1]["reason"] == "conversation"
    assert not handed


async def test_keys_may_use_what_their_models_stand_for(house, fast, handed):
    await opened(house, fast, handed, api_keys=KEYS, roles={"poor": {}})
    for name, status in (("a:low", 200), ("warm", 200), ("b:high", 403), ("safe", 403)):
        short, long = await both_ways(house, {"model": name}, Authorization="Bearer key-of-limited")
        assert short == long
        assert short[0] == status
    assert fast == [True, True, False, False]
    assert not handed
    assert house.front.gate._balances["limited"].running == 0


async def test_what_the_rules_cannot_work_on_is_refused_alike(house, fast, handed):
    await opened(house, fast, handed)
    short, long = await both_ways(house, BROKEN)
    assert short == long
    assert (short[0], json.loads(short[2])["error"]["param"]) == (400, "max_tokens")
    assert len(house.engine.bodies) == len(AWAKE)
    short, long = await both_ways(house, {"model": "warm"}, X_LLMux_Conversation="x" * 300)
    assert short == long
    assert short[0] == 400
    assert handed == ["a:low", "warm"]
    assert not house.switcher.inside.tickets
    assert not house.front._handler.budget.held


async def test_one_whose_target_is_asleep_wakes_it_and_is_chosen_once(house, fast, handed):
    await opened(house, fast, handed)
    await house.ask("POST", CHAT, {"model": "b"})
    await house.ask("POST", "/llmux/models/a/sleep", {})
    await until(lambda: house.switcher.core.state.models["a"].phase is Phase.ASLEEP)
    reply = await house.ask("POST", CHAT, {"model": "safe", "max_tokens": 20})
    assert (reply.status, reply.headers["x-llmux-variant"]) == (200, "a:low")
    assert handed == ["safe"]
    assert json.loads(house.engine.bodies[-1]) == {"top_p": 0.9, "model": "served", "max_tokens": 10}
    assert [choice["asked"] for choice in house.switcher.choices] == ["safe"]
    assert len([field for field in reply.fields if field[0] == "x-llmux-served-by"]) == 1


async def test_where_the_engine_breaks_off_the_next_target_serves(house, fast, handed, monkeypatch):
    await opened(house, fast, handed)
    await house.ask("POST", CHAT, {"model": "b"})
    asked = []
    one = house.engine._one

    async def breaking(reader, writer):
        if not asked:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            raise ConnectionResetError
        await one(reader, writer)

    monkeypatch.setattr(house.engine, "_one", breaking)
    for task in list(house.engine._tasks):
        task.cancel()
    await until(lambda: not house.engine._tasks)
    reply = await house.ask("POST", CHAT, {"model": "safe"})
    assert (reply.status, reply.headers["x-llmux-served-by"]) == (200, "b")
    assert "x-llmux-variant" not in reply.headers
    assert json.loads(house.engine.bodies[-1]) == {"model": "b"}
    assert handed == ["safe"]
    assert len(house.switcher.choices) == 1
    assert not house.switcher.inside.tickets


@pytest.mark.parametrize("left", [{}, {"safe": {"first": ["b"]}}])
async def test_one_that_is_under_way_when_its_name_gets_another_meaning(house, fast, handed, left):
    await opened(house, fast, handed)
    line = await house.begin("POST", "/v1/hold", {"model": "safe"})
    await until(lambda: house.in_flight("a"))
    config = house.config(house.models, virtual=left, capacity="4GiB")
    house.switcher.replace(config)
    house.front.configure(config)
    house.engine.go.set()
    for task in list(house.engine._tasks):
        task.cancel()
    reply = await line.reply()
    assert reply.status in {200, 404, 502}
    if reply.status == 200:
        assert reply.headers["x-llmux-served-by"] == "b"
        assert json.loads(house.engine.bodies[-1]) == {"model": "b"}
    assert handed == ["safe"]
    assert not house.switcher.inside.tickets
    assert not house.in_flight("a")


async def test_exact_usage_keeps_what_decides_about_streams_on_the_long_way(house, fast):
    variants = {"a:stream": {"set": {"stream": True}}, "a:cool": {"set": {"temperature": 0}}}
    house.up("a")
    more = {"usage": "exact", "ledger": "ledger.db", "virtual": {"any": {"first": ["a:stream"]}}}
    await house.open({"a": {"variants": variants}}, **more)
    for name in ("a:stream", "a:cool", "any"):
        assert (await house.chat(name)).status == 200
    assert fast.count(True) == 1
    assert [json.loads(body).get("stream_options") for body in house.engine.bodies] == [
        {"include_usage": True}, None, {"include_usage": True},
    ]  # fmt: skip
