"""Tokens, read from the ends of an answer."""

import pytest

from llmux.proxy.token_usage import NONE, Usage, usage_of

OPENAI = b'{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":12,"completion_tokens":3}}'
QUOTED = rb'{"choices":[{"message":{"content":"\"usage\": {\"prompt_tokens\": 9, \"completion_tokens\": 9}"}}]}'

AT_ONCE = (
    b'event: message_start\ndata: {"message":{"usage":{"input_tokens":20,"output_tokens":1}}}\n\n'
    b'event: message_delta\ndata: {"usage":{"output_tokens":42}}\n\n'
)


@pytest.mark.parametrize(
    ("opening", "tail", "expected"),
    [
        (b"", [], NONE),
        (b"", [b"ok"], NONE),
        (b"", [OPENAI], Usage(12, 3)),
        (b"", [OPENAI[:60], OPENAI[60:]], Usage(12, 3)),  # two reads
        (b"", [QUOTED], NONE),
        (b"", [b'{"usage": null}'], NONE),
        (b"", [b'{"object":"list","usage":{"prompt_tokens":7,"total_tokens":7}}'], Usage(7, None)),  # embeddings
        # A stream with `include_usage`: what comes before the last report says null.
        (
            b'data: {"usage":null}\n\n',
            [b'data: {"usage":{"prompt_tokens":5,"completion_tokens":6}}\n\n', b"data: [DONE]\n\n", b"0\r\n\r\n"],
            Usage(5, 6),
        ),
        (b"", [b'"usage":{"prompt_tokens":1}', b'data: {"usage":null}'], Usage(1, None)),
        # Anthropic's: the input at the beginning, the output at the end.
        (
            b'event: message_start\ndata: {"message":{"usage":{"input_tokens":20,"output_tokens":1}}}\n\n',
            [b'event: message_delta\ndata: {"usage":{"output_tokens":42}}\n\n', b"event: message_stop\n\n"],
            Usage(20, 42),
        ),
        (b'{"usage":{"input_tokens":20,"output_tokens":1}}', [b"nothing"], Usage(20, 1)),
        *(
            (
                b'data: {"message":{"usage":{"input_tokens":20,"output_tokens":1}}}\n\n',
                [b'"usage":{%b}' % end],
                Usage(20, 9),
            )
            for end in (b'"input_tokens":0,"output_tokens":9', b'"output_tokens":9,"input_tokens":0')
        ),
        (b'data: {"usage":null}\n\n', [b'"usage":{"input_tokens":0,"output_tokens":9}'], Usage(0, 9)),
        # All of it at once.
        *(
            (text, [text], Usage(20, 42))
            for text in (AT_ONCE, b'data: {"usage":null}\n\n' + b" " * 3000 + AT_ONCE)
        ),
        (b"", [b'"usage":{"prompt_tokens":' + b"9" * 40 + b"}"], NONE),
    ],
)
def test_usage(opening, tail, expected):
    assert usage_of(opening, tail) == expected
