"""What llmux changes in a request on its way to what serves it, and the headers by which its client is told."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote_plus, unquote_plus

from llmux.extract import Body

if TYPE_CHECKING:
    from llmux.proxy import RelayFactory
    from llmux.targets.codecs import Translation

SERVED_BY = "X-LLMux-Served-By"
VARIANT = "X-LLMux-Variant"
MARKS = frozenset({SERVED_BY, VARIANT})
"""The headers that say what served a request for a name which is neither a model nor an alias."""


class Rewritten(Body):
    """A request in another dialect than its client's: its target, and the relay of its answer."""

    target: str
    relay: RelayFactory
    translation: Translation


def rename_in_query(target: str, model: str) -> str:
    """Replace the value of every ``model`` in a target's query; nothing else changes."""
    path, question, query = target.partition("?")
    pairs = query.split("&")
    for index, pair in enumerate(pairs):
        key, equals, _ = pair.partition("=")
        if equals and unquote_plus(key) == "model":
            pairs[index] = f"{key}={quote_plus(model)}"
    return f"{path}{question}{'&'.join(pairs)}"
