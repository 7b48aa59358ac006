"""Which web pages may use llmux, and by which name: the Origin and Host headers, and the answers to OPTIONS.

A browser sends ``Origin`` with what a page does to another site. Without a check any page that a user opens could
talk to the llmux on that user's machine. So a request with an ``Origin`` is refused (403) unless it is llmux's
own or in ``cors``; one without (curl, the SDKs) is none of this module's business.

llmux's own: the page came from the address that the request is sent to (same host and port as its ``Host``
header, under http or https: a proxy in front may end TLS), where that is an IP address, ``localhost`` or a name
of this machine; or from a loopback name on llmux's own port. A proxy's public name belongs into ``cors``.
``null`` (files, sandboxed frames) is refused unless it is listed; ``*`` in ``cors`` admits every page.

Images, frames, links and forms send no ``Origin`` with their GETs, but ``Sec-Fetch-Site``: ``cross-site`` and
``same-site`` without an ``Origin`` are refused, unless ``*`` admits every page. ``none`` (the address bar) and
``same-origin`` pass, and programs send none of it.

The ``Host`` header is judged where llmux listens on loopback and wants no keys. A web page may give its own name
a loopback address (DNS rebinding). The browser then takes llmux for the page's own server: it sends neither
``Origin`` nor ``Sec-Fetch-Site``, and shows the page every answer. Only ``Host``, the page's name, tells. So a
request is refused unless it calls llmux ``localhost``, a name below it, by a loopback address, or by a name in
``hosts``. 0.0.0.0 is none of these: browsers treat it as a public address.

Programs may leave ``Host`` out, or empty; no browser does. Names of one label (``http://gpubox``) and those below
``.test`` (RFC 6761) cannot be had in the public DNS; programs on this host use them. But ``/etc/hosts`` of many
systems gives some a loopback address (``localhost4``), so a page may use those: both are refused where
``Accept-Encoding`` is sent, which every browser does and no page can prevent.

The cost: one look-up in a set for a name that has been judged before.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
# What the SDKs for browsers send; used when a preflight names no headers.
_HEADERS = (
    "Authorization, Content-Type, X-API-Key, X-Request-ID, X-LLMux-Progress, Anthropic-Version, Anthropic-Beta,"
    " OpenAI-Beta"
)
_EXPOSED = "X-Request-ID, X-LLMux-Queue-Seconds, X-LLMux-Expected-Seconds, Retry-After"
_MAX_AGE = "600"  # seconds; browsers cap it anyway (Chromium at 2 h)
_ELSEWHERE = frozenset({"cross-site", "same-site"})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_HEADER_LIST = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:[ \t]*,[ \t]*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_MAX_HEADER_LIST = 4096
_SHOWN = 100  # characters of a refused origin


class Verdict(NamedTuple):
    """Whether a request's origin may use llmux, and the headers that its response gets."""

    allowed: bool
    headers: Mapping[str, str]
    reason: str = ""


class Answer(NamedTuple):
    """llmux's answer to OPTIONS; it has no body when ``status`` is 204."""

    status: int
    headers: Mapping[str, str]
    reason: str = ""


_NO_HEADERS: Mapping[str, str] = {}
_PLAIN = Verdict(allowed=True, headers=_NO_HEADERS)


def canonical(origin: str) -> str:
    """Return an origin as scheme://host[:port], folded, without the scheme's own port; "" when it is none."""
    try:
        parts = urlsplit(origin.strip())
        port = parts.port
        host = parts.hostname
    except ValueError:
        return ""
    if not parts.scheme or not host or parts.path not in {"", "/"} or parts.query or parts.fragment:
        return ""
    if "@" in parts.netloc:
        return ""
    if ":" in host:
        host = f"[{host}]"
    if port is None or port == _DEFAULT_PORTS.get(parts.scheme):
        return f"{parts.scheme}://{host}"
    return f"{parts.scheme}://{host}:{port}"


def _refusal(origin: str, form: str) -> str:
    """Say what would let in the pages of an origin, of which ``form`` is the canonical form, if it has one."""
    pages = f"pages of the origin {origin[:_SHOWN]!r} may not use llmux"
    if form:
        return f"{pages}: add it to `cors` in the configuration"
    return f"{pages}: only * in `cors` in the configuration, which lets in all, would let them in"


def check_cors_entry(entry: str) -> str:
    """Return an entry of ``cors`` as it is compared; ValueError when it can match no Origin header."""
    if entry in {"*", "null"}:
        return entry
    form = canonical(entry)
    if not form:
        raise ValueError(f"{entry!r} is not an origin: write scheme://host or scheme://host:port, or *")
    return form


