"""The tokens that an engine reports in ``usage``, read from the ends of an answer after it has passed.

The relay keeps references to the last blocks of an answer (and to the beginning of an event stream, where
Anthropic's dialect puts the input), and nothing is looked at before the answer has ended. A compressed answer, or
one whose report is spread over more than ``BLOCKS`` blocks, has no usage here. llama.cpp reports on embeddings
before the first of them: of large blocks the beginning is kept, too, and the first block of an answer that is no
stream. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

BLOCKS = 4  # that are kept; engines send the report, `[DONE]` and the body's end as blocks of their own
BLOCK = 16 * 1024  # bytes of each that are kept
_BEGINNING = 1024  # of them, the first ones; the others are the last ones
EVENT = b"data:"  # what an event of a stream begins with; in most streams, one is a token

_REPORT = b'"usage"'  # in a text that is quoted in JSON the quotes are escaped
_INPUTS = (b'"prompt_tokens"', b'"input_tokens"')
_OUTPUTS = (b'"completion_tokens"', b'"output_tokens"')
# As most engines write it. Tried first, since every request is looked at.
_MOST = re.compile(
    rb'"usage": ?\{"prompt_tokens": ?(\d{1,12}),(?: ?"total_tokens": ?\d+,)? ?"completion_tokens": ?(\d{1,12})\b'
)
# And others: with Anthropic's names, then llama.cpp.
_USUAL = re.compile(
    rb'"usage": ?\{"(?:prompt|input)_tokens": ?(\d{1,12}),(?: ?"total_tokens": ?\d+,)?'
    rb' ?"(?:completion|output)_tokens": ?(\d{1,12})\b'
    rb'|"usage":\{"completion_tokens":(\d{1,12}),"prompt_tokens":(\d{1,12})\b'
)
_FIGURE = re.compile(rb"\s*:\s*(\d{1,12})\b")
_REACH = 2048  # bytes after the name in which the figures stand


class Usage(NamedTuple):
    """Tokens of one request; None where the answer does not tell."""

    input: int | None = None
    output: int | None = None


NONE = Usage()


def ends_of(block: bytes) -> bytes:
    """Return what is kept of a block that is larger than ``BLOCK``."""
    return block[:_BEGINNING] + block[_BEGINNING - BLOCK :]


_new = tuple.__new__  # Usage(…) would be a call of Python's own, with each request


def usage_of(opening: bytes, tail: Sequence[bytes]) -> Usage:
    """Return the usage told in the last blocks of an answer, completed from its opening."""
    text = tail[0] if len(tail) == 1 else b"".join(tail)
    at = text.rfind(_REPORT)
    if at >= 0 and (most := _MOST.match(text, at)) is not None:
        told, made = most.groups()
        return _new(Usage, (int(told), int(made)))
    if at >= 0 and (usual := _USUAL.match(text, at)) is not None:
        given, made, also_made, also_given = usual.groups()
        told = int(given or also_given)
        if told or not opening:
            return _new(Usage, (told, int(made or also_made)))
    last = _last_report(text, at)
    if last.input or not opening:  # some tell 0 at the end for what they told at the beginning
        return last
    first = _first_report(opening)  # a short stream is all there, its end as well
    read = last.input if first.input is None else first.input
    return Usage(read, first.output if last.output is None else last.output)


def _last_report(text: bytes, at: int) -> Usage:
    while at >= 0:
        given, made = _figure(text, at, _INPUTS), _figure(text, at, _OUTPUTS)
        if given is not None or made is not None:
            return Usage(given, made)
        at = text.rfind(_REPORT, 0, at)
    return NONE


def _first_report(text: bytes) -> Usage:
    at = text.find(_REPORT)
    while at >= 0:
        end = text.find(_REPORT, at + 1)
        part = text if end < 0 else text[:end]
        given, made = _figure(part, at, _INPUTS), _figure(part, at, _OUTPUTS)
        if given is not None:
            return Usage(given, made)
        at = end
    return NONE


def _figure(text: bytes, at: int, names: Iterable[bytes]) -> int | None:
    for name in names:
        found = text.find(name, at, at + _REACH)
        if found >= 0 and (figure := _FIGURE.match(text, found + len(name))) is not None:
            return int(figure[1])
    return None
