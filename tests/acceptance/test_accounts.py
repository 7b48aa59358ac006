"""Tokens in the ledger, request by request, against what real engines tell the official SDKs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from tests.engine.mux import Engine, Mux
from tests.engine.real import SLOW, VECTOR, wait_until

MESSAGES = [{"role": "user", "content": "wake up, and say what there is to say about it"}]
NAMES = ("alice", "bob")
PAGE = {"begins": 0, "kept": 0}  # rows and captures of the tests before
KEYS = [{"name": name, "key": f"key-of-{name}"} for name in NAMES]


@pytest.fixture(scope="module", params=["reported", "exact"])
def running(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Mux]:
    """Run llmux for all tests with one way of counting: its engines are started once."""
    engines = {"chat": Engine(SLOW), "vector": Engine(VECTOR, args="--embedding")}
    more = (
        {"captures": {"keys": ["alice"], "folder": "kept"}, "audit": "audit.jsonl"}
        if request.param == "exact"
        else {}
    )
    mux = Mux(
        tmp_path_factory.mktemp("accounts"),
        engines,
        ledger="ledger.db",
        api_keys=KEYS,
        usage=request.param,
        admin_key="key-of-admin",
        **more,
    )
    try:
        mux.start()
        yield mux
        assert mux.stop() == 0
        assert "Traceback" not in mux.said()
    finally:
        mux.clean_up()


@pytest.fixture
def mux(running: Mux) -> Mux:
    """Begin a page of the ledger: a test sees only what it has done itself, and waits for its last row."""
    PAGE["begins"] = len(all_written(running))
    PAGE["kept"] = len(all_captured(running))
    return running


@pytest.fixture
async def sdk(mux):
    async with openai.AsyncOpenAI(
        base_url=f"{mux.url}/v1", api_key="key-of-alice", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture
async def claude(mux):
    async with anthropic.AsyncAnthropic(
        base_url=mux.url, api_key="key-of-bob", max_retries=0, timeout=60
    ) as client:
        yield client


class Seen:
    """What the SDKs were told, in the order of the requests."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, key: str, read: int, cached: int, made: int) -> None:
        self.rows.append({"key": key, "input": read, "cached": cached, "output": made, "estimated": 0})

    def chat(self, usage) -> None:
        self.add("alice", usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens)

    def response(self, usage) -> None:
        self.add("alice", usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens)

    def message(self, usage) -> None:
        cached = usage.cache_read_input_tokens or 0
        self.add("bob", usage.input_tokens + cached, cached, usage.output_tokens)


def ledger_rows(mux: Mux) -> list[dict[str, Any]]:
    return all_written(mux)[PAGE["begins"] :]


def all_written(mux: Mux) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(mux.folder / "ledger.db")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM requests ORDER BY id")]


async def rows(mux: Mux, count: int) -> list[dict[str, Any]]:
    await asyncio.to_thread(wait_until, lambda: len(ledger_rows(mux)) >= count, what=f"{count} rows")
    return ledger_rows(mux)


