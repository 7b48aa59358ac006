"""What engines send that no specification has, and what would cost a codec more than it is worth."""

import json
import math
import time

import pytest

from llmux.targets.codecs import Translation
from llmux.targets.codecs.sse import MOST, EventParser
from tests.targets.dialects import (
    ASKED,
    CHAT,
    MESSAGES,
    RESPONSES,
    block,
    call,
    chunk,
    message_end,
    message_start,
    told,
    translate,
    wire,
)


def from_chat(*chunks, to=MESSAGES, done=True, **more):
    return translate(to, CHAT, wire(*chunks, done=done), **more)


def whole(message, finish="tool_calls", client=MESSAGES):
    document = {"id": "1", "model": "e", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    translation = Translation(client, CHAT)
    translation.request(ASKED[client])
    return translation.answer(document)


def reason_of(documents):
    return next(one["delta"]["stop_reason"] for one in documents if one["type"] == "message_delta")


# ---- counts


@pytest.mark.parametrize("odd", [[], {}, "x", True, math.nan, math.inf, -1e400, 1.5, 10**400])
@pytest.mark.parametrize("client", [MESSAGES, RESPONSES, CHAT])
def test_a_count_that_is_none_does_not_end_the_answer(client, odd):
    if client is CHAT:
        text = block(0, {"type": "text", "text": "hi"})
        end = message_end(output_tokens=odd, cache_read_input_tokens=odd, input_tokens=odd)
        asked = {"stream_options": {"include_usage": True}}
        documents = translate(CHAT, MESSAGES, wire(message_start(output_tokens=odd), *text, *end), asked=asked)
    else:
        usage = {"prompt_tokens": odd, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": odd}}
        documents = from_chat(chunk({"content": "hi"}), chunk({}, "stop"), chunk(usage=usage), to=client)
    ends = {MESSAGES: "message_stop", RESPONSES: "response.completed", CHAT: "[DONE]"}
    assert documents[-1]["type"] == ends[client]
    json.dumps(documents, allow_nan=False)


# ---- calls


@pytest.mark.parametrize("ids", [("c", "c"), (None, None), ("", ""), ("c", None)])
def test_calls_with_one_id_are_two_calls_and_get_two(ids):
    calls = [
        {
            "type": "function",
            "function": {"name": "f", "arguments": json.dumps({"a": at})},
            **({"id": id_} if id_ is not None else {}),
        }
        for at, id_ in enumerate(ids)
    ]
    content = whole({"role": "assistant", "content": None, "tool_calls": calls})["content"]
    assert [block["input"] for block in content] == [{"a": 0}, {"a": 1}]
    assert len({block["id"] for block in content}) == 2
    assert all(block["id"] for block in content)


def test_calls_with_one_id_in_a_stream_are_told_apart_by_their_index():
    first, second = call(0, "c", "f", '{"a":0}'), call(1, "c", "f", '{"a":')
    rest = call(1, "c", arguments="1}")
    got = told(from_chat(chunk(first), chunk(second), chunk(rest), chunk({}, "tool_calls")))
    assert [each["input"] for each in got] == [{"a": 0}, {"a": 1}]
    assert len({each["id"] for each in got}) == 2


@pytest.mark.parametrize("to", [MESSAGES, RESPONSES])
def test_an_engine_that_says_it_calls_and_does_not(to):
    got = from_chat(chunk({"content": "hi"}), chunk({}, "tool_calls"), to=to)
    if to is MESSAGES:
        assert reason_of(got) == "end_turn"  # an agent would look for a call
    assert whole({"role": "assistant", "content": "hi"})["stop_reason"] == "end_turn"


# ---- errors that are told in odd ways


@pytest.mark.parametrize("to", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("begun", [[], [chunk({"content": "a"})]])
def test_an_error_without_its_envelope(to, begun):
    odd = {"object": "error", "message": "no memory", "type": "InternalServerError", "code": 500}
    got = from_chat(*begun, odd, to=to)
    assert got[-1]["type"] == "error"
    assert got[-1]["error"]["message"] == "no memory"


@pytest.mark.parametrize("to", [MESSAGES, RESPONSES])
def test_a_stream_that_holds_nothing_but_its_end(to):
    got = translate(to, CHAT, b"data: [DONE]\n\n")
    assert got[-1]["type"] == "error"
    assert [one["type"] for one in got].count("message_stop") == 0


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"loc": ["body", "messages"], "msg": "field required"}]}, "field required"),
        ({"object": "error", "message": "bad", "code": 400}, "bad"),
        ({"error": "model 'x' not found"}, "model 'x' not found"),
        ({"error": {"detail": "quota"}}, "quota"),
        ({"error": {"error": "deep"}}, "deep"),
        ([{"error": {"code": 400, "message": "listed"}}], "listed"),
    ],
)
@pytest.mark.parametrize(("client", "engine"), [(MESSAGES, CHAT), (CHAT, MESSAGES), (RESPONSES, CHAT)])
def test_whatever_an_engine_says_of_an_error_is_told(client, engine, document, said):
    shown = Translation(client, engine).error(400, document)
    assert said in shown["error"]["message"]


