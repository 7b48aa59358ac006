"""Clients of one dialect, with the official SDKs, at engines that only speak another."""

from __future__ import annotations

import asyncio
import json
from itertools import permutations
from typing import Any

import anthropic
import openai
import pydantic
import pytest
from aiohttp import web

from llmux.core.phases import Phase
from tests.harness.sdks import anthropic_client, openai_client
from tests.server.house import HOST, until
from tests.targets.dialects import (
    CHAT,
    MESSAGES,
    RESPONSES,
    block,
    call,
    chunk,
    message_end,
    message_start,
    wire,
)
from tests.targets.test_codec_streams import RESPONSE

USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 4,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 6},
}
ARGUMENTS = '{"a":1}'

CHAT_STREAM = wire(
    chunk({"role": "assistant", "content": None, "reasoning_content": "hm"}),
    chunk({"content": "ye"}),
    chunk({"content": "s"}),
    chunk(call(0, "c1", "f", '{"a"')),
    chunk(call(0, arguments=":1}")),
    chunk({}, "tool_calls"),
    chunk(None, usage=USAGE),
    done=True,
)
FUNCTION = {"name": "f", "arguments": ARGUMENTS}
CHAT_WHOLE = {
    "id": "chatcmpl-7",
    "object": "chat.completion",
    "created": 5,
    "model": "e",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "yes",
                "reasoning_content": "hm",
                "tool_calls": [{"id": "c1", "type": "function", "function": FUNCTION}],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": USAGE,
}
MESSAGES_USAGE = {"input_tokens": 4, "cache_read_input_tokens": 6, "output_tokens": 4}
MESSAGES_STREAM = wire(
    message_start(input_tokens=4, cache_read_input_tokens=6),
    *block(0, {"type": "thinking", "thinking": "", "signature": ""}, {"type": "thinking_delta", "thinking": "hm"}),
    *block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "yes"}),
    {"type": "ping"},
    *block(
        2,
        {"type": "tool_use", "id": "c1", "name": "f", "input": {}},
        {"type": "input_json_delta", "partial_json": ""},
        {"type": "input_json_delta", "partial_json": '{"a":'},
        {"type": "input_json_delta", "partial_json": "1}"},
    ),
    *message_end("tool_use", output_tokens=4),
    named=True,
)
MESSAGES_WHOLE = {
    "id": "msg_7",
    "type": "message",
    "role": "assistant",
    "model": "e",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "yes"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": MESSAGES_USAGE,
}
RESPONSES_WHOLE = {
    "id": "resp_7",
    "object": "response",
    "created_at": 5,
    "model": "e",
    "status": "completed",
    "output": [
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {
            "type": "message",
            "id": "m1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "yes", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": ARGUMENTS},
    ],
    "usage": {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 6},
        "output_tokens": 4,
        "total_tokens": 14,
    },
}
SAYS = {
    CHAT: (CHAT_STREAM, CHAT_WHOLE),
    MESSAGES: (MESSAGES_STREAM, MESSAGES_WHOLE),
    RESPONSES: (wire(*(one for one in RESPONSE if one.get("summary_index") != 1), named=True), RESPONSES_WHOLE),
}


