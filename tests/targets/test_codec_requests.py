"""Requests, translated: what each field becomes, and what has no place."""

import hashlib
import json
import re

import pytest

from llmux.errors import BadRequestError
from llmux.targets.codecs import Dialect, Translation
from tests.targets.dialects import CHAT, MESSAGES, RESPONSES, call, chunk, read, requested, told, wire

USER = {"role": "user", "content": "q"}
PNG = "iVBORw0KGgo="
PNG_URL = f"data:image/png;base64,{PNG}"
PNG_SOURCE = {"type": "base64", "media_type": "image/png", "data": PNG}
PDF_URL = "data:application/pdf;base64,JVBERi0="


def whole_of(client, events):
    """Return an answer as a client has it when its stream has ended."""
    if client is MESSAGES:
        return {"content": told(events)}
    return next(event["response"] for event in events if event["type"] == "response.completed")


def got(client, engine, lossy=False, **fields):
    return requested(client, engine, lossy=lossy, **fields)[0]


def refused(client, engine, **fields):
    """Return what is named when these are refused, and hold that with `lossy` the rest is carried."""
    with pytest.raises(BadRequestError) as caught:
        requested(client, engine, **fields)
    assert caught.value.status == 400
    assert caught.value.param in caught.value.message
    return caught.value


# ---- 5. results of tools


RESULTS = [
    USER,
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I look"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "one"},
            {
                "type": "tool_result",
                "tool_use_id": "c2",
                "content": [{"type": "text", "text": "two"}],
                "is_error": True,
            },
            {"type": "text", "text": "and now?"},
        ],
    },
]


def test_results_and_text_of_one_turn_are_split_for_chat():
    assert got(MESSAGES, CHAT, messages=RESULTS)["messages"][1:] == [
        {
            "role": "assistant",
            "content": "I look",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: two"},
        {"role": "user", "content": "and now?"},
    ]


def test_results_one_after_the_other_become_one_turn_of_messages():
    chat = got(MESSAGES, CHAT, messages=RESULTS)["messages"]
    back = got(CHAT, MESSAGES, messages=chat)["messages"]
    assert [turn["role"] for turn in back] == ["user", "assistant", "user"]
    assert [part["type"] for part in back[2]["content"]] == ["tool_result", "tool_result", "text"]
    assert back[1]["content"][1] == {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}


def test_results_come_before_a_text_that_a_client_puts_first():
    turn = {
        "role": "user",
        "content": [{"type": "text", "text": "t"}, {"type": "tool_result", "tool_use_id": "c1"}],
    }
    chat = got(MESSAGES, CHAT, messages=[*RESULTS[:2], turn])["messages"]
    assert [message["role"] for message in chat[2:]] == ["tool", "user"]


def test_an_image_in_a_result_follows_it_in_chat_and_stays_in_responses():
    content = [{"type": "text", "text": "see"}, {"type": "image", "source": PNG_SOURCE}]
    turn = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": content}]}
    chat = got(MESSAGES, CHAT, messages=[*RESULTS[:2], turn])["messages"][2:]
    assert chat == [
        {"role": "tool", "tool_call_id": "c1", "content": "see"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG_URL}}]},
    ]
    item = got(MESSAGES, RESPONSES, messages=[*RESULTS[:2], turn])["input"][-1]
    assert item == {
        "type": "function_call_output",
        "call_id": "c1",
        "output": [
            {"type": "input_text", "text": "see"},
            {"type": "input_image", "image_url": PNG_URL, "detail": "auto"},
        ],
    }


def test_items_of_responses_become_turns():
    items = [
        {"role": "user", "content": "q"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look", "annotations": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "f",
            "arguments": "{}",
            "status": "completed",
        },
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "and now?"}]},
    ]
    chat = got(RESPONSES, CHAT, input=items, instructions="be brief")["messages"]
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "tool", "tool", "user"]
    assert chat[2]["reasoning_content"] == "hm"
    assert chat[2]["content"] == "I look"
    assert [call["id"] for call in chat[2]["tool_calls"]] == ["c1", "c2"]
    turns = got(RESPONSES, MESSAGES, lossy=True, input=items, instructions="be brief")
    assert turns["system"] == "be brief"
    assert [turn["role"] for turn in turns["messages"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in turns["messages"][2]["content"]] == ["tool_result", "tool_result", "text"]


# ---- 6. images and documents


@pytest.mark.parametrize(
    ("url", "source"),
    [(PNG_URL, PNG_SOURCE), ("https://x/y.png", {"type": "url", "url": "https://x/y.png"})],
)
def test_images_inline_and_at_a_url(url, source):
    chat = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"type": "text", "text": "see"}, {"type": "image", "source": source}]
    assert got(CHAT, MESSAGES, messages=[{"role": "user", "content": chat}])["messages"][0]["content"] == messages
    assert got(MESSAGES, CHAT, messages=[{"role": "user", "content": messages}])["messages"][0]["content"] == chat
    responses = got(CHAT, RESPONSES, messages=[{"role": "user", "content": chat}])["input"][0]["content"]
    assert responses[1] == {"type": "input_image", "image_url": url, "detail": "auto"}
    back = got(RESPONSES, MESSAGES, input=[{"role": "user", "content": responses}])
    assert back["messages"][0]["content"] == messages


