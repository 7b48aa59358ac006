"""/v1/models: what clients and chat front ends are told about the models."""

import openai
import pytest

from llmux.config import Config, ConfigErrors
from llmux.config.model_settings import InfoConfig
from llmux.estimates.costs import SwitchCosts
from llmux.runtime.model_list import ABILITIES
from tests.server.house import held, until

CHAT = "/v1/chat/completions"
INFO = {"description": "Writes code", "context": 32768, "capabilities": ["tools", "vision"]}


async def listed(house, target="/v1/models"):
    reply = await house.ask("GET", target)
    assert reply.status == 200
    assert reply.json()["object"] == "list"
    return {entry["id"]: entry for entry in reply.json()["data"]}


async def one(house, name):
    reply = await house.ask("GET", f"/v1/models/{name}")
    assert reply.status == 200
    return reply.json()


async def test_a_model_with_nothing_to_tell_has_the_usual_fields(house):
    await house.open()
    entry = (await listed(house))["a"]
    assert set(entry) == {"id", "object", "created", "owned_by", "status", "llmux"}
    assert entry["status"] == {"value": "unloaded"}


@pytest.mark.parametrize("target", ["/v1/models/", "/models/", "/v1/models/?limit=1000"])
async def test_the_list_may_be_asked_for_with_a_slash_at_its_end(house, target):
    await house.open()
    assert await listed(house, target) == await listed(house)
    assert (await house.ask("HEAD", target)).status == 200


@pytest.mark.parametrize("target", ["/v1//models", "//v1/models", "//models//"])
async def test_a_base_address_with_a_slash_too_many_is_named(house, target):
    await house.open()
    reply = await house.ask("GET", target)
    assert (reply.status, reply.error["code"]) == (404, "not_found")
    assert "if /" in reply.error["message"]
    assert "models is meant, the client's base address has a slash too many" in reply.error["message"]
    elsewhere = await house.ask("GET", "/llmux/nothing")
    assert elsewhere.error["message"] == "llmux has nothing here."


async def test_what_is_told_has_the_names_that_front_ends_read(house):
    await house.open({"a": {"info": INFO, "aliases": ["gpt"]}, "b": {}})
    found = await listed(house)
    assert list(found) == ["a", "b"]
    entry = found["a"]
    assert entry["description"] == "Writes code"
    assert (entry["context_length"], entry["meta"]) == (32768, {"n_ctx": 32768})
    assert entry["capabilities"] == {"function_calling": True, "vision": True}
    assert entry["architecture"] == {
        "modality": "text+image->text",
        "input_modalities": ["text", "image"],
        "output_modalities": ["text"],
    }
    assert entry["supported_parameters"] == ["tools", "tool_choice"]
    assert entry["aliases"] == entry["llmux"]["aliases"] == ["gpt"]


async def test_a_title_is_that_of_the_model_and_its_aliases_not_of_its_variants(house):
    variants = {"a:short": {"set": {"max_tokens": 9}}}
    await house.open(
        {"a": {"info": {"name": "The Big One"}, "aliases": ["gpt"], "variants": variants}, "b": {}},
        list_aliases=True,
        virtual={"any": {"first": ["a", "b"]}},
    )
    titles = {name: entry.get("name") for name, entry in (await listed(house)).items()}
    assert titles == {"a": "The Big One", "gpt": "The Big One", "a:short": None, "any": None, "b": None}
    assert (await one(house, "a"))["name"] == "The Big One"


async def test_every_capability_of_the_configuration_is_told(house):
    known = InfoConfig.model_json_schema()["properties"]["capabilities"]["items"]["enum"]
    assert set(known) == set(ABILITIES)
    await house.open({name: {"info": {"capabilities": [name]}} for name in known})
    for name, entry in (await listed(house)).items():
        assert entry["capabilities"] == {ABILITIES[name].key: True}
        assert entry["architecture"]["input_modalities"]
        assert entry["architecture"]["output_modalities"]


async def test_an_unlisted_model_is_served_and_not_shown(house):
    await house.open(
        {
            "a": {"aliases": ["gpt"]},
            "b": {"info": {"unlisted": True}, "aliases": ["hush"], "variants": {"b:loud": {"set": {"n": 1}}}},
        },
        list_aliases=True,
    )
    assert set(await listed(house)) == {"a", "gpt", "b:loud"}
    for name in ("b", "hush"):
        assert (await house.chat(name)).status == 200
        assert (await one(house, name))["id"] == name
    refused = (await house.chat("c")).error["message"]
    assert refused == "model 'c' not found; configured are: a (gpt), b:loud"
    reply = await house.ask("POST", "/llmux/models/b/sleep")
    assert reply.status == 202


async def test_nor_is_a_key_with_models_told_of_an_unlisted_one(house):
    models = {"a": {"aliases": ["gpt"]}, "b": {"info": {"unlisted": True}, "aliases": ["hush"]}}
    await house.open(models, api_keys=[{"name": "alice", "key": "key-of-alice", "models": ["*"]}])
    key = {"X_API_Key": "key-of-alice"}
    for name in ("b", "hush"):
        assert (await house.ask("POST", "/v1/chat/completions", {"model": name}, **key)).status == 200
    for refused in (
        await house.ask("POST", "/v1/chat/completions", {"model": "c"}, **key),
        await house.ask("GET", "/v1/models/c", **key),
    ):
        assert refused.error["message"] == "model 'c' not found; configured are: a, gpt"


