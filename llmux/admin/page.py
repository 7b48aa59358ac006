"""The page for people: a few static files, which ask ``/llmux/…`` for everything that they show."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from typing import NamedTuple

from aiohttp import hdrs, web

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

HEADERS = {
    # Nothing from elsewhere, nothing inline; and no text ever becomes markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    hdrs.CACHE_CONTROL: "no-cache",  # asked for anew every time: an update is seen at once
}


class _File(NamedTuple):
    content: bytes
    content_type: str
    etag: str


@functools.cache
def _files() -> dict[str, _File]:
    found = {}
    for path in resources.files("llmux").joinpath("ui").iterdir():
        kind = _TYPES.get(path.name[path.name.rfind(".") :])
        if kind is not None:
            content = path.read_bytes()
            found[path.name] = _File(content, kind, hashlib.sha256(content).hexdigest()[:32])
    return found


def wants_page(request: web.BaseRequest) -> bool:
    """Whether this comes from a browser that was given llmux's address."""
    return "text/html" in request.headers.get(hdrs.ACCEPT, "")


def page_file(request: web.Request, name: str) -> web.Response:
    """Return one file of the page, or 304 when the browser has it. Raises HTTPNotFound."""
    file = _files().get(name)
    if file is None:
        raise web.HTTPNotFound
    known = request.if_none_match or ()
    if any(etag.value == file.etag for etag in known):
        response = web.Response(status=304, headers=HEADERS)
    else:
        response = web.Response(
            body=file.content, content_type=file.content_type, charset="utf-8", headers=HEADERS
        )
    response.etag = file.etag
    return response
