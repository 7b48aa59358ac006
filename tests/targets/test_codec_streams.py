"""Streams, translated: the cases in which gateways are known to lose something."""

import json

import pytest

from llmux.targets.codecs import Translation
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
    read,
    requested,
    told,
    translate,
    wire,
)

USAGE = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}


def from_chat(*chunks, to=MESSAGES, done=True, **more):
    return translate(to, CHAT, wire(*chunks, done=done), **more)


def translate_as_it_comes(*before):
    """Return what translates a further event of chat for a client of messages."""
    translation = Translation(MESSAGES, CHAT)
    translation.request(ASKED[MESSAGES])
    stream = translation.stream()
    stream.feed(wire(*before))
    return lambda event: read(stream.feed(wire(event)))


def stop_of(documents):
    return next(one["delta"] for one in documents if one["type"] == "message_delta")


def output_of(documents):
    return documents[-1]["response"]["output"]


# ---- 1. tool arguments in the chunk that begins the call


def test_arguments_that_come_with_the_start_of_the_call_are_kept():
    got = from_chat(chunk(call(0, "c1", "f", '{"a":')), chunk(call(0, arguments="1}")), chunk({}, "tool_calls"))
    assert told(got) == [{"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}]
    whole = from_chat(chunk(call(0, "c1", "f", '{"a":1}')), chunk({}, "tool_calls"), to=RESPONSES)
    assert output_of(whole)[0]["arguments"] == '{"a":1}'


def test_arguments_that_an_engine_of_messages_puts_in_the_start_are_kept():
    start = block(0, {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}})
    got = translate(CHAT, MESSAGES, wire(message_start(), *start, *message_end("tool_use"), named=True))
    calls = [one["choices"][0]["delta"].get("tool_calls", [{}])[0] for one in got if one.get("choices")]
    assert "".join(each.get("function", {}).get("arguments", "") for each in calls) == '{"a":1}'


def test_arguments_that_are_an_object_become_text():
    assert told(from_chat(chunk(call(0, "c1", "f", {"a": 1})), chunk({}, "stop")))[0]["input"] == {"a": 1}


# ---- 2. several calls


SEVERAL = [
    {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
    {"type": "tool_use", "id": "c2", "name": "g", "input": {"b": 2}},
]


@pytest.mark.parametrize(
    "chunks",
    [
        # one after the other
        [
            call(0, "c1", "f", ""),
            call(0, arguments='{"a":1}'),
            call(1, "c2", "g", ""),
            call(1, arguments='{"b":2}'),
        ],
        # both begun before either has arguments; in turns
        [
            call(0, "c1", "f", ""),
            call(1, "c2", "g", ""),
            call(0, arguments='{"a"'),
            call(1, arguments='{"b":'),
            call(0, arguments=":1}"),
            call(1, arguments="2}"),
        ],
        # both in one chunk
        [
            {
                "tool_calls": call(0, "c1", "f", '{"a":1}')["tool_calls"]
                + call(1, "c2", "g", '{"b":2}')["tool_calls"]
            }
        ],
        # without an index, and all with the same
        [call(None, "c1", "f", '{"a":1}'), call(None, "c2", "g", '{"b":2}')],
        [call(0, "c1", "f", '{"a":1}'), call(0, "c2", "g", '{"b":2}')],
        # in the wrong order
        [call(1, "c1", "f", '{"a":1}'), call(0, "c2", "g", '{"b":2}')],
        # the name again in every piece
        [call(0, "c1", "f", '{"a"'), call(0, "c1", "f", ":1}"), call(1, "c2", "g", '{"b":2}')],
    ],
)
def test_calls_stay_apart(chunks):
    chunks = [chunk(each) for each in chunks]
    assert told(from_chat(*chunks, chunk({}, "tool_calls"))) == SEVERAL
    items = output_of(from_chat(*chunks, chunk({}, "tool_calls"), to=RESPONSES))
    assert [(item["call_id"], json.loads(item["arguments"])) for item in items] == [
        ("c1", {"a": 1}),
        ("c2", {"b": 2}),
    ]


def test_calls_without_index_and_id_are_told_apart_by_their_names():
    got = told(
        from_chat(chunk(call(None, None, "f", '{"a":1}')), chunk(call(None, None, "g", "{}")), chunk({}, "stop"))
    )
    assert [(each["name"], each["input"]) for each in got] == [("f", {"a": 1}), ("g", {})]
    assert len({each["id"] for each in got}) == 2


@pytest.mark.parametrize(
    "chunks",
    [
        [call(0, "c1"), call(0, None, "f", '{"a"'), call(0, arguments=":1}")],
        [call(0, "c1", "", ""), call(0, "c1", "f", '{"a":1}')],
        [call(0, "c1", arguments='{"a"'), call(0, None, "f", ":1}")],
        [call(0, "c1", "f", '{"a"'), call(0, "", "", ":1}")],
    ],
)
def test_a_name_may_come_after_the_id(chunks):
    sent = wire(*(chunk(one) for one in chunks), chunk({}, "tool_calls"), done=True)
    [got] = told(translate(MESSAGES, CHAT, sent))
    assert (got["id"], got["name"], got["input"]) == ("c1", "f", {"a": 1})


def test_a_name_that_never_comes_is_none():
    sent = wire(chunk(call(0, "c1", arguments="{}")), chunk({}, "tool_calls"), done=True)
    [got] = told(translate(MESSAGES, CHAT, sent))
    assert (got["id"], got["name"]) == ("c1", "")


@pytest.mark.parametrize("names", ["fg", "ff"])
def test_calls_with_one_index_and_no_ids_are_told_apart_when_one_is_whole(names):
    first, second = (chunk(call(0, "", name, f'{{"a":{n}}}')) for n, name in enumerate(names))
    again = chunk(call(0, "", names[1], ""))  # says nothing new
    got = told(translate(MESSAGES, CHAT, wire(first, second, again, chunk({}, "stop"), done=True)))
    assert [(one["name"], one["input"]) for one in got] == [(names[0], {"a": 0}), (names[1], {"a": 1})]
    assert len({one["id"] for one in got}) == 2


def test_arguments_may_begin_with_an_empty_object_that_means_nothing():
    pieces = [call(0, "a", "f", "{}"), call(0, arguments='{"a"'), call(0, arguments=":1}")]
    for more in ([], [call(1, "b", "g", "{}")], [call(1, "b", "g", '{"b":2}')]):
        got = told(from_chat(*(chunk(one) for one in [*pieces, *more]), chunk({}, "stop")))
        inputs = [json.loads(one["tool_calls"][0]["function"]["arguments"]) for one in more]
        assert [one["input"] for one in got] == [{"a": 1}, *inputs]


def test_arguments_that_are_null_are_none():
    made = call(0, "a", "f", "null")
    [got] = told(from_chat(chunk(made), chunk({}, "stop")))
    assert got["input"] == {}
    translation = Translation(MESSAGES, CHAT)
    whole = translation.answer({"choices": [{"message": made, "finish_reason": "tool_calls"}]})
    assert whole["content"][0]["input"] == {}
    pieces = [call(0, "a", "f", '{"a":'), call(0, arguments="null"), call(0, arguments="}")]
    [got] = told(from_chat(*(chunk(one) for one in pieces), chunk({}, "stop")))
    assert got["input"] == {"a": None}


def test_an_empty_object_is_all_of_the_arguments_when_something_else_follows():
    bare = chunk(call(0, "a", "f", "{}"))
    parser = translate_as_it_comes(bare)
    assert [one["type"] for one in parser(chunk(call(1, "b", "g", '{"b":2}')))][:2] == [
        "content_block_delta",
        "content_block_stop",
    ]
    got = told(from_chat(bare, chunk({"content": "so"}), chunk({}, "stop")))
    assert (got[0]["input"], got[1]["text"]) == ({}, "so")
    got = told(from_chat(chunk(call(0, "", "f", "{}")), chunk(call(0, "", "g", '{"b":2}')), chunk({}, "stop")))
    assert [(one["name"], one["input"]) for one in got] == [("f", {}), ("g", {"b": 2})]


def test_a_name_that_comes_with_each_piece_begins_no_further_call():
    sent = wire(chunk(call(0, "", "f", '{"a"')), chunk(call(0, "", "f", ":1}")), chunk({}, "stop"), done=True)
    [got] = told(translate(MESSAGES, CHAT, sent))
    assert got["input"] == {"a": 1}


def test_what_an_engine_leaves_unnamed_gets_a_name_that_no_other_answer_has():
    sent = wire(
        {"choices": [{"delta": call(0, "", "f", "{}")}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        done=True,
    )
    answers = [translate(MESSAGES, CHAT, sent) for _ in range(2)]
    starts = [answer[0]["message"] for answer in answers]
    assert len({start["id"] for start in starts}) == 2
    assert len({told(answer)[0]["id"] for answer in answers}) == 2
    for engine in (MESSAGES, RESPONSES):
        [first, second] = [Translation(CHAT, engine) for _ in range(2)]
        empty = {"content": [], "output": []}
        assert first.answer(empty)["id"] != second.answer(empty)["id"]


def test_what_comes_before_the_answer_does_not_name_it():
    """As Azure's, which say first what they think of the question."""
    filtered = {"id": "", "model": "", "object": "", "created": 0, "choices": [], "prompt_filter_results": []}
    sent = wire(filtered, chunk({"content": "a"}), chunk({}, "stop"), done=True)
    translation = Translation(MESSAGES, CHAT)
    translation.request(ASKED[MESSAGES])
    start = read(translation.stream().feed(sent))[0]["message"]
    assert (start["id"], start["model"]) == ("msg_chatcmpl-7", "e")


def test_an_engine_that_does_not_tell_its_model_is_the_one_that_was_asked():
    translation = Translation(MESSAGES, CHAT)
    translation.request(ASKED[MESSAGES])
    answer = translation.answer({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]})
    assert answer["model"] == "m"


def test_text_while_calls_are_open_comes_after_them():
    got = told(
        from_chat(
            chunk({"content": "I "}),
            chunk({"content": "look"}),
            chunk(call(0, "c1", "f", '{"a"')),
            chunk({"content": "and "}),
            chunk(call(0, arguments=":1}")),
            chunk({"content": "see"}),
            chunk({}, "stop"),
        )
    )
    assert [each.get("text", each["type"]) for each in got] == ["I look", "tool_use", "and see"]
    assert got[1]["input"] == {"a": 1}


def test_the_usual_stream_is_passed_on_at_once():
    translation = Translation(MESSAGES, CHAT)
    translation.request({"model": "m", "max_tokens": 1, "messages": [], "stream": True})
    stream = translation.stream()
    for delta, shown in (
        ({"content": "a"}, b'"text":"a"'),
        (call(0, "c1", "f", ""), b'"c1"'),
        (call(0, arguments='{"a":1}'), b'{\\"a\\":1}'),
        (call(1, "c2", "g", ""), b'"c2"'),
    ):
        assert shown in stream.feed(wire(chunk(delta)))


def test_a_call_without_arguments_has_none():
    assert told(from_chat(chunk(call(0, "c1", "f", "")), chunk({}, "tool_calls")))[0]["input"] == {}


# ---- 3. one beginning, and one end of each block


def test_there_is_one_beginning_and_one_end():
    got = from_chat(
        chunk({"role": "assistant", "content": ""}),
        chunk({"role": "assistant", "content": "a"}),
        chunk({"role": "assistant", "content": None}),
        chunk({}, "stop"),
        chunk({}, "stop"),
        chunk(None, usage=USAGE),
    )
    assert [one["type"] for one in got] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_an_end_that_an_engine_sends_twice_is_told_once():
    text = block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "a"})
    sent = wire(message_start(), *text, text[-1], message_start(), *message_end(), *message_end(), named=True)
    got = translate(RESPONSES, MESSAGES, sent)
    assert [one["type"] for one in got].count("response.output_item.done") == 1
    assert [one["type"] for one in got].count("response.created") == 1
    assert got[-1]["type"] == "response.completed"


# ---- 4. thinking


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_is_a_block_of_its_own(name):
    got = told(
        from_chat(
            chunk({name: "hm"}),
            chunk({name: " so"}),
            chunk({"content": "yes"}),
            chunk({name: "wait"}),
            chunk({}, "stop"),
        )
    )
    assert got == [
        {"type": "thinking", "thinking": "hm so", "signature": ""},
        {"type": "text", "text": "yes"},
        {"type": "thinking", "thinking": "wait", "signature": ""},
    ]


THOUGHT = block(
    0,
    {"type": "thinking", "thinking": "", "signature": ""},
    {"type": "thinking_delta", "thinking": "hm"},
    {"type": "signature_delta", "signature": "sig"},
)
HIDDEN = block(1, {"type": "redacted_thinking", "data": "xyz"})
SAID = block(2, {"type": "text", "text": ""}, {"type": "text_delta", "text": "yes"})


def test_signatures_and_what_is_redacted_survive_the_way_there_and_back():
    sent = wire(message_start(), *THOUGHT, *HIDDEN, *SAID, *message_end(), named=True)
    got = translate(CHAT, MESSAGES, sent)
    deltas = [one["choices"][0]["delta"] for one in got if one.get("choices")]
    message = {
        "role": "assistant",
        "content": "".join(delta.get("content") or "" for delta in deltas),
        "reasoning_content": "".join(delta.get("reasoning_content") or "" for delta in deltas),
        "reasoning_details": [detail for delta in deltas for detail in delta.get("reasoning_details", ())],
    }
    assert (message["content"], message["reasoning_content"]) == ("yes", "hm")
    back, _ = requested(CHAT, MESSAGES, messages=[{"role": "user", "content": "q"}, message])
    assert back["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "yes"},
    ]
    items = output_of(translate(RESPONSES, MESSAGES, sent))
    back, _ = requested(RESPONSES, MESSAGES, input=[{"role": "user", "content": "q"}, *items])
    assert [part["type"] for part in back["messages"][1]["content"]] == ["thinking", "redacted_thinking", "text"]
    assert back["messages"][1]["content"][0] == {"type": "thinking", "thinking": "hm", "signature": "sig"}


# ---- 7. why it ends


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([chunk({"content": "a"}), chunk({}, "stop")], "end_turn"),
        ([chunk(call(0, "c", "f", "{}")), chunk({}, "stop")], "tool_use"),
        ([chunk(call(0, "c", "f", "{}")), chunk({}, "tool_calls")], "tool_use"),
        ([chunk({"content": "a"}), chunk({}, "length")], "max_tokens"),
        ([chunk(call(0, "c", "f", '{"a')), chunk({}, "length")], "max_tokens"),
        ([chunk({"content": "a"}), chunk({}, "content_filter")], "refusal"),
        ([chunk({"refusal": "no"}), chunk({}, "stop")], "refusal"),
        ([chunk({"content": "a"}), chunk({}, "made_up")], "end_turn"),
    ],
)
def test_why_it_ends(chunks, reason):
    got = from_chat(*chunks)
    assert stop_of(got)["stop_reason"] == reason
    if reason != "max_tokens" or "content" in chunks[0]["choices"][0]["delta"]:
        told(got)


