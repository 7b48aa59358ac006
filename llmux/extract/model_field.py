"""Where a request names its model, and what a name may be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from urllib.parse import unquote_plus

from llmux.errors import BadRequestError

SLICE = 64 * 1024
"""Bytes: the most that a scanner is fed at once, and the most that a body is written or sent at once."""

MAX_NAME = 1024
"""Bytes: the longest model name, in UTF-8."""


@dataclass(frozen=True, slots=True)
class ModelField:
    """The model that a body names, and where.

    ``start`` and ``end`` are byte offsets in the body: of the JSON literal with its quotes, or of the
    content of the form field. What lies between them can be replaced; every other byte stays.
    """

    name: str
    start: int
    end: int


def json_literal(name: str) -> bytes:
    """``name`` as a JSON string, in UTF-8."""
    return json.dumps(name, ensure_ascii=False).encode()


def checked_name(name: str) -> str:
    """``name`` itself, or BadRequestError when it is empty, too long, or no Unicode text."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # a surrogate without its other half, written as an escape
        raise BadRequestError("model is not valid Unicode", param="model") from None
    if not size:
        raise BadRequestError("model is empty", param="model")
    if size > MAX_NAME:
        raise name_too_long()
    return name


def ambiguous(where: str) -> BadRequestError:
    """Return the error for a request that names its model twice, under keys that differ in case only."""
    return BadRequestError(
        f"{where} names the model twice, under keys that differ in case only, as model and Model; engines that"
        " do not tell them apart would serve another model than the one that was asked for: send one",
        code="ambiguous_model",
        param="model",
    )


def name_too_long() -> BadRequestError:
    """Return the error for a name of more than ``MAX_NAME`` bytes."""
    return BadRequestError(f"model is longer than {MAX_NAME} bytes", param="model")


def model_in_query(query: str) -> str | None:
    """Return the last value of ``model`` in a raw query string; None when it is absent or blank.

    ``query`` is what follows the ``?`` on the wire, still percent-encoded. Raises BadRequestError for a name
    that is not UTF-8 or too long, and for keys that differ in case only.
    """
    value = ""
    seen = alike = False
    for pair in query.split("&"):
        key, _, text = pair.partition("=")
        if "%" in key:
            key = unquote_plus(key)
        if key == "model":
            seen, value = True, text
        elif key.lower() == "model":
            alike = True
    if seen and alike:
        raise ambiguous("the query")
    try:
        name = unquote_plus(value, errors="strict")
    except UnicodeDecodeError:
        raise BadRequestError("model in the query is not valid UTF-8", param="model") from None
    return checked_name(name) if name.strip() else None
