"""Common parts of the configuration's sections, and the types of settings: size, duration, address.

The address of the store which hosts and gateways share is one server, sentinels, a cluster, or ``embedded``.
"""

import contextlib
import ipaddress
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, WithJsonSchema


@dataclass(frozen=True, slots=True)
class Word:
    """For an ``Annotated`` type: the name of the type for users."""

    text: str


@dataclass(frozen=True, slots=True)
class Default:
    """For an ``Annotated`` type: the default as shown to users, if the value does not express it."""

    text: str


_BYTES_OF = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_LONGEST_COUNT = 100_000
LARGEST = 2**60  # bytes; more than any machine has, small enough for exact arithmetic anywhere

_BY_LOWER = {unit.lower(): factor for unit, factor in _BYTES_OF.items()}
_SIZE_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")
_SIZE_SHAPE = r"^\s*\d+(\.\d+)?\s*([kKmMgGtT]?[iI]?[bB])?\s*$|\$\{"
_SIZE_HOW = "write bytes, or a size such as 18GiB, 24GB, 512MiB"


def parse_size(value: Any) -> int:
    """Return bytes, 0 ≤ bytes ≤ 2**60.

    Raises:
        ValueError: ``value`` is not a size, negative, or not a whole number of bytes.

    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"is not a size; {_SIZE_HOW}")  # noqa: TRY004 (pydantic turns ValueError into a problem)
    text = str(value)
    match = _SIZE_TEXT.match(text)
    if not match:
        raise ValueError(f"{text!r} is not a size; {_SIZE_HOW}")
    number, unit = match.groups()
    if unit and unit.lower() not in _BY_LOWER:
        # `18G` means 10**9 to some tools and 2**30 to others: 7 % of a GPU is too much to guess.
        hint = f"{unit[0].upper()}iB or {unit[0].upper()}B" if unit[0].upper() in "KMGT" else "GiB or GB"
        raise ValueError(f"{text!r} has an unknown unit {unit!r}; write {hint}")
    size = Fraction(number) * _BY_LOWER.get(unit.lower(), 1)
    if not unit and size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes; {_SIZE_HOW}")
    if size > LARGEST:
        raise ValueError(f"{text!r} is more than 1024 PiB; {_SIZE_HOW}")
    return round(size)


def format_size(size: int) -> str:
    """Format bytes for people: exactly if that is short, else to one decimal: ``18GiB``, ``1.3GiB``."""
    # Binary units come last and win a tie.
    exact = [(size // factor, unit) for unit, factor in reversed(_BYTES_OF.items()) if size % factor == 0]
    count, unit = min(exact, key=lambda pair: pair[0]) if size else (0, "B")
    if count < _LONGEST_COUNT:
        return f"{count}{unit}"
    unit = "GiB" if size >= _BYTES_OF["GiB"] else "MiB"
    return f"{size / _BYTES_OF[unit]:.1f}{unit}"


def _positive(value: int) -> int:
    if value <= 0:
        raise ValueError("must be more than 0 bytes")
    return value


def _schema(minimum: int) -> WithJsonSchema:
    return WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": minimum}, {"type": "string", "pattern": _SIZE_SHAPE}]}
    )


Size = Annotated[int, BeforeValidator(parse_size), Word("size"), _schema(0)]
"""A pydantic type: bytes, ≥ 0, from a number or text."""

PositiveSize = Annotated[
    int, BeforeValidator(lambda value: _positive(parse_size(value))), Word("size"), _schema(1)
]
"""The same, > 0."""


LONGEST_NAME = 256
LONGEST_SCRIPT = 131_071  # bytes: Linux refuses a longer argument to sh -c

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
# Browser extensions and desktop programs have schemes of their own: chrome-extension://ID, app://obsidian.md.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+\Z", re.IGNORECASE)


class Section(BaseModel):
    """A mapping of settings: unknown names are errors, values never change."""

    # A part of a whole needs no validator of its own.
    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @classmethod
    def of_defaults(cls) -> Self:
        """Return a section with defaults only, without a validator, which would be built for this alone."""
        return cls.model_construct()


def is_file(path: str | Path) -> bool:
    """Return whether a file is there. Of a longer name than there can be, pathlib would raise an error."""
    return os.path.isfile(path)  # noqa: PTH113


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")  # noqa: TRY004
    return value


def _script(value: Any) -> Any:
    if isinstance(value, bool):
        word = str(value).lower()
        raise ValueError(f'is read as the truth value {word}; write the command in quotes: "{word}"')  # noqa: TRY004
    if isinstance(value, list | tuple):
        raise ValueError("is a list; write one script: on one line, or on the lines after `|`")  # noqa: TRY004
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("is empty; write a command, `true` in quotes for one that does nothing")
    if not isinstance(value, str):
        raise ValueError("is not text; write a command in quotes")  # noqa: TRY004
    if "\0" in value:
        raise ValueError("holds a NUL character, which no shell takes; remove it")
    if len(value.encode(errors="replace")) > LONGEST_SCRIPT:
        raise ValueError("is longer than 128 KiB, which `sh -c` does not take; put it into a file and name that")
    return value


def _name(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; a model needs a name")
    if value != value.strip():  # which a header cannot carry, nor people see
        raise ValueError(f"{value!r} begins or ends with a blank; remove it")
    if len(value) > LONGEST_NAME:
        raise ValueError(f"is longer than {LONGEST_NAME} characters")
    if not value.isprintable():
        raise ValueError(f"{value!r} holds characters that cannot be printed; remove them")
    return value


def is_name(text: str) -> bool:
    """Whether a model may have this name."""
    with contextlib.suppress(ValueError):
        return bool(_name(text))
    return False


def _env_name(value: str) -> str:
    if not _ENV_NAME.match(value):
        raise ValueError("is not a name for an environment variable; use letters, digits and _")
    if value.startswith("LLMUX_"):
        raise ValueError("is reserved: llmux itself sets the LLMUX_ variables of a hook")
    return value


def _env_value(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if value is None:
        raise ValueError('has no value; write "" for the empty text')
    if isinstance(value, str) and "\0" in value:
        raise ValueError("holds a NUL character, which no environment takes; remove it")
    return value


def _origin(value: str) -> str:
    if value not in {"*", "null"} and not (_ORIGIN.match(value) and _has_port_or_none(value)):
        raise ValueError(
            f"{value!r} is not an origin; write scheme and host as http://localhost:5173, null for files, or *"
        )
    host = urlsplit(value).hostname or ""
    return value.lower().replace(host, ascii_host(host))


def _has_port_or_none(origin: str) -> bool:
    try:
        return bool(urlsplit(origin).hostname) and urlsplit(origin).port != 0
    except ValueError:
        return False


def _host(value: str) -> str:
    host = value.strip().removeprefix("[").removesuffix("]")
    if not host or any(character.isspace() or character in "/@?#" for character in host):
        raise ValueError(f"{value!r} is not an address to listen on; write 127.0.0.1, 0.0.0.0 or a host name")
    return host


def _called(value: str) -> str:
    name = value.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")
    # A colon means an IPv6 address, or a port: those are not compared.
    is_name = ":" not in name and not any(character.isspace() or character in "/@?#,[]\\*" for character in name)
    if name != "*" and not (name and (is_name or _is_address(name))):
        raise ValueError(f"{value!r} is not a host name; write it without scheme and port as gpu.example, or *")
    return ascii_host(name)


def ascii_host(name: str) -> str:
    """Return the form in which a host's name is looked up and sent. ValueError for what can be none."""
    try:
        return name if name.isascii() else name.encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError(f"{name!r} is not a host name") from None


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