def test_the_detail_of_an_image_is_a_hint():
    image = {"type": "image_url", "image_url": {"url": PNG_URL, "detail": "low"}}
    _, translation = requested(CHAT, MESSAGES, messages=[{"role": "user", "content": [image]}])
    assert translation.dropped == ("messages[].content[].image_url.detail",)
    assert (
        got(CHAT, RESPONSES, messages=[{"role": "user", "content": [image]}])["input"][0]["content"][0]["detail"]
        == "low"
    )


def test_documents():
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF_URL}}
    source = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
    document = {"type": "document", "source": source, "title": "a.pdf"}
    assert got(CHAT, MESSAGES, messages=[{"role": "user", "content": [file]}])["messages"][0]["content"] == [
        document
    ]
    assert got(MESSAGES, CHAT, messages=[{"role": "user", "content": [document]}])["messages"][0]["content"] == [
        file
    ]
    plain = {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "text"},
        "title": "t",
    }
    assert got(MESSAGES, CHAT, messages=[{"role": "user", "content": [plain]}])["messages"][0]["content"] == [
        {"type": "text", "text": "t\ntext"}
    ]
    assert got(MESSAGES, RESPONSES, messages=[{"role": "user", "content": [document]}])["input"][0]["content"] == [
        {"type": "input_file", "filename": "a.pdf", "file_data": PDF_URL}
    ]
    there = {"type": "document", "source": {"type": "url", "url": "https://x/a.pdf"}}
    assert "messages[0].content" in refused(MESSAGES, CHAT, messages=[{"role": "user", "content": [there]}]).param


# ---- 9. the system


@pytest.mark.parametrize(
    ("system", "messages"),
    [
        ("be brief", [{"role": "system", "content": "be brief"}, USER]),
        ("be brief", [{"role": "developer", "content": "be brief"}, USER]),
        ("be brief", [USER, {"role": "system", "content": [{"type": "text", "text": "be brief"}]}]),
        (
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            [{"role": "system", "content": "a"}, USER, {"role": "developer", "content": "b"}],
        ),
    ],
)
def test_the_system_speaks_first_in_messages(system, messages):
    translated = got(CHAT, MESSAGES, messages=messages)
    assert translated["system"] == system
    assert translated["messages"] == [USER]


def test_a_system_of_blocks():
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    translated, translation = requested(MESSAGES, CHAT, system=blocks)
    assert translated["messages"][0] == {"role": "system", "content": "a\nb"}
    assert translation.dropped == ("system[].cache_control",)
    assert got(MESSAGES, RESPONSES, system=blocks)["instructions"] == "a\nb"


def test_a_system_in_the_midst_stays_there_in_responses():
    items = got(CHAT, RESPONSES, messages=[USER, {"role": "developer", "content": "b"}])["input"]
    assert [item["role"] for item in items] == ["user", "developer"]


@pytest.mark.parametrize(
    ("client", "fields"),
    [
        (RESPONSES, {"instructions": "a", "input": [{"role": "developer", "content": "b"}, USER]}),
        (MESSAGES, {"system": "a", "messages": [{"role": "system", "content": "b"}, USER]}),
    ],
)
def test_templates_of_chat_know_one_system_and_no_developer(client, fields):
    assert got(client, CHAT, **fields)["messages"] == [{"role": "system", "content": "a\nb"}, USER]


ANSWER = {"role": "assistant", "content": "a"}
LATER = {"role": "user", "content": "q2"}


@pytest.mark.parametrize(
    ("client", "fields"),
    [
        (RESPONSES, {"instructions": "s", "input": [USER, {"role": "developer", "content": "b"}]}),
        (MESSAGES, {"system": "s", "messages": [USER, {"role": "system", "content": "b"}]}),
    ],
)
def test_a_system_after_the_first_question_is_said_first_in_chat_as_some_templates_refuse_a_later_one(
    client, fields
):
    turns = [{"role": "system", "content": "s\nb"}, USER]
    assert got(client, CHAT, **fields)["messages"] == turns
    name = "messages" if client is MESSAGES else "input"
    fields[name] = [*fields[name], ANSWER, LATER]
    assert got(client, CHAT, **fields)["messages"] == [*turns, ANSWER, LATER]  # an engine's cache still holds


@pytest.mark.parametrize(("client", "name"), [(RESPONSES, "input"), (MESSAGES, "messages")])
def test_a_system_after_an_answer_is_told_by_the_user_in_chat_where_it_stands(client, name):
    history = [
        USER,
        ANSWER,
        {"role": "system", "content": "b"},
        LATER,
        ANSWER,
        LATER,
        {"role": "system", "content": "c"},
    ]
    assert got(client, CHAT, **{name: history})["messages"] == [
        USER,
        ANSWER,
        {"role": "user", "content": "b\nq2"},
        ANSWER,
        {"role": "user", "content": "q2\nc"},
    ]