class Origins:
    """The origins that may use llmux. Made anew when the configuration changes."""

    def __init__(self, cors: Iterable[str] = (), *, port: int | None = None, hosts: Iterable[str] = ()) -> None:
        """``cors`` as configured, ``port`` the one that llmux listens on, ``hosts`` the names of this machine."""
        names = {host.lower().rstrip(".") for host in hosts}
        self._hosts = names | {f"{name}.local" for name in names}
        entries = frozenset(check_cors_entry(entry) for entry in cors)
        self._any = "*" in entries
        own = [f"{name}:{port}" for name in _LOOPBACK] if port is not None else []
        self._listed = entries | {canonical(f"http://{address}") for address in own}

    def check(self, origin: str | None, host: str | None) -> Verdict:
        """Judge the values of a request's ``Origin`` and ``Host`` headers (None: not sent)."""
        if origin is None:
            return _PLAIN
        if self._any:
            return Verdict(
                allowed=True,
                headers={"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": _EXPOSED},
            )
        form = origin if origin == "null" else canonical(origin)
        if form and (form in self._listed or self._same_host(form, host)):
            return Verdict(
                allowed=True,
                headers={
                    "Access-Control-Allow-Origin": origin,
                    "Access-Control-Expose-Headers": _EXPOSED,
                    "Vary": "Origin",
                },
            )
        return Verdict(
            allowed=False,
            headers={"Vary": "Origin"},
            reason=_refusal(origin, form),
        )

    def check_site(self, sites: Iterable[str], origin: str | None) -> str:
        """Say why a request is refused whose page comes from elsewhere; "" when it is not.

        ``sites`` are the values of its ``Sec-Fetch-Site`` headers. One with an ``Origin`` is judged by that.
        """
        if origin is not None or self._any or not any(site.strip().lower() in _ELSEWHERE for site in sites):
            return ""
        return (
            "Of what pages of other sites have a browser send, only requests with an Origin that is in `cors`"
            " in the configuration are let in."
        )

    def options(self, headers: Mapping[str, str]) -> Answer:
        """Answer an OPTIONS request; ``headers`` are looked up as a CORS preflight writes them.

        The mapping should ignore case, as aiohttp's does.
        """
        origin = headers.get("Origin")
        verdict = self.check(origin, headers.get("Host"))
        if not verdict.allowed:
            return Answer(403, verdict.headers, verdict.reason)
        answer = dict(verdict.headers)
        if origin is None or "Access-Control-Request-Method" not in headers:
            answer["Allow"] = METHODS
            return Answer(204, answer)
        wanted = headers.get("Access-Control-Request-Headers", "")
        echo = len(wanted) <= _MAX_HEADER_LIST and _HEADER_LIST.fullmatch(wanted)
        answer.pop("Access-Control-Expose-Headers")
        answer["Access-Control-Allow-Methods"] = METHODS
        answer["Access-Control-Allow-Headers"] = wanted if echo else _HEADERS
        answer["Access-Control-Max-Age"] = _MAX_AGE
        answer["Vary"] = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
        # Chromium asks this before a public page may reach a private or loopback address.
        if headers.get("Access-Control-Request-Private-Network") == "true":
            answer["Access-Control-Allow-Private-Network"] = "true"
        return Answer(204, answer)

    def _same_host(self, form: str, host: str | None) -> bool:
        """Whether a canonical origin is the host that the request is sent to, and that host is this machine.

        A name that is not known to be this machine's may be an attacker's that points here (DNS rebinding).
        """
        scheme = form.partition("://")[0]
        if not host or scheme not in _DEFAULT_PORTS or canonical(f"{scheme}://{host}") != form:
            return False
        return self._is_ours(urlsplit(form).hostname or "")

    def is_here(self, host: str | None) -> bool:
        """Whether a ``Host`` header holds an address or a name of this machine. No header: it is no browser."""
        if host is None:
            return True
        form = canonical(f"http://{host}")
        return bool(form) and self._is_ours(urlsplit(form).hostname or "")

    def _is_ours(self, name: str) -> bool:
        return name in self._hosts or name == "localhost" or name.endswith(".localhost") or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


ANY = "*"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@?#\\\s,]*)(?::[0-9]{0,5})?")
_REMEMBERED = 64  # ways to write a name that is allowed: a program may invent ports


def canonical_host(host: str) -> str:
    """Return the name or address of a ``Host`` header as it is compared, "" when it is none."""
    found = _HOST.fullmatch(host.strip())
    if found is None:
        return ""
    name = found[1].lower()
    if not name.startswith("["):
        return name.removesuffix(".")
    try:
        return str(ipaddress.IPv6Address(name[1:-1]))
    except ValueError:
        return ""


def is_loopback_name(name: str) -> bool:
    """Whether a canonical name is ``localhost``, below it, or a loopback address."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


class Hosts:
    """The names that llmux may be called by. Made anew when the configuration changes."""

    def __init__(self, names: Iterable[str] = (), *, held: bool = True) -> None:
        """``names`` as configured in ``hosts``. Not ``held``: all names are allowed."""
        self._names = frozenset(canonical_host(f"[{name}]" if ":" in name else name) for name in names)
        self.held = held and ANY not in names
        self._allowed: set[bytes] = set()

    def knows(self, value: bytes) -> bool:
        """Whether the value of a ``Host`` header is allowed by its name alone."""
        if value in self._allowed:
            return True
        if self.held and not self._listed(value.decode("latin-1")):
            return False
        if len(self._allowed) < _REMEMBERED:
            self._allowed.add(value)
        return True

    def refused(self, hosts: Iterable[str], headers: Mapping[str, str]) -> str | None:
        """Return the first of a request's ``Host`` headers that is refused; ``headers`` are all it sent."""
        if not self.held:
            return None
        for host in hosts:
            name = canonical_host(host)
            local = bool(name) and (name.endswith(".test") or not {".", ":"} & set(name))
            unlikely = not host.strip() or (local and "Accept-Encoding" not in headers)  # from a browser
            if not unlikely and not self._listed(host):
                return host
        return None

    def _listed(self, host: str) -> bool:
        name = canonical_host(host)
        return bool(name) and (is_loopback_name(name) or name in self._names)
