"""The address of the store that hosts and gateways share: one server, sentinels, a cluster, or ``embedded``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import AfterValidator, SecretStr

from llmux.config.setting_types import Word

EMBEDDED = "embedded"
PORT, SENTINEL_PORT = 6379, 26379
_UNIX = "unix"
_HOW = (
    "write it as redis://HOST:6379/0 (rediss: TLS), redis+sentinel://HOST:26379/MASTER, redis+cluster://HOST:6379,"
    " unix:/PATH or embedded"
)
_FILES = {"ca": "CA certificates", "cert": "client certificate", "cert_key": "client certificate's key"}
_OPTIONS = {*_FILES, "sentinel_user", "sentinel_password"}
_CALLED = {"ssl_ca_certs": "ca", "ssl_certfile": "cert", "ssl_keyfile": "cert_key"}  # by the client library

Kind = Literal["embedded", "server", "sentinel", "cluster"]


class StoreAddress(NamedTuple):
    """Where the store is, and what it is shown."""

    kind: Kind
    nodes: tuple[tuple[str, int], ...] = ()  # host and port of each that is named
    socket: str = ""  # of a server on this machine, in place of nodes
    user: str | None = None
    password: str | None = None
    db: int = 0
    master: str = ""  # as sentinels call it
    tls: bool = False
    ca: str | None = None  # files; None: what the system trusts
    cert: str | None = None
    cert_key: str | None = None
    sentinel_user: str | None = None
    sentinel_password: str | None = None
    called: str = ""  # how it is told of, where it is reached in another way

    def __str__(self) -> str:
        """Say where it is, without what is secret."""
        if self.kind == "embedded" or self.called:
            return self.called or EMBEDDED
        where = self.socket or ",".join(f"{host}:{port}" for host, port in self.nodes)
        return f"{self.master} of {where}" if self.master else where


def parse_store(text: str) -> StoreAddress:
    """Read an address. Raises ValueError, which repeats nothing of it: a password may be in it."""
    text = text.strip()
    if text == EMBEDDED:
        return StoreAddress("embedded")
    if text.startswith("unix:/") and not text.startswith("unix://"):
        text = f"unix://{text.removeprefix('unix:')}"
    scheme, kind, tls = _scheme(text)
    user, password, where = _credentials(text)
    path, _, query = where.partition("?")
    given = _query(query)
    if not tls and (file := next((name for name in _FILES if name in given), None)):
        raise ValueError(f"has `{file}`, which takes TLS: {_HOW}")
    base = StoreAddress(kind, user=user, password=password, tls=tls)._replace(**given)  # type: ignore[arg-type]
    if scheme == _UNIX:
        if not path.startswith("/"):
            raise ValueError(f"names no socket by its whole path; {_HOW}")
        return base._replace(socket=unquote(path))
    places, _, rest = path.partition("/")
    nodes = tuple(_node(place, SENTINEL_PORT if kind == "sentinel" else PORT) for place in places.split(","))
    if kind == "server" and len(nodes) > 1:
        raise ValueError("names several servers; write redis+sentinel:// or redis+cluster:// for what they are")
    master, _, rest = rest.partition("/") if kind == "sentinel" else ("", "", rest)
    if kind == "sentinel" and not master:
        raise ValueError("does not say what sentinels call the server; write it as redis+sentinel://HOST/MASTER")
    return base._replace(nodes=nodes, db=_database(rest, kind), master=unquote(master))


def _database(text: str, kind: Kind) -> int:
    if text and not (text.isascii() and text.isdigit() and len(text) < 6):  # noqa: PLR2004
        raise ValueError(f"has no number of a database after the last slash; {_HOW}")
    if kind == "cluster" and int(text or 0):
        raise ValueError("names a database; a cluster has only number 0")
    return int(text or 0)


def _scheme(text: str) -> tuple[str, Kind, bool]:
    scheme, colon, _ = text.partition("://")
    base, plus, more = scheme.lower().partition("+")
    kinds: dict[str, Kind] = {"": "server", "sentinel": "sentinel", "cluster": "cluster"}
    secure = {"redis": False, "rediss": True, "valkey": False, "valkeys": True}
    if colon and base == _UNIX and not plus:
        return base, "server", False
    if not colon or base not in secure or more not in kinds or (plus and not more):
        raise ValueError(f"is not the address of a store; {_HOW}")
    return base, kinds[more], secure[base]


def _credentials(text: str) -> tuple[str | None, str | None, str]:
    """Return the user, the password and what comes behind them."""
    rest = text.partition("://")[2]
    if "#" in rest:
        raise ValueError("has a #; write it as %23 in a password")
    before, at, where = rest.rpartition("@")
    if not at:
        return None, None, rest
    if "/" in before or "?" in before:
        raise ValueError("has / or ? in its password, or @ behind it; write them as %2F, %3F and %40")
    user, _, password = before.partition(":")
    return unquote(user) or None, unquote(password) or None, where


def _query(query: str) -> dict[str, str]:
    given = {_CALLED.get(name, name): value for name, value in parse_qsl(query, keep_blank_values=True)}
    for name, value in given.items():
        if name not in _OPTIONS:
            raise ValueError(f"has an option {name[:40]!r}; known are {', '.join(sorted(_OPTIONS))}")
        if name in _FILES:
            if not value.startswith("/"):
                raise ValueError(f"must say `{name}` as a whole path")
            if not Path(value).is_file():
                raise ValueError(f"names no file with `{name}`: there is no {value}, for its {_FILES[name]}")
    if ("cert" in given) != ("cert_key" in given):
        raise ValueError("needs both of `cert` and `cert_key`, or neither")
    return given


def _node(place: str, port: int) -> tuple[str, int]:
    try:
        split = urlsplit(f"//{place}")
        host, found = split.hostname, split.port
    except ValueError:
        host = found = None
        place = ""
    if not host or (place.rpartition("]")[2].count(":") and found is None) or found == 0:
        raise ValueError(f"has no HOST:PORT where one belongs; {_HOW}")
    return host, port if found is None else found


def _checked(value: SecretStr) -> SecretStr:
    parse_store(value.get_secret_value())
    return value


StoreSetting = Annotated[SecretStr, AfterValidator(_checked), Word("address")]