def test_a_system_after_the_results_of_tools_follows_them_in_chat():
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    history = [
        USER,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]},
        {"role": "system", "content": "b"},
    ]
    assert got(MESSAGES, CHAT, messages=history)["messages"][2:] == [
        {"role": "tool", "tool_call_id": "c", "content": "x"},
        {"role": "user", "content": "b"},
    ]


def test_questions_one_after_the_other_are_one_for_chat_whose_templates_often_want_turns_to_alternate():
    url = {"type": "input_image", "image_url": PNG_URL}
    environment = {"role": "user", "content": "<environment_context>"}
    assert got(RESPONSES, CHAT, input=[environment, USER])["messages"] == [
        {"role": "user", "content": "<environment_context>\nq"}
    ]
    (turn,) = got(RESPONSES, CHAT, input=[environment, {"role": "user", "content": [url]}])["messages"]
    assert [part["type"] for part in turn["content"]] == ["text", "image_url"]


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_several_texts_are_one_for_chat_whose_engines_often_take_no_list(role):
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (turn,) = got(MESSAGES, CHAT, messages=[{"role": role, "content": texts}])["messages"]
    assert turn == {"role": role, "content": "a\nb"}


@pytest.mark.parametrize("blank", ["", " \n", [{"type": "text", "text": " "}], []])
def test_messages_take_no_blank_text_and_no_empty_turn(blank):
    turns = [{"role": "system", "content": blank}, USER, {"role": "assistant", "content": blank}, USER]
    translated = got(CHAT, MESSAGES, messages=turns)
    both = [{"type": "text", "text": "q"}, {"type": "text", "text": "q"}]
    assert "system" not in translated
    assert translated["messages"] == [{"role": "user", "content": both}]


def test_what_follows_an_empty_turn_and_a_result_is_kept():
    result = {"role": "tool", "tool_call_id": "c", "content": "r"}
    turns = [USER, {"role": "assistant", "content": ""}, result, {"role": "user", "content": "last"}]
    translated = got(CHAT, MESSAGES, messages=turns)
    first, block, last = translated["messages"][0]["content"]
    assert (first["text"], block["type"], last["text"]) == ("q", "tool_result", "last")


@pytest.mark.parametrize("budget", ["NaN", "-1e999", "-1"])
def test_a_budget_that_is_no_number_of_tokens_is_refused_or_none(budget):
    thinking = {"type": "enabled", "budget_tokens": json.loads(budget)}
    with pytest.raises(BadRequestError, match="budget_tokens"):
        got(MESSAGES, CHAT, messages=[USER], thinking=thinking)


@pytest.mark.parametrize("odd", ["NaN", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["max_tokens", "temperature"])
@pytest.mark.parametrize("engine", [MESSAGES, RESPONSES])
def test_a_number_that_json_does_not_have_is_refused(engine, field, odd):
    with pytest.raises(BadRequestError, match=field):
        got(CHAT, engine, messages=[USER], reasoning_effort="low", **{field: json.loads(odd)})


def test_a_blank_text_beside_others_is_left_out():
    picture = {"type": "image_url", "image_url": {"url": PNG_URL}}
    content = [{"type": "text", "text": "\n"}, picture]
    translated = got(CHAT, MESSAGES, messages=[{"role": "user", "content": content}])
    assert [part["type"] for part in translated["messages"][0]["content"]] == ["image"]


def test_reasoning_that_says_nothing_makes_no_turn():
    items = [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None}, USER]
    assert got(RESPONSES, CHAT, input=items)["messages"] == [USER]


# ---- 10. marks for caches


@pytest.mark.parametrize("mark", [{"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}])
def test_marks_for_caches_are_dropped_and_listed(mark):
    content = [{"type": "text", "text": "q", "cache_control": mark}]
    tool = {"name": "f", "input_schema": {"type": "object"}, "cache_control": mark}
    for engine in (CHAT, RESPONSES):
        translated, translation = requested(
            MESSAGES, engine, messages=[{"role": "user", "content": content}], tools=[tool]
        )
        assert "cache_control" not in str(translated)
        assert translation.dropped == ("messages[].content[].cache_control", "tools[].cache_control")


# ---- 12. tools


OWN = {"type": "object", "properties": {}, "x-own": None}
TOOL = {"name": "f", "description": "d", "parameters": OWN, "strict": True}
NOTHING = {"type": "object", "properties": {}}


def test_tools_and_strict_schemas():
    chat = [{"type": "function", "function": TOOL}]
    messages = [{"name": "f", "description": "d", "input_schema": TOOL["parameters"], "strict": True}]
    responses = [{"type": "function", **TOOL}]
    assert got(CHAT, MESSAGES, tools=chat)["tools"] == messages
    assert got(MESSAGES, CHAT, tools=messages)["tools"] == chat
    assert got(CHAT, RESPONSES, tools=chat)["tools"] == responses
    assert got(RESPONSES, MESSAGES, tools=responses)["tools"] == messages
    loose = [{"type": "function", "function": {"name": "f"}}]
    assert got(CHAT, RESPONSES, tools=loose)["tools"] == [
        {"type": "function", "name": "f", "parameters": NOTHING, "strict": False}
    ]
    assert got(CHAT, MESSAGES, tools=loose)["tools"] == [{"name": "f", "input_schema": NOTHING}]


A_TOOL = {
    CHAT: [{"type": "function", "function": {"name": "f", "parameters": NOTHING}}],
    MESSAGES: [{"name": "f", "input_schema": NOTHING}],
    RESPONSES: [{"type": "function", "name": "f", "parameters": NOTHING}],
}


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"type": "object"}, NOTHING),
        ({"properties": {"a": {}}}, {"type": "object", "properties": {"a": {}}}),
        ({"type": ["object", "null"]}, {"type": ["object", "null"]}),
        ({"anyOf": [{}]}, {"type": "object", "anyOf": [{}], "properties": {}}),
    ],
)
def test_schemas_have_what_some_providers_demand_of_them(schema, wanted):
    tools = [{"name": "f", "input_schema": schema}]
    assert got(MESSAGES, CHAT, tools=tools)["tools"][0]["function"]["parameters"] == wanted
    assert got(MESSAGES, RESPONSES, tools=tools)["tools"][0]["parameters"] == wanted
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert got(CHAT, MESSAGES, tools=tools)["tools"][0]["input_schema"] == wanted


