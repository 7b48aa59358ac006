"""Which clients may use llmux, and which may operate it.

With ``api_keys`` a client shows one of them as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``. Operators
show ``admin_key`` the same way, which opens everything else too. Without ``admin_key`` they come over the
control socket (``llmux.control``), or, without ``api_keys``, from this machine, and not through a proxy. With
``api_keys`` that is not enough: a proxy on this machine connects from there for all of its clients, and few say
so by themselves. Without either all credentials pass untouched; else a header that holds one of llmux's keys is
kept from the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aiohttp import hdrs, web

from llmux.config.access import Access
from llmux.config.setting_types import LONGEST_NAME
from llmux.errors import ForbiddenError, RequestError, UnauthorizedError
from llmux.middleware.keyring import Holder, Keyring, network_of, no_valid_key

KEY_NAME = "X-LLMux-Key"
"""With a gateway's key: the name of its client's."""
_OF_GATEWAYS = frozenset({KEY_NAME.lower().encode(), b"x-llmux-progress"})  # no client has sent these
_AUTHORIZATION = b"authorization"
_API_KEY = b"x-api-key"
_LOOPBACK = ("127.", "::ffff:127.")
_FROM_ELSEWHERE = (hdrs.FORWARDED, hdrs.X_FORWARDED_FOR, "X-Real-IP")
_HOW = "send Authorization: Bearer KEY, or X-API-Key: KEY"


class Let(NamedTuple):
    """The holder that was let in, and the headers (in lower case) that must not go on to an engine."""

    holder: Holder | None = None
    drop: frozenset[bytes] = frozenset()

    @property
    def of_gateway(self) -> bool:
        """Whether it is a gateway's key."""
        return self.holder is not None and self.holder.gateway

    def for_client(self, request: web.BaseRequest) -> Let:
        """Return the same in the name of the gateway's client, where the gateway tells it."""
        assert self.holder is not None
        name = request.headers.get(KEY_NAME, "")
        holder = self.holder._replace(name=name) if 0 < len(name) <= LONGEST_NAME and name.isprintable() else None
        return Let(holder or self.holder, self.drop | _OF_GATEWAYS)


class FastLet(NamedTuple):
    """The same on the fast path: which lines of the head must not go on, the last first."""

    drop: Sequence[int]
    holder: Holder | None


ANONYMOUS = Let()
_THIS_HOST = Holder(None, operator=True)


