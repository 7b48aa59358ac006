"""Errors as the two families of SDKs expect them, as a response and inside an event stream.

Answers to requests without a key are made without aiohttp (``refusal``): the same bytes, for a fraction of the
time. So a flood of such requests costs little each, and a connection is closed after ``MOST_REFUSED`` of them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE

from llmux.errors import RequestError, UnauthorizedError


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


def no_key(error: RequestError) -> Iterable[tuple[str, str]]:
    """Return the fields that say that no key was right, and that trying again, as Claude Code does, is no use."""
    return _NO_KEY if isinstance(error, UnauthorizedError) else ()


_NO_KEY = (("WWW-Authenticate", "Bearer"), ("x-should-retry", "false"))


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


MOST_REFUSED = 100  # requests

_bodies: dict[str, bytes] = {}  # by message: there are two
_SERVER = SERVER_SOFTWARE.encode()


def refused_too_often(client: Any) -> bool:
    """Count a refusal on a client's connection, and return whether it is closed."""
    refused: int | None = getattr(client, "refused", None)
    if refused is None:  # a server other than llmux's own
        return False
    client.refused = refused = refused + 1
    return refused >= MOST_REFUSED


def refusal(error: RequestError, request_id: str, *, anthropic: bool, close: bool) -> bytes:
    """Return head and body of ``error_response``, as aiohttp would send it."""
    if anthropic:
        body = json.dumps(error_body(error, anthropic=True, request_id=request_id)).encode()
    else:
        found = _bodies.get(error.message)
        if found is None:
            found = _bodies[error.message] = json.dumps(error_body(error, anthropic=False)).encode()
        body = found
    more = b"".join(b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in no_key(error))
    if error.retry_after is not None:
        more += b"Retry-After: %d\r\n" % max(1, math.ceil(error.retry_after))
    return (
        b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nX-Request-ID: %b\r\nX-LLMux-Queue-Seconds: 0.000\r\n"
        b"%bContent-Length: %d\r\nDate: %b\r\nServer: %b\r\n%b\r\n%b"
        % (
            _status(error.status),
            request_id.encode(),
            more,
            len(body),
            rfc822_formatted_time().encode(),
            _SERVER,
            b"Connection: close\r\n" if close else b"",
            body,
        )
    )


@functools.lru_cache
def _status(status: int) -> bytes:
    return f"{status} {HTTPStatus(status).phrase}".encode()
