"""An engine as its connections know it: where it listens, what it has sent, and how an exchange with it can fail.

EngineError (502)
├── EngineRefusedError     no connection could be made: nothing was sent
├── EngineLostError        the connection ended before the response did
└── EngineProtocolError    the engine's answer is not HTTP/1.1
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from llmux.errors import EngineError

_DEFAULT_PORTS = {"http": 80, "https": 443}


class EngineRefusedError(EngineError):
    """No connection could be made: not a byte of the request was sent."""

    code = "engine_refused"


class EngineLostError(EngineError):
    """The connection ended before the response did."""

    code = "engine_lost"


class EngineProtocolError(EngineError):
    """The engine's answer is not HTTP/1.1."""

    code = "engine_protocol_error"


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """An engine's address; ``base_path`` ("" or "/prefix") goes before every request's target.

    ``socket`` is the path of a Unix socket, in place of host and port.
    """

    host: str
    port: int
    tls: bool = False
    base_path: str = ""
    socket: str = ""
    host_header: bytes = field(init=False, repr=False, compare=False)  # worked out once, sent every time

    def __post_init__(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
        if self.port != _DEFAULT_PORTS["https" if self.tls else "http"]:
            host = f"{host}:{self.port}"
        object.__setattr__(self, "host_header", host.encode("ascii"))

    @classmethod
    def from_url(cls, url: str) -> EngineAddress:
        """Read ``http://host[:port][/base]`` or ``https://…``. ValueError says what is wrong."""
        parts = urlsplit(url)
        if parts.scheme not in _DEFAULT_PORTS:
            raise ValueError(f"{url!r} does not start with http:// or https://")
        if not parts.hostname:
            raise ValueError(f"{url!r} names no host")
        if parts.username is not None or parts.password is not None:
            raise ValueError("an engine's URL cannot carry a user name or password")
        if parts.query or parts.fragment:
            raise ValueError(f"{url!r} has a query or a fragment; an engine's URL ends with its path")
        if any(character <= " " or not character.isascii() for character in parts.path):
            raise ValueError(f"{url!r} has a path that must be percent-encoded")
        port = parts.port
        return cls(
            host=parts.hostname,
            port=_DEFAULT_PORTS[parts.scheme] if port is None else port,
            tls=parts.scheme == "https",
            base_path=parts.path.rstrip("/"),
        )

    def __str__(self) -> str:
        if self.socket:
            return f"unix:{self.socket}"
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{self.host_header.decode('ascii')}{self.base_path}"


@functools.lru_cache(maxsize=256)
def engine_address(host: str, port: int, tls: bool, base_path: str) -> EngineAddress:
    """Return an engine's address, the same object every time."""
    return EngineAddress(host, port, tls, base_path)


class Untold(Protocol):
    """A connection that passes bytes on, and tells of it later."""

    def tell_passed(self) -> None:
        """Tell of what has passed."""


@dataclass(slots=True, eq=False)
class EngineActivity:
    """What is known of an engine from its connections, for one stretch of time that it is awake.

    All requests of that stretch share it; idle connections are kept by it and never outlive it.
    """

    connected: bool = False  # a connection was accepted at least once
    last_byte: float | None = None  # loop time at which an answer other than an error last delivered something
    counting: bool = False  # a reader of the status wants to know how many events are streamed
    streamed: int = 0  # events of event streams, as far as they were counted
    untold: set[Untold] = field(default_factory=set, repr=False)
    """Connections that may have passed on what is not in here yet."""

    def look(self) -> None:
        """Bring all of this up to date."""
        for connection in self.untold:
            connection.tell_passed()