EnginePort = Annotated[int, Field(ge=1, le=65535), BeforeValidator(_number), Word("port")]
"""1 to 65535."""
OwnPort = Annotated[int, Field(ge=0, le=65535), BeforeValidator(_number), Word("port")]
"""0 to 65535; 0 lets the system choose."""
Count = Annotated[int, Field(ge=0), BeforeValidator(_number), Word("whole number")]
PositiveCount = Annotated[int, Field(ge=1), BeforeValidator(_number), Word("whole number")]
Script = Annotated[str, BeforeValidator(_script), Field(min_length=1), Word("script")]
Name = Annotated[str, AfterValidator(_name), Field(min_length=1, max_length=LONGEST_NAME), Word("name")]
EnvName = Annotated[str, AfterValidator(_env_name)]
EnvValue = Annotated[str, BeforeValidator(_env_value, json_schema_input_type=str | int | float | bool)]
Origin = Annotated[str, AfterValidator(_origin), Word("origin")]
HostName = Annotated[str, AfterValidator(_called), Word("name")]
Host = Annotated[str, AfterValidator(_host), Word("host")]


_SECONDS_OF = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
LONGEST_DURATION = 1e9  # seconds, about 31 years: longer deadlines are meaningless and make arithmetic inexact

_DURATION_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|[dhms])")
_PLAIN_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*\Z")
_DURATION_SHAPE = r"^\s*(\d+(\.\d+)?\s*|(\d+(\.\d+)?\s*(ms|[dhms])\s*)+)$|\$\{"
_DURATION_HOW = "write seconds, or a duration such as 90s, 10m, 1h30m"


