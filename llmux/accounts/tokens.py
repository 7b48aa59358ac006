"""The tokens of one request: as its engine reports them, or estimated if the answer does not report them.

Engines count in two ways. OpenAI's `prompt_tokens` (and `input_tokens` of its responses) include tokens from a
cache; Anthropic's `input_tokens` do not: those are reported beside them. Here ``input`` is everything that the
model read, and ``cached`` the part of it that came from a cache; ``output`` is everything that it wrote, and
``reasoning`` the part of it that was thinking.

An answer that was cut, and a stream whose client did not ask for usage, have no report. llama.cpp's `timings`
serve as well; else a stream's events are counted, as most engines send one for each token, and the input is
estimated as one token for every ``BYTES_PER_TOKEN`` bytes of the request. Pure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import from_json

BYTES_PER_TOKEN = 3.5  # of English text in JSON, about
_SUCCESS = range(200, 300)
_GONE = 499

GENERATING = frozenset(
    {
        "/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions", "/completion", "/infill",
        "/v1/responses", "/v1/messages", "/v1/embeddings", "/embeddings", "/embedding",
    }
)  # fmt: skip
"""The paths, in lower case, on which an answer without a report is estimated."""

_REACH = 4096  # bytes after its name within which a report ends
_INSIDE = 8  # objects in a report that the fast way, in a third of the time, can read
_MOST = 10**12  # tokens; a larger number is not a count
_TIMINGS = 12  # minimal size of timings, in bytes
_NUMBERS = (int, float)  # a union would be created each time
# A whole report as most engines write it, and nothing else: parsing would take three times as long.
_USUAL = re.compile(
    rb'"usage": ?\{"prompt_tokens": ?(\d{1,12}), ?"'
    rb'(?:completion_tokens": ?(\d{1,12})(?:, ?"total_tokens": ?\d+)?'
    rb'|total_tokens": ?\d+, ?"completion_tokens": ?(\d{1,12}))(?:\}|, ?"prompt_tokens_details": ?null\})'
)
_decode = json.JSONDecoder().raw_decode


class Tokens(NamedTuple):
    """What one request read and wrote. ``prompt`` and ``decode`` are seconds, if the engine reports them."""

    input: int = 0
    cached: int = 0  # of the input
    output: int = 0
    reasoning: int = 0  # of the output
    estimated: bool = False
    prompt: float | None = None
    decode: float | None = None


NONE = Tokens()


class Answer(NamedTuple):
    """What is known of a request and its answer when it has ended."""

    path: str  # normal form, in lower case
    status: int  # 499: its client left first
    whole: bool  # the answer was complete
    sent: int  # bytes of the request's body
    begun: bool  # the request was sent to the engine
    opening: bytes  # the beginning of an event stream
    tail: Sequence[bytes]  # the last blocks of the answer
    events: int  # events of the stream, 0 if it was none


def told(tail: Sequence[bytes]) -> tuple[int, int] | None:
    """Return the tokens, read and written, that the last blocks of an answer report in the usual form; else None.

    The usual form reports nothing else: no tokens from a cache, no thinking, no timings.
    """
    text = tail[0] if len(tail) == 1 else b"".join(tail)
    at = text.rfind(b'"usage"')
    if at < 0 or (usual := _USUAL.match(text, at)) is None:
        return None
    if usual.end() + _TIMINGS < len(text) and text.find(b'"timings"', at) >= 0:
        return None
    read, wrote, also_wrote = usual.groups()
    return int(read), int(wrote or also_wrote)


def tokens_of(answer: Answer) -> Tokens:
    """Return the tokens that an answer reports, or an estimate."""
    usual = told(answer.tail)
    if usual is not None:
        return Tokens(usual[0], output=usual[1])
    tail = answer.tail[0] if len(answer.tail) == 1 else b"".join(answer.tail)
    usage = _last(tail, b'"usage"')
    if usage is None or "output_tokens" in usage:
        first = _first(answer.opening, b'"usage"') if answer.opening else None
        if first is not None:  # Anthropic's: the input stands at the beginning, and the output at the end
            # What is told at the end has grown since; some tell 0 there for what they told before.
            usage = first if usage is None else {**first, **{k: v for k, v in usage.items() if v}}
    timings = _last(tail, b'"timings"')
    prompt = decode = None
    if timings is not None:
        prompt, decode = _seconds(timings, "prompt_ms"), _seconds(timings, "predicted_ms")
    if usage is not None and (answer.whole or not answer.events or "completion_tokens" in usage):
        return _reported(usage, prompt, decode)
    if timings is not None and "predicted_n" in timings:
        cached = _number(timings, "cache_n")
        read, wrote = _number(timings, "prompt_n") + cached, _number(timings, "predicted_n")
        return Tokens(read, cached, wrote, prompt=prompt, decode=decode)
    return _estimate(answer, NONE if usage is None else _reported(usage))


def _reported(usage: Mapping[str, Any], prompt: float | None = None, decode: float | None = None) -> Tokens:
    if "prompt_tokens" in usage:
        read, made = _number(usage, "prompt_tokens"), _number(usage, "completion_tokens")
        reading, writing = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
        cached = _number(reading, "cached_tokens") or _number(usage, "prompt_cache_hit_tokens")
        cached = cached or _number(usage, "cached_tokens")
    else:
        read, made = _number(usage, "input_tokens"), _number(usage, "output_tokens")
        reading, writing = usage.get("input_tokens_details"), usage.get("output_tokens_details")
        cached = _number(reading, "cached_tokens")
        if reading is None:
            cached = _number(usage, "cache_read_input_tokens")
            read += cached + _number(usage, "cache_creation_input_tokens")
    thought = _number(writing, "reasoning_tokens")
    return Tokens(read, min(cached, read), made, min(thought, made), False, prompt, decode)


def _estimate(answer: Answer, reported: Tokens) -> Tokens:
    """Estimate an answer without a whole report; ``reported`` is the part of it that there is."""
    ran = answer.begun and (answer.status in _SUCCESS or answer.status == _GONE or not answer.whole)
    if not ran or answer.path not in GENERATING:
        return reported
    read = reported.input or round(answer.sent / BYTES_PER_TOKEN)
    made = max(reported.output, answer.events - _without_token(answer))
    return Tokens(read, reported.cached, made, reported.reasoning, estimated=True)


def _without_token(answer: Answer) -> int:
    """Return how many of a stream's events carry no token: those that frame the answer."""
    if answer.path == "/v1/messages":
        return 5 if answer.whole else 2  # message_start, content_block_start; the two stops, and message_delta
    if answer.path == "/v1/responses":
        return 8 if answer.whole else 4
    framing = 1 if b'"role"' in answer.opening else 0
    if b"data: [DONE]" in b"".join(answer.tail):
        framing += 2  # including the event with the finish reason
    return framing