@pytest.mark.parametrize(
    ("chat", "messages", "responses"),
    [
        ("auto", {"type": "auto"}, "auto"),
        ("none", {"type": "none"}, "none"),
        ("required", {"type": "any"}, "required"),
        (
            {"type": "function", "function": {"name": "f"}},
            {"type": "tool", "name": "f"},
            {"type": "function", "name": "f"},
        ),
    ],
)
def test_choices(chat, messages, responses):
    forms = {CHAT: chat, MESSAGES: messages, RESPONSES: responses}
    for client, given in forms.items():
        for engine, wanted in forms.items():
            translated = got(client, engine, tool_choice=given, tools=A_TOOL[client])
            assert translated["tool_choice"] == wanted


@pytest.mark.parametrize("engine", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_choice_of_no_tools_is_none_and_engines_refuse_it(engine, choice):
    for client, given in ((CHAT, choice), (RESPONSES, choice), (MESSAGES, {"type": choice})):
        more = {} if client is MESSAGES else {"parallel_tool_calls": True}
        translated = got(client, engine, tool_choice=given, tools=[], **more)
        assert not {"tool_choice", "parallel_tool_calls"} & translated.keys()


LONG_ID = "call_" + "x" * 90


@pytest.mark.parametrize("given", ["functions.Bash:0", LONG_ID, "c1"])
def test_ids_of_calls_are_such_as_the_provider_takes_and_still_pairs(given):
    made = {"id": given, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat = [USER, {"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": given}]
    turns = got(CHAT, MESSAGES, messages=chat)["messages"]
    ids = {turns[1]["content"][0]["id"], turns[2]["content"][0]["tool_use_id"]}
    items = got(CHAT, RESPONSES, messages=chat)["input"]
    others = {item["call_id"] for item in items if "call_id" in item}
    assert len(ids) == len(others) == 1
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", id_) for id_ in ids)
    assert all(len(id_) <= 64 for id_ in others)
    if len(given) <= 64:  # an engine may know it only as it is
        assert others == {given}


def test_ids_that_differ_stay_different():
    calls = [
        {"id": id_, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        for id_ in ("a.b", "a:b", "a_b")
    ]
    turns = got(CHAT, MESSAGES, messages=[USER, {"role": "assistant", "tool_calls": calls}])["messages"]
    assert len({part["id"] for part in turns[1]["content"]}) == 3


def test_calls_at_once():
    tools = [{"name": "f", "input_schema": {}}]
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert got(MESSAGES, CHAT, tools=tools, tool_choice=choice)["parallel_tool_calls"] is False
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert got(CHAT, MESSAGES, tools=tools, parallel_tool_calls=False)["tool_choice"] == choice
    assert got(CHAT, RESPONSES, tools=tools, parallel_tool_calls=False)["parallel_tool_calls"] is False
    assert "tool_choice" not in got(CHAT, MESSAGES, parallel_tool_calls=False)


@pytest.mark.parametrize("name", ["mcp__" + "x" * 90, "a.b/c", "ä"])
def test_names_that_an_engine_would_refuse_are_made_to_fit_and_found_again(name):
    history = [
        USER,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": name, "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]},
    ]
    translated, translation = requested(
        MESSAGES,
        CHAT,
        messages=history,
        tools=[{"name": name, "input_schema": {}}, {"name": name + "y", "input_schema": {}}],
        tool_choice={"type": "tool", "name": name},
    )
    short, other = (tool["function"]["name"] for tool in translated["tools"])
    assert len(short) <= 64
    assert short != other
    assert translated["tool_choice"]["function"]["name"] == short
    assert translated["messages"][1]["tool_calls"][0]["function"]["name"] == short
    message = {"tool_calls": [{"id": "c", "function": {"name": short, "arguments": "{}"}}]}
    answer = translation.answer({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    assert answer["content"][0]["name"] == name


# As Codex sends them; those of an MCP server have a namespace that ends in underscores.
SPACES = [
    {"type": "function", "name": "exec_command", "strict": False, "parameters": {"type": "object"}},
    {
        "type": "namespace",
        "name": "multi_agent_v1",
        "description": "Tools for sub-agents.",
        "tools": [{"type": "function", "name": "spawn_agent", "description": "Spawn.", "parameters": {}}],
    },
    {"type": "namespace", "name": "mcp__notes__", "tools": [{"type": "function", "name": "exec_command"}]},
]


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_of_namespaces_have_their_names_without_and_are_called_within(streamed):
    history = [
        {"role": "user", "content": "q"},
        {
            "type": "function_call",
            "call_id": "c1",
            "namespace": "multi_agent_v1",
            "name": "spawn_agent",
            "arguments": "{}",
        },
        {"type": "function_call_output", "call_id": "c1", "output": "spawned"},
    ]
    translated, translation = requested(RESPONSES, CHAT, tools=SPACES, input=history)
    names = [tool["function"]["name"] for tool in translated["tools"]]
    assert names == ["exec_command", "multi_agent_v1__spawn_agent", "mcp__notes__exec_command"]
    assert translated["messages"][1]["tool_calls"][0]["function"]["name"] == names[1]
    assert translation.dropped == ("tools[].description",)
    if streamed:
        calls = [chunk(call(at, f"c{at}", name, "{}")) for at, name in enumerate(names)]
        stream = translation.stream()
        told = read(stream.feed(wire(*calls, chunk({}, "tool_calls"), done=True)))
        items = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    else:
        calls = [{"id": f"c{at}", "function": {"name": name, "arguments": "{}"}} for at, name in enumerate(names)]
        answer = {"choices": [{"message": {"tool_calls": calls}, "finish_reason": "tool_calls"}]}
        items = translation.answer(answer)["output"]
    assert [(item.get("namespace"), item["name"]) for item in items] == [
        (None, "exec_command"),
        ("multi_agent_v1", "spawn_agent"),
        ("mcp__notes__", "exec_command"),
    ]


def test_tools_that_only_their_namespaces_tell_apart_are_refused():
    tools = [*SPACES, {"type": "function", "name": "mcp__notes__exec_command"}]
    assert refused(RESPONSES, CHAT, lossy=True, tools=tools).param == "tools"


def test_arguments_that_are_no_object():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{oops"}}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert refused(CHAT, MESSAGES, messages=history).param == "messages[1].tool_calls"
    assert got(CHAT, MESSAGES, lossy=True, messages=history)["messages"][1]["content"][0]["input"] == {}
    assert got(CHAT, RESPONSES, messages=history)["input"][1]["arguments"] == "{oops"


# ---- 13. what the answer looks like


SCHEMA = {"type": "object", "properties": {"a": {"const": None}}}


def test_schemas_of_answers():
    chat = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    responses = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
    messages = {"format": {"type": "json_schema", "schema": SCHEMA}}
    assert got(CHAT, RESPONSES, response_format=chat)["text"] == responses
    assert got(RESPONSES, CHAT, text=responses)["response_format"] == chat
    assert got(CHAT, MESSAGES, response_format=chat)["output_config"] == messages
    assert got(MESSAGES, CHAT, output_config=messages)["response_format"]["json_schema"] == {
        "name": "answer",
        "schema": SCHEMA,
    }
    assert got(MESSAGES, CHAT, output_format=messages["format"]) == got(MESSAGES, CHAT, output_config=messages)
    assert got(CHAT, RESPONSES, response_format={"type": "json_object"})["text"] == {
        "format": {"type": "json_object"}
    }
    assert refused(CHAT, MESSAGES, response_format={"type": "json_object"}).param == "response_format"
    assert "response_format" not in got(CHAT, CHAT, response_format={"type": "text"})


# ---- 4. thinking


@pytest.mark.parametrize(
    ("effort", "thinking"),
    [
        ("none", {"type": "disabled"}),
        ("low", {"type": "enabled", "budget_tokens": 2048}),
        ("medium", {"type": "enabled", "budget_tokens": 8192}),
        ("high", {"type": "enabled", "budget_tokens": 24576}),
    ],
)
def test_efforts(effort, thinking):
    assert got(CHAT, MESSAGES, reasoning_effort=effort)["thinking"] == thinking
    assert got(MESSAGES, CHAT, thinking=thinking)["reasoning_effort"] == effort
    assert got(CHAT, RESPONSES, reasoning_effort=effort)["reasoning"] == {"effort": effort}
    assert got(RESPONSES, CHAT, reasoning={"effort": effort, "summary": "auto"})["reasoning_effort"] == effort


def test_thinking_leaves_room_for_the_answer():
    assert got(CHAT, MESSAGES, reasoning_effort="high")["max_tokens"] > 24576
    limited = got(CHAT, MESSAGES, reasoning_effort="high", max_completion_tokens=4000)
    assert (limited["max_tokens"], limited["thinking"]["budget_tokens"]) == (4000, 2000)
    assert refused(CHAT, MESSAGES, reasoning_effort="low", max_tokens=100).param == "reasoning_effort"


def test_thinking_that_adapts_goes_by_its_effort():
    translated = got(MESSAGES, CHAT, thinking={"type": "adaptive"}, output_config={"effort": "max"})
    assert translated["reasoning_effort"] == "xhigh"
    assert "reasoning_effort" not in got(MESSAGES, CHAT, thinking={"type": "adaptive"})


def test_thoughts_of_the_engines_own_go_back_to_it():
    said = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "a"}],
    }
    assert got(MESSAGES, CHAT, messages=[USER, said, USER])["messages"][1] == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "hm",
    }