def parse_duration(value: Any) -> float:
    """Return seconds, 0 ≤ seconds ≤ 1e9.

    Raises:
        ValueError: ``value`` is not a duration, negative, infinite or not a number.

    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"is not a duration; {_DURATION_HOW}")  # noqa: TRY004 (pydantic turns ValueError into a problem)
    if isinstance(value, str) and not _PLAIN_NUMBER.match(value):
        seconds = _parse_units(value)
    else:
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
    if math.isnan(seconds):
        raise ValueError(f"is not a number; {_DURATION_HOW}")
    if seconds < 0:
        raise ValueError(f"is negative: {value}; {_DURATION_HOW}")
    if seconds > LONGEST_DURATION:
        raise ValueError(f"is longer than 30 years: {value}; {_DURATION_HOW}")
    return seconds


def _parse_units(text: str) -> float:
    """Add up the parts of ``1h30m``: each unit at most once, the largest first."""
    seconds, position, smallest = 0.0, 0, math.inf
    while match := _DURATION_PART.match(text, position):
        number, unit = match.groups()
        if _SECONDS_OF[unit] >= smallest:
            raise ValueError(f"{text!r} repeats or reorders its units; {_DURATION_HOW}")
        smallest = _SECONDS_OF[unit]
        seconds += float(number) * smallest
        position = match.end()
    if position == 0 or text[position:].strip():
        raise ValueError(f"{text!r} is not a duration; {_DURATION_HOW}")
    return seconds


def format_duration(seconds: float) -> str:
    """Format seconds for people: ``10m``, ``1h30m``, ``500ms``, ``0s``."""
    rest = round(seconds * 1000)
    text = ""
    for unit, size in _SECONDS_OF.items():
        count, rest = divmod(rest, round(size * 1000))
        if count:
            text += f"{count}{unit}"
    return text or "0s"


def _positive_duration(value: float) -> float:
    if value <= 0:
        raise ValueError("must be longer than 0")
    return value


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    Word("duration"),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": _DURATION_SHAPE}]}),
]
"""A pydantic type: seconds, ≥ 0, from a number or text."""

PositiveDuration = Annotated[
    float,
    BeforeValidator(lambda value: _positive_duration(parse_duration(value))),
    Word("duration"),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": _DURATION_SHAPE}]}
    ),
]
"""The same, > 0."""


_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_ANY_HOST = frozenset({"0.0.0.0", "::"})  # noqa: S104 (recognised, not bound)
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
        """Host and port, equal for all names of this machine."""
        return same_host(self.host), self.port


def same_host(host: str) -> str:
    """Return one spelling for all names of this machine's loopback, else the host in lower case."""
    name = host.lower().rstrip(".")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(name)
        mapped = address.ipv4_mapped if address.version == 6 else None  # noqa: PLR2004
        name = str(mapped or address)
    # To connect to "any address" is to connect to this machine.
    return "127.0.0.1" if name in _LOOPBACK or name in _ANY_HOST else name


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    return host.lower() in _LOOPBACK or host.startswith("127.")


