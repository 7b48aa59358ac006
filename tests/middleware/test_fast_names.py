"""Variants and virtual models on the short way: the same as the long way."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from llmux.accounts.gate import Gate
from llmux.core.phases import Phase
from llmux.middleware import engine_path
from llmux.middleware.client_connection import ClientConnection
from llmux.middleware.targeting import Targeting
from llmux.targets.conversation import Conversations
from llmux.upstream import ConnectionPool, EngineConnection, EngineRefusedError
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
    {"name": "held", "key": "key-of-held", "models": ["a"]},
]
USAGE = b'{"usage":{"prompt_tokens":12,"completion_tokens":3}}'


@pytest.fixture
async def house(tmp_path, monkeypatch):
    """A house in which the engine has an address for each model, so that several can be awake."""
    monkeypatch.setattr("llmux.extract.body._WORK", PATIENCE)  # what is interrupted takes long, and is handed over
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


async def test_a_key_without_limits_is_not_counted(house, fast, handed):
    await opened(house, fast, handed, api_keys=KEYS, roles={"poor": {}})
    house.engine.says = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(USAGE), USAGE)
    for name in ("a", "a:low"):
        short, long = await both_ways(house, {"model": name}, Authorization="Bearer key-of-held")
        assert short == long
        assert not house.front.gate._models  # nothing is learned for estimates
    assert fast == [True] * 2


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


async def test_how_one_target_failed_does_not_concern_the_next(house, fast, handed, monkeypatch):
    """The first one has taken the request when it goes; the next one's engine has to be looked for."""
    await opened(house, fast, handed)
    line = await house.begin("POST", "/v1/hold", {"model": "safe"})
    await until(lambda: house.in_flight("a"))
    lost, refused = house.models["a"]["port"], [house.models["b"]["port"]]  # for good, and once
    connect = ConnectionPool.connect

    async def connecting(pool, address):
        if address.port in [lost, *refused]:
            refused[:] = [port for port in refused if port != address.port]
            raise EngineRefusedError("nobody there")
        return await connect(pool, address)

    monkeypatch.setattr(ConnectionPool, "connect", connecting)
    house.switcher.on_sleep(house.switcher.open_activity("b"))
    await lose(house)
    reply = await line.reply()
    assert (reply.status, reply.headers["x-llmux-served-by"]) == (200, "b")
    assert handed == ["safe"]
    await until(lambda: nothing_is_kept(house))


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


FORMER = {"aliases": ["name"], "variants": {"name:v": {"cap": {"max_tokens": 10}}}}
REMOTE = {"url": "http://127.0.0.1:{port}", "models": {"q": "theirs"}}
LATER = [
    ({}, {"virtual": {"NAME": {"first": ["b"]}}}, (200, "b", "b")),
    ({"b": {"aliases": ["NAME"]}}, {}, (200, "NAME", None)),
    ({"b": {"variants": {"NAME": {"set": {"n": 2}}}}}, {}, (200, "b", "b")),
    (
        {},
        {"virtual": {"NAME": {"first": ["far/q"]}}, "remotes": {"far": REMOTE}, "remotes_for_all": True},
        (200, "theirs", "far/q"),
    ),
    ({}, {"routes": [{"when": {"model": "NAME"}, "to": "b"}]}, (200, "b", "b")),
    ({"a": {"aliases": ["NAME"]}}, {"passive": ["/v1/hold"]}, (200, "served", None)),
    ({}, {}, (404, None, None)),
]


async def under_way(house, name, *, pooled=True):
    """Begin a request on the fast path, of which its engine has all."""
    for model in ("a", "b"):
        house.up(model)
    house.models = {model: house.models[model] | {"variants": {}} for model in ("a", "b")}
    models = house.models | {"a": house.models["a"] | FORMER}
    await house.open(models, capacity="4GiB", shutdown_grace=0)
    assert (await house.chat("a")).status == 200
    if not pooled:
        house.switcher.on_sleep(house.switcher.open_activity("a"))
    line = await house.begin("POST", "/v1/hold", {"model": name})
    await until(lambda: house.in_flight("a") and len(house.engine.bodies) == 2)
    return line