def test_a_stop_sequence_is_named():
    end = chunk({}, "stop")
    end["choices"][0]["stop_reason"] = "END"
    assert stop_of(from_chat(chunk({"content": "a"}), end)) == {
        "stop_reason": "stop_sequence",
        "stop_sequence": "END",
    }
    end["choices"][0]["stop_reason"] = 128009  # some engines tell a token
    assert stop_of(from_chat(chunk({"content": "a"}), end))["stop_reason"] == "end_turn"
    end["choices"][0] |= {"stop_reason": None, "matched_stop": "END"}
    assert stop_of(from_chat(chunk({"content": "a"}), end))["stop_sequence"] == "END"


@pytest.mark.parametrize(
    ("reason", "finish", "status", "why"),
    [
        ("end_turn", "stop", "completed", None),
        ("stop_sequence", "stop", "completed", None),
        ("pause_turn", "stop", "completed", None),
        ("tool_use", "tool_calls", "completed", None),
        ("max_tokens", "length", "incomplete", {"reason": "max_output_tokens"}),
        ("model_context_window_exceeded", "length", "incomplete", {"reason": "max_output_tokens"}),
        ("refusal", "content_filter", "incomplete", {"reason": "content_filter"}),
        ("made_up", "stop", "completed", None),
    ],
)
def test_why_messages_end(reason, finish, status, why):
    sent = wire(message_start(), *SAID[:0], *message_end(reason), named=True)
    got = translate(CHAT, MESSAGES, sent)
    assert [one["choices"][0]["finish_reason"] for one in got if one.get("choices")][-1] == finish
    last = translate(RESPONSES, MESSAGES, sent)[-1]
    assert last["type"] == f"response.{status}"
    assert (last["response"]["status"], last["response"]["incomplete_details"]) == (status, why)


