"""Variants of a model, asked for by clients: other parameters, the same engine."""

import asyncio
import json
import subprocess
import sys

import pytest

from llmux.core.phases import Phase
from tests.server.house import message, until

VARIANTS = {
    "q:high": {"set": {"temperature": 0.2, "reasoning.effort": "high"}},
    "q:low": {"strip": ["reasoning"], "default": {"top_p": 0.9}, "cap": {"max_tokens": 10}},
    "q:same": {},
}
MODELS = {"q": {"variants": VARIANTS}, "other": {}}


async def served(house, body, target="/v1/chat/completions", **headers):
    reply = await house.ask("POST", target, body, **headers)
    assert reply.status == 200, reply.body
    return reply, house.engine.bodies[-1]


async def test_the_engine_gets_the_parameters_and_its_own_name(house):
    await house.open(MODELS)
    reply, sent = await served(house, b'{"messages" : [1.0],"model": "q:high", "reasoning":{"x":1}}')
    assert sent == b'{"temperature":0.2,"messages" : [1.0],"model": "q", "reasoning":{"effort":"high","x":1}}'
    assert reply.headers["x-llmux-served-by"] == "q"
    assert reply.headers["x-llmux-variant"] == "q:high"
    assert reply.marked


async def test_default_strip_and_cap(house):
    await house.open(MODELS)
    _, sent = await served(house, b'{"model":"q:low","max_tokens":1e3,"reasoning":{"effort":"high"}}')
    assert sent == b'{"top_p":0.9,"model":"q","max_tokens":10}'
    _, sent = await served(house, b'{"model":"q:low","top_p":1,"max_tokens":5}')
    assert sent == b'{"model":"q","top_p":1,"max_tokens":5}'


async def test_the_model_itself_is_left_alone(house):
    await house.open(MODELS)
    reply, sent = await served(house, b'{"model":"q","temperature":1}')
    assert sent == b'{"model":"q","temperature":1}'
    assert "x-llmux-served-by" not in reply.headers


async def test_upstream_model_is_what_the_engine_gets(house):
    await house.open({"q": {"variants": VARIANTS, "upstream_model": "served"}, "other": {}})
    _, sent = await served(house, b'{"model":"q:high"}')
    assert json.loads(sent) == {"model": "served", "temperature": 0.2, "reasoning": {"effort": "high"}}


async def test_a_variant_named_in_the_query(house):
    await house.open(MODELS)
    reply, sent = await served(house, b'{"n":1}', "/v1/x?model=q%3Ahigh&a=%20")
    assert json.loads(sent) == {"n": 1, "temperature": 0.2, "reasoning": {"effort": "high"}}
    assert house.engine.heads[-1].startswith(b"POST /v1/x?model=q&a=%20 ")
    assert reply.headers["x-llmux-variant"] == "q:high"
    assert (await house.ask("GET", "/v1/x?model=q:high")).status == 200
    assert house.engine.heads[-1].startswith(b"GET /v1/x?model=q ")


async def test_no_switch_between_a_variant_and_its_model(house):
    switcher = await house.open(MODELS)
    for name in ("q", "q:high", "q:low", "q", "q:same"):
        await served(house, {"model": name})
    assert len(house.log.named("switch_started")) == 1
    await served(house, {"model": "other"})
    await served(house, {"model": "q:low"})
    assert len(house.log.named("switch_started")) == 3
    assert not switcher.inside.tickets


async def test_requests_for_a_variant_wait_with_those_for_its_model(house):
    await house.open(MODELS)
    await served(house, {"model": "other"})
    holding = await house.begin("POST", "/v1/hold", {"model": "other"})
    await until(lambda: house.in_flight("other") == 1)
    waiting = [await house.begin("POST", "/v1/x", {"model": name}) for name in ("q", "q:high", "q:low")]
    await until(lambda: house.queued("q") == 3)
    house.engine.go.set()
    assert {(await line.reply()).status for line in [holding, *waiting]} == {200}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"model":"q:low","max_tokens":"5"}', "max_tokens"),
        (b'{"model":"q:high","reasoning":"high"}', "reasoning"),
    ],
)
async def test_a_value_that_the_rules_cannot_work_on_wakes_nothing(house, body, field):
    await house.open(MODELS)
    reply = await house.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 400
    assert reply.error["param"] == field
    assert not house.log.named("switch_started")