class OneDialect:
    """An engine that knows one path. ``stream`` and ``whole`` are what it answers."""

    def __init__(self, dialect) -> None:
        self.dialect = dialect
        self.stream, self.whole = SAYS[dialect]
        self.status = 200
        self.headers: dict[str, str] = {}
        self.piece = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.gone = asyncio.Event()
        self.asked: list[dict[str, Any]] = []
        self.seen: list[web.BaseRequest] = []
        self._runner: web.ServerRunner | None = None
        self.port = 0

    async def start(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._answer, handler_cancellation=True), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, HOST, 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.seen.append(request)
        if request.path != self.dialect.path:
            return web.json_response({"error": {"message": "no such path"}}, status=404)
        document = json.loads(await request.content.read())
        self.asked.append(document)
        if self.status != 200 or not document.get("stream"):
            if isinstance(self.whole, bytes):
                return web.Response(body=self.whole, status=self.status, headers=self.headers)
            return web.json_response(self.whole, status=self.status, headers=self.headers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        step = self.piece or len(self.stream)
        for start in range(0, len(self.stream), step):
            await response.write(self.stream[start : start + step])
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.gone.set()
            raise
        return response


@pytest.fixture
async def serve(house):
    """Serve a model ``m`` whose engine only speaks one dialect."""
    engines = []

    async def start(dialect, **settings):
        engine = OneDialect(dialect)
        await engine.start()
        engines.append(engine)
        mine = {"port": engine.port, "shared_address": False, "apis": [str(dialect)], **settings}
        await house.open({"m": mine, "other": {}})
        return engine

    yield start
    for engine in engines:
        await engine.stop()


@pytest.fixture
async def gpt(house):
    async def open_client():
        return openai_client(f"http://{HOST}:{house.port}")

    return open_client


@pytest.fixture
async def claude(house):
    async def open_client():
        return anthropic_client(f"http://{HOST}:{house.port}")

    return open_client


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
CHAT_TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]
MESSAGES_TOOLS = [{"name": "f", "description": "d", "input_schema": SCHEMA}]
RESPONSES_TOOLS = [{"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": False}]
QUESTION = [{"role": "user", "content": "q"}]


async def ask_chat(client, *, stream):
    if not stream:
        answer = await client.chat.completions.create(model="m", messages=QUESTION, tools=CHAT_TOOLS)
    else:
        options = {"include_usage": True}
        async with client.chat.completions.stream(
            model="m", messages=QUESTION, tools=CHAT_TOOLS, stream_options=options
        ) as events:
            answer = await events.get_final_completion()
    message = answer.choices[0].message
    tool = message.tool_calls[0]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.prompt_tokens_details.cached_tokens == 6
    return (
        message.model_extra["reasoning_content"],
        message.content,
        (tool.id, tool.function.name, json.loads(tool.function.arguments)),
        (answer.usage.prompt_tokens, answer.usage.completion_tokens),
    )


async def ask_messages(client, *, stream):
    fields = {"model": "m", "max_tokens": 9, "messages": QUESTION, "tools": MESSAGES_TOOLS}
    if not stream:
        answer = await client.messages.create(**fields)
    else:
        async with client.messages.stream(**fields) as events:
            answer = await events.get_final_message()
    assert [part.type for part in answer.content] == ["thinking", "text", "tool_use"]
    assert answer.stop_reason == "tool_use"
    thought, text, tool = answer.content
    usage = answer.usage
    assert usage.cache_read_input_tokens == 6
    return (
        thought.thinking,
        text.text,
        (tool.id, tool.name, tool.input),
        (usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens),
    )


async def ask_responses(client, *, stream):
    fields = {"model": "m", "input": "q", "tools": RESPONSES_TOOLS}
    if not stream:
        answer = await client.responses.create(**fields)
    else:
        async with client.responses.stream(**fields) as events:
            answer = await events.get_final_response()
    thought, message, tool = answer.output
    assert answer.status == "completed"
    assert answer.usage.input_tokens_details.cached_tokens == 6
    assert answer.output_text == message.content[0].text
    return (
        thought.summary[0].text,
        answer.output_text,
        (tool.call_id, tool.name, json.loads(tool.arguments)),
        (answer.usage.input_tokens, answer.usage.output_tokens),
    )


ASK = {CHAT: ask_chat, MESSAGES: ask_messages, RESPONSES: ask_responses}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("piece", [0, 7])
@pytest.mark.parametrize(("client", "engine"), list(permutations([CHAT, MESSAGES, RESPONSES], 2)))
async def test_thinking_text_calls_and_usage_reach_every_sdk(serve, gpt, claude, client, engine, piece, stream):
    running = await serve(engine)
    running.piece = piece
    sdk = await (claude if client is MESSAGES else gpt)()
    answer = await ASK[client](sdk, stream=stream)
    assert answer == ("hm", "yes", ("c1", "f", {"a": 1}), (10, 4))
    [asked] = running.asked
    assert asked["model"] == "m"
    assert bool(asked.get("stream")) is stream
    assert len(asked["tools"]) == 1
    await sdk.close()


