"""Tokens are counted for every model, by its engine if that is awake; nothing wakes for it."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from llmux.core.phases import Phase
from llmux.middleware import counting
from tests.server.house import HOST, held, until

QUESTION = [{"role": "user", "content": "how many tokens?"}]
TOOLS = [{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}]
COUNT, TEMPLATE, TOKENIZE = "/v1/messages/count_tokens", "/apply-template", "/tokenize"


class Engine:
    """An engine that answers what its test says: a status and a document for each path; 404 for the others."""

    def __init__(self) -> None:
        self.says = {}
        self.seen = []
        self.peers = []
        self.go = None
        self.drops = False  # what comes on a connection that was kept
        self.port = 0

    async def start(self):
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{rest:.*}", self.answer)
        self.runner = web.AppRunner(app, access_log=None)
        await self.runner.setup()
        await web.TCPSite(self.runner, HOST, 0).start()
        self.port = self.runner.addresses[0][1]

    async def answer(self, request):
        peer = request.transport.get_extra_info("peername")
        if self.drops and peer in self.peers:
            request.transport.abort()
            raise ConnectionResetError
        self.peers.append(peer)
        self.seen.append((request.path, dict(request.headers), await request.read()))
        if self.go is not None:
            await self.go.wait()
        status, document = self.says.get(request.path, (404, {"error": "no such path"}))
        return web.json_response(document, status=status)

    @property
    def asked(self):
        return [path for path, _, _ in self.seen]

    def body(self, at=-1):
        return json.loads(self.seen[at][2])


@pytest.fixture
async def engine():
    engine = Engine()
    await engine.start()
    engine.says["/v1/chat/completions"] = 200, {}
    yield engine
    if engine.go is not None:
        engine.go.set()
    await engine.runner.cleanup()


async def open_house(house, engine, *, awake=True, **settings):
    await house.open({"m": {"port": engine.port, "shared_address": False, **settings}, "other": {}})
    if awake:
        assert (await house.chat("m")).status == 200
        engine.seen.clear()


async def count(house, model="m", messages=QUESTION, headers=None, **fields):
    return await house.ask("POST", COUNT, {"model": model, "messages": messages, **fields}, **(headers or {}))


def estimated(reply):
    assert reply.status == 200
    assert reply.marked
    return reply.headers.get("x-llmux-estimated") == "true"


@pytest.mark.parametrize("apis", [None, ["chat"], ["chat", "count_tokens"]])
async def test_model_that_sleeps_is_not_woken(house, engine, apis):
    engine.says[COUNT] = 200, {"input_tokens": 7}
    await open_house(house, engine, awake=False, apis=apis)
    reply = await count(house)
    assert estimated(reply)
    assert 1 <= reply.json()["input_tokens"] < 50
    assert house.switcher.core.state.models["m"].phase is Phase.ASLEEP
    assert (engine.seen, house.log.named("switch_started")) == ([], [])


async def test_the_estimate_grows_with_what_is_said(house, engine):
    await open_house(house, engine, awake=False)
    little = (await count(house)).json()["input_tokens"]
    long = [{"role": "user", "content": "word " * 1000}]
    assert 1000 < (await count(house, messages=long)).json()["input_tokens"] < 2000
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 2_000_000}}
    seen = (await count(house, messages=[{"role": "user", "content": [picture]}])).json()["input_tokens"]
    assert 1000 < seen < 3000
    assert (await count(house, tools=TOOLS)).json()["input_tokens"] > little
    assert (await count(house, system="be brief")).json()["input_tokens"] > little


async def test_a_connection_that_died_while_it_was_kept_takes_no_count_along(house, engine):
    engine.says[COUNT] = 200, {"input_tokens": 7}
    await open_house(house, engine)
    engine.drops = True
    for _ in range(2):
        reply = await count(house)
        assert (estimated(reply), reply.json()) == (False, {"input_tokens": 7})
    assert len(set(engine.peers)) == 3  # that of the chat, and one for each count


@pytest.mark.parametrize("apis", [None, ["chat", "count_tokens"]])
async def test_engine_that_counts_is_asked_with_the_clients_own_bytes(house, engine, apis):
    engine.says[COUNT] = 200, {"input_tokens": 7}
    await open_house(house, engine, apis=apis)
    body = b'{"messages": [] ,"model" :"m","x":1.50}'
    reply = await house.ask("POST", COUNT + "?beta=true", body, **{"anthropic-beta": "b", "x-api-key": "k"})
    assert not estimated(reply)
    assert reply.json() == {"input_tokens": 7}
    path, headers, sent = engine.seen[-1]
    assert (path, sent) == (COUNT, body)
    assert (headers["anthropic-beta"], headers["x-api-key"]) == ("b", "k")
    assert headers["X-Request-ID"] == reply.headers["x-request-id"]
    assert house.switcher.core.state.models["m"].admissions == 1  # that which woke it


async def test_connection_to_the_engine_is_used_again(house, engine):
    engine.says[COUNT] = 200, {"input_tokens": 7}
    await open_house(house, engine)
    for _ in range(3):
        assert (await count(house)).json() == {"input_tokens": 7}
    assert len(set(engine.peers[-3:])) == 1


async def test_engine_that_has_a_template_and_a_tokenizer(house, engine):
    engine.says[TEMPLATE] = 200, {"prompt": "<user>how many tokens?"}
    engine.says[TOKENIZE] = 200, {"tokens": [1, 2, 3, 4]}
    await open_house(house, engine, upstream_model="served")
    for _ in range(2):
        reply = await count(house, tools=TOOLS, system="s")
        assert not estimated(reply)
        assert reply.json() == {"input_tokens": 4}
    # What it does not know it is asked once.
    assert engine.asked == [COUNT, TEMPLATE, TOKENIZE, TEMPLATE, TOKENIZE]
    assert json.loads(engine.seen[0][2])["model"] == "served"
    template, question = engine.body(-2), engine.body(-1)
    assert template["messages"] == [{"role": "system", "content": "s"}, QUESTION[0]]
    assert template["tools"][0]["function"]["name"] == "f"
    assert question["content"] == question["prompt"] == "<user>how many tokens?"
    assert question["model"] == "served"


async def test_engine_that_applies_its_template_by_itself(house, engine):  # as vLLM
    engine.says[TOKENIZE] = 200, {"count": 9, "tokens": [0] * 9, "max_model_len": 10}
    await open_house(house, engine, apis=["chat"])
    reply = await count(house)
    assert not estimated(reply)
    assert reply.json() == {"input_tokens": 9}
    assert engine.asked == [TEMPLATE, TOKENIZE]  # `apis` say that it does not count
    assert engine.body()["messages"] == QUESTION
    assert "prompt" not in engine.body()


async def test_text_that_is_only_tokenized_is_an_estimate(house, engine):
    engine.says[TOKENIZE] = 200, {"tokens": [0] * 5}
    await open_house(house, engine)
    reply = await count(house, system="be brief")
    assert estimated(reply)
    assert reply.json() == {"input_tokens": 5}
    assert engine.body()["content"] == "be brief\nuser\nhow many tokens?"


async def test_engine_that_can_do_neither(house, engine):
    await open_house(house, engine)
    for _ in range(3):
        assert estimated(await count(house))
    assert engine.asked == [COUNT, TEMPLATE, TOKENIZE]
    assert (await house.ask("POST", "/llmux/models/m/sleep")).status == 202
    await until(lambda: house.switcher.core.state.models["m"].phase is Phase.ASLEEP)
    await house.chat("m")  # another engine, perhaps
    engine.seen.clear()
    await count(house)
    assert engine.asked == [COUNT, TEMPLATE, TOKENIZE]


@pytest.mark.parametrize("answer", [(500, {}), (503, {}), (200, []), (200, {"input_tokens": "x"}), (429, {})])
async def test_engine_that_fails_to_count(house, engine, answer):
    engine.says = {**engine.says, COUNT: answer, TEMPLATE: answer, TOKENIZE: answer}
    await open_house(house, engine)
    assert estimated(await count(house))


async def test_what_the_engine_refuses_is_refused(house, engine):
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
    engine.says[COUNT] = 400, error
    await open_house(house, engine)
    reply = await count(house)
    assert (reply.status, reply.json()) == (400, error)
    assert reply.marked


async def test_engine_that_takes_too_long_or_is_gone(house, engine, monkeypatch):
    monkeypatch.setattr(counting, "PATIENCE", 0.05)
    engine.go = asyncio.Event()
    engine.go.set()
    await open_house(house, engine)
    engine.go.clear()
    assert estimated(await count(house))
    engine.go.set()
    await engine.runner.cleanup()
    assert estimated(await count(house))
    assert house.switcher.core.state.models["m"].phase is Phase.AWAKE  # a count suspects no engine


async def test_count_holds_up_no_sleep(house, engine):
    engine.go = asyncio.Event()
    engine.go.set()
    await open_house(house, engine, sleep=f"{held('sleep')}; rm -f m.up")
    engine.go.clear()
    asked = asyncio.create_task(count(house))
    await until(lambda: engine.seen)
    assert (await house.ask("POST", "/llmux/models/m/sleep")).status == 202
    assert estimated(await asked)  # while the engine still holds its answer back
    assert house.switcher.core.state.models["m"].phase is Phase.SLEEPING
    house.release("sleep")


async def test_names_beside_the_models_own(house, engine):
    engine.says[COUNT] = 200, {"input_tokens": 7}
    variants = {"m:hot": {"set": {"temperature": 1.5}}}
    mine = {"port": engine.port, "shared_address": False, "variants": variants, "aliases": ["claude-x"]}
    await house.open({"m": mine, "other": {}}, virtual={"warm": {"awake": ["other", "m"]}})
    assert estimated(await count(house, "m:hot"))
    await house.chat("m")
    for name, served in (("m:hot", b'"m"'), ("claude-x", b'"claude-x"'), ("warm", b'"m"')):
        assert (await count(house, name)).json() == {"input_tokens": 7}
        assert served in engine.seen[-1][2]
    assert len(house.log.named("switch_started")) == 1


async def test_what_is_no_such_request_goes_on_as_any_other(house, engine):
    engine.says[COUNT] = 200, {"any": "thing"}
    await open_house(house, engine, awake=False)
    reply = await house.ask("POST", COUNT, {"model": "m"})
    assert reply.json() == {"any": "thing"}
    assert len(house.log.named("switch_started")) == 1
    refused = await house.ask("POST", COUNT, b'{"model":"m","messages":[}')
    assert (refused.status, refused.json()["type"]) == (400, "error")


async def test_operators_reach_the_engine_itself(house, engine):
    engine.says[COUNT] = 200, {"input_tokens": 7}
    await open_house(house, engine, awake=False)
    assert (await house.ask("POST", f"/upstream/m{COUNT}", {"messages": QUESTION})).json() == {"input_tokens": 7}


async def test_a_client_that_leaves_ends_the_question(house, engine):
    engine.go = asyncio.Event()
    engine.go.set()
    await open_house(house, engine)
    engine.go.clear()
    line = await house.begin("POST", COUNT, {"model": "m", "messages": QUESTION})
    await until(lambda: engine.seen)
    line.abort()
    await until(lambda: house.log.named("client_left"))
