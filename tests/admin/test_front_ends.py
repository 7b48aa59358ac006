"""What chat front ends make of `/v1/models`, as their own clients read it.

Open WebUI (`backend/open_webui/routers/openai.py`) lists each entry that has an id or a name, under its name if it
has one, and fails on one without an `id`. LibreChat (`packages/api/src/endpoints/models.ts` and `utils/tokens.ts`)
takes the ids, and the sizes of contexts and prices only if every entry has all three, prices as text. llama.cpp's
web UI (`models.service.ts`, `props.svelte.ts`) reads the value of each status, and the kinds of input, unchecked.
"""

from __future__ import annotations

import anthropic
import openai
import pytest

INFO = {"context": 8192, "capabilities": ["tools", "vision"]}
REMOTE = {"url": "http://127.0.0.1:9", "key": "k", "models": {"x": "org/x"}}
PRICES = {"models": {"far/x": {"input": 0.25, "output": 2}}}


async def served(house, **more):
    """Serve one name of each kind; return what a front end with the usual base address gets."""
    models = {
        "a": {"info": INFO, "aliases": ["gpt"], "variants": {"a:hot": {"set": {"temperature": 2}}}},
        "b": {"info": {"context": 4096, "capabilities": ["tools"]}},
        "hidden": {"info": {"unlisted": True}},
    }
    virtual = {
        "both": {"awake": ["a", "b"]},
        "one": {"first": ["a", "far/x"]},
        "unknown": {"first": ["hidden", "a"]},
        "elsewhere": {"first": ["far/x"]},
    }
    settings = {
        "virtual": virtual,
        "remotes": {"far": REMOTE},
        "remotes_for_all": True,
        "list_aliases": True,
        **more,
    }
    await house.open(models, **settings)
    reply = await house.ask("GET", "/v1/models", Authorization="Bearer any")
    assert reply.headers["content-type"].startswith("application/json")
    return reply.json()


NAMES = {"a", "gpt", "a:hot", "b", "both", "one", "unknown", "elsewhere", "far/x"}


async def test_open_webui(house):
    answer = await served(house)
    models = answer.get("data")
    assert isinstance(models, list)
    assert "error" not in models
    shown = {entry.get("name", entry["id"]) for entry in models if entry.get("id") or entry.get("name")}
    assert shown == NAMES
    assert all(entry.get("name", "") is not None for entry in models)  # which would be no name at all
    assert all(isinstance(entry, dict) for entry in models)


def token_sizes(answer):
    """As LibreChat: nothing, unless each entry has all three."""
    found = {}
    for entry in answer["data"]:
        pricing, context = entry.get("pricing"), entry.get("context_length")
        if not isinstance(context, int) or not isinstance(pricing, dict):
            return {}
        if not (isinstance(pricing["prompt"], str) and isinstance(pricing["completion"], str)):
            return {}
        costs = [float(pricing[kind]) * 1_000_000 for kind in ("prompt", "completion")]
        found[entry["id"]] = (*costs, context)
    return found


async def test_librechat(house):
    answer = await served(house, prices=PRICES)
    assert {entry["id"] for entry in answer["data"]} == NAMES
    assert token_sizes(answer) == {}  # it is not known of each
    for entry in answer["data"]:
        assert entry["pricing"] == {
            "prompt": "0.00000025" if entry["id"] in ("far/x", "one", "elsewhere") else "0",
            "completion": "0.000002" if entry["id"] in ("far/x", "one", "elsewhere") else "0",
        }


async def test_librechat_where_all_is_known(house):
    models = {
        "a": {"info": INFO, "variants": {"a:hot": {"set": {"temperature": 2}}}},
        "b": {"info": {"context": 4096}},
    }
    prices = {"models": {"a": {"input": 0.5, "output": 1.5}}}
    await house.open(models, virtual={"both": {"awake": ["a", "b"]}}, prices=prices)
    assert token_sizes((await house.ask("GET", "/v1/models")).json()) == {
        "a": (0.5, 1.5, 8192),
        "a:hot": (0.5, 1.5, 8192),
        "b": (0.0, 0.0, 4096),
        "both": (0.5, 1.5, 4096),
    }
    entry = (await house.ask("GET", "/v1/models/a")).json()
    assert entry["pricing"] == {"prompt": "0.0000005", "completion": "0.0000015"}


@pytest.mark.parametrize("prices", [None, {"gpu_hour": 0.9}, {"currency": "eur", "models": {"a": {"input": 1}}}])
async def test_prices_are_told_in_dollars_or_not_at_all(house, prices):
    answer = await served(house, prices=prices)
    assert not any("pricing" in entry for entry in answer["data"])


async def test_llama_cpps_web_ui(house):
    answer = await served(house)
    loaded = {entry["id"]: entry["status"]["value"] for entry in answer["data"]}
    assert set(loaded.values()) <= {"loaded", "loading", "unloaded"}
    assert {name for name, value in loaded.items() if value == "loaded"} == {"far/x"}
    seeing = set()
    for entry in answer["data"]:
        if "architecture" in entry:
            assert all(isinstance(kinds, list) for kinds in (entry["architecture"]["input_modalities"],))
            if "image" in entry["architecture"]["input_modalities"]:
                seeing.add(entry["id"])
    assert seeing == {"a", "gpt", "a:hot", "one"}
    assert {entry["id"]: entry["meta"]["n_ctx"] for entry in answer["data"] if "meta" in entry} == {
        "a": 8192, "gpt": 8192, "a:hot": 8192, "b": 4096, "both": 4096, "one": 8192,
    }  # fmt: skip


async def test_the_official_sdks(house):
    await served(house, prices=PRICES)
    url = f"http://127.0.0.1:{house.port}"
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
        assert {model.id async for model in client.models.list()} == NAMES
        assert (await client.models.retrieve("far/x")).id == "far/x"
    async with anthropic.AsyncAnthropic(base_url=url, api_key="x") as client:
        assert {model.id async for model in client.models.list()} == NAMES
        assert (await client.models.retrieve("a:hot")).id == "a:hot"