async def test_an_agent_of_anthropics_at_an_engine_of_chat(serve, claude):
    engine = await serve(CHAT)
    sdk = await claude()
    tools = [{**MESSAGES_TOOLS[0], "cache_control": {"type": "ephemeral"}}]
    fields = {
        "model": "m",
        "max_tokens": 20_000,
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        "tools": tools,
        "thinking": {"type": "enabled", "budget_tokens": 10_000},
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    }
    kinds = []
    async with sdk.messages.stream(messages=QUESTION, **fields) as events:
        kinds += [event.type async for event in events]
        first = await events.get_final_message()
        dropped = events.response.headers["X-LLMux-Dropped"]
    assert kinds.count("message_start") == 1
    assert kinds.count("content_block_stop") == 3
    assert {"thinking", "text", "input_json"} <= set(kinds)
    assert dropped == "system[].cache_control, tools[].cache_control"
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "it is 7"}
    messages = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    engine.stream = wire(chunk({"content": "7"}), chunk({}, "stop"), done=True)
    async with sdk.messages.stream(messages=messages, **fields) as events:
        second = await events.get_final_message()
    assert (second.content[0].text, second.stop_reason) == ("7", "end_turn")
    asked = engine.asked[1]
    assert asked["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "yes",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c1", "type": "function", "function": FUNCTION}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "it is 7"},
    ]
    assert asked["reasoning_effort"] == "medium"
    assert asked["parallel_tool_calls"] is False
    assert asked["stream_options"] == {"include_usage": True}
    await sdk.close()


async def test_an_agent_of_openais_at_an_engine_of_messages(serve, gpt):
    engine = await serve(MESSAGES)
    sdk = await gpt()
    first = await sdk.responses.create(model="m", input="q", instructions="be brief", tools=RESPONSES_TOOLS)
    engine.whole = {**MESSAGES_WHOLE, "content": [{"type": "text", "text": "7"}], "stop_reason": "end_turn"}
    items = [item for item in first.output if item.type != "reasoning"]
    result = {"type": "function_call_output", "call_id": "c1", "output": "it is 7"}
    second = await sdk.responses.create(
        model="m", input=[*QUESTION, *items, result], instructions="be brief", tools=RESPONSES_TOOLS
    )
    assert second.output_text == "7"
    asked = engine.asked[1]
    assert asked["system"] == "be brief"
    assert [turn["role"] for turn in asked["messages"]] == ["user", "assistant", "user"]
    assert asked["messages"][2]["content"] == [{"type": "tool_result", "tool_use_id": "c1", "content": "it is 7"}]
    chat = await sdk.chat.completions.create(
        model="m", messages=[{"role": "developer", "content": "be brief"}, *QUESTION], reasoning_effort="low"
    )
    assert chat.choices[0].message.content == "7"
    assert engine.asked[2]["thinking"] == {"type": "enabled", "budget_tokens": 2048}
    await sdk.close()


# ---- what goes wrong


ERRORS = {
    CHAT: {"error": {"message": "slow down", "type": "x", "code": "y"}},
    MESSAGES: {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}},
}


@pytest.mark.parametrize(("client", "engine"), [(MESSAGES, CHAT), (CHAT, MESSAGES), (RESPONSES, MESSAGES)])
async def test_an_engines_error_keeps_its_status(serve, gpt, claude, client, engine):
    running = await serve(engine)
    running.status, running.whole, running.headers = 429, ERRORS[engine], {"Retry-After": "7"}
    sdk = await (claude if client is MESSAGES else gpt)()
    kind = anthropic.RateLimitError if client is MESSAGES else openai.RateLimitError
    for stream in (False, True):
        with pytest.raises(kind, match="slow down") as caught:
            await ASK[client](sdk, stream=stream)
        assert caught.value.response.headers["retry-after"] == "7"
        assert caught.value.body["error" if client is MESSAGES else "message"]
    await sdk.close()


