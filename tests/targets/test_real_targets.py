"""Variants, virtual models and dialects with real engines (llama.cpp's server) and the official SDKs.

llama.cpp speaks all three dialects. `apis` keeps llmux from passing them through, so that all of what an SDK gets
here was translated from what the engine said in another one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import anthropic
import pytest

from tests.engine.mux import LLMUX, Engine, Mux
from tests.engine.real import with_tools
from tests.harness.sdks import anthropic_client, openai_client
from tests.harness.waiting import PATIENCE

QUESTION = [{"role": "user", "content": "wake up"}]
TOKENS = 12
ENGINES = {
    "chat": Engine(settings={"apis": ["chat"], "variants": {"chat:short": {"cap": {"max_tokens": 3}}}}),
    "messages": Engine(settings={"apis": ["messages"]}),
    "responses": Engine(settings={"apis": ["responses"]}),
}
VIRTUAL = {"warm": {"awake": ["messages", "chat"]}, "brief": {"first": ["chat:short"]}}


@pytest.fixture(scope="module")
def mux(tmp_path_factory) -> Iterator[Mux]:
    folder: Path = tmp_path_factory.mktemp("targets")
    mux = Mux(folder, ENGINES, virtual=VIRTUAL, policy={"use": "fifo"})
    mux.start()
    try:
        yield mux
        assert mux.stop() == 0
        assert "Traceback" not in mux.said()
        assert not mux.engine_pids()
    finally:
        mux.clean_up()


@pytest.fixture
async def gpt(mux):
    async with openai_client(mux.url) as client:
        yield client


@pytest.fixture
async def claude(mux):
    async with anthropic_client(mux.url) as client:
        yield client


@pytest.mark.parametrize("model", ["chat", "responses"])
async def test_anthropics_sdk_at_an_engine_that_does_not_speak_messages(claude, model):
    fields = {"model": model, "max_tokens": TOKENS, "messages": QUESTION, "system": "be brief"}
    fields["extra_body"] = {"temperature": 0.0}
    whole = await claude.messages.create(**fields)
    reason = "end_turn" if model == "responses" else "max_tokens"  # this engine's responses do not tell
    assert (whole.stop_reason, whole.usage.output_tokens) == (reason, TOKENS)
    assert whole.model == model
    assert whole.id.removeprefix("msg_").startswith(("chatcmpl-", "resp_"))
    async with claude.messages.stream(**fields) as events:
        pieces = [text async for text in events.text_stream]
        final = await events.get_final_message()
    assert len(pieces) > 1
    assert final.content[0].text == "".join(pieces) == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (reason, TOKENS)
    assert final.usage.input_tokens > 0


@pytest.mark.parametrize("model", ["messages", "responses"])
async def test_openais_chat_at_an_engine_that_does_not_speak_chat(gpt, model):
    fields = {"model": model, "max_tokens": TOKENS, "messages": QUESTION, "temperature": 0.0}
    whole = await gpt.chat.completions.create(**fields)
    reason = "stop" if model == "responses" else "length"  # this engine's responses do not tell
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == (reason, TOKENS)
    text, usage = "", None
    stream = await gpt.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    async for piece in stream:
        usage = piece.usage or usage
        text += piece.choices[0].delta.content or "" if piece.choices else ""
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == TOKENS


@pytest.mark.parametrize("model", ["chat", "messages"])
async def test_openais_responses_at_an_engine_that_does_not_speak_them(gpt, model):
    fields = {"model": model, "max_output_tokens": TOKENS, "input": "wake up", "temperature": 0.0}
    whole = await gpt.responses.create(**fields)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.usage.output_tokens == TOKENS
    kinds, text = [], ""
    async for event in await gpt.responses.create(**fields, stream=True):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == whole.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"


async def test_tools_reach_the_engine(claude):
    tools = [{"name": "look", "description": "look", "input_schema": {"type": "object", "properties": {}}}]
    answer = await claude.messages.create(model="chat", max_tokens=TOKENS, messages=QUESTION, tools=tools)
    with_tools = answer.usage.input_tokens
    plain = await claude.messages.create(model="chat", max_tokens=TOKENS, messages=QUESTION)
    assert with_tools >= plain.usage.input_tokens
    error = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    with pytest.raises(anthropic.APIStatusError) as refused:  # it has no eyes, and says so in its own dialect
        await claude.messages.create(model="chat", max_tokens=1, messages=[{"role": "user", "content": [error]}])
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"]["message"]


async def test_a_variant_and_virtual_models(mux, gpt):
    answer = await gpt.chat.completions.with_raw_response.create(
        model="chat:short", max_tokens=TOKENS, messages=QUESTION
    )
    assert answer.parse().usage.completion_tokens == 3
    assert answer.headers["x-llmux-served-by"] == "chat"
    assert answer.headers["x-llmux-variant"] == "chat:short"
    before = mux.said().count("switch_started")
    answer = await gpt.chat.completions.with_raw_response.create(model="warm", max_tokens=1, messages=QUESTION)
    assert answer.headers["x-llmux-served-by"] == "chat"  # which is awake, though the other one is named first
    answer = await gpt.chat.completions.create(model="brief", max_tokens=TOKENS, messages=QUESTION)
    assert answer.usage.completion_tokens == 3
    assert mux.said().count("switch_started") == before
    listed = {model.id async for model in await gpt.models.list()}
    assert {"chat", "chat:short", "warm", "brief"} <= listed


async def test_a_count_by_template_and_tokenizer_is_the_engines_own(mux, claude, gpt):
    fields = {"messages": [*QUESTION, {"role": "assistant", "content": "no"}, *QUESTION], "system": "be brief"}
    fields["tools"] = [
        {"name": "look", "description": "look", "input_schema": {"type": "object", "properties": {}}}
    ]
    await gpt.chat.completions.create(model="chat", max_tokens=1, messages=QUESTION)
    answer = await claude.messages.with_raw_response.count_tokens(model="chat", **fields)
    assert "x-llmux-estimated" not in answer.headers
    url = f"http://127.0.0.1:{mux.ports['chat']}"
    async with anthropic_client(url) as engine:
        own = await engine.messages.count_tokens(model="chat", **fields)
    assert (await answer.parse()).input_tokens == own.input_tokens
    asleep = await claude.messages.with_raw_response.count_tokens(model="messages", **fields)
    assert asleep.headers["x-llmux-estimated"] == "true"
    assert mux.phase("chat") == "awake"


def test_what_these_engines_speak_is_found_out(mux):
    said = check(mux, "--probe", "--wake")
    dialects = "chat, completions, messages, responses"
    for model, apis in (("chat", "chat"), ("messages", "messages"), ("responses", "responses")):
        assert f"model {model} speaks {dialects}, count_tokens; not embeddings" in said
        assert (
            f"models.{model}: write `apis: [{dialects}, count_tokens]`: it speaks more than its `apis` state"
            in said
        )
        assert apis not in said.partition(f"models.{model}: ")[2].partition("state (")[2].partition(")")[0].split(
            ", "
        )
    before = mux.said().count("switch_started")
    assert check(mux, "--probe").count("asleep, and not asked") == 2
    assert mux.said().count("switch_started") == before


def check(mux: Mux, *options: str) -> str:
    command = [LLMUX, "check", *options, mux.config]
    done = subprocess.run(command, env=with_tools(), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