# ---- 8. usage


def test_what_caches_held_is_inside_for_one_and_outside_for_the_other():
    usage = {
        **USAGE,
        "prompt_tokens_details": {"cached_tokens": 6},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    got = from_chat(chunk({"content": "a"}), chunk({}, "stop"), chunk(None, usage=usage))
    assert got[0]["message"]["usage"] == {"input_tokens": 0, "output_tokens": 0}
    told_usage = next(one["usage"] for one in got if one["type"] == "message_delta")
    assert told_usage == {"input_tokens": 4, "output_tokens": 4, "cache_read_input_tokens": 6}
    for cached in ({"prompt_cache_hit_tokens": 6, "prompt_cache_miss_tokens": 4}, {"cached_tokens": 6}):
        others = {**USAGE, **cached}  # as DeepSeek's, and Moonshot's, which are in the choice too
        got = from_chat(chunk({"content": "a"}), chunk({}, "stop"), chunk(None, usage=others))
        assert next(one["usage"] for one in got if one["type"] == "message_delta") == told_usage
        got = from_chat({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop", "usage": others}]})
        assert next(one["usage"] for one in got if one["type"] == "message_delta") == told_usage
    last = from_chat(chunk({"content": "a"}), chunk({}, "stop"), chunk(None, usage=usage), to=RESPONSES)[-1]
    assert last["response"]["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 6},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 14,
    }


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (
            {"input_tokens": 4, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 1},
            {"output_tokens": 4},
        ),
        (
            {},
            {
                "input_tokens": 4,
                "cache_read_input_tokens": 5,
                "cache_creation_input_tokens": 1,
                "output_tokens": 4,
            },
        ),
        (
            {"cache_read_input_tokens": 5, "cache_creation_input_tokens": 1},
            {"input_tokens": 4, "output_tokens": 4},
        ),
        (
            {"input_tokens": 4, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 1},
            {
                "input_tokens": 0,
                "cache_read_input_tokens": 0,
                "cache_creation_input_tokens": 0,
                "output_tokens": 4,
            },
        ),
    ],
)
def test_usage_of_messages_wherever_it_is_told(start, end):
    sent = wire(message_start(**start), *message_end(**end), named=True)
    got = translate(CHAT, MESSAGES, sent, asked={"stream_options": {"include_usage": True}})
    *_, last, done = got
    assert done == {"type": "[DONE]"}
    assert (last["choices"], last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == ([], 10, 4)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 5, "cache_creation_tokens": 1}
    assert not [one for one in translate(CHAT, MESSAGES, sent) if one.get("usage")]


def test_of_several_answers_the_first_counts():
    two = {"index": 1, "delta": {"content": "other"}, "finish_reason": None}
    first = chunk({"content": "a"})
    first["choices"].append(two)
    assert told(from_chat(first, chunk({}, "stop"))) == [{"type": "text", "text": "a"}]


# ---- 11. errors, and answers that break off


FAILS = {"error": {"message": "out of memory", "type": "server_error", "code": "oom"}}


@pytest.mark.parametrize("begun", [[], [chunk({"content": "a"})], [chunk(call(0, "c", "f", '{"a'))]])
def test_an_error_in_a_stream_is_an_error_and_no_end(begun):
    got = from_chat(*begun, FAILS, chunk({"content": "late"}), done=True)
    assert got[-1] == {"type": "error", "error": {"type": "api_error", "message": "out of memory"}}
    assert "message_stop" not in [one["type"] for one in got]
    got = from_chat(*begun, FAILS, done=True, to=RESPONSES)
    assert got[-1]["type"] == "error"
    assert got[-1]["error"]["message"] == "out of memory"
    assert got[-1]["code"] == "oom"
    assert "response.completed" not in [one["type"] for one in got]


@pytest.mark.parametrize(
    "error",
    [
        {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
        {"type": "error", "error": {"message": "busy"}},
        {"type": "error", "error": "busy"},
    ],
)
def test_an_error_of_messages_reaches_a_client_of_chat(error):
    got = translate(CHAT, MESSAGES, wire(message_start(), *SAID[:1], error, named=True))
    assert got[-1]["error"]["message"] == "busy"
    assert {"type": "[DONE]"} not in got


@pytest.mark.parametrize("to", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("chunks", [[], [chunk({"content": "a"})], [chunk({"reasoning_content": "a"})]])
def test_a_cut_is_an_error(to, chunks):
    got = from_chat(*chunks, done=False, to=to)
    assert got[-1]["type"] == "error"
    assert "broke off" in got[-1]["error"]["message"]


def test_an_error_of_messages_that_does_not_say_that_it_is_one():
    assert translate(CHAT, MESSAGES, wire({"error": {"message": "busy"}}))[-1]["error"]["message"] == "busy"


@pytest.mark.parametrize("to", [MESSAGES, RESPONSES])
@pytest.mark.parametrize(
    ("last", "said"),
    [
        (chunk({}, "error"), "error"),
        (chunk({}, "abort"), "abort"),
        ({"choices": [{"delta": {}, "finish_reason": "error", "error": {"message": "gone"}}]}, "gone"),
    ],
)
def test_an_answer_that_the_engine_ended_is_none(to, last, said):
    got = translate(to, CHAT, wire(chunk({"content": "a"}), last, done=True))
    assert got[-1]["type"] == "error"
    assert said in got[-1]["error"]["message"]
    [choice] = last["choices"]
    with pytest.raises(ValueError, match=said):
        Translation(to, CHAT).answer({"choices": [{**choice, "message": {"content": "a"}}]})


def test_a_stream_that_only_lacks_its_done_is_complete():
    assert from_chat(chunk({"content": "a"}), chunk({}, "stop"), done=False)[-1]["type"] == "message_stop"


@pytest.mark.parametrize("lost", [1, 2])
def test_messages_that_lack_their_end_are_cut(lost):
    events = [message_start(), *SAID, *message_end()]
    got = translate(CHAT, MESSAGES, wire(*events[:-lost], named=True))
    assert "broke off" in got[-1]["error"]["message"]


@pytest.mark.parametrize("engine", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize(
    "data", [b"data: {\n\n", b'data: {"choices": 1}\n\n', b'data: {"type": "content_block_delta"}\n\n']
)
def test_what_is_no_event_of_the_dialect_is_an_error_or_nothing(engine, data):
    client = MESSAGES if engine is not MESSAGES else CHAT
    got = translate(client, engine, data)
    assert "error" in got[-1]


# ---- 14. responses


def test_events_of_responses_are_numbered_and_placed():
    got = from_chat(
        chunk({"reasoning_content": "hm"}),
        chunk({"content": "yes"}),
        chunk(call(0, "c1", "f", '{"a":1}')),
        chunk({}, "tool_calls"),
        to=RESPONSES,
    )
    assert [one["sequence_number"] for one in got] == list(range(len(got)))
    assert [one["type"] for one in got] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    places = {one["output_index"]: one.get("item_id") for one in got if "output_index" in one and "item_id" in one}
    items = output_of(got)
    assert list(places) == [0, 1, 2]
    assert [item["id"] for item in items] == list(places.values())
    assert items[2]["id"] != items[2]["call_id"] == "c1"
    assert len({one["response"]["id"] for one in got if "response" in one}) == 1


def test_responses_echo_what_was_asked():
    tools = [{"type": "function", "name": "f", "parameters": {}, "strict": True}]
    got = from_chat(
        chunk({"content": "a"}), chunk({}, "stop"), to=RESPONSES, asked={"tools": tools, "temperature": 0.5}
    )
    assert got[-1]["response"]["tools"] == tools
    assert got[-1]["response"]["temperature"] == 0.5
    assert got[-1]["response"]["store"] is False


def response(status="in_progress", **more):
    return {
        "id": "resp_7",
        "object": "response",
        "created_at": 5,
        "model": "e",
        "status": status,
        "output": [],
        **more,
    }


def typed(kind, **fields):
    return {"type": f"response.{kind}", **fields}


RESPONSE = [
    typed("created", response=response()),
    typed("output_item.added", output_index=0, item={"type": "reasoning", "id": "rs_1", "summary": []}),
    typed("reasoning_summary_text.delta", output_index=0, summary_index=0, delta="hm"),
    typed("reasoning_summary_text.delta", output_index=0, summary_index=1, delta="so"),
    typed(
        "output_item.done",
        output_index=0,
        item={
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"text": "hm"}, {"text": "so"}],
            "encrypted_content": "sig",
        },
    ),
    typed("output_item.added", output_index=1, item={"type": "message", "id": "m1", "content": []}),
    typed("content_part.added", output_index=1, content_index=0, part={"type": "output_text", "text": ""}),
    typed("output_text.delta", output_index=1, content_index=0, delta="yes"),
    typed("output_text.done", output_index=1, content_index=0, text="yes"),
    typed("content_part.done", output_index=1, content_index=0, part={"type": "output_text", "text": "yes"}),
    typed(
        "output_item.done",
        output_index=1,
        item={"type": "message", "content": [{"type": "output_text", "text": "yes"}]},
    ),
    typed(
        "output_item.added",
        output_index=2,
        item={"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": ""},
    ),
    typed("function_call_arguments.delta", output_index=2, delta='{"a":'),
    typed("function_call_arguments.delta", output_index=2, delta="1}"),
    typed("function_call_arguments.done", output_index=2, arguments='{"a":1}'),
    typed(
        "output_item.done",
        output_index=2,
        item={"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": '{"a":1}'},
    ),
    typed(
        "completed",
        response=response(
            "completed",
            usage={"input_tokens": 10, "input_tokens_details": {"cached_tokens": 6}, "output_tokens": 4},
        ),
    ),
]
TOLD = [
    {"type": "thinking", "thinking": "hm\n\nso", "signature": "sig"},
    {"type": "text", "text": "yes"},
    {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
]


def test_a_stream_of_responses():
    got = translate(MESSAGES, RESPONSES, wire(*RESPONSE, named=True))
    assert told(got) == TOLD
    assert stop_of(got)["stop_reason"] == "tool_use"
    usage = next(one["usage"] for one in got if one["type"] == "message_delta")
    assert usage == {"input_tokens": 4, "output_tokens": 4, "cache_read_input_tokens": 6}


def test_a_stream_of_responses_whose_items_are_known_by_their_ids_only():
    ids = ["rs_1", "m1", "fc_1"]
    events = []
    for event in RESPONSE:
        place = event.get("output_index")
        kept = {key: value for key, value in event.items() if not key.endswith("_index")}
        if place is not None:
            kept |= {"item": {**event["item"], "id": ids[place]}} if "item" in event else {"item_id": ids[place]}
        events.append(kept)
    got = told(translate(MESSAGES, RESPONSES, wire(*events, named=True)))
    assert got == [{**TOLD[0], "thinking": "hmso"}, *TOLD[1:]]


def test_a_stream_of_responses_that_only_tells_what_is_done():
    kept = [one for one in RESPONSE if "delta" not in one["type"] and "part" not in one["type"]]
    kept = [one for one in kept if not one["type"].endswith("item.added")]
    assert told(translate(MESSAGES, RESPONSES, wire(*kept, named=True))) == TOLD


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (typed("failed", response=response("failed", error={"code": "x", "message": "broken"})), "broken"),
        ({"type": "error", "code": "x", "message": "broken", "param": None}, "broken"),
        (None, "broke off"),
    ],
)
def test_responses_that_fail(last, message):
    got = translate(CHAT, RESPONSES, wire(*RESPONSE[:8], *([last] if last else []), named=True))
    assert message in got[-1]["error"]["message"]
    assert {"type": "[DONE]"} not in got


def test_responses_that_are_incomplete():
    end = typed("incomplete", response=response("incomplete", incomplete_details={"reason": "max_output_tokens"}))
    got = translate(CHAT, RESPONSES, wire(*RESPONSE[:11], end, named=True))
    assert got[-2]["choices"][0]["finish_reason"] == "length"


# ---- server-sent events


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 0])
def test_lines_may_end_in_any_way_and_be_cut_anywhere(end, piece):
    sent = wire(chunk({"content": "ä€😀"}), chunk({}, "stop"), done=True).decode().replace("\n", end).encode()
    extra = f": a comment{end}id: 7{end}retry: 5{end}{end}".encode()
    got = translate(MESSAGES, CHAT, b"\xef\xbb\xbf" + extra + sent, piece=piece)
    assert told(got) == [{"type": "text", "text": "ä€😀"}]