class Keys:
    """The keys of the configuration in force."""

    def __init__(self) -> None:
        self.ring = Keyring()

    def configure(self, config: Access) -> None:
        """Take over a configuration's keys, at once."""
        self.ring.configure(config)

    async def client(self, request: web.BaseRequest) -> Let:
        """Let a client in. Raises UnauthorizedError or TooManyAttemptsError."""
        ring = self.ring
        if not ring.any:
            return ANONYMOUS
        shown = _shown(request)
        let = self._recognized(shown)
        if let.holder is not None or not ring.wanted:
            return let
        if not ring.guarded and is_control(request):
            return Let(_THIS_HOST)
        if await ring.ask(shown.values(), address_of(request)) is None:
            raise no_valid_key()
        return self._recognized(shown)

    async def operator(self, request: web.BaseRequest) -> Let:
        """Let an operator in. Raises UnauthorizedError, ForbiddenError or TooManyAttemptsError."""
        ring = self.ring
        shown = _shown(request) if ring.any else {}
        let = self._recognized(shown)
        if not ring.guarded:
            if is_control(request):
                return Let(_THIS_HOST, let.drop)
            if ring.wanted:
                raise ForbiddenError(
                    "With `api_keys`, operating llmux over HTTP takes `admin_key`, which is not set: set it in the"
                    " configuration, or use the llmux command on llmux's own host.",
                    code="admin_key_not_set",
                )
            if not is_loopback(request) or any(name in request.headers for name in _FROM_ELSEWHERE):
                raise ForbiddenError("Without `admin_key` only this machine may do this, and not through a proxy.")
            return let
        if let.holder is None or not let.holder.operator:
            unknown = [key for key in shown.values() if ring.recognize(key) is None]
            holder = await ring.ask(unknown, address_of(request))
            if holder is None or not holder.operator:
                what = "No valid admin key" if let.holder is None else "This takes the admin key"
                raise UnauthorizedError(f"{what}: {_HOW}.")
        return self._recognized(shown)

    async def shows_one(self, request: web.BaseRequest) -> bool:
        """Whether a request shows any of the keys. Raises TooManyAttemptsError."""
        shown = _shown(request) if self.ring.any else {}
        if self._recognized(shown).holder is not None:
            return True
        return bool(shown) and await self.ring.ask(shown.values(), address_of(request)) is not None

    def on_fast_path(self, lines: list[bytes], shown: Sequence[int]) -> FastLet | None:
        """Return which of a head's lines must not go on, and whose key it is; None if that takes more than a look.

        ``shown`` are those that hold a credential.
        """
        found = []
        best: Holder | None = None
        seen = b""
        for at in reversed(shown):
            name, _, value = lines[at].partition(b": ")
            name = name.lower()
            if name == seen or len(shown) > 2:  # noqa: PLR2004 - one of them twice
                return None
            seen = name
            key = _bearer(value) if name == _AUTHORIZATION else value
            holder = None if key is None else self.ring.recognize(key)
            if holder is not None:
                found.append(at)
                if best is None or holder.operator:
                    best = holder
        return FastLet(found, best) if found or not self.ring.wanted else None

    def refusal(self, lines: list[bytes], shown: Sequence[int], address: str) -> RequestError | None:
        """Return why a client is refused that shows these lines of a head; None if that takes more than a look."""
        ring = self.ring
        if not ring.wanted:
            return None
        keys: dict[bytes, bytes | None] = {}
        for at in shown:
            name, _, value = lines[at].partition(b": ")
            name = name.lower()
            if name in keys:
                return None
            keys[name] = _bearer(value) if name == _AUTHORIZATION else value
        found = [key for name in (_AUTHORIZATION, _API_KEY) if (key := keys.get(name)) is not None]
        if any(ring.recognize(key) is not None for key in found):
            return None
        return ring.refusal(found, address)

    def _recognized(self, shown: dict[bytes, bytes]) -> Let:
        best: Holder | None = None
        drop = set()
        for header, key in shown.items():
            holder = self.ring.recognize(key)
            if holder is not None:
                drop.add(header)
                if best is None or holder.operator:
                    best = holder
        return Let(best, frozenset(drop)) if drop else ANONYMOUS


def is_control(request: web.BaseRequest) -> bool:
    """Whether the request came over the control socket, which only this host's user can open."""
    return getattr(request.protocol, "control", False)


def is_loopback(request: web.BaseRequest) -> bool:
    """Whether the request comes from this machine (over a Unix socket too)."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    if isinstance(peer, tuple):
        return peer[0] == "::1" or str(peer[0]).startswith(_LOOPBACK)
    return peer is not None


def address_of(request: web.BaseRequest) -> str:
    """Return whose wrong keys are counted together."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    return network_of(str(peer[0])) if isinstance(peer, tuple) else ""


def _shown(request: web.BaseRequest) -> dict[bytes, bytes]:
    """Return the keys that a request shows, by header."""
    shown = {}
    value = request.headers.get(hdrs.AUTHORIZATION)
    if value is not None and (key := _bearer(value.encode("utf-8", "surrogateescape"))) is not None:
        shown[_AUTHORIZATION] = key
    value = request.headers.get("X-API-Key")
    if value is not None:
        shown[_API_KEY] = value.encode("utf-8", "surrogateescape")
    return shown


def _bearer(value: bytes) -> bytes | None:
    scheme, _, key = value.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None
