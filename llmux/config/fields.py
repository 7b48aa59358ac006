"""What the sections of the configuration have in common, and the types of their settings."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


@dataclass(frozen=True, slots=True)
class Word:
    """Put into an ``Annotated`` type: the word for it that a user reads."""

    text: str


@dataclass(frozen=True, slots=True)
class Default:
    """Put into an ``Annotated`` type: the default as a user reads it, where the value does not say it."""

    text: str


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
        ValueError: ``value`` is not a size, negative, or no whole number of bytes.

    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"is not a size; {_HOW}")  # noqa: TRY004 (pydantic turns ValueError into a problem)
    text = str(value)
    match = _TEXT.match(text)
    if not match:
        raise ValueError(f"{text!r} is not a size; {_HOW}")
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


LONGEST_NAME = 256
LONGEST_SCRIPT = 131_071  # bytes: Linux refuses a longer argument to sh -c

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_ORIGIN = re.compile(r"https?://[^/\s?#@]+\Z", re.IGNORECASE)


class Section(BaseModel):
    """A mapping of settings: unknown names are errors, values never change."""

    # What is only a part of a whole needs no validator of its own.
    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True, hide_input_in_errors=True)


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")  # noqa: TRY004
    return value


def _script(value: Any) -> Any:
    if isinstance(value, bool):
        word = str(value).lower()
        raise ValueError(f'is read as the truth value {word}; write the command in quotes: "{word}"')  # noqa: TRY004
    if isinstance(value, list | tuple):
        raise ValueError("is a list; write one script: on one line, or on the lines after `|`")  # noqa: TRY004
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("is empty; write a command, `true` in quotes for one that does nothing")
    if not isinstance(value, str):
        raise ValueError("is no text; write a command in quotes")  # noqa: TRY004
    if "\0" in value:
        raise ValueError("holds a NUL character, which no shell takes; remove it")
    if len(value.encode(errors="replace")) > LONGEST_SCRIPT:
        raise ValueError("is longer than 128 KiB, which `sh -c` does not take; put it into a file and name that")
    return value


def _name(value: str) -> str:
    if not value:
        raise ValueError("is empty; a model needs a name")
    if len(value) > LONGEST_NAME:
        raise ValueError(f"is longer than {LONGEST_NAME} characters")
    if not value.isprintable():
        raise ValueError(f"{value!r} holds characters that cannot be printed; remove them")
    return value


def _env_name(value: str) -> str:
    if not _ENV_NAME.match(value):
        raise ValueError("is not a name for an environment variable; use letters, digits and _")
    if value.startswith("LLMUX_"):
        raise ValueError("is reserved: llmux itself sets the LLMUX_ variables of a hook")
    return value


def _env_value(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if value is None:
        raise ValueError('has no value; write "" for the empty text')
    if isinstance(value, str) and "\0" in value:
        raise ValueError("holds a NUL character, which no environment takes; remove it")
    return value


def _origin(value: str) -> str:
    if value not in {"*", "null"} and not (_ORIGIN.match(value) and _has_port_or_none(value)):
        raise ValueError(f"{value!r} is no origin; write scheme and host as http://localhost:5173, or *")
    return value.lower()


def _has_port_or_none(origin: str) -> bool:
    try:
        return bool(urlsplit(origin).hostname) and urlsplit(origin).port != 0
    except ValueError:
        return False


def _host(value: str) -> str:
    host = value.strip().removeprefix("[").removesuffix("]")
    if not host or any(character.isspace() or character in "/@?#" for character in host):
        raise ValueError(f"{value!r} is not an address to listen on; write 127.0.0.1, 0.0.0.0 or a host name")
    return host


def _called(value: str) -> str:
    name = value.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")
    # A colon is an IPv6 address's, or a port: those are not compared.
    is_name = ":" not in name and not any(character.isspace() or character in "/@?#,[]\\*" for character in name)
    if name != "*" and not (name and (is_name or _is_address(name))):
        raise ValueError(f"{value!r} is no host's name; write it without scheme and port as gpu.example, or *")
    return name


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


EnginePort = Annotated[int, Field(ge=1, le=65535), BeforeValidator(_number), Word("port")]
"""1 to 65535."""
OwnPort = Annotated[int, Field(ge=0, le=65535), BeforeValidator(_number), Word("port")]
"""0 to 65535; 0 lets the system choose."""
Count = Annotated[int, Field(ge=0), BeforeValidator(_number), Word("whole number")]
PositiveCount = Annotated[int, Field(ge=1), BeforeValidator(_number), Word("whole number")]
Script = Annotated[str, BeforeValidator(_script), Field(min_length=1), Word("script")]
Name = Annotated[str, AfterValidator(_name), Field(min_length=1, max_length=LONGEST_NAME), Word("name")]
EnvName = Annotated[str, AfterValidator(_env_name)]
EnvValue = Annotated[str, BeforeValidator(_env_value, json_schema_input_type=str | int | float | bool)]
Origin = Annotated[str, AfterValidator(_origin), Word("origin")]
HostName = Annotated[str, AfterValidator(_called), Word("name")]
Host = Annotated[str, AfterValidator(_host), Word("host")]