def test_data_on_several_lines_is_one_event():
    sent = (
        b'data: {"choices":[{"index":0,"delta":{"content":"a"},\ndata:"finish_reason":"stop"}]}\n\ndata:[DONE]\n\n'
    )
    assert told(translate(MESSAGES, CHAT, sent)) == [{"type": "text", "text": "a"}]


def test_half_a_surrogate_pair_does_no_harm():
    sent = b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n' + wire(
        chunk({}, "stop"), done=True
    )
    got = translate(MESSAGES, CHAT, sent)
    assert told(got) == [{"type": "text", "text": "\ud83d"}]


@pytest.mark.parametrize("beat", [b"data:\n\n", b"data: \n\n", b"event: ping\ndata:\n\n", b": ping\n\n"])
@pytest.mark.parametrize("engine", [CHAT, MESSAGES])
def test_an_event_without_data_is_none(engine, beat):
    if engine is CHAT:
        events = [wire(chunk({"content": "a"})), wire(chunk({}, "stop"), done=True)]
    else:
        text = block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "a"})
        events = [wire(message_start(), *text, named=True), wire(*message_end(), named=True)]
    got = translate(RESPONSES, engine, beat + beat.join(events))
    assert got[-1]["type"] == "response.completed"
    assert got[-1]["response"]["output"][0]["content"][0]["text"] == "a"


def test_pings_are_not_passed_on():
    sent = wire({"type": "ping"}, message_start(), {"type": "ping"}, *SAID, *message_end(), named=True)
    got = translate(CHAT, MESSAGES, sent)
    assert "".join(one["choices"][0]["delta"].get("content") or "" for one in got if one.get("choices")) == "yes"
    assert read(b"") == []
