"""Amounts of memory: a whole number of bytes, or ``18GiB``, ``24GB``, ``512MiB``."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from llmux.config.words import Word

UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_LONGEST_COUNT = 100_000
LARGEST = 2**60  # bytes; more than any machine has, small enough for exact arithmetic anywhere

_BY_LOWER = {unit.lower(): factor for unit, factor in UNITS.items()}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")
_SHAPE = r"^\s*\d+(\.\d+)?\s*([kKmMgGtT]?[iI]?[bB])?\s*$|\$\{"
_HOW = "write bytes, or a size such as 18GiB, 24GB, 512MiB"


def parse_size(value: Any) -> int:
    """Return bytes, 0 ≤ bytes ≤ 2**60.

    Raises:
        ValueError: ``value`` is no size, negative, or no whole number of bytes.

    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"is no size; {_HOW}")  # noqa: TRY004 (pydantic turns ValueError into a problem)
    text = str(value)
    match = _TEXT.match(text)
    if not match:
        raise ValueError(f"{text!r} is no size; {_HOW}")
    number, unit = match.groups()
    if unit and unit.lower() not in _BY_LOWER:
        # `18G` means 10**9 to some tools and 2**30 to others: 7 % of a GPU is too much to guess.
        hint = f"{unit[0].upper()}iB or {unit[0].upper()}B" if unit[0].upper() in "KMGT" else "GiB or GB"
        raise ValueError(f"{text!r} has an unknown unit {unit!r}; write {hint}")
    size = Fraction(number) * _BY_LOWER.get(unit.lower(), 1)
    if not unit and size.denominator != 1:
        raise ValueError(f"{text!r} is no whole number of bytes; {_HOW}")
    if size > LARGEST:
        raise ValueError(f"{text!r} is more than 1024 PiB; {_HOW}")
    return round(size)


def format_size(size: int) -> str:
    """Write bytes as a user would: exactly where that is short, else to one decimal: ``18GiB``, ``1.3GiB``."""
    # Binary units come last and win a tie.
    exact = [(size // factor, unit) for unit, factor in reversed(UNITS.items()) if size % factor == 0]
    count, unit = min(exact, key=lambda pair: pair[0]) if size else (0, "B")
    if count < _LONGEST_COUNT:
        return f"{count}{unit}"
    unit = "GiB" if size >= UNITS["GiB"] else "MiB"
    return f"{size / UNITS[unit]:.1f}{unit}"


def _positive(value: int) -> int:
    if value <= 0:
        raise ValueError("must be more than 0 bytes")
    return value


def _schema(minimum: int) -> WithJsonSchema:
    return WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": minimum}, {"type": "string", "pattern": _SHAPE}]}
    )


Size = Annotated[int, BeforeValidator(parse_size), Word("size"), _schema(0)]
"""A pydantic type: bytes, ≥ 0, from a number or text."""

PositiveSize = Annotated[
    int, BeforeValidator(lambda value: _positive(parse_size(value))), Word("size"), _schema(1)
]
"""The same, > 0."""