# ---- parts


def test_thoughts_as_parts_of_the_content():  # as Mistral's
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    got = told(
        from_chat(
            chunk({"content": [thought]}), chunk({"content": [{"type": "text", "text": "yes"}]}), chunk({}, "stop")
        )
    )
    assert [each["type"] for each in got] == ["thinking", "text"]
    assert (got[0]["thinking"], got[1]["text"]) == ("hm", "yes")
    plain = {"type": "thinking", "thinking": "hm"}
    assert whole({"content": [plain, {"type": "text", "text": "yes"}]}, "stop")["content"][0]["thinking"] == "hm"


@pytest.mark.parametrize(
    "delta",
    [
        {"content": [{"type": "text", "text": ""}]}, {"content": []}, {"content": ""},
        {"content": [{"type": "odd"}]},
        {"content": None, "tool_calls": None, "reasoning_content": ""}, {"refusal": ""}, {"tool_calls": []},
        {"reasoning_details": []}, {},
    ],
)  # fmt: skip
def test_what_says_nothing_makes_no_block(delta):
    got = from_chat(
        chunk({"role": "assistant", **delta}), chunk(delta), chunk({"content": "a"}), chunk(delta, "stop")
    )
    assert told(got) == [{"type": "text", "text": "a"}]


def test_blocks_that_only_a_provider_has_are_left_out_and_the_rest_is_in_order():
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}
    cited = {"type": "citations_delta", "citation": {}}
    events = [
        *block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "a"}),
        *block(1, search, {"type": "input_json_delta", "partial_json": '{"q":'}),
        *block(2, found),
        *block(3, {"type": "text", "text": ""}, cited, {"type": "text_delta", "text": "b"}),
    ]
    got = translate(CHAT, MESSAGES, wire(message_start(), *events, *message_end("pause_turn"), named=True))
    said = [one["choices"][0]["delta"].get("content") or "" for one in got if one.get("choices")]
    assert "".join(said) == "ab"


# ---- what must not take long, nor much room


def seconds(work):
    best = float("inf")
    for _ in range(3):
        begun = time.process_time()
        work()
        best = min(best, time.process_time() - begun)
    return best


def test_a_long_event_in_small_pieces_costs_what_its_length_does():
    def feed(size):
        parser = EventParser()
        for _ in range(size // 64):
            parser.feed(b"x" * 64)
        return parser.feed(b"\n\n")

    short, long = seconds(lambda: feed(1 << 19)), seconds(lambda: feed(1 << 22))
    assert long < 40 * max(short, 0.001)  # eight times as long; if each piece copied all before it, 64 times


def test_an_event_without_an_end_is_given_up():
    translation = Translation(MESSAGES, CHAT)
    translation.request(ASKED[MESSAGES])
    stream = translation.stream("m")
    sent, got = 0, b""
    while not got and sent <= 2 * MOST:
        got = stream.feed(b"data: " + b"x" * (1 << 20))
        sent += 1 << 20
    assert stream.over
    assert stream.failed
    assert sent <= MOST + (2 << 20)
    assert b"too long" in got


def test_calls_in_turns_cost_what_their_length_does():
    def feed(size):
        pieces = [chunk(call(0, "a", "f", '{"x":"')), chunk(call(1, "b", "g", '{"y":"'))]
        pieces += [chunk(call(at % 2, arguments="{}" * 8)) for at in range(size)]
        return from_chat(
            *pieces, chunk(call(0, arguments='"}')), chunk(call(1, arguments='"}')), chunk({}, "tool_calls")
        )

    assert [each["input"]["xy"[at]][:4] for at, each in enumerate(told(feed(10)))] == ["{}{}", "{}{}"]
    short, long = seconds(lambda: feed(500)), seconds(lambda: feed(4000))
    assert long < 40 * max(short, 0.001)
