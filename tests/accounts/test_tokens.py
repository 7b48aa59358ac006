"""Tokens as engines report them, and what is guessed where they do not."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.accounts.tokens import NONE, Answer, Tokens, tokens_of

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


def answer(*tail, path=CHAT, status=200, whole=True, sent=350, begun=True, opening=b"", events=0):
    return Answer(path, status, whole, sent, begun, opening, tail, events)


def usage(**figures):
    return b'{"choices":[{"message":{"content":"hi"}}],"usage":' + json.dumps(figures).encode() + b"}"


USED = b'"usage":{"input_tokens":5,"output_tokens":1,"cache_read_input_tokens":20}'
START = b'event: message_start\ndata: {"message":{' + USED + b"}}\n\n"
DELTA = b'event: message_delta\ndata: {"delta":{},"usage":{"output_tokens":42}}\n\n'
TIMINGS = b'"timings":{"cache_n":182,"prompt_n":1,"prompt_ms":0.5,"predicted_n":3,"predicted_ms":1.5}'
LLAMA = b'data: {"choices":[],' + TIMINGS + b"}\n\n"
ROLE = b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (answer(usage(prompt_tokens=12, completion_tokens=3)), Tokens(12, 0, 3)),
        # OpenAI's cache is inside, Anthropic's is beside.
        (
            answer(usage(prompt_tokens=12, completion_tokens=3, prompt_tokens_details={"cached_tokens": 8})),
            Tokens(12, 8, 3),
        ),
        (
            answer(
                usage(input_tokens=12, output_tokens=3, input_tokens_details={"cached_tokens": 8}), path=RESPONSES
            ),
            Tokens(12, 8, 3),
        ),
        (
            answer(
                usage(input_tokens=4, cache_read_input_tokens=8, cache_creation_input_tokens=2, output_tokens=3),
                path=MESSAGES,
            ),
            Tokens(14, 8, 3),
        ),
        (answer(usage(prompt_tokens=12, completion_tokens=3, prompt_cache_hit_tokens=10)), Tokens(12, 10, 3)),
        (
            answer(usage(prompt_tokens=1, completion_tokens=9, completion_tokens_details={"reasoning_tokens": 7})),
            Tokens(1, 0, 9, 7),
        ),
        (
            answer(usage(input_tokens=1, output_tokens=9, output_tokens_details={"reasoning_tokens": 7})),
            Tokens(1, 0, 9, 7),
        ),
        (answer(usage(prompt_tokens=7, total_tokens=7), path="/v1/embeddings"), Tokens(7, 0, 0)),
        (
            answer(
                usage(prompt_tokens=12, completion_tokens=3)[:60],
                usage(prompt_tokens=12, completion_tokens=3)[60:],
            ),
            Tokens(12, 0, 3),
        ),
        (
            answer(
                b'data: {"usage":null}\n\n',
                b"data: " + usage(prompt_tokens=5, completion_tokens=6),
                DONE,
                events=9,
            ),
            Tokens(5, 0, 6),
        ),
        # A stream of Anthropic's: the input at its beginning, the output at its end.
        (answer(DELTA, b"event: message_stop\n\n", path=MESSAGES, opening=START, events=9), Tokens(25, 20, 42)),
        (answer(START + DELTA, path=MESSAGES, opening=START + DELTA, events=9), Tokens(25, 20, 42)),  # all at once
        *(
            (answer(zeros, path=MESSAGES, opening=START, events=9), Tokens(25, 20, 42))
            for zeros in (
                b'data: {"usage":{"input_tokens":0,"output_tokens":42}}\n\n',
                b'data: {"usage":{"output_tokens":42,"cache_read_input_tokens":0,"input_tokens":null}}\n\n',
            )
        ),
        (
            answer(START + DELTA, path=MESSAGES, opening=b'{"usage":null}' + START + DELTA, events=9),
            Tokens(25, 20, 42),
        ),
        # llama.cpp's timings tell as much, whether or not the client asked for usage.
        (answer(LLAMA, DONE, events=7, opening=ROLE), Tokens(183, 182, 3, prompt=0.0005, decode=0.0015)),
        (
            answer(b'{"tokens_predicted":3,"timings":{"prompt_n":8,"predicted_n":3}}', path="/completion"),
            Tokens(8, 0, 3),
        ),
        # Guessed: a token an event, but for those that frame the answer.
        (answer(DONE, events=13, opening=ROLE), Tokens(100, 0, 10, estimated=True)),
        (answer(b"data: x\n\n", events=11, opening=ROLE, whole=False), Tokens(100, 0, 10, estimated=True)),
        (
            answer(b"data: x\n\n", path=MESSAGES, opening=START, whole=False, events=12),
            Tokens(25, 20, 10, estimated=True),
        ),
        (
            answer(path=CHAT, status=499, whole=False),
            Tokens(100, 0, 0, estimated=True),
        ),  # it was reading the prompt
        (answer(b"\x1f\x8b compressed", path=CHAT), Tokens(100, 0, 0, estimated=True)),
        (answer(b"data: x\n\n", path=RESPONSES, whole=False, events=14), Tokens(100, 0, 10, estimated=True)),
        # Nothing was made.
        (answer(b'{"error":{}}', status=400), NONE),
        (answer(status=503, begun=False), NONE),
        (answer(status=499, begun=False, whole=False), NONE),
        (answer(b'{"tokens":[1,2]}', path="/tokenize"), NONE),
        # What is no report.
        (answer(rb'{"content":"\"usage\":{\"prompt_tokens\":9}"}', path="/x"), NONE),
        (answer(b'{"usage":{"prompt_tokens":"many","completion_tokens":-3}}'), NONE),
        (answer(b'{"usage":{"prompt_tokens":1e300,"prompt_tokens_details":7}}'), NONE),
        (answer(b'{"usage":{"prompt_tokens":3', path="/x"), NONE),
        (answer(b'{"usage": {' + b'"a":{' * 2000, path="/x"), NONE),
    ],
)
def test_tokens(given, expected):
    assert tokens_of(given) == expected


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}, Tokens(12, 0, 3)),
        ({"prompt_tokens": 12, "total_tokens": 15, "completion_tokens": 3}, Tokens(12, 0, 3)),
        ({"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": None}, Tokens(12, 0, 3)),
        ({"prompt_tokens": 12, "completion_tokens": 3, "prompt_cache_hit_tokens": 10}, Tokens(12, 10, 3)),
        (
            {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15, "cached_tokens": 10},
            Tokens(12, 10, 3),
        ),
        ({"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15, "more": {}}, Tokens(12, 0, 3)),
        ({"prompt_tokens": 10**12, "completion_tokens": 3}, Tokens(0, 0, 3)),
    ],
)
def test_the_usual_report_is_read_without_parsing_and_says_the_same(figures, expected, separators):
    said = b'{"usage":' + json.dumps(figures, separators=separators).encode() + b"}"
    assert tokens_of(answer(said)) == expected
    assert tokens_of(answer(said[:20], said[20:])) == expected


TEXTS = st.text('{}"\\ä', max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(TEXTS, JSON, max_size=4), st.integers(0, 9), JSON)
def test_whatever_else_a_report_holds(more, output, after):
    """Braces in texts, reports in reports, and any number of objects in them."""
    document = {"usage": {**more, "prompt_tokens": 7, "completion_tokens": output}, "after": after}
    assert tokens_of(answer(json.dumps(document).encode())) == Tokens(7, 0, output)


@pytest.mark.parametrize("nested", ["{" * 4000, '{"a":' * 3000 + "1" + "}" * 3000, "}" * 4000, "[{}," * 2000])
def test_a_report_that_cannot_be_read_is_none(nested):
    assert tokens_of(answer((f'"usage":{{"x":{nested}' * 4).encode())) == Tokens(100, estimated=True)
