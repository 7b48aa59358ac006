"""Who may use llmux, and who may operate it.

With ``api_keys`` a client shows one of them as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``; the header
that did it is kept from the engine. Without, all credentials pass untouched. Operators show ``admin_key`` the
same way; without one they are whoever connects from this machine. Comparisons take the same time for every key.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from aiohttp import hdrs, web

from llmux.errors import ForbiddenError, UnauthorizedError

_API_KEY = "X-API-Key"
_LOOPBACK = ("127.", "::ffff:127.")


class Keys:
    """The keys of one configuration."""

    def __init__(self, api_keys: Iterable[str] = (), admin_key: str | None = None) -> None:
        self._api = [key.encode() for key in api_keys]
        self._admin = admin_key.encode() if admin_key is not None else None

    @property
    def required(self) -> bool:
        """Whether clients have to show one."""
        return bool(self._api)

    def client(self, request: web.BaseRequest) -> bytes | None:
        """Let a client in; return the header that must not go on to the engine. Raises UnauthorizedError."""
        if not self._api:
            return None
        accepted = self._api if self._admin is None else [*self._api, self._admin]
        header = _shown(request, accepted)
        if header is None:
            raise UnauthorizedError("No valid API key: send Authorization: Bearer KEY, or X-API-Key: KEY.")
        return header

    def operator(self, request: web.BaseRequest) -> bytes | None:
        """Let an operator in. Raises UnauthorizedError or ForbiddenError."""
        if self._admin is not None:
            header = _shown(request, [self._admin])
            if header is None:
                raise UnauthorizedError("No valid admin key: send Authorization: Bearer KEY, or X-API-Key: KEY.")
            return header
        if not is_loopback(request):
            raise ForbiddenError("Without `admin_key` only this machine may do this.")
        return _shown(request, self._api)  # not asked for, but not the engine's business either


def is_loopback(request: web.BaseRequest) -> bool:
    """Whether the request comes from this machine (over a Unix socket too)."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    if isinstance(peer, tuple):
        return peer[0] == "::1" or str(peer[0]).startswith(_LOOPBACK)
    return peer is not None


def _shown(request: web.BaseRequest, accepted: list[bytes]) -> bytes | None:
    scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "bearer" and _known(key.strip(), accepted):
        return b"authorization"
    if _known(request.headers.get(_API_KEY, ""), accepted):
        return b"x-api-key"
    return None


def _known(key: str, accepted: list[bytes]) -> bool:
    given = key.encode("utf-8", "surrogateescape")
    # Not `any`: it would stop at the first match.
    return bool(sum(hmac.compare_digest(given, one) for one in accepted))