@pytest.mark.parametrize(("client", "engine"), list(permutations([CHAT, MESSAGES, RESPONSES], 2)))
@pytest.mark.parametrize("how", ["cut", "error"])
async def test_a_stream_that_fails_raises_in_every_sdk(serve, gpt, claude, client, engine, how):
    running = await serve(engine)
    told = {
        CHAT: {"error": {"message": "out of memory"}},
        MESSAGES: {"type": "error", "error": {"type": "api_error", "message": "out of memory"}},
        RESPONSES: {"type": "error", "code": "oom", "message": "out of memory", "param": None},
    }
    events = running.stream.split(b"\n\n")[:4]
    running.stream = b"\n\n".join(events) + b"\n\n"
    if how == "error":
        running.stream += wire(told[engine], named=engine is not CHAT)
    sdk = await (claude if client is MESSAGES else gpt)()
    kind = anthropic.APIError if client is MESSAGES else openai.APIError
    with pytest.raises(kind, match="broke off" if how == "cut" else "out of memory"):
        await ASK[client](sdk, stream=True)
    await sdk.close()


@pytest.mark.parametrize("whole", [b"<html>", b"[]", b"{}", b'{"choices": 5}'])
async def test_an_answer_that_is_none_is_the_engines_fault(serve, house, whole):
    running = await serve(CHAT)
    running.whole = whole
    reply = await house.ask("POST", "/v1/messages", {"model": "m", "max_tokens": 1, "messages": []})
    assert reply.status == 502
    assert reply.json()["type"] == "error"
    assert reply.marked


async def test_what_cannot_be_carried_is_refused_and_wakes_nothing(serve, house):
    running = await serve(MESSAGES)
    reply = await house.ask("POST", "/v1/chat/completions", {"model": "m", "messages": QUESTION, "n": 2})
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "cannot_translate", "n")
    reply = await house.ask("POST", "/v1/chat/completions", b'{"model": "m", "messages": [}')
    assert reply.status == 400
    assert not running.asked
    assert house.switcher.core.state.models["m"].phase is Phase.ASLEEP
    assert house.front._handler.budget.held == 0


async def test_with_lossy_it_is_dropped_and_listed(serve, house):
    running = await serve(MESSAGES, lossy=True)
    body = {"model": "m", "messages": QUESTION, "n": 2, "seed": 7}
    reply = await house.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 200
    assert reply.headers["x-llmux-dropped"] == "n, seed"
    assert not {"n", "seed"} & running.asked[0].keys()
    assert reply.marked
    assert house.front._handler.budget.held == 0


async def test_a_client_whose_dialect_the_engine_speaks_gets_its_bytes(serve, house):
    running = await serve(CHAT)
    sent = b'{"stream":true ,"model":"m","messages":[]}'
    reply = await house.ask("POST", "/v1/chat/completions", sent)
    assert reply.body == CHAT_STREAM
    assert "x-llmux-dropped" not in reply.headers
    assert (await house.ask("POST", "/v1/embeddings", {"model": "m"})).status == 404  # the engine's
    assert [request.path for request in running.seen] == ["/v1/chat/completions", "/v1/embeddings"]


async def test_aliases_upstream_models_and_variants_are_translated_too(serve, house):
    variants = {"m:hot": {"set": {"temperature": 1.5}}}
    running = await serve(CHAT, aliases=["claude-x"], upstream_model="served", variants=variants)
    for name in ("claude-x", "m:hot"):
        reply = await house.ask("POST", "/v1/messages?beta=true", {"model": name, "max_tokens": 1, "messages": []})
        assert reply.status == 200
    assert [asked["model"] for asked in running.asked] == ["served", "served"]
    assert running.asked[1]["temperature"] == 1.5
    assert running.seen[0].path_qs == "/v1/chat/completions"


