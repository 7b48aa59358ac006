"""Which conversation a request belongs to."""

import json

import pytest

from llmux.errors import BadRequestError
from llmux.targets import conversation
from llmux.targets.conversation import Conversations, conversation_of
from llmux.targets.resolution import Target
from tests.targets.test_field_scanner import body_of


async def of(document, **more):
    with body_of(json.dumps({"model": "m", **document}, **more).encode()) as body:
        return await conversation_of(None, body)


USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
ANSWER = {"role": "assistant", "content": "hello"}
MORE = [ANSWER, {"role": "user", "content": "and?"}]


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({"messages": [USER]}, {"messages": [USER, *MORE], "temperature": 1}),
        ({"messages": [SYSTEM, USER]}, {"stream": True, "messages": [SYSTEM, USER, *MORE]}),
        ({"system": "s", "messages": [USER]}, {"system": "s", "messages": [USER, *MORE]}),
        ({"input": "hi"}, {"input": "hi", "stream": True}),
        ({"input": [USER]}, {"input": [USER, *MORE]}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, *MORE]},
        ),
        (
            {"messages": [USER]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, *MORE]},
        ),
        # a first turn beyond the window
        (
            {"messages": [{"role": "user", "content": "x" * 100_000}]},
            {"messages": [{"role": "user", "content": "x" * 100_000}, *MORE]},
        ),
        # a conversation that has grown beyond it
        ({"messages": [USER]}, {"messages": [USER, *[ANSWER, USER] * 50_000]}),
    ],
)
async def test_it_is_known_by_how_it_began(first, later):
    name = await of(first)
    assert name is not None
    assert name == await of(later)
    assert name == await of(later, indent=1) or len(json.dumps(first)) > conversation.WINDOW


@pytest.mark.parametrize("depth", [100, 480, 900, 5000])
@pytest.mark.parametrize(
    "turn", ["%s", '{"role":"user","content":%s}', '{"role":"system","content":%s},{"role":"user"}']
)
async def test_one_that_is_nested_deeply_is_known_as_it_is_sent(turn, depth):
    messages = turn % ("[" * depth + "]" * depth)
    with body_of(b'{"model":"m","messages":[%b]}' % messages.encode()) as body:
        name = await conversation_of(None, body)
        assert name is not None
        assert name == await conversation_of(None, body)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": [USER]}, {"messages": [SYSTEM, USER]}),
        ({"messages": [USER]}, {"messages": [{"role": "user", "content": "ho"}]}),
        ({"system": "a", "messages": [USER]}, {"system": "b", "messages": [USER]}),
        ({"input": "a"}, {"input": "b"}),
        ({"messages": [USER]}, {"input": [USER]}),
    ],
)
async def test_what_begins_otherwise_is_another(one, other):
    assert await of(one) != await of(other)


@pytest.mark.parametrize("document", [{}, {"system": "s"}, {"query": [1]}])
async def test_what_has_no_turn_is_none(document):
    assert await of(document) is None


@pytest.mark.parametrize("text", [b'{"messages":[{]}', b"[]", b'{"messages":'])
async def test_what_is_malformed_is_for_the_engine_to_judge(text):
    with body_of(b"{}") as body:
        body._store.add(text)
        await conversation_of(None, body)


async def test_a_clients_own_name_comes_first():
    with body_of(b'{"messages":[1]}') as body:
        assert await conversation_of("mine", body) == await conversation_of("mine", None)
        assert await conversation_of("mine", body) != await conversation_of(None, body)
    for wrong in ("", "a\tb", "x" * 257):
        with pytest.raises(BadRequestError, match="printable"):
            await conversation_of(wrong, None)


def test_the_last_ones_are_remembered(monkeypatch):
    monkeypatch.setattr(conversation, "MOST", 2)
    kept = Conversations()
    kept.keep("v", None, None, Target("a"))
    assert kept.get("v", None, None) is None
    kept.keep("v", None, "1", Target("a"))
    kept.keep("v", None, "2", Target("b"))
    kept.keep("v", None, "1", Target("c"))
    kept.keep("v", "key", "1", Target("d"))
    assert [kept.get("v", None, "1"), kept.get("v", None, "2"), kept.get("v", "key", "1")] == [
        Target("c"),
        None,
        Target("d"),
    ]
