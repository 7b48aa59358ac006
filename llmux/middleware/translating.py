"""Requests in a dialect that their model's engine does not speak. Imported only where there are such models."""

from __future__ import annotations

import json
from typing import Any

from llmux.config import Config
from llmux.config.targets import Spoken
from llmux.errors import BadRequestError
from llmux.extract import SLICE, Body, BodyBudget, ModelField, ModelScanner
from llmux.extract.body import Store
from llmux.middleware.context import RequestContext
from llmux.middleware.paths import DIALECTS
from llmux.middleware.rewriting import Rewritten
from llmux.proxy.translated import TranslatingRelay
from llmux.targets.codecs import Dialect, Translation

DROPPED = "X-LLMux-Dropped"
_EVERYTHING = Spoken()
_LONGEST = 1000  # characters of that header

# Which of an engine's dialects loses least.
_NEAREST = {
    Dialect.CHAT: (Dialect.RESPONSES, Dialect.MESSAGES),
    Dialect.MESSAGES: (Dialect.CHAT, Dialect.RESPONSES),
    Dialect.RESPONSES: (Dialect.CHAT, Dialect.MESSAGES),
}


class Translating:
    """Knows which engines lack a dialect."""

    def __init__(self, config: Config, budget: BodyBudget) -> None:
        self._budget = budget
        self._spoken = config.spoken

    def fit(self, context: RequestContext, body: Body | None) -> Body | None:
        """Return the request in a dialect that its model's engine speaks; unchanged if that is its own.

        Raises BadRequestError for parts that cannot be translated.
        """
        assert context.model is not None
        context.headers = [field for field in context.headers if field[0] != DROPPED]
        spoken, lossy, deprecates_max_tokens = self._spoken.get(context.model, _EVERYTHING)
        path = DIALECTS.get(context.route.path)
        if path is None or spoken is None or path in spoken or body is None:
            return body
        client = Dialect(path)
        engine = next((dialect for dialect in _NEAREST[client] if dialect in spoken), None)
        if engine is None:
            return body
        document = _document(body)
        document.setdefault("model", context.model)
        translation = Translation(client, engine, lossy=lossy)
        translated = translation.request(document)
        if deprecates_max_tokens and engine is Dialect.CHAT and "max_tokens" in translated:
            translated["max_completion_tokens"] = translated.pop("max_tokens")
        if translation.dropped:
            context.headers.append((DROPPED, _listed(translation.dropped)))
        return self._made(translated, translation)

    def _made(self, document: dict[str, Any], translation: Translation) -> Rewritten:
        try:
            data = json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can only write as an escape
            data = json.dumps(document).encode()
        store, scanner = Store(self._budget), ModelScanner()
        try:
            for start in range(0, len(data), SLICE):
                scanner.feed(data[start : start + SLICE])
                store.add(data[start : start + SLICE])
            field: ModelField | None = scanner.finish()
        except BaseException:
            store.close()
            raise
        body = Rewritten(store, field)
        body.target = translation.engine.path
        body.translation = translation
        body.relay = lambda client, exchange, loop: TranslatingRelay(client, exchange, loop, translation)
        return body


def _document(body: Body) -> dict[str, Any]:
    if body.form or body.compressed:
        raise BadRequestError("this model's engine speaks another dialect: send plain JSON", code="invalid_json")
    try:
        document = json.loads(b"".join(body))
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise BadRequestError("the body is not a JSON object", code="invalid_json")
    return document


def _listed(dropped: tuple[str, ...]) -> str:
    """Return names for a header, without characters that a header may not contain."""
    text = ", ".join(name if name.isascii() and name.isprintable() else repr(name) for name in dropped)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
