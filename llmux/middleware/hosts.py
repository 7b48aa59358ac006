"""Which names llmux may be called by: the ``Host`` header, where llmux listens on loopback and wants no keys.

A web page may give its own name a loopback address (DNS rebinding). The browser then takes llmux for the page's
own server: it sends neither ``Origin`` nor ``Sec-Fetch-Site``, and shows the page every answer. Only ``Host``, the
page's name, tells. So a request is refused unless it calls llmux ``localhost``, a name below it, by a
loopback address, or by a name in ``hosts``. 0.0.0.0 is none of these: browsers treat it as a public address.

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