async def test_an_engine_that_does_not_stream_is_streamed(serve, house):
    running = await serve(CHAT)
    running.status = 201  # whatever was asked for
    body = {"model": "m", "max_tokens": 1, "messages": [], "stream": True}
    reply = await house.ask("POST", "/v1/messages", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


@pytest.mark.parametrize(
    ("stream", "kind"),
    [(False, "text/event-stream"), (False, "application/json"), (True, "application/json")],
)
@pytest.mark.parametrize(("client", "engine"), list(permutations([CHAT, MESSAGES, RESPONSES], 2)))
async def test_a_stream_that_was_not_asked_for_or_is_not_called_one(
    serve, gpt, claude, house, client, engine, stream, kind
):
    running = await serve(engine)
    running.whole, running.headers = running.stream, {"Content-Type": kind}
    running.status = 201  # whatever was asked for
    sdk = await (claude if client is MESSAGES else gpt)()
    answer = await ASK[client](sdk, stream=stream)
    assert answer == ("hm", "yes", ("c1", "f", {"a": 1}), (10, 4))
    [row] = (await house.ask("GET", "/llmux/activity")).json()["requests"]
    assert (row["input_tokens"], row["output_tokens"]) == (4 if engine is MESSAGES else 10, 4)
    await sdk.close()


async def test_a_stream_that_was_not_asked_for_and_fails_is_no_answer(serve, house):
    running = await serve(CHAT)
    running.whole = wire(chunk({"content": "a"}), {"error": {"message": "out of memory"}})
    body = {"model": "m", "max_tokens": 1, "messages": QUESTION}
    reply = await house.ask("POST", "/v1/messages", body)
    assert reply.status == 502
    assert "out of memory" in reply.error["message"]


async def test_a_client_of_http_1_0(serve, house):
    await serve(CHAT)
    body = json.dumps({"model": "m", "max_tokens": 1, "messages": [], "stream": True}).encode()
    head = f"POST /v1/messages HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    reply = await house.raw(head + body)
    assert reply.status == 200
    assert "transfer-encoding" not in reply.headers
    assert reply.body.endswith(b'data: {"type":"message_stop"}\n\n')


async def test_compression_is_not_asked_for(serve, house):
    running = await serve(CHAT)
    body = {"model": "m", "max_tokens": 1, "messages": []}
    assert (await house.ask("POST", "/v1/messages", body, Accept_Encoding="gzip")).status == 200
    assert "Accept-Encoding" not in running.seen[0].headers
    running.headers = {"Content-Encoding": "gzip"}
    assert (await house.ask("POST", "/v1/messages", body)).status == 502


async def test_a_client_that_leaves_in_mid_stream_is_noticed(serve, house):
    running = await serve(CHAT)
    running.hold.clear()
    line = await house.begin(
        "POST", "/v1/messages", {"model": "m", "max_tokens": 1, "messages": [], "stream": True}
    )
    assert (await line.head()).status == 200
    await line.reader.readuntil(b"message_start")
    assert house.in_flight("m") == 1
    line.abort()
    await asyncio.wait_for(running.gone.wait(), 60)
    await until(lambda: house.in_flight("m") == 0)
    assert house.front._handler.budget.held == 0


@pytest.mark.parametrize(
    ("engine", "client", "path", "ping"),
    [
        (CHAT, MESSAGES, "/v1/messages", b": 3\n\n"),
        (MESSAGES, CHAT, "/v1/chat/completions", b'event: ping\ndata: {"type": "ping"}\n\n'),
        (CHAT, RESPONSES, "/v1/responses", b":\n\n"),
    ],
)
async def test_what_keeps_a_connection_open_reaches_the_client(
    serve, house, gpt, claude, engine, client, path, ping
):
    running = await serve(engine)
    answer, running.stream = running.stream, ping
    running.hold.clear()
    line = await house.begin(
        "POST", path, {"model": "m", "max_tokens": 1, "messages": [], "input": "q", "stream": True}
    )
    assert (await line.head()).status == 200
    await line.reader.readuntil(b"\r\n: ping\n\n\r\n")
    running.hold.set()
    assert b"broke off" in await line.closed()
    running.stream, running.piece = ping + answer, len(ping)
    sdk = await (claude if client is MESSAGES else gpt)()
    assert (await ASK[client](sdk, stream=True))[1:3]
    await sdk.close()


async def test_usage_is_counted_from_what_the_engine_said(serve, house):
    await serve(MESSAGES)
    body = {"model": "m", "messages": QUESTION, "stream": True}  # this client is told nothing of it
    assert b"usage" not in (await house.ask("POST", "/v1/chat/completions", body)).body
    assert (await house.ask("POST", "/v1/chat/completions", {**body, "stream": False})).status == 200
    rows = (await house.ask("GET", "/llmux/activity")).json()["requests"]
    assert [(row["input_tokens"], row["output_tokens"]) for row in rows] == [(4, 4), (4, 4)]


async def test_a_large_request_is_translated_from_its_file(serve, house):
    running = await serve(CHAT)
    picture = {"type": "base64", "media_type": "image/png", "data": "A" * 3_000_000}
    content = [{"type": "image", "source": picture}, {"type": "text", "text": "see"}]
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
    reply = await house.ask("POST", "/v1/messages", body)
    assert reply.status == 200
    url = running.asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url == "data:image/png;base64," + "A" * 3_000_000


# ---- what SDKs make of more than the usual


PAIR = [("a1", "f", {"a": 1}), ("b2", "g", {"b": [2, "}"]})]


def pair_from(dialect):
    """Return two calls, of which the pieces come in turns where the dialect allows it."""
    texts = [json.dumps(arguments) for _, _, arguments in PAIR]
    halves = [(text[:4], text[4:]) for text in texts]
    if dialect is CHAT:
        starts = [chunk(call(at, id_, name, "")) for at, (id_, name, _) in enumerate(PAIR)]
        turns = [chunk(call(at, arguments=halves[at][half])) for half in (0, 1) for at in (0, 1)]
        return wire(
            chunk({"role": "assistant"}), *starts, *turns, chunk({}, "stop"), chunk(None, usage=USAGE), done=True
        )
    if dialect is MESSAGES:
        blocks = [
            block(
                at,
                {"type": "tool_use", "id": id_, "name": name, "input": {}},
                *({"type": "input_json_delta", "partial_json": half} for half in halves[at]),
            )
            for at, (id_, name, _) in enumerate(PAIR)
        ]
        turns = [event for events in zip(*blocks, strict=True) for event in events]
        return wire(message_start(input_tokens=4), *turns, *message_end("tool_use", output_tokens=4), named=True)
    items = [
        {"type": "function_call", "id": f"fc{at}", "call_id": id_, "name": name, "arguments": texts[at]}
        for at, (id_, name, _) in enumerate(PAIR)
    ]
    begun = [{"type": "response.created", "response": {**RESPONSES_WHOLE, "output": [], "status": "in_progress"}}]
    for at, item in enumerate(items):
        begun.append({"type": "response.output_item.added", "output_index": at, "item": {**item, "arguments": ""}})
    for half in (0, 1):
        for at, item in enumerate(items):
            more = {"type": "response.function_call_arguments.delta", "output_index": at, "item_id": item["id"]}
            begun.append({**more, "delta": halves[at][half]})
    ends = [
        {"type": "response.output_item.done", "output_index": at, "item": item} for at, item in enumerate(items)
    ]
    last = {"type": "response.completed", "response": {**RESPONSES_WHOLE, "output": items}}
    return wire(*begun, *ends, last, named=True)


async def pair_of(client, sdk):
    if client is MESSAGES:
        async with sdk.messages.stream(model="m", max_tokens=9, messages=QUESTION, tools=MESSAGES_TOOLS) as events:
            answer = await events.get_final_message()
        assert answer.stop_reason == "tool_use"
        return [(block.id, block.name, block.input) for block in answer.content]
    if client is CHAT:
        async with sdk.chat.completions.stream(model="m", messages=QUESTION, tools=CHAT_TOOLS) as events:
            choice = (await events.get_final_completion()).choices[0]
        assert choice.finish_reason == "tool_calls"
        return [
            (each.id, each.function.name, json.loads(each.function.arguments))
            for each in choice.message.tool_calls
        ]
    async with sdk.responses.stream(model="m", input="q", tools=RESPONSES_TOOLS) as events:
        output = (await events.get_final_response()).output
    return [(item.call_id, item.name, json.loads(item.arguments)) for item in output]


@pytest.mark.parametrize("piece", [0, 11])
@pytest.mark.parametrize(("client", "engine"), list(permutations([CHAT, MESSAGES, RESPONSES], 2)))
async def test_calls_whose_pieces_come_in_turns_reach_every_sdk(serve, gpt, claude, client, engine, piece):
    running = await serve(engine)
    running.stream, running.piece = pair_from(engine), piece
    sdk = await (claude if client is MESSAGES else gpt)()
    assert await pair_of(client, sdk) == PAIR
    await sdk.close()


PIXEL = "iVBORw0KGgo="


async def test_images_of_anthropics_reach_an_engine_of_chat(serve, claude):
    inline = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    away = {"type": "image", "source": {"type": "url", "url": "https://h/x.png"}}
    engine = await serve(CHAT)
    sdk = await claude()
    content = [inline, away, {"type": "text", "text": "q"}]
    await sdk.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": content}])
    assert engine.asked[0]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
        {"type": "image_url", "image_url": {"url": "https://h/x.png"}},
        {"type": "text", "text": "q"},
    ]
    await sdk.close()