async def test_exact_request_by_request(mux, sdk, claude):
    seen, before = Seen(), await told(mux)
    for tokens in (3, 17):  # the second finds its prompt in the cache
        chat = {"model": "chat", "messages": MESSAGES, "max_tokens": tokens}
        seen.chat((await sdk.chat.completions.create(**chat)).usage)
        counted = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await sdk.chat.completions.create(**chat, **counted)]
        seen.chat(chunks[-1].usage)
        text = {"model": "chat", "prompt": "once upon", "max_tokens": tokens}
        seen.chat((await sdk.completions.create(**text)).usage)
        chunks = [chunk async for chunk in await sdk.completions.create(**text, **counted)]
        seen.chat(next(chunk.usage for chunk in reversed(chunks) if chunk.usage))
        request = {"model": "chat", "input": "say something", "max_output_tokens": tokens}
        seen.response((await sdk.responses.create(**request)).usage)
        events = [event async for event in await sdk.responses.create(**request, stream=True)]
        seen.response(events[-1].response.usage)
        message = {"model": "chat", "messages": MESSAGES, "max_tokens": tokens}
        seen.message((await claude.messages.create(**message)).usage)
        async with claude.messages.stream(**message) as stream:
            seen.message((await stream.get_final_message()).usage)
    vector = await sdk.embeddings.create(model="vector", input=["one", "two"], encoding_format="float")
    seen.add("alice", vector.usage.prompt_tokens, 0, 0)

    found = await rows(mux, len(seen.rows))
    assert [{name: row[name] for name in seen.rows[0]} for row in found] == seen.rows
    assert any(row["cached"] for row in found)
    assert {row["served"] for row in found} == {"chat", "vector"}
    assert all(row["decode"] for row in found[:4])  # llama.cpp's own speed
    after = await told(mux)
    for name in NAMES:
        mine = [row for row in seen.rows if row["key"] == name]
        for column in ("input", "cached", "output"):
            assert after[name, column] - before[name, column] == sum(row[column] for row in mine)


async def told(mux: Mux) -> Counter[tuple[str, str]]:
    """Return what llmux says that each key has used, by kind of token."""
    headers = {"Authorization": "Bearer key-of-alice"}
    found: Counter[tuple[str, str]] = Counter()
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{mux.url}/llmux/usage") as answer:
        for row in (await answer.json())["usage"]:
            for column in ("input", "cached", "output"):
                found[row["key"], column] += row[f"{column}_tokens"]
    return found


async def test_captures_have_what_the_sdk_sent_and_read(mux, sdk):
    """Chunk by chunk, and nothing of its key."""
    chat = {"model": "chat", "messages": MESSAGES, "max_tokens": 7}
    told = await sdk.chat.completions.create(**chat)
    chunks = [chunk async for chunk in await sdk.chat.completions.create(**chat, stream=True)]
    if (mux.folder / "audit.jsonl").exists():
        await asyncio.to_thread(wait_until, lambda: len(captured(mux)) == 2, what="two captures")
        whole, stream = captured(mux)
        assert whole["request"]["body"] == chat
        assert whole["answer"]["body"]["choices"][0]["message"]["content"] == told.choices[0].message.content
        texts = [event["data"]["choices"][0]["delta"].get("content") for event in stream["answer"]["events"][:-1]]
        assert texts == [chunk.choices[0].delta.content for chunk in chunks]
        assert "key-of" not in json.dumps([whole, stream])
    else:
        assert not captured(mux)
    await rows(mux, 2)


def captured(mux: Mux) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in all_captured(mux)[PAGE["kept"] :]]


def all_captured(mux: Mux) -> list[Path]:
    return sorted(mux.folder.glob("kept/*/*.json"))


async def test_a_stream_without_usage_is_exact_by_its_timings(mux, sdk):
    """Or by what llmux asks; either way its client sees what it would without llmux."""
    chat = {"model": "chat", "messages": MESSAGES, "max_tokens": 23}
    text = {"model": "chat", "prompt": "once upon", "max_tokens": 19}
    told = (await sdk.chat.completions.create(**chat)).usage
    chunks = [chunk async for chunk in await sdk.chat.completions.create(**chat, stream=True)]
    assert not any(chunk.usage for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)
    wrote = (await sdk.completions.create(**text)).usage
    chunks = [chunk async for chunk in await sdk.completions.create(**text, stream=True)]
    assert all(chunk.choices for chunk in chunks)  # llama.cpp tells the usage of these in the last of them
    first, last, whole, streamed = await rows(mux, 4)
    assert (last["input"], last["output"], last["estimated"]) == (told.prompt_tokens, 23, 0)
    assert (first["input"], first["output"]) == (told.prompt_tokens, told.completion_tokens)
    assert (whole["input"], whole["output"]) == (wrote.prompt_tokens, wrote.completion_tokens)
    assert (streamed["input"], streamed["output"], streamed["estimated"]) == (wrote.prompt_tokens, 19, 0)


