"""The model that a query string names."""

from __future__ import annotations

from urllib.parse import unquote_plus

from llmux.errors import BadRequestError
from llmux.extract.field import ambiguous, checked_name


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