async def test_images_of_openais_reach_an_engine_of_messages(serve, gpt):
    engine = await serve(MESSAGES)
    sdk = await gpt()
    url = f"data:image/png;base64,{PIXEL}"
    shown = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "q"}]
    await sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": shown}])
    shown = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": "q"}]
    await sdk.responses.create(model="m", input=[{"role": "user", "content": shown}])
    assert len(engine.asked) == 2
    for asked in engine.asked:
        assert asked["messages"][0]["content"] == [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
            {"type": "text", "text": "q"},
        ]
    await sdk.close()


async def test_stop_sequences_both_ways(serve, claude):
    engine = await serve(CHAT)
    stopped = chunk({}, "stop")
    stopped["choices"][0]["stop_reason"] = "END"  # as vLLM says which
    engine.stream = wire(chunk({"content": "a"}), stopped, done=True)
    sdk = await claude()
    async with sdk.messages.stream(
        model="m", max_tokens=9, messages=QUESTION, stop_sequences=["END", "x"]
    ) as events:
        answer = await events.get_final_message()
    assert engine.asked[0]["stop"] == ["END", "x"]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "END")
    await sdk.close()


async def test_stop_sequences_of_openais(serve, gpt):
    engine = await serve(MESSAGES)
    engine.whole = {**MESSAGES_WHOLE, "content": [{"type": "text", "text": "a"}], "stop_reason": "stop_sequence"}
    sdk = await gpt()
    answer = await sdk.chat.completions.create(model="m", messages=QUESTION, stop="END")
    assert engine.asked[0]["stop_sequences"] == ["END"]
    assert answer.choices[0].finish_reason == "stop"
    await sdk.close()