def shape(value: Any) -> Any:
    """Return the keys and types of a JSON value; texts as they are, without what differs from time to time."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items() if name not in {"id", "created"}}
    if isinstance(value, list):
        return [shape(one) for one in value]
    return value if isinstance(value, str | None) else type(value).__name__


async def test_a_stream_is_as_without_llmux(mux, sdk):
    """Event by event, the key order included."""
    body = {"model": "chat", "messages": MESSAGES, "max_tokens": 9, "stream": True, "temperature": 0, "seed": 1}
    await sdk.chat.completions.create(**{**body, "stream": False})  # the prompt is in the cache from here on
    seen = []
    for base in (mux.url, f"http://127.0.0.1:{mux.ports['chat']}"):
        headers = {"Authorization": "Bearer key-of-alice"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{base}/v1/chat/completions", json=body) as answer,
        ):
            events = (await answer.read()).decode().split("\n\n")
        seen.append([shape(json.loads(event[6:])) if event.startswith("data: {") else event for event in events])
    assert json.dumps(seen[0]) == json.dumps(seen[1])
    assert len(seen[0]) > 9
    await rows(mux, 2)


async def cancel(mux, request_id):
    async with (
        aiohttp.ClientSession(headers={"Authorization": "Bearer key-of-admin"}) as session,
        session.post(f"{mux.url}/llmux/requests/{request_id}/cancel") as answer,
    ):
        assert answer.status == 202


async def test_a_stream_that_an_operator_cancels_is_estimated(mux, sdk):
    request = {"model": "chat", "messages": MESSAGES, "max_tokens": 3500, "stream": True}
    stream = await sdk.chat.completions.create(**request, extra_headers={"X-Request-ID": "mine"})
    read = 0

    async def read_on():
        nonlocal read
        async for event in stream:
            read += bool(event.choices and event.choices[0].delta.content)
            if read == 50:
                await cancel(mux, "mine")

    with pytest.raises(openai.APIError):
        await read_on()
    (row,) = await rows(mux, 1)
    assert (row["estimated"], row["reason"]) == (1, "cancelled")
    assert read <= row["output"] < 3500


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
async def test_a_stream_that_its_client_leaves_is_estimated(mux, sdk, claude, dialect):
    """A token an event: the engine has made at least what the client has read."""
    read, request = 0, {"model": "chat", "messages": MESSAGES, "max_tokens": 3500, "stream": True}
    if dialect == "openai":
        stream = await sdk.chat.completions.create(**request)
    else:
        stream = await claude.messages.create(**request)
    async for event in stream:
        read += bool(event.choices[0].delta.content) if dialect == "openai" else "delta" in event.type
        if read == 50:
            break
    await stream.close()
    (row,) = await rows(mux, 1)
    assert (row["status"], row["estimated"]) == (499, 1)
    assert 50 <= row["output"] < 3500
    prompt = len(json.dumps(MESSAGES))
    assert prompt / 8 < row["input"] < prompt * 2


async def test_the_engines_own_paths(mux):
    headers = {"Authorization": "Bearer key-of-bob"}
    async with aiohttp.ClientSession(headers=headers) as session:
        body = {"model": "chat", "prompt": "hello there", "n_predict": 5}
        async with session.post(f"{mux.url}/completion", json=body) as answer:
            whole = await answer.json()
        async with session.post(f"{mux.url}/completion", json={**body, "stream": True}) as answer:
            assert b"tokens_predicted" in await answer.read()
        async with session.post(f"{mux.url}/tokenize", json={"model": "chat", "content": "a b"}) as answer:
            assert (await answer.json())["tokens"]
    found = await rows(mux, 3)
    assert [(row["input"], row["output"], row["estimated"]) for row in found] == [
        (whole["tokens_evaluated"], 5, 0),
        (whole["tokens_evaluated"], 5, 0),
        (0, 0, 0),
    ]
