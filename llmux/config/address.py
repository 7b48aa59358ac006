"""Where an engine listens."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_ANY = frozenset({"0.0.0.0", "::"})  # noqa: S104 (recognised, not bound)
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed ``url``. ``base_path`` is empty or starts with ``/`` and does not end with one."""

    host: str
    port: int
    tls: bool = False
    base_path: str = ""

    @property
    def authority(self) -> str:
        """``host:port``, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole address, without a slash at its end."""
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.base_path}"

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port, equal for every way of writing this machine."""
        return same_host(self.host), self.port


def same_host(host: str) -> str:
    """Return one spelling for all that mean this machine's loopback, else the host in lower case."""
    return "127.0.0.1" if host.lower() in _LOOPBACK else host.lower()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    return host.lower() in _LOOPBACK or host.startswith("127.")


def covers(listener: str, host: str) -> bool:
    """Whether a socket bound to ``listener`` also takes ``host``."""
    return same_host(listener) == same_host(host) or (listener in _ANY and is_loopback(host))


def parse_address(url: str) -> Address:
    """Parse ``http[s]://host[:port][/path]``.

    Raises:
        ValueError: it is anything else.

    """
    how = "write it as http://127.0.0.1:8001"
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is not a URL: {error}; {how}") from None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is not an http or https URL; {how}")
    if "@" in parts.netloc:
        raise ValueError("holds a user or password, which would end up in logs; remove it")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} has a query or fragment; remove it")
    if port == 0 or any(character.isspace() or ord(character) < ord("!") for character in url.strip()):
        raise ValueError(f"{url!r} is not a URL; {how}")
    return Address(
        host=parts.hostname,
        port=port or _DEFAULT_PORTS[parts.scheme],
        tls=parts.scheme == "https",
        base_path=parts.path.rstrip("/"),
    )
