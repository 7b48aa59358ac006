"""Durations: a number of seconds, or ``90s``, ``10m``, ``1h30m``, ``500ms``, ``2d``."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from llmux.config.fields import Word

UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
LONGEST = 1e9  # seconds, about 31 years: beyond it a deadline says nothing and arithmetic suffers

_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|[dhms])")
_PLAIN = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*\Z")
_SHAPE = r"^\s*(\d+(\.\d+)?\s*|(\d+(\.\d+)?\s*(ms|[dhms])\s*)+)$|\$\{"
_HOW = "write seconds, or a duration such as 90s, 10m, 1h30m"


def parse_duration(value: Any) -> float:
    """Return seconds, 0 ≤ seconds ≤ 1e9.

    Raises:
        ValueError: ``value`` is not a duration, negative, infinite or not a number.

    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"is not a duration; {_HOW}")  # noqa: TRY004 (pydantic turns ValueError into a problem)
    if isinstance(value, str) and not _PLAIN.match(value):
        seconds = _parse_units(value)
    else:
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
    if math.isnan(seconds):
        raise ValueError(f"is not a number; {_HOW}")
    if seconds < 0:
        raise ValueError(f"is negative: {value}; {_HOW}")
    if seconds > LONGEST:
        raise ValueError(f"is longer than 30 years: {value}; {_HOW}")
    return seconds


def _parse_units(text: str) -> float:
    """Add up the parts of ``1h30m``: each unit at most once, the largest first."""
    seconds, position, smallest = 0.0, 0, math.inf
    while match := _PART.match(text, position):
        number, unit = match.groups()
        if UNITS[unit] >= smallest:
            raise ValueError(f"{text!r} repeats or reorders its units; {_HOW}")
        smallest = UNITS[unit]
        seconds += float(number) * smallest
        position = match.end()
    if position == 0 or text[position:].strip():
        raise ValueError(f"{text!r} is not a duration; {_HOW}")
    return seconds


def format_duration(seconds: float) -> str:
    """Write seconds as a user would: ``10m``, ``1h30m``, ``500ms``, ``0s``."""
    rest = round(seconds * 1000)
    text = ""
    for unit, size in UNITS.items():
        count, rest = divmod(rest, round(size * 1000))
        if count:
            text += f"{count}{unit}"
    return text or "0s"


def _positive(value: float) -> float:
    if value <= 0:
        raise ValueError("must be longer than 0")
    return value


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    Word("duration"),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": _SHAPE}]}),
]
"""A pydantic type: seconds, ≥ 0, from a number or text."""

PositiveDuration = Annotated[
    float,
    BeforeValidator(lambda value: _positive(parse_duration(value))),
    Word("duration"),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": _SHAPE}]}),
]
"""The same, > 0."""