@pytest.mark.parametrize(
    ("part", "at"),
    [
        ({"type": "thinking", "thinking": "hm", "signature": "sig"}, "messages[1].content[0].signature"),
        ({"type": "redacted_thinking", "data": "x"}, "messages[1].content[0]"),
    ],
)
def test_thoughts_of_another_provider_are_refused_or_dropped_openly(part, at):
    history = [USER, {"role": "assistant", "content": [part, {"type": "text", "text": "a"}]}]
    assert refused(MESSAGES, CHAT, messages=history).param == at
    translated, translation = requested(MESSAGES, CHAT, lossy=True, messages=history)
    assert translated["messages"][1]["content"] == "a"
    assert translation.dropped


def test_thoughts_without_a_signature_have_no_place_in_messages():
    history = [USER, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    assert refused(CHAT, MESSAGES, messages=history).param == "messages[1].reasoning_content"
    assert got(CHAT, MESSAGES, lossy=True, messages=history)["messages"][1]["content"] == "a"


SIGNED = {"type": "reasoning.text", "signature": "sig", "format": "x-v1", "index": 0}
HIDDEN = {"type": "reasoning.encrypted", "data": "xyz", "id": "t1", "format": "x-v1", "index": 1}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("client", [MESSAGES, RESPONSES])
def test_an_engine_of_chat_gets_its_own_signed_thoughts_back_as_it_told_them(client, streamed):
    _, translation = requested(client, CHAT)
    if streamed:
        said = wire(
            chunk({"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}),
            chunk({"reasoning_details": [SIGNED]}),
            chunk({"reasoning_details": [HIDDEN]}),
            chunk({"content": "a"}, "stop"),
            done=True,
        )
        answer = whole_of(client, read(translation.stream().feed(said)))
    else:
        message = {"content": "a", "reasoning": "hm", "reasoning_details": [{**SIGNED, "text": "hm"}, HIDDEN]}
        answer = translation.answer({"id": "c", "choices": [{"message": message, "finish_reason": "stop"}]})
    if client is MESSAGES:
        fields = {"messages": [USER, {"role": "assistant", "content": answer["content"]}, USER]}
    else:
        fields = {"input": [USER, *answer["output"], USER]}
    said = got(client, CHAT, **fields)["messages"][1]
    assert said["content"] == "a"
    assert said["reasoning_content"] == "hm"
    assert said["reasoning_details"] == [{**SIGNED, "text": "hm"}, HIDDEN]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("client", [MESSAGES, RESPONSES])
def test_an_engine_of_chat_gets_back_what_it_added_to_its_calls(client, streamed):
    """Gemini's signs its calls there, and refuses them without that."""
    calls = [
        {"id": id_, "type": "function", "function": {"name": "f", "arguments": f'{{"a":"{id_}"}}'}}
        for id_ in "abc"
    ]
    for made in calls[:2]:
        made["extra_content"] = {"google": {"thought_signature": f"sig-{made['id']}"}}
    _, translation = requested(client, CHAT)
    if streamed:
        sent = wire(*(chunk({"tool_calls": [call]}) for call in calls), chunk({}, "stop"), done=True)
        answer = whole_of(client, read(translation.stream().feed(sent)))
    else:
        answer = translation.answer({"choices": [{"message": {"tool_calls": calls}, "finish_reason": "stop"}]})
    if client is MESSAGES:
        fields = {"messages": [USER, {"role": "assistant", "content": answer["content"]}]}
    else:
        fields = {"input": [USER, *answer["output"]]}
    assert got(client, CHAT, **fields)["messages"][1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": calls,
    }


@pytest.mark.parametrize("sealed", ["llmux-chat.", "llmux-chat.!", "llmux-chat.W10="])
def test_what_only_looks_like_an_engines_own_is_another_providers(sealed):
    part = {"type": "redacted_thinking", "data": sealed}
    assert refused(MESSAGES, CHAT, messages=[{"role": "assistant", "content": [part]}])


# ---- 14. what responses keep


@pytest.mark.parametrize("name", ["previous_response_id", "conversation", "prompt"])
@pytest.mark.parametrize("engine", [CHAT, MESSAGES])
def test_what_a_request_refers_to_is_never_dropped(name, engine):
    assert refused(RESPONSES, engine, **{name: "x"}).param == name
    with pytest.raises(BadRequestError):
        got(RESPONSES, engine, lossy=True, **{name: "x"})
    with pytest.raises(BadRequestError):
        got(RESPONSES, engine, lossy=True, input=[{"type": "item_reference", "id": "x"}])


def test_answers_are_not_kept():
    for engine in (CHAT, MESSAGES):
        assert refused(RESPONSES, engine, store=True).param == "store"
        assert "store" not in got(RESPONSES, engine, store=False)
        assert "store" not in got(RESPONSES, engine, lossy=True, store=True)
    assert got(CHAT, RESPONSES)["store"] is False


# ---- 15. what no dialect knows, and what only one does


@pytest.mark.parametrize("client", list(Dialect))
@pytest.mark.parametrize("engine", list(Dialect))
def test_an_engines_own_fields_are_kept(client, engine):
    own = {"chat_template_kwargs": {"enable_thinking": False}, "min_p": 0.1, "top_k": 5}
    translated = got(client, engine, **own)
    assert {name: translated[name] for name in own} == own


@pytest.mark.parametrize(
    ("client", "engine", "fields", "at"),
    [
        (CHAT, MESSAGES, {"n": 2}, "n"),
        (CHAT, MESSAGES, {"logprobs": True}, "logprobs"),
        (CHAT, MESSAGES, {"seed": 7}, "seed"),
        (CHAT, MESSAGES, {"presence_penalty": 0.5}, "presence_penalty"),
        (CHAT, MESSAGES, {"logit_bias": {"1": 2}}, "logit_bias"),
        (CHAT, MESSAGES, {"verbosity": "low"}, "verbosity"),
        (CHAT, MESSAGES, {"functions": [{}]}, "functions"),
        (CHAT, RESPONSES, {"stop": "x"}, "stop"),
        (CHAT, RESPONSES, {"audio": {}, "modalities": ["audio"]}, "audio"),
        (MESSAGES, CHAT, {"container": "x"}, "container"),
        (MESSAGES, CHAT, {"mcp_servers": [{}]}, "mcp_servers"),
        (MESSAGES, CHAT, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        (
            MESSAGES,
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "search_result"}]}]},
            "messages[0].content[0]",
        ),
        (MESSAGES, CHAT, {"messages": [{"role": "user", "content": "q", "made_up": 1}]}, "messages[0].made_up"),
        (
            MESSAGES,
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "made_up": 1}]}]},
            "messages[0].content[0].made_up",
        ),
        (
            CHAT,
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
        ),
        (
            CHAT,
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
            "messages[0].content[0].file.file_id",
        ),
        (CHAT, MESSAGES, {"tools": [{"type": "custom", "custom": {}}]}, "tools[0]"),
        (CHAT, MESSAGES, {"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (RESPONSES, CHAT, {"tools": [{"type": "web_search"}]}, "tools[0]"),
        (RESPONSES, CHAT, {"background": True}, "background"),
        (RESPONSES, CHAT, {"max_tool_calls": 3}, "max_tool_calls"),
        (RESPONSES, CHAT, {"truncation": "auto"}, "truncation"),
        (RESPONSES, CHAT, {"include": ["file_search_call.results"]}, "include"),
        (RESPONSES, CHAT, {"input": [{"type": "computer_call"}]}, "input[0]"),
        (
            RESPONSES,
            CHAT,
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        (RESPONSES, MESSAGES, {"text": {"verbosity": "low"}}, "verbosity"),
    ],
)
def test_what_has_no_place_is_named_or_with_lossy_dropped_and_listed(client, engine, fields, at):
    error = refused(client, engine, **fields)
    assert (error.param, error.code) == (at, "cannot_translate")
    assert "lossy" in error.message  # what an operator can do
    translated, translation = requested(client, engine, lossy=True, **fields)
    assert any(name.replace("[]", "[0]") == at for name in translation.dropped)
    assert translated.get(at.partition("[")[0]) in (None, []) or "[" in at


@pytest.mark.parametrize(
    ("client", "engine", "fields", "hint"),
    [
        (CHAT, MESSAGES, {"metadata": {"a": "b"}}, "metadata"),
        (CHAT, MESSAGES, {"prompt_cache_key": "k"}, "prompt_cache_key"),
        (MESSAGES, CHAT, {"metadata": {"other": 1}}, "metadata.other"),
        (MESSAGES, CHAT, {"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        (RESPONSES, CHAT, {"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        (RESPONSES, CHAT, {"client_metadata": {"turn_id": "t"}}, "client_metadata"),
        (
            RESPONSES,
            CHAT,
            {"input": [{"role": "user", "content": "q", "internal_chat_message_metadata_passthrough": {"a": 1}}]},
            "input[].internal_chat_message_metadata_passthrough",
        ),
        (CHAT, MESSAGES, {"service_tier": "flex"}, "service_tier"),
    ],
)
def test_hints_are_dropped_and_listed(client, engine, fields, hint):
    assert requested(client, engine, **fields)[1].dropped == (hint,)


@pytest.mark.parametrize(
    ("client", "fields"),
    [
        (
            CHAT,
            {
                "n": 1,
                "logprobs": False,
                "frequency_penalty": 0,
                "store": False,
                "modalities": ["text"],
                "seed": None,
            },
        ),
        (CHAT, {"tools": None, "tool_choice": None, "response_format": {"type": "text"}, "user": None}),
        (MESSAGES, {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}),
        (MESSAGES, {"context_management": {"edits": []}}),
        (RESPONSES, {"background": False, "truncation": "disabled", "include": [], "previous_response_id": None}),
        (RESPONSES, {"include": ["reasoning.encrypted_content"], "text": {"format": {"type": "text"}}}),
    ],
)
def test_what_says_nothing_is_no_loss(client, fields):
    translated, translation = requested(client, MESSAGES, **fields)
    assert translation.dropped == ()
    assert translated == requested(client, MESSAGES)[0]


@pytest.mark.parametrize(
    ("client", "fields", "at"),
    [
        (CHAT, {"messages": "q"}, "messages"),
        (CHAT, {"messages": [1]}, "messages[0]"),
        (CHAT, {"messages": [{"role": 7}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]},
            "messages[0].content[0].text",
        ),
        (CHAT, {"tools": {}}, "tools"),
        (CHAT, {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        (CHAT, {"tool_choice": "f"}, "tool_choice"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"stream": 1}, "stream"),
        (CHAT, {"service_tier": {}}, "service_tier"),
        (CHAT, {"max_tokens": True}, "max_tokens"),
        (MESSAGES, {"system": 7}, "system"),
        (MESSAGES, {"thinking": {"type": "deep"}}, "thinking.type"),
        (MESSAGES, {"tool_choice": {"type": "most"}}, "tool_choice.type"),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
            "messages[0].content[0].source",
        ),
        (MESSAGES, {"stop_sequences": "x"}, "stop_sequences"),
        (RESPONSES, {"input": 7}, "input"),
        (RESPONSES, {"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        (RESPONSES, {"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        (RESPONSES, {"reasoning": "high"}, "reasoning"),
        (RESPONSES, {"instructions": [1]}, "instructions"),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u", "detail": {}}}]}
                ]
            },
            "messages[0].content[0].image_url.detail",
        ),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u", "detail": []}]}]},
            "input[0].content[0].detail",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "reasoning_details": [{"signature": "s", "text": 7}]}]},
            "messages[0].reasoning_details[0].text",
        ),
    ],
)
def test_what_is_malformed_is_named(client, fields, at):
    engine = MESSAGES if client is CHAT else CHAT
    assert refused(client, engine, **fields).param == at
    with pytest.raises(BadRequestError):
        got(client, engine, lossy=True, **fields)


