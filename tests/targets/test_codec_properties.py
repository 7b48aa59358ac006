"""What holds for every request and every answer."""

import contextlib
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.errors import BadRequestError
from llmux.targets.codecs import Dialect, Translation
from llmux.targets.codecs.answer import (
    BlockEnded,
    BlockStarted,
    Delta,
    Ended,
    Finished,
    Kind,
    Signature,
    Started,
    Stop,
    Usage,
)
from llmux.targets.codecs.request import unseal
from llmux.targets.codecs.sse import EventParser
from llmux.targets.codecs.translation import _ANSWERS
from tests.targets.dialects import ASKED, CHAT, MESSAGES, RESPONSES

DIALECTS = st.sampled_from(list(Dialect))
WORDS = st.text(min_size=1, max_size=12)
PLAIN = st.text('abc äé😀"\\\n', min_size=1, max_size=12)
SAID = PLAIN.filter(str.strip)  # messages take no text that is blank
NAMES = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
OBJECTS = st.dictionaries(
    NAMES, st.integers() | st.booleans() | PLAIN | st.lists(st.integers(), max_size=2), max_size=3
)
ARGUMENTS = OBJECTS.map(lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")))
FEW = settings(max_examples=40)


# ---- answers


@st.composite
def answers(draw, *, signed=True, ordered=False):
    """Events of an answer: thoughts, texts and calls. ``ordered``: as dialects without an order have it."""
    blocks = []
    if draw(st.booleans()):
        blocks.append(("thinking", draw(PLAIN), draw(st.sampled_from(["", "sig"])) if signed else ""))
    blocks += [("text", draw(PLAIN), "")] if draw(st.booleans()) else []
    blocks += [("call", draw(ARGUMENTS), f"call_{n}") for n in range(draw(st.integers(0, 2)))]
    if not ordered and draw(st.booleans()):
        blocks.reverse()
    events = [Started("7", "m", 5)]
    for kind, text, more in blocks:
        name = draw(NAMES) if kind == "call" else ""
        events.append(BlockStarted(Kind(kind), more if kind == "call" else "", name))
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        events += [Delta(piece) for piece in pieces if piece]
        events += [Signature(more)] if kind == "thinking" and more else []
        events.append(BlockEnded())
    cached = draw(st.integers(0, 5))
    events.append(Usage(draw(st.integers(5, 9)), draw(st.integers(0, 9)), cached, None, None))
    calls = any(kind == "call" for kind, *_ in blocks)
    stop = draw(st.sampled_from([Stop.CALLS if calls else Stop.END, Stop.LENGTH]))
    return [*events, Finished(stop), Ended()]


def encoder(dialect):
    return _ANSWERS[dialect].AnswerEncoder("m", usage_in_stream=True)


def normal(events):
    """Return what an answer says: neighbouring pieces joined, identities, seals and zeros left out."""
    found = []
    for event in events:
        match event:
            case Started() | Ended():
                continue
            case Delta() if found and isinstance(found[-1], Delta):
                found[-1] = Delta(found[-1].text + event.text)
            case Usage():
                found.append(Usage(*(value or 0 for value in event)))
            case Signature():
                found.append(Signature((unseal(event.text) or {"signature": event.text})["signature"]))
            case _:
                found.append(event)
    return found


def streamed(dialect, events):
    encode, parser, decode = encoder(dialect), EventParser(), _ANSWERS[dialect].AnswerDecoder()
    sent = b"".join(encode.feed(event) for event in events)
    got = [one for name, data in parser.feed(sent) for one in decode.feed(name, data)]
    return got + decode.cut()


@FEW
@given(DIALECTS, answers(ordered=True))
def test_a_stream_there_and_back_says_the_same(dialect, events):
    assert normal(streamed(dialect, events)) == normal(events)


@FEW
@given(DIALECTS, answers(ordered=True))
def test_streamed_and_whole_say_the_same(dialect, events):
    whole = _ANSWERS[dialect].AnswerDecoder().whole(encoder(dialect).whole(events))
    assert normal(whole) == normal(events)
    assert normal(whole) == normal(streamed(dialect, events))


@FEW
@given(st.sampled_from([MESSAGES, RESPONSES]), answers())
def test_dialects_with_an_order_keep_any(dialect, events):
    assert normal(streamed(dialect, events)) == normal(events)


@FEW
@given(DIALECTS, DIALECTS, answers(), st.lists(st.integers(0, 4000), max_size=12), st.booleans())
def test_however_a_stream_is_cut_into_pieces_the_client_gets_the_same(client, engine, events, cuts, returns):
    encode = encoder(engine)
    sent = b"".join(encode.feed(event) for event in events)
    if returns:
        sent = sent.replace(b"\n", b"\r\n")
    cuts = sorted({cut % len(sent) for cut in cuts})
    got = []
    for places in ([], cuts, range(1, len(sent))):
        translation = Translation(client, engine)
        translation.request(ASKED[client])
        stream = translation.stream()
        parts = [sent[a:b] for a, b in zip([0, *places], [*places, len(sent)], strict=True)]
        got.append(b"".join(map(stream.feed, parts)) + stream.end())
        assert stream.over
        assert not stream.failed
    assert got[0] == got[1] == got[2]


@FEW
@given(DIALECTS, DIALECTS, answers(ordered=True))
def test_a_client_is_told_the_same_whole_and_in_pieces(client, engine, events):
    """What an engine says whole and what it streams come out alike at the client."""
    translation = Translation(client, engine)
    translation.request(ASKED[client] | {"stream": False})
    whole = translation.answer(encoder(engine).whole(events))
    encode = encoder(engine)
    stream = translation.stream()
    sent = b"".join(stream.feed(encode.feed(event)) for event in events) + stream.end()
    decode = _ANSWERS[client].AnswerDecoder()
    pieces = [one for name, data in EventParser().feed(sent) for one in decode.feed(name, data)]
    said = normal(_ANSWERS[client].AnswerDecoder().whole(whole))
    # A chat without `include_usage` is not told it in its stream.
    assert [one for one in normal(pieces) if client is not CHAT or not isinstance(one, Usage)] == [
        one for one in said if client is not CHAT or not isinstance(one, Usage)
    ]


@FEW
@given(DIALECTS, st.binary(max_size=200), st.integers(1, 50))
def test_no_bytes_of_an_engine_raise(engine, noise, piece):
    for client in Dialect:
        translation = Translation(client, engine)
        translation.request(ASKED[client])
        stream = translation.stream()
        for start in range(0, len(noise), piece):
            stream.feed(noise[start : start + piece])
        stream.feed(b"\n\ndata: " + noise.replace(b"\n", b"") + b"\n\n")
        stream.end()
        assert stream.over


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["type", "index", "delta", "choices", "content", "message", "response", "item", "output", "error",
             "text", "tool_calls", "function", "usage", "output_index", "content_block", "finish_reason", "status",
             "id", "name", "arguments", "model", "created", "stop_reason", "reasoning_content", "thinking", "data"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
TYPES = st.sampled_from(
    ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
     "response.created", "response.output_item.added", "response.output_item.done", "response.output_text.delta",
     "response.completed", "response.reasoning_text.delta", "error"]
)  # fmt: skip


@FEW
@given(
    DIALECTS,
    st.lists(st.tuples(TYPES, st.dictionaries(st.sampled_from(["index", "delta", "choices", "item"]), JSON))),
)
def test_no_document_of_an_engine_raises(engine, documents):
    for client in Dialect:
        translation = Translation(client, engine)
        translation.request(ASKED[client])
        stream = translation.stream()
        for kind, fields in documents:
            stream.feed(b"data: " + json.dumps({"type": kind, **fields}).encode() + b"\n\n")
        stream.end()
        assert stream.over


@FEW
@given(DIALECTS, JSON)
def test_no_whole_answer_of_an_engine_raises_anything_but_that_it_is_none(engine, document):
    for client in Dialect:
        translation = Translation(client, engine)
        translation.request(ASKED[client])
        for read in (translation.answer, translation.stream_of):
            with contextlib.suppress(ValueError):
                read(document)
        translation.error(400, document)


# ---- requests


PICTURES = st.sampled_from(["data:image/png;base64,AAAA", "https://x/y.png"])


@st.composite
def histories(draw):
    """Messages of chat that every dialect can tell."""
    found = [{"role": "system", "content": draw(SAID)}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            content = draw(SAID)
        else:
            image = {"type": "image_url", "image_url": {"url": draw(PICTURES)}}
            content = [{"type": "text", "text": draw(SAID)}, image]
        found.append({"role": "user", "content": content})
        ids = [f"c{turn}{n}" for n in range(draw(st.integers(0, 2)))]
        said = {"role": "assistant", "content": draw(SAID if not ids else SAID | st.none())}
        if ids:
            said["tool_calls"] = [
                {"id": id_, "type": "function", "function": {"name": draw(NAMES), "arguments": draw(ARGUMENTS)}}
                for id_ in ids
            ]
        found.append(said)
        found += [{"role": "tool", "tool_call_id": id_, "content": draw(SAID)} for id_ in ids]
    return [*found, {"role": "user", "content": draw(SAID)}]


SCHEMAS = OBJECTS.map(lambda value: {"type": "object", "properties": value})
TOOLS = st.lists(
    st.fixed_dictionaries({"name": NAMES, "description": PLAIN, "parameters": SCHEMAS, "strict": st.booleans()}),
    max_size=2,
).map(lambda tools: [{"type": "function", "function": tool} for tool in tools])
OPTIONS = st.fixed_dictionaries(
    {"max_tokens": st.integers(60_000, 70_000)},
    optional={
        "temperature": st.floats(0, 1),
        "top_p": st.floats(0, 1),
        "reasoning_effort": st.sampled_from(["none", "low", "medium", "high"]),
        "user": PLAIN,
        "tool_choice": st.sampled_from(
            ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]
        ),
        "response_format": SCHEMAS.map(
            lambda schema: {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        ),
        "min_p": st.floats(0, 1),
        "stream": st.just(False),
    },
)


def asked_for(messages, tools, options):
    if not tools and options.get("tool_choice") in ["auto", "none"]:  # which says nothing
        options = {name: value for name, value in options.items() if name != "tool_choice"}
    return {"model": "m", "messages": messages, **options} | ({"tools": tools} if tools else {})


@FEW
@given(st.sampled_from([MESSAGES, RESPONSES]), histories(), TOOLS, OPTIONS)
def test_a_request_there_and_back_is_the_same(other, messages, tools, options):
    asked = asked_for(messages, tools, options)
    there = Translation(CHAT, other)
    back = Translation(other, CHAT)
    assert back.request(there.request(asked)) == asked
    assert there.dropped == back.dropped == ()


@FEW
@given(histories(), TOOLS, OPTIONS)
def test_messages_there_and_back_by_either_way_are_the_same(messages, tools, options):
    asked = Translation(CHAT, MESSAGES).request({"model": "m", "messages": messages, "tools": tools, **options})
    for other in (CHAT, RESPONSES):
        there = Translation(MESSAGES, other).request(asked)
        assert Translation(other, MESSAGES).request(there) == asked


@FEW
@given(histories(), TOOLS, OPTIONS)
def test_the_three_ways_round_agree(messages, tools, options):
    asked = asked_for(messages, tools, options)
    one = Translation(CHAT, MESSAGES).request(asked)
    two = Translation(RESPONSES, MESSAGES).request(Translation(CHAT, RESPONSES).request(asked))
    assert one == two


@FEW
@given(
    DIALECTS,
    DIALECTS,
    st.dictionaries(
        st.sampled_from(
            [
                "model",
                "messages",
                "input",
                "system",
                "tools",
                "tool_choice",
                "stream",
                "max_tokens",
                "thinking",
                "reasoning",
                "text",
                "response_format",
                "output_config",
                "stop",
                "metadata",
                "instructions",
                "stream_options",
                "include",
            ]
        ),
        JSON,
    ),
)
def test_no_request_of_a_client_raises_anything_but_a_refusal(client, engine, document):
    for lossy in (False, True):
        with contextlib.suppress(BadRequestError):
            assert isinstance(Translation(client, engine, lossy=lossy).request(document), dict)
