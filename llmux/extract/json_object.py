"""The members that llmux needs of a JSON object which is held whole.

pydantic's parser reads all of such a body, and makes objects of nothing but these members. Where strings have
escapes, it is several times as fast as ``ModelScanner``, which reads a body that is still arriving. It is also
stricter. Whatever it does not accept, or what is not clear, is left to the scanner: both find the same model.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from pydantic_core import SchemaValidator, ValidationError, core_schema

from llmux.extract.model_field import json_literal

MOST = 1024 * 1024
"""Bytes: the largest body that is read at once. A usual one of that size takes a millisecond."""

_SMALL = 64 * 1024  # bytes of which pydantic may make objects, to say what is wrong
_QUICK = 128 * 1024  # bytes that are read within milliseconds, whatever they are
_NESTED = 32 * 1024  # opening brackets in a larger body, which take longer than anything else


def _validator(model: core_schema.TypedDictField, other: core_schema.CoreSchema) -> SchemaValidator:
    """Return what reads the wanted members. ``other`` is for keys that differ from ``model`` only in case.

    Some engines take one for the other. Such keys come last in what is found.
    """
    optional = core_schema.typed_dict_field(core_schema.any_schema(), required=False)
    spellings = map("".join, itertools.product(*zip("model", "MODEL", strict=True)))
    others = dict.fromkeys(spellings, core_schema.typed_dict_field(other, required=False))
    wanted = {"model": model, "stream": optional, "stream_options": optional}
    return SchemaValidator(core_schema.typed_dict_schema(wanted | others | wanted, extra_behavior="ignore"))


_WANTED = ("model", "stream", "stream_options")
_never = core_schema.int_schema(gt=0, lt=0)
_STRICT = _validator(core_schema.typed_dict_field(core_schema.str_schema(strict=True)), _never)
_LENIENT = _validator(
    core_schema.typed_dict_field(core_schema.any_schema(), required=False), core_schema.any_schema()
)
_KEY = b'"model"'
_NAMED = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("[^"]*")')
_SPELT_OUT = b"\\u006"  # begins every escape of a letter of the key


def members_of(body: bytes) -> dict[str, Any] | None:
    """Return ``model``, a string, and if present ``stream`` and ``stream_options`` of a JSON object.

    None for a body which the scanner has to judge.
    """
    if len(body) < _WORTH_KEEPING:
        return _read(body)
    last, found = _last[0]
    if body != last:
        found = _read(body)
        _last[0] = body, found
    return found


def _read(body: bytes) -> dict[str, Any] | None:
    size = len(body)
    if size > _QUICK and (size > MOST or body.count(b"[") + body.count(b"{") > _NESTED):
        return None
    try:
        if size <= _SMALL:
            return _STRICT.validate_json(body)  # type: ignore[no-any-return]
        found: dict[str, Any] = _LENIENT.validate_json(body)
    except ValidationError:
        return None
    clear = type(found.get("model")) is str and next(reversed(found)) in _WANTED
    return found if clear else None


# The last body of some size: one that cannot be served on the fast path is read again for the model handler.
_WORTH_KEEPING = 4096
_last: list[tuple[bytes, dict[str, Any] | None]] = [(b"", None)]


def place_of_model(body: bytes) -> tuple[int, int] | None:
    """Return where the literal of the top-level model stands in a body that has one; None if it takes a scan.

    If the key occurs only once in all of the body, and no escape can stand for a letter of it, then it is the
    top-level one.
    """
    at = body.rfind(_KEY)  # backwards it is four times as fast
    if body.rfind(_KEY, 0, at) >= 0 or body.rfind(_SPELT_OUT) >= 0:
        return None
    found = _NAMED.match(body, at)
    return None if found is None or b"\\" in found[1] else found.span(1)


def with_model(body: bytes, name: str) -> bytes | None:
    """Return the body with ``name`` as its model, every other byte unchanged; None if that takes a scan."""
    place = place_of_model(body)
    if place is None:
        return None
    start, end = place
    return b"%b%b%b" % (body[:start], json_literal(name), body[end:])