class Wanted(pydantic.BaseModel):
    """What the SDKs are to parse an answer into."""

    a: int
    names: list[str]


async def test_sdks_parse_structured_output_from_engines_of_other_dialects(serve, gpt):
    engine = await serve(MESSAGES)
    said = '{"a":1,"names":["x"]}'
    engine.whole = {**MESSAGES_WHOLE, "content": [{"type": "text", "text": said}], "stop_reason": "end_turn"}
    sdk = await gpt()
    chat = await sdk.chat.completions.parse(model="m", messages=QUESTION, response_format=Wanted)
    assert chat.choices[0].message.parsed == Wanted(a=1, names=["x"])
    answer = await sdk.responses.parse(model="m", input="q", text_format=Wanted)
    assert answer.output_parsed == Wanted(a=1, names=["x"])
    for asked in engine.asked:
        assert asked["output_config"]["format"]["schema"]["required"] == ["a", "names"]
    await sdk.close()


async def test_anthropics_sdk_parses_structured_output_from_an_engine_of_chat(serve, claude):
    engine = await serve(CHAT)
    message = {"role": "assistant", "content": '{"a":1,"names":["x"]}'}
    engine.whole = {**CHAT_WHOLE, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    sdk = await claude()
    answer = await sdk.messages.parse(model="m", max_tokens=9, messages=QUESTION, output_format=Wanted)
    assert answer.parsed_output == Wanted(a=1, names=["x"])
    asked = engine.asked[0]["response_format"]
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["schema"]["required"] == ["a", "names"]
    await sdk.close()


@pytest.mark.parametrize("engine", [CHAT, RESPONSES])
async def test_anthropics_sdk_when_nothing_is_said(serve, claude, engine):
    running = await serve(engine)
    running.stream = b"data: [DONE]\n\n"
    sdk = await claude()
    with pytest.raises(anthropic.APIError):
        async with sdk.messages.stream(model="m", max_tokens=9, messages=QUESTION) as events:
            await events.get_final_message()
    await sdk.close()