def covers(listener: str, host: str) -> bool:
    """Return whether a socket bound to ``listener`` also receives connections to ``host``."""
    return same_host(listener) == same_host(host) or (listener in _ANY_HOST and is_loopback(host))


def parse_address(url: str, how: str = "write it as http://127.0.0.1:8001") -> Address:
    """Parse ``http[s]://host[:port][/path]``; ``how`` is the advice in an error.

    Raises:
        ValueError: it is not of that form.

    """
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is not a URL: {error}; {how}") from None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is not an http or https URL; {how}")
    if "@" in parts.netloc:
        raise ValueError("contains a user or password, which would end up in logs; remove it")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} has a query or fragment; remove it")
    if port == 0 or any(character.isspace() or ord(character) < ord("!") for character in url.strip()):
        raise ValueError(f"{url!r} is not a URL; {how}")
    if not parts.path.isascii():
        raise ValueError(f"{url!r} has other characters than ASCII in its path; percent-encode them")
    return Address(
        host=ascii_host(parts.hostname),
        port=port or _DEFAULT_PORTS[parts.scheme],
        tls=parts.scheme == "https",
        base_path=parts.path.rstrip("/"),
    )


# ---- the address of the store that hosts and gateways share

EMBEDDED = "embedded"
PORT, SENTINEL_PORT = 6379, 26379
_UNIX = "unix"
_HOW = (
    "write it as redis://HOST:6379/0 (rediss: TLS), redis+sentinel://HOST:26379/MASTER, redis+cluster://HOST:6379,"
    " unix:/PATH or embedded"
)
_FILES = {"ca": "CA certificates", "cert": "client certificate", "cert_key": "client certificate's key"}
_OPTIONS = {*_FILES, "sentinel_user", "sentinel_password"}
_CALLED = {"ssl_ca_certs": "ca", "ssl_certfile": "cert", "ssl_keyfile": "cert_key"}  # the client library's names

Kind = Literal["embedded", "server", "sentinel", "cluster"]


class StoreAddress(NamedTuple):
    """The address of the store, and the credentials for it."""

    kind: Kind
    nodes: tuple[tuple[str, int], ...] = ()  # host and port of each named node
    socket: str = ""  # of a server on this machine, instead of nodes
    user: str | None = None
    password: str | None = None
    db: int = 0
    master: str = ""  # the sentinels' name for it
    tls: bool = False
    ca: str | None = None  # files; None: what the system trusts
    cert: str | None = None
    cert_key: str | None = None
    sentinel_user: str | None = None
    sentinel_password: str | None = None
    called: str = ""  # its name in messages, if it is reached in another way

    def __str__(self) -> str:
        """Return the address, without secrets."""
        if self.kind == "embedded" or self.called:
            return self.called or EMBEDDED
        where = self.socket or ",".join(f"{host}:{port}" for host, port in self.nodes)
        return f"{self.master} of {where}" if self.master else where


def parse_store(text: str) -> StoreAddress:
    """Parse an address. Raises ValueError, which does not repeat it: it may contain a password."""
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
    """Return the user, the password and the rest."""
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
            if not is_file(value):
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


def working_folder() -> Path:
    """Return the folder that the process is in; / if that was deleted."""
    try:
        return Path.cwd()
    except OSError:
        return Path("/")