@pytest.mark.parametrize("wanted", [False, True])
async def test_aliases_are_listed_where_that_is_wanted(house, wanted):
    await house.open({"a": {"info": INFO, "aliases": ["gpt", "o1"]}}, list_aliases=wanted)
    found = await listed(house)
    assert set(found) == ({"a", "gpt", "o1"} if wanted else {"a"})
    alias = await one(house, "gpt")  # which answers in any case
    assert found["a"].pop("aliases") == ["gpt", "o1"]
    assert alias == {**found["a"], "id": "gpt", "llmux": {**found["a"]["llmux"], "alias_of": "a"}}
    assert not wanted or found["gpt"] == alias


async def test_the_status_is_that_of_llama_servers_router(house):
    await house.open({"a": {"wake": f"{held('a')}; touch a.up"}, "b": {"wake": "exit 1"}})
    assert (await one(house, "a"))["status"] == {"value": "unloaded"}
    waiting = await house.begin("POST", "/v1/x", {"model": "a"})
    await until(lambda: house.switcher.core.state.switch)
    assert (await one(house, "a"))["status"] == {"value": "loading"}
    house.release("a")
    assert (await waiting.reply()).status == 200
    assert (await one(house, "a"))["status"] == {"value": "loaded"}
    assert (await house.chat("b")).status == 503
    assert (await one(house, "b"))["status"] == {"value": "unloaded", "failed": True}


async def test_a_virtual_model_is_loaded_where_one_of_its_models_is(house):
    await house.open("a b", virtual={"warm": {"awake": ["a", "b"]}})
    assert (await one(house, "warm"))["status"] == {"value": "unloaded"}
    assert (await house.chat("b")).status == 200
    assert (await listed(house))["warm"]["status"] == {"value": "loaded"}


async def test_the_list_without_v1(house):
    await house.open(api_keys=["user"])
    assert (await house.ask("GET", "/models")).status == 401
    reply = await house.ask("GET", "/models", Authorization="Bearer user")
    assert reply.json() == (await house.ask("GET", "/v1/models", Authorization="Bearer user")).json()
    for path in ("/models", "/models/load", "/models/unload"):  # of llama-server's router: these switch
        assert (await house.ask("POST", path, {"model": "a"}, Authorization="Bearer user")).status == 404
    assert not house.engine.heads


async def test_the_list_of_an_engine_can_still_be_forwarded(house):
    await house.open("a", forward=["default", "/models"])
    assert (await house.ask("GET", "/models?model=a")).body == b"ok"
    assert house.engine.heads


async def test_openais_sdk_reads_all_of_it(house):
    await house.open({"a": {"info": INFO}, "b": {"info": {"unlisted": True}}})
    for base in (f"http://127.0.0.1:{house.port}/v1", f"http://127.0.0.1:{house.port}"):
        async with openai.AsyncOpenAI(base_url=base, api_key="none") as client:
            (model,) = [model async for model in client.models.list()]
        assert (model.id, model.owned_by) == ("a", "llmux")
        assert model.model_extra["context_length"] == 32768
        assert model.model_extra["status"] == {"value": "unloaded"}
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{house.port}/v1", api_key="none") as client:
        assert (await client.models.retrieve("b")).id == "b"


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"capabilities": ["tool"]}, "models.a.info.capabilities[0]: must be tools, vision, reasoning, audio"),
        ({"context": 0}, "models.a.info.context: must be at least 1, not 0"),
        ({"name": "x" * 201}, "models.a.info.name: must have at most 200 characters, not"),
        ({"description": "x" * 1025}, "models.a.info.description: must have at most 1024 characters, not"),
        ({"unlisted": "perhaps"}, "models.a.info.unlisted: must be true or false, not 'perhaps'"),
        ({"ctx": 1}, "models.a.info.ctx: unknown setting; here it is `context`"),
    ],
)
def test_a_mistake_in_info_has_its_place(house, info, words):
    with pytest.raises(ConfigErrors) as raised:
        house.config({"a": {"info": info}})
    assert words in str(raised.value)


async def test_a_variant_that_is_unlisted_is_served_and_not_listed(house):
    variants = {"a:shown": {"set": {"n": 1}}, "a:hidden": {"set": {"n": 2}, "unlisted": True}}
    await house.open({"a": {"variants": variants}})
    listed = (await house.ask("GET", "/v1/models")).json()["data"]
    assert [entry["id"] for entry in listed] == ["a", "a:shown"]
    assert (await house.chat("a:hidden")).status == 200


async def test_of_very_many_an_error_lists_some(house):
    await house.open(
        {"a": {"aliases": [f"n{number:03}" for number in range(5)]}, **{f"m{n:03}": {} for n in range(150)}}
    )
    refused = (await house.chat("c")).error["message"]
    assert refused.startswith("model 'c' not found; configured are: a (n000, n001, n002, n003, n004), m000, ")
    assert refused.endswith("m097, m098 and 51 more")


async def test_what_an_operator_sees_grows_with_the_models_and_no_faster(house, monkeypatch):
    """Also while something waits for each of them."""
    switcher = await house.open(
        {f"m{number:02}": {} for number in range(40)}, policy={"use": "fifo", "min_active": 1000}
    )
    assert (await house.chat("m00")).status == 200
    lines = [await house.begin("POST", CHAT, {"model": f"m{number:02}"}) for number in range(1, 40)]
    await until(lambda: switcher.core.state.queued == 39)
    costs, names = [], []
    estimate, of = SwitchCosts.estimate, Config.names.func
    monkeypatch.setattr(SwitchCosts, "estimate", lambda *given: costs.append(1) or estimate(*given))
    monkeypatch.setattr(Config.names, "func", lambda config: names.append(1) or of(config))
    assert (await house.ask("GET", "/llmux/status")).status == 200
    assert (await house.ask("GET", "/v1/models")).status == 200
    assert 0 < len(costs) < 8 * 40
    assert len(names) <= 1
    for line in lines:
        line.close()