def _last(text: bytes, name: bytes) -> dict[str, Any] | None:
    """Return the last JSON object under a name. In a text within JSON, the quotes would be escaped."""
    at = text.rfind(name)
    while at >= 0:
        if (found := _object(text, at + len(name))) is not None:
            return found
        at = text.rfind(name, 0, at)
    return None


def _first(text: bytes, name: bytes) -> dict[str, Any] | None:
    """Return the first JSON object under a name: the opening of a short stream contains its end, too."""
    at = text.find(name)
    while at >= 0:
        if (found := _object(text, at + len(name))) is not None:
            return found
        at = text.find(name, at + 1)
    return None


def _object(text: bytes, end: int) -> dict[str, Any] | None:
    """Return the JSON object whose name ends at ``end``."""
    begin = text.find(b"{", end, end + 8)
    if begin < 0 or text[end:begin].strip() != b":":
        return None
    close, most = begin, begin + _REACH
    for _ in range(_INSIDE):
        close = text.find(b"}", close + 1, most)
        if close < 0:
            break
        piece = text[begin : close + 1]
        if piece.count(b"{") == piece.count(b"}"):
            try:
                return from_json(piece, cache_strings="keys")  # type: ignore[no-any-return]
            except ValueError:
                break  # there are braces in a text, or it is not JSON
    try:
        found, _ = _decode(text[begin:most].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return found  # type: ignore[no-any-return]  # it begins with a brace, so it is an object


def _number(document: Any, name: str) -> int:
    value = document.get(name) if document.__class__ is dict else None
    if value.__class__ is not int:
        value = int(value) if value.__class__ is float and math.isfinite(value) else 0
    return value if 0 <= value < _MOST else 0


def _seconds(timings: Mapping[str, Any], name: str) -> float | None:
    value = timings.get(name)
    return value / 1000 if isinstance(value, _NUMBERS) and 0 <= value < _MOST else None
