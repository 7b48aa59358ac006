"""llmux as a whole: real engines (llama.cpp's server), the shipped hooks, the official SDKs.

llama.cpp answers under its own alias, whatever model a request names: an answer that went astray shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from tests.engine.mux import Engine, Mux
from tests.engine.real import SLOW, VECTOR, runs, status_of, text_of, wait_until

MESSAGES = [{"role": "user", "content": "wake up"}]
MODELS = {
    "quick": Engine(settings={"aliases": ["gpt-4o-mini"]}),
    "slow": Engine(SLOW, settings={"aliases": ["claude-haiku"]}),
    "vector": Engine(VECTOR, args="--embedding"),
}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Mux]]:
    started: list[Mux] = []

    def start(engines=MODELS, **settings) -> Mux:
        mux = Mux(tmp_path, engines, **settings)
        started.append(mux)
        mux.start()
        return mux

    yield start
    for mux in started:
        if mux.process is not None and mux.process.poll() is None:
            assert mux.stop() == 0
            assert "Traceback" not in mux.said()
            assert not mux.engine_pids()
        mux.clean_up()


@pytest.fixture
async def mux(start) -> Mux:
    return start()


@pytest.fixture
async def client(mux):
    async with openai.AsyncOpenAI(base_url=f"{mux.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def claude(mux):
    async with anthropic.AsyncAnthropic(base_url=mux.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


async def ask(client: openai.AsyncOpenAI, model: str, tokens: int = 8) -> str:
    answer = await client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=tokens)
    assert answer.usage.completion_tokens == tokens
    return answer.model


async def embed(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model="vector", input=["one", "two"], encoding_format="float")
    # Here llama.cpp repeats the name that was asked for, whoever it is: the length tells.
    assert [len(item.embedding) for item in answer.data] == [VECTOR.dim] * 2


async def test_each_name_reaches_its_engine_and_only_one_runs_at_a_time(mux, client):
    for name, model in (
        ("quick", "quick"),
        ("gpt-4o-mini", "quick"),
        ("slow", "slow"),
        ("claude-haiku", "slow"),
        ("quick", "quick"),
    ):
        assert await ask(client, name) == model
        assert mux.status()["awake"] == [model]
        assert len(mux.engine_pids()) == 1


async def test_a_stream_arrives_piece_by_piece_and_a_switch_waits_for_its_end(mux, client):
    async with held_answer(mux, client) as (tokens, first, chunks):
        # What has arrived was passed on before the end.
        other = asyncio.create_task(ask(client, "quick"))
        await asyncio.to_thread(wait_until, lambda: mux.phase("slow") == "draining", what="the drain")
        assert not other.done()
    used, models = None, {first.model}
    async for chunk in chunks:
        models.add(chunk.model)
        used = chunk.usage or used
    assert models == {"slow"}
    assert used.completion_tokens == tokens
    assert await other == "quick"


@contextlib.asynccontextmanager
async def held_answer(mux: Mux, client: openai.AsyncOpenAI) -> AsyncIterator[tuple[int, Any, AsyncIterator[Any]]]:
    """Have the engine of "slow" do nothing in the middle of an answer: its tokens, its first chunk, the others."""
    for tokens in (400, 1600, 6400):
        stream = await client.chat.completions.create(
            model="slow", messages=MESSAGES, max_tokens=tokens, stream=True, stream_options={"include_usage": True}
        )
        chunks = aiter(stream)
        first = await anext(chunks)
        with stopped(mux):
            mux.status()  # once this is answered, llmux has all that the engine had sent
            if mux.status()["models"]["slow"]["in_flight"]:
                yield tokens, first, chunks
                return
        async for _ in chunks:  # this machine is so busy that the answer was over before
            pass
    raise AssertionError("the engine answers sooner than it can be stopped")


@contextlib.contextmanager
def stopped(mux: Mux) -> Iterator[None]:
    """Have the engine that runs do nothing for a while, so that a short answer lasts long enough."""
    (pid,) = mux.engine_pids()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_embeddings(client):
    await embed(client)
    assert await ask(client, "quick") == "quick"


async def test_anthropic_messages(claude, client):
    answer = await claude.messages.create(model="claude-haiku", messages=MESSAGES, max_tokens=8)
    assert answer.model == "slow"
    assert await ask(client, "quick") == "quick"
    async with claude.messages.stream(model="claude-haiku", messages=MESSAGES, max_tokens=30) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text
    assert final.model == "slow"
    assert final.usage.output_tokens == 30


async def test_the_sdks_raise_their_own_errors(client, claude):
    with pytest.raises(openai.NotFoundError) as refused:
        await ask(client, "no-such-model")
    assert refused.value.code == "model_not_found"
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.create(model="no-such-model", messages=MESSAGES, max_tokens=1)


async def test_the_models_are_listed(client):
    names = {model.id async for model in await client.models.list()}
    assert {"quick", "slow", "vector"} <= names


async def test_responses_say_how_long_they_waited_and_who_they_are(client):
    raw = await client.chat.completions.with_raw_response.create(
        model="quick", messages=MESSAGES, max_tokens=1, extra_headers={"X-Request-ID": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert 0 < float(raw.headers["x-llmux-queue-seconds"]) < 30  # it had to be woken


async def test_a_client_that_leaves_in_mid_stream_frees_its_engine(mux, client):
    stream = await client.chat.completions.create(model="slow", messages=MESSAGES, max_tokens=3500, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await asyncio.to_thread(wait_until, mux.idle, what="the end of the request")
    engine = f"http://127.0.0.1:{mux.ports['slow']}"
    await asyncio.to_thread(wait_until, lambda: not busy_slots(engine), what="an idle engine")
    said = re.search(r"^llamacpp:tokens_predicted_total (\d+)", text_of(f"{engine}/metrics"), re.MULTILINE)
    assert int(said[1]) < 3500
    assert await ask(client, "quick") == "quick"


def busy_slots(engine: str) -> list[dict]:
    return [slot for slot in json.loads(text_of(f"{engine}/slots")) if slot["is_processing"]]


async def test_a_client_that_leaves_the_queue_wakes_nobody(mux, client):
    async with held_answer(mux, client) as (_, _, chunks):
        waiter = asyncio.create_task(ask(client, "quick"))
        await asyncio.to_thread(wait_until, lambda: mux.status()["models"]["quick"]["queued"] == 1)
        waiter.cancel()
        await asyncio.to_thread(wait_until, lambda: mux.status()["models"]["quick"]["queued"] == 0)
    assert len([chunk async for chunk in chunks]) > 100
    await asyncio.to_thread(wait_until, mux.idle, what="rest")
    assert mux.status()["awake"] == ["slow"]


async def test_many_clients_across_many_switches(mux, client):
    wanted = ["quick", "slow", "gpt-4o-mini", "claude-haiku"]
    engine = {"gpt-4o-mini": "quick", "claude-haiku": "slow"}

    async def program(number: int) -> None:
        for turn in range(4):
            name = wanted[(number + turn) % 4]
            assert await ask(client, name, 5 + number) == engine.get(name, name)
            if number == 0:
                await embed(client)

    await asyncio.gather(*(program(number) for number in range(6)))
    done = {
        (labels["from"], labels["to"]): value
        for labels, value in mux.samples("llmux_switch_total")
        if labels["result"] == "success"
    }
    assert sum(done.values()) >= 5
    assert sum(value for _, value in mux.samples("llmux_model_in_flight")) == 0
    answered = sum(value for labels, value in mux.samples("llmux_requests_total") if labels["status"] == "200")
    assert answered == 6 * 4 + 4
    costs = {(cost["from"], cost["to"]): cost for cost in mux.status()["switch_costs"] if cost["samples"]}
    assert costs
    assert all(0 < cost["seconds"] < 20 for cost in costs.values())


async def test_an_engine_that_crashed_is_woken_by_the_next_request(mux, client):
    assert await ask(client, "quick") == "quick"
    (pid,) = mux.engine_pids()
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: not runs(pid))
    assert await ask(client, "quick") == "quick"
    assert mux.engine_pids() != [pid]


async def test_an_engine_that_dies_in_mid_stream_ends_the_stream_with_an_error(mux, client):
    stream = await client.chat.completions.create(model="slow", messages=MESSAGES, max_tokens=3500, stream=True)
    chunks = aiter(stream)
    await anext(chunks)
    (pid,) = mux.engine_pids()
    os.kill(pid, signal.SIGKILL)
    # Whatever the SDK makes of it, it must not look like an answer that is complete.
    with pytest.raises(Exception) as broken:  # noqa: PT011
        async for _ in chunks:
            pass
    assert not isinstance(broken.value, TimeoutError)
    # Until the kernel has buried it, its port takes connections, of which nobody can tell what was read: 502.
    await asyncio.to_thread(wait_until, lambda: not runs(pid))
    assert await ask(client, "slow") == "slow"


async def test_what_runs_already_is_adopted_after_a_kill(mux, client):
    assert await ask(client, "quick") == "quick"
    (pid,) = mux.engine_pids()
    mux.stop(signal.SIGKILL)
    assert runs(pid)  # engines are detached: they outlive llmux
    mux.start()
    assert mux.status()["awake"] == ["quick"]
    assert await ask(client, "quick") == "quick"
    assert mux.engine_pids() == [pid]
    assert await ask(client, "slow") == "slow"
    assert not runs(pid)


def test_engines_are_left_as_they_are_at_the_end_unless_told_otherwise(start):
    mux = start({"quick": Engine(settings={"preload": True})}, on_exit="leave")
    wait_until(lambda: mux.phase("quick") == "awake")
    (pid,) = mux.engine_pids()
    assert mux.stop() == 0
    assert runs(pid)
    assert status_of(f"http://127.0.0.1:{mux.ports['quick']}/health") == 200


async def test_models_that_fit_are_awake_together(start):
    engines = {
        name: Engine(settings={"memory": f"{size}GiB"}) for name, size in (("one", 8), ("two", 8), ("three", 16))
    }
    mux = start(engines, capacity="20GiB")
    async with openai.AsyncOpenAI(base_url=f"{mux.url}/v1", api_key="none", max_retries=0) as client:
        assert await ask(client, "one") == "one"
        assert await ask(client, "two") == "two"
        assert sorted(mux.status()["awake"]) == ["one", "two"]
        assert await ask(client, "three") == "three"
        assert mux.status()["awake"] == ["three"]


async def test_an_embedder_beside_two_chat_models_never_waits_for_their_turns(start):
    sizes = {"quick": 16, "slow": 16, "vector": 2}
    engines = {
        name: dataclasses.replace(MODELS[name], settings={"memory": f"{size}GiB"}) for name, size in sizes.items()
    }
    mux = start(engines, capacity="20GiB")
    async with openai.AsyncOpenAI(base_url=f"{mux.url}/v1", api_key="none", max_retries=0) as client:
        await embed(client)

        async def take_turns() -> None:
            for turn in range(4):
                model = ("quick", "slow")[turn % 2]
                assert await ask(client, model) == model

        turns, waits = asyncio.create_task(take_turns()), []
        while not turns.done():
            raw = await client.embeddings.with_raw_response.create(model="vector", input="one")
            waits.append(float(raw.headers["x-llmux-queue-seconds"]))
            await asyncio.sleep(0.02)
        await turns
    switches = sum(value for labels, value in mux.samples("llmux_switch_total") if labels["to"] != "vector")
    assert switches == 4
    assert len(waits) > switches
    assert max(waits) == 0.0
    assert mux.status()["awake"] == ["slow", "vector"]


async def test_an_idle_model_goes_to_sleep(start):
    mux = start({"quick": Engine(settings={"idle_sleep": "500ms"})})
    async with openai.AsyncOpenAI(base_url=f"{mux.url}/v1", api_key="none", max_retries=0) as client:
        assert await ask(client, "quick") == "quick"
        await asyncio.to_thread(wait_until, lambda: mux.phase("quick") == "asleep")
        assert not mux.engine_pids()
        assert await ask(client, "quick") == "quick"


async def test_an_engine_that_cannot_start_is_reported_and_others_are_served(start, tmp_path):
    broken = {"env": {"MODEL": str(tmp_path / "missing.gguf"), "PID_DIR": str(tmp_path / "pids")}}
    mux = start({"quick": Engine(), "broken": Engine(settings=broken)})
    async with openai.AsyncOpenAI(base_url=f"{mux.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            await ask(client, "broken")
        assert failed.value.status_code == 503
        assert int(failed.value.response.headers["retry-after"]) >= 1
        assert await ask(client, "quick") == "quick"
    assert "MODEL cannot be read" in mux.said()


async def test_metrics_and_status_are_served_while_everything_sleeps(mux):
    async with aiohttp.ClientSession(mux.url) as session:
        for path in ("/health", "/ready", "/metrics", "/llmux/status", "/v1/models"):
            async with session.get(path) as response:
                assert response.status == 200
    assert mux.status()["awake"] == []