def test_messages_have_a_limit_and_a_user():
    translated = got(CHAT, MESSAGES, user="u")
    assert translated["max_tokens"] == 8192
    assert translated["metadata"] == {"user_id": "u"}
    assert got(MESSAGES, RESPONSES, metadata={"user_id": "u"}, max_tokens=5)["user"] == "u"
    assert got(MESSAGES, RESPONSES, max_tokens=5)["max_output_tokens"] == 5
    assert got(CHAT, MESSAGES, stop="x", temperature=0, top_p=1.0)["stop_sequences"] == ["x"]


@pytest.mark.parametrize("user", ["user_" + "a" * 150, "bob@example.com", "+49 30 1234567"])
def test_users_whom_providers_would_refuse_are_told_apart_by_a_digest(user):
    """Claude Code's are longer than 64 characters, and Anthropic's takes neither addresses nor numbers."""
    digest = hashlib.sha256(user.encode()).hexdigest()
    assert got(CHAT, MESSAGES, user=user)["metadata"]["user_id"] == digest
    assert got(CHAT, MESSAGES, user=user + "x")["metadata"]["user_id"] != digest
    for engine in (CHAT, RESPONSES):
        told = got(MESSAGES, engine, metadata={"user_id": user})["user"]
        assert told == (digest if len(user) > 64 else user)


