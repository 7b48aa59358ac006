"""Whether a client that waits is told where it stands, and how.

Told in the body is who asks a path on which the kind of the answer is known beforehand: events, or JSON.
"""

from __future__ import annotations

from aiohttp import HttpVersion11, hdrs, web

from llmux.errors import BadRequestError
from llmux.extract import Body
from llmux.extract.flag import streams
from llmux.middleware.paths import Kind, Route
from llmux.proxy.early import Dialect

HEADER = "X-LLMux-Progress"
INTERIM = "1xx"

_MESSAGES = "/v1/messages"
_STREAMED = frozenset(
    {
        "/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions", "/completion",
        "/v1/responses", "/infill", _MESSAGES,
    }
)  # fmt: skip
_JSON = _STREAMED | {
    "/v1/embeddings", "/embeddings", "/embedding", "/v1/rerank", "/rerank", "/v1/reranking", "/reranking",
    "/v1/score", "/score", "/v1/pooling", "/pooling", "/v1/classify", "/classify", "/v1/moderations",
    "/v1/images/generations", "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/apply-template",
}  # fmt: skip


def wish(request: web.BaseRequest, default: bool) -> str:
    """Return how a client wants to be told: ``on``, ``off`` or ``1xx``. Raises BadRequestError."""
    given = request.headers.get(HEADER)
    word = ("on" if default else "off") if given is None else given.strip().lower()
    if word not in {"on", "off", INTERIM}:
        raise BadRequestError(f"{HEADER} must be on, off or 1xx", param=HEADER)
    return "off" if request.version < HttpVersion11 else word


async def dialect_of(request: web.BaseRequest, route: Route, body: Body | None) -> Dialect | None:
    """Return what the client expects to read, None where nobody can say before the engine does."""
    if (
        route.kind is not Kind.FORWARD
        or route.path not in _JSON
        or body is None
        or request.method != hdrs.METH_POST
    ):
        return None
    match await streams(body):
        case False:
            return Dialect.JSON
        case True if route.path in _STREAMED:
            return Dialect.ANTHROPIC_STREAM if route.path == _MESSAGES else Dialect.OPENAI_STREAM
        case _:
            return None
