"""The tokens that an engine reports in ``usage``, read from the ends of an answer after it has passed.

The relay keeps references to the last blocks of an answer (and to the beginning of an event stream, where
Anthropic's dialect puts the input), and nothing is looked at before the answer has ended. A compressed answer, or
one whose report is spread over more than ``BLOCKS`` blocks, has no usage here. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

BLOCKS = 8  # that are kept; engines send the report, `[DONE]` and the body's end as blocks of their own
BLOCK = 16 * 1024  # bytes of each that are kept, the last ones

_REPORT = b'"usage"'  # in a text that is quoted in JSON the quotes are escaped
_INPUT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,12})\b')
_OUTPUT = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,12})\b')
_REACH = 2048  # bytes after the name in which the figures stand


class Usage(NamedTuple):
    """Tokens of one request; None where the answer does not tell."""

    input: int | None = None
    output: int | None = None


NONE = Usage()


def usage_of(opening: bytes, tail: Iterable[bytes]) -> Usage:
    """Return the usage told in the last blocks of an answer, completed from its opening."""
    last = _last_report(b"".join(tail))
    if last.input is not None or not opening:
        return last
    first = _last_report(opening)
    return Usage(first.input, first.output if last.output is None else last.output)


def _last_report(text: bytes) -> Usage:
    at = text.rfind(_REPORT)
    while at >= 0:
        report = text[at : at + _REACH]
        given, made = _INPUT.search(report), _OUTPUT.search(report)
        if given or made:
            return Usage(int(given[1]) if given else None, int(made[1]) if made else None)
        at = text.rfind(_REPORT, 0, at)
    return NONE
