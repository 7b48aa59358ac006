"""Engines that run: told apart by what they say of themselves over HTTP."""

import asyncio
import contextlib
import socket

import pytest

from examples.quickstart.tiny_gguf import cached
from llmux.survey import host as engines
from llmux.survey.host import Engine, Served, probe
from tests.engine.real import TINY, foreground
from tests.harness.ports import free_port
from tests.survey.conftest import listed


async def look(port) -> Engine | None:
    found = await probe([port])
    assert len(found) < 2
    return found[0] if found else None


async def test_a_real_llama_server():
    port = free_port()
    with contextlib.ExitStack() as stack:
        await asyncio.to_thread(stack.enter_context, foreground("my alias", port))
        engine = await look(port)
    assert (engine.kind, engine.router) == ("llama.cpp", False)
    assert engine.models == (Served("my alias", str(cached(TINY))),)


async def test_llama_servers_router(serve):
    entries = listed("llamacpp", "a", "b", status={"value": "unloaded"})
    engine = await look(serve({"/v1/models": entries, "/props": {"role": "router"}}))
    assert (engine.kind, engine.router, [model.name for model in engine.models]) == ("llama.cpp", True, ["a", "b"])


@pytest.mark.parametrize(("answer", "sleeps"), [({"is_sleeping": False}, True), ((404, {}), False)])
async def test_vllm(serve, answer, sleeps):
    engine = await look(serve({"/v1/models": listed("vllm", "q", root="Qwen/Qwen3-8B"), "/is_sleeping": answer}))
    assert (engine.kind, engine.models, engine.sleeps) == ("vLLM", (Served("q", "Qwen/Qwen3-8B"),), sleeps)


@pytest.mark.parametrize("models", [listed("library", "llama3:8b"), {"object": "list", "data": None}])
async def test_ollama(serve, models):
    tags = {"models": [{"name": "llama3:8b"}, {"name": "qwen3:4b"}, {"no": "name"}]}
    engine = await look(serve({"/v1/models": models, "/api/version": {"version": "0.12"}, "/api/tags": tags}))
    assert (engine.kind, engine.models) == ("Ollama", (Served("llama3:8b"), Served("qwen3:4b")))


@pytest.mark.parametrize(
    ("owner", "kind"),
    [
        ("sglang", "SGLang"),
        ("tabbyAPI", "TabbyAPI"),
        ("tensorrt_llm", "TensorRT-LLM"),
        ("organization_owner", "LM Studio"),
        ("llama-swap", "llama-swap"),
        ("llmux", "llmux"),
        ("somebody", "unknown"),
    ],
)
async def test_others(serve, owner, kind):
    engine = await look(serve({"/v1/models": listed(owner, "m")}))
    assert (engine.kind, engine.models) == (kind, (Served("m"),))


async def test_one_that_wants_a_key(serve):
    engine = await look(serve({"/v1/models": (401, {"error": "no"})}))
    assert engine.locked
    assert engine.about.startswith("something that wants a key on port ")


@pytest.mark.parametrize(
    "answer",
    [
        "<html>", "[]", "null", "{", {"data": 5}, {"data": [5, None, {"id": 7}]},
        {"data": [{"id": "m", "owned_by": 3}]}, (500, "oops"), (302, "moved"),
    ],
)  # fmt: skip
async def test_something_else(serve, answer):
    assert (await look(serve({"/v1/models": answer}))).kind == "unknown"


async def test_nobody():
    assert await look(free_port()) is None


async def test_what_is_no_http_or_says_nothing_holds_nobody_up(monkeypatch, serve):
    monkeypatch.setattr(engines, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as rude:

        def answer():
            with contextlib.suppress(OSError), rude.accept()[0] as client:
                client.sendall(b"220 mail.example\r\n")

        talking = asyncio.create_task(asyncio.to_thread(answer))
        good = serve({"/v1/models": listed("vllm", "m")})
        found = await probe([silent.getsockname()[1], rude.getsockname()[1], good, free_port()])
        await talking
    assert [engine.port for engine in found] == [good]


async def test_a_long_list_is_named_shortly(serve):
    engine = await look(serve({"/v1/models": listed("sglang", *"abcdef")}))
    assert engine.about == f"SGLang on port {engine.port}: a, b, c, d, …"