def test_the_type_of_a_jpeg_is_what_anthropics_takes():
    picture = {"type": "image_url", "image_url": {"url": f"data:image/jpg;base64,{PNG}"}}
    turn = got(CHAT, MESSAGES, messages=[{"role": "user", "content": [picture]}])["messages"][0]
    assert turn["content"][0]["source"]["media_type"] == "image/jpeg"


def test_a_stream_is_asked_to_tell_its_usage():
    assert got(MESSAGES, CHAT)["stream_options"] == {"include_usage": True}
    assert "stream_options" not in got(MESSAGES, CHAT, stream=False)
    assert Translation(CHAT, MESSAGES).streams is False


# ---- errors, and answers that are none


@pytest.mark.parametrize(
    ("client", "engine", "status", "document", "wanted"),
    [
        (
            MESSAGES,
            CHAT,
            429,
            {"error": {"message": "slow", "type": "x"}},
            {"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}},
        ),
        (
            MESSAGES,
            CHAT,
            418,
            {"message": "odd"},
            {"type": "error", "error": {"type": "invalid_request_error", "message": "odd"}},
        ),
        (MESSAGES, CHAT, 500, "oops", {"type": "error", "error": {"type": "api_error", "message": "oops"}}),
        (
            CHAT,
            MESSAGES,
            529,
            {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
            {"error": {"message": "busy", "type": "overloaded_error", "code": None, "param": None}},
        ),
    ],
)
def test_errors_of_the_engine(client, engine, status, document, wanted):
    assert Translation(client, engine).error(status, document) == wanted


@pytest.mark.parametrize(
    "document", [[], {"choices": 7}, {"error": {"message": "no"}}, {"choices": [{"message": 5}]}]
)
def test_what_is_no_answer_is_none(document):
    with pytest.raises(ValueError, match=r".+"):
        Translation(MESSAGES, CHAT).answer(document)