async def test_parameters_have_no_place_in_a_form_or_a_compressed_body(house):
    await house.open(MODELS)
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nq:high\r\n--b--\r\n'
    kind = {"Content_Type": "multipart/form-data; boundary=b"}
    reply = await house.ask("POST", "/v1/audio/transcriptions", form, **kind)
    assert (reply.status, reply.error["code"]) == (400, "variant_needs_json")
    reply = await house.ask("POST", "/v1/x?model=q:low", b"xx", Content_Encoding="gzip")
    assert (reply.status, reply.error["code"]) == (400, "variant_needs_json")
    # Without parameters there is nothing to place.
    _, sent = await served(house, form.replace(b"q:high", b"q:same"), "/v1/audio/transcriptions", **kind)
    assert sent == form.replace(b"q:high", b"q")


async def test_a_large_body_is_sent_as_it_came(house):
    await house.open(MODELS)
    data = b'{"messages":[%b],"model":"q:low","max_tokens":99}' % (b'"%b",1.0' % (b"x" * 3_000_000))
    _, sent = await served(house, data)
    assert sent == data.replace(b"q:low", b"q").replace(b"99}", b"10}").replace(b"{", b'{"top_p":0.9,', 1)


async def test_they_are_listed(house):
    await house.open(MODELS)
    listed = {entry["id"]: entry["llmux"] for entry in (await house.ask("GET", "/v1/models")).json()["data"]}
    assert list(listed) == ["other", "q", "q:high", "q:low", "q:same"]
    assert listed["q:high"]["variant_of"] == "q"
    assert "variant_of" not in listed["q"]
    one = (await house.ask("GET", "/v1/models/q:high")).json()
    assert (one["id"], one["llmux"]["variant_of"]) == ("q:high", "q")
    assert (await house.ask("GET", "/v1/models/q")).json()["id"] == "q"
    unknown = await house.chat("nope")
    assert unknown.status == 404
    assert "q:high" in unknown.error["message"]


async def test_an_operator_may_name_the_variant(house):
    switcher = await house.open(MODELS)
    reply = await house.ask("POST", "/llmux/models/q:high/wake", {})
    assert (reply.status, reply.json()["model"]) == (202, "q")
    await until(lambda: switcher.core.state.models["q"].phase is Phase.AWAKE)


async def test_a_reload_adds_and_removes_variants(house):
    switcher = await house.open({"q": {}, "other": {}})
    assert (await house.chat("q:high")).status == 404
    for models, status in ((MODELS, 200), ({"q": {}, "other": {}}, 404)):
        config = house.config(models)
        switcher.replace(config)
        house.front.configure(config)
        assert (await house.chat("q:high")).status == status


async def test_many_at_once_are_each_given_their_own(house):
    await house.open(MODELS)
    lines = []
    for number in range(30):
        name = ("q:high", "q:low", "q")[number % 3]
        line = await house.line()
        line.send(message("POST", "/v1/x", {"model": name, "user": str(number)}))
        lines.append(line)
    replies = await asyncio.gather(*(line.reply() for line in lines))
    assert {reply.status for reply in replies} == {200}
    sent = {int(body["user"]): body for body in map(json.loads, house.engine.bodies)}
    assert ["temperature" in sent[n] for n in range(30)] == [n % 3 == 0 for n in range(30)]
    assert ["top_p" in sent[n] for n in range(30)] == [n % 3 == 1 for n in range(30)]


def test_without_such_names_and_apis_nothing_of_it_is_imported():
    code = """
import sys
from llmux.app import build_app
from llmux.config import Config
model = {"port": 8001, "wake": "true", "sleep": "true", "alive": "true"}
build_app(Config(models={"q": model}, state=None))
build_app(Config(models={"q": {**model, "apis": ["chat", "messages", "responses"]}}, state=None))
UNUSED = (
    "llmux.targets", "llmux.proxy.translated",
    "llmux.middleware.targeting", "llmux.middleware.remotes", "llmux.proxy.remote",
)
assert not [name for name in sys.modules if name.startswith(UNUSED)]
build_app(Config(models={"q": {**model, "variants": {"v": {}}}}, state=None))
assert "llmux.middleware.targeting" in sys.modules
assert not [name for name in sys.modules if name.startswith((*UNUSED[3:], "llmux.targets.codecs"))]
build_app(Config(models={"q": {**model, "apis": ["chat"]}}, state=None))
assert "llmux.targets.codecs" in sys.modules
assert not [name for name in sys.modules if name.startswith(UNUSED[3:])]
remotes = {"r": {"url": "https://localhost:1", "models": {"m": "m"}}}
build_app(Config(models={"q": model}, remotes=remotes, state=None))
assert "llmux.proxy.remote" in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
