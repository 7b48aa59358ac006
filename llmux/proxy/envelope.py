"""Errors as the two families of SDKs expect them, as a response and inside an event stream."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

from aiohttp import web

from llmux.errors import RequestError


def error_response(
    error: RequestError,
    *,
    anthropic: bool,
    headers: Iterable[tuple[str, str]] = (),
) -> web.Response:
    """Make the response for a refused request. ``headers`` go with it; the request's id is among them."""
    response = web.Response(status=error.status, content_type="application/json")
    for name, value in headers:
        response.headers[name] = value
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    body = error_body(error, anthropic=anthropic, request_id=response.headers.get("X-Request-ID"))
    response.body = json.dumps(body).encode()
    return response


def error_body(error: RequestError, *, anthropic: bool, request_id: str | None = None) -> dict[str, object]:
    """Return the envelope that goes with the client's dialect."""
    if anthropic:
        body: dict[str, object] = {
            "type": "error",
            "error": {"type": error.anthropic_type, "message": error.message},
        }
        if request_id is not None:
            body["request_id"] = request_id
        return body
    return {
        "error": {"message": error.message, "type": error.type, "code": error.code, "param": error.param},
    }


def error_event(error: RequestError, *, anthropic: bool, request_id: str | None = None) -> bytes:
    """Return the error as a server-sent event that makes the official SDKs raise.

    It starts with a blank line, which ends whatever event was being sent.
    """
    return event_of(error_body(error, anthropic=anthropic, request_id=request_id), anthropic=anthropic)


def event_of(document: Mapping[str, object], *, anthropic: bool) -> bytes:
    """Return an envelope as such an event."""
    data = json.dumps(document).encode()
    name = b"event: error\n" if anthropic else b""
    return b"\n\n" + name + b"data: " + data + b"\n\n"
