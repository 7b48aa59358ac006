"""Requests in a dialect that their model's engine does not speak. Imported only where there are such models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from llmux.config import Config
from llmux.errors import BadRequestError
from llmux.extract import SLICE, Body, BodyBudget, ModelField, ModelScanner
from llmux.extract.body import Store
from llmux.middleware.context import RequestContext
from llmux.middleware.model_handler import Rewritten
from llmux.proxy.translated import TranslatingRelay
from llmux.targets.codecs import Dialect, Translation

DROPPED = "X-LLMux-Dropped"
ESTIMATED = "X-LLMux-Estimated"
_COUNT = "/v1/messages/count_tokens"
_EVERYTHING = (None, False)
_PER_TOKEN = 3.5  # bytes of a request in JSON
_PER_FILE = 1500  # tokens of an image or a document, about
_LONGEST = 1000  # characters of that header

_DIALECTS = {
    "/v1/chat/completions": Dialect.CHAT,
    "/chat/completions": Dialect.CHAT,
    "/v1/messages": Dialect.MESSAGES,
    "/v1/responses": Dialect.RESPONSES,
}
# Which of those that an engine speaks loses least.
_NEAREST = {
    Dialect.CHAT: (Dialect.RESPONSES, Dialect.MESSAGES),
    Dialect.MESSAGES: (Dialect.CHAT, Dialect.RESPONSES),
    Dialect.RESPONSES: (Dialect.CHAT, Dialect.MESSAGES),
}


class Translating:
    """Knows which engines lack a dialect."""

    def __init__(self, config: Config, budget: BodyBudget, is_awake: Callable[[str], bool]) -> None:
        self._budget = budget
        self._is_awake = is_awake
        self._spoken: Mapping[str, tuple[frozenset[str] | None, bool]] = {
            name: (frozenset(config.models[name].apis or ()), config.models[name].lossy)
            for name in config.translated
        }

    def fit(self, context: RequestContext, body: Body | None) -> Body | None:
        """Return the request in a dialect that its model's engine speaks; as it is, where that does.

        Raises BadRequestError for what has no place in it.
        """
        assert context.model is not None
        context.headers = [field for field in context.headers if field[0] != DROPPED]
        spoken, lossy = self._spoken.get(context.model, _EVERYTHING)
        client = _DIALECTS.get(context.route.path)
        if client is None or spoken is None or client in spoken or body is None:
            return body
        engine = next((dialect for dialect in _NEAREST[client] if dialect in spoken), None)
        if engine is None:
            return body
        document = _document(body)
        document.setdefault("model", context.model)
        translation = Translation(client, engine, lossy=lossy)
        translated = translation.request(document)
        if translation.dropped:
            context.headers.append((DROPPED, _listed(translation.dropped)))
        return self._made(translated, translation)

    def count(self, context: RequestContext, body: Body | None) -> web.Response | None:
        """Return an estimate of a request's tokens, where its model's engine cannot be asked without being woken.

        None where it can, or where what it speaks is not stated. Raises BadRequestError for what is no request.
        """
        assert context.model is not None
        spoken, _ = self._spoken.get(context.model, _EVERYTHING)
        if context.route.path != _COUNT or spoken is None or body is None:
            return None
        if "count_tokens" in spoken and self._is_awake(context.model):
            return None
        tokens = estimate(_document(body))
        fields = [*context.headers, (ESTIMATED, "true"), ("X-LLMux-Queue-Seconds", "0.000")]
        return web.json_response({"input_tokens": tokens}, headers=dict(fields))

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
        body.relay = lambda client, exchange, loop: TranslatingRelay(client, exchange, loop, translation)
        return body


def estimate(document: dict[str, Any]) -> int:
    """Return about how many tokens a request has: by the bytes of its text, and a guess for each file in it."""
    files = 0
    pending: list[Any] = [{name: document.get(name) for name in ("system", "messages", "tools")}]
    size = 0
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            if isinstance(value.get("source"), dict):
                files += 1
            pending += [item for name, item in value.items() if name != "source"]
            size += sum(len(name) + 4 for name in value)
        elif isinstance(value, str):
            size += len(value.encode(errors="replace"))
    return max(1, math.ceil(size / _PER_TOKEN)) + files * _PER_FILE


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
    """Return names for a header: without what no header may hold."""
    text = ", ".join(name if name.isascii() and name.isprintable() else repr(name) for name in dropped)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