def reload(house, name, models, more):
    """Apply a configuration in which the name stands for something else."""
    text = json.dumps([models, more]).replace("NAME", name).replace("{port}", str(house.engine.port))
    models, more = json.loads(text)
    models = {model: settings | models.get(model, {}) for model, settings in house.models.items()}
    config = house.config(models, capacity="4GiB", **more)
    house.switcher.replace(config)
    house.front.configure(config)


async def lose(house):
    """Have the engine close its connections; from now on it answers."""
    house.engine.go.set()
    for task in list(house.engine._tasks):
        task.cancel()
    await until(lambda: not house.engine._tasks or house.engine.open)


def nothing_is_kept(house):
    handler = house.front._handler
    running = [] if handler.gate is None else [one.running for one in handler.gate._balances.values()]
    models = house.switcher.core.state.models
    left = [house.switcher.inside.tickets, handler.budget.held, sum(running), len(house.switcher.elsewhere)]
    return not any(left) and not any(model.in_flight or model.queue for model in models.values())


@pytest.mark.parametrize("name", ["name", "name:v"])
@pytest.mark.parametrize(("models", "more", "served"), LATER)
async def test_a_name_that_a_reload_has_changed_is_served_as_what_it_is_now(
    house, fast, handed, name, models, more, served
):
    line = await under_way(house, name)
    reload(house, name, models, more)
    await lose(house)
    reply = await line.reply()
    status, sent, by = served
    assert fast[-1]
    assert handed == [name]
    assert (reply.status, reply.headers.get("x-llmux-served-by")) == (status, by)
    assert "x-llmux-variant" not in reply.headers or models.get("b", {}).get("variants")
    if sent is not None:
        assert json.loads(house.engine.bodies[-1])["model"] == sent.replace("NAME", name)
    await until(lambda: nothing_is_kept(house))


@pytest.mark.parametrize("name", ["name", "name:v"])
@pytest.mark.parametrize(("models", "more"), [later[:2] for later in LATER])
async def test_what_an_engine_may_have_read_is_not_sent_again_after_a_reload(
    house, handed, monkeypatch, name, models, more
):
    line = await under_way(house, name, pooled=False)
    suspected = []
    monkeypatch.setattr(house.switcher, "suspect", lambda model, **_more: suspected.append(model))
    reload(house, name, models, more)
    await lose(house)
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (502, "engine_lost")
    assert suspected == ["a"]
    assert handed == [name]
    assert len(house.engine.bodies) == 2
    await until(lambda: nothing_is_kept(house))


MISTAKES = [
    (Targeting, "at_once", 200),
    (Gate, "enter", 200),
    ("switcher", "enter", 200),
    (engine_path, "with_model", 200),
    (engine_path, "engine_address", 200),
    (engine_path, "Exchange", 200),
    (engine_path, "extra_fields", 200),
    (engine_path, "EngineRequest", 200),
    (ConnectionPool, "take", 500),
    (EngineConnection, "begin", 500),
]


PASSED_BY = {("a", "at_once"), ("warm", "with_model")}


@pytest.mark.parametrize(
    ("name", "owner", "what", "status"),
    [(name, *one) for one in MISTAKES for name in ("a:low", "warm", "a") if (name, one[1]) not in PASSED_BY],
)
async def test_a_mistake_of_llmux_leaves_no_request_without_an_answer(
    house, handed, monkeypatch, name, owner, what, status
):
    await opened(house, [], handed, api_keys=KEYS, roles={"poor": {}})
    owner = getattr(house, owner) if isinstance(owner, str) else owner
    mistakes = [LookupError("odd")]
    done = getattr(owner, what)

    def once(*given, **more):
        if mistakes:
            raise mistakes.pop()
        return done(*given, **more)

    monkeypatch.setattr(owner, what, once)
    line = await house.line()
    for expected in (status, 200):
        line.send(message("POST", CHAT, {"model": name}, Authorization="Bearer key-of-limited"))
        assert (await line.reply()).status == expected
        await until(lambda: nothing_is_kept(house))
    assert handed == [name]
    errors = [error["error"] for error in house.log.named("internal_error")]
    assert errors == ["LookupError('odd')"] * (1 if status == 200 else 2)


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
