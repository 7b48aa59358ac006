"""Remotes: endpoints on other hosts, which of their models may be used, and which requests go to them.

Their models are targets called ``REMOTE/MODEL``. A request goes to one only if it is for a name that leads there
(or a rule of `routes`, or a model's `spill`, leads there), and its key may leave this host (`remote: true` of the
key or its role; without `api_keys`: `remotes_for_all: true`).
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo

from llmux.config.access import check_globs, check_key
from llmux.config.accounts import Amount
from llmux.config.problems import Path, Problem, in_short
from llmux.config.setting_types import (
    Address,
    Count,
    Duration,
    Name,
    PositiveCount,
    PositiveDuration,
    Section,
    Word,
    is_file,
    is_loopback,
    parse_address,
)
from llmux.config.targets import Apis

if TYPE_CHECKING:
    from llmux.config.schema import Config


_HOW = "write it as https://openrouter.ai/api"
_REGION = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}\Z")
_REMOTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_LONGEST_KEY = 16 * 1024  # bytes of a file


def _url(value: str) -> str:
    address = parse_address(value, _HOW)
    if not (value.isascii() and value.isprintable()):
        raise ValueError(f"{value!r} holds other characters than printable ASCII; percent-encode them")
    return address.url


def _key(value: SecretStr) -> SecretStr:
    check_key(value.get_secret_value())
    return value


def _folder(info: ValidationInfo) -> FilePath:
    """Return the configuration's folder, to which paths are relative."""
    return FilePath((info.context or {}).get("folder") or FilePath.cwd())


def _file(value: str, info: ValidationInfo) -> FilePath:
    path = _folder(info) / FilePath(value).expanduser()
    if not is_file(path):
        raise ValueError(f"there is no file {path}")
    return path


def _key_file(value: str, info: ValidationInfo) -> str:
    path = _file(value, info)
    key_in(path)
    return str(path)


def key_in(path: FilePath) -> SecretStr:
    """Return the key in a file with nothing else but blanks. ValueError, without the key."""
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_KEY).decode("latin-1").strip()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        check_key(text)
    except ValueError:
        raise ValueError(f"{path} contains no key: one line of printable ASCII without spaces") from None
    return SecretStr(text)


def _ca(value: str, info: ValidationInfo) -> str:
    import ssl  # noqa: PLC0415 - few configurations have one

    path = _file(value, info)
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # SSLError is one
        raise ValueError(f"{path} is not a file of certificates in PEM: {error.strerror or error}") from None
    return str(path)


def _region(value: str) -> str:
    if not _REGION.match(value.lower()):
        raise ValueError(f"{value[:40]!r} is not a region; write a short word, as eu or us-east")
    return value.lower()


def _remote(value: str) -> str:
    if not _REMOTE.match(value):
        raise ValueError(f"{value[:80]!r} is not a name for a remote; use letters, digits, `.`, `_` and `-`")
    return value


def _some_models(value: Any) -> Any:
    if not value:
        raise ValueError("must name at least one of its models, as {qwen3: qwen/qwen3-32b}")
    return value


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Region = Annotated[str, AfterValidator(_region), Word("region")]
RemoteName = Annotated[str, AfterValidator(_remote)]
Globs = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_one_or_more, json_schema_input_type=str | tuple[str, ...]),
    Word("glob, or list of globs"),
]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(_one_or_more, json_schema_input_type=str | tuple[str, ...]),
    Word("name, or list of names"),
]


class RemoteTimeoutsConfig(Section):
    """How long each step of a request to a remote may take."""

    connect: PositiveDuration = Field(default=5.0, description="The connection, and TLS.")
    first_byte: PositiveDuration = Field(
        default=60.0, description="From the request to the first byte of its answer."
    )
    idle: PositiveDuration = Field(default=60.0, description="Between two pieces of the answer.")
    total: PositiveDuration | None = Field(default=None, description="All of it. null: no limit.")


class RemoteConfig(Section):
    """An endpoint on another host that speaks OpenAI's or Anthropic's API."""

    url: Annotated[str, AfterValidator(_url), Word("URL")] = Field(
        description="Where it is: what stands before /v1/chat/completions. If it ends in a version, as /v1 or"
        " /v1beta/openai, the /v1 of requests is left out."
    )
    key: Annotated[SecretStr, AfterValidator(_key), Word("key")] | None = Field(
        default=None, description='The key that it takes, as "${OPENROUTER_KEY}": from the environment.'
    )
    key_file: Annotated[str, AfterValidator(_key_file), Word("path")] | None = Field(
        default=None, description="In place of `key`: a file that holds it. Read at the start and at a reload."
    )
    auth: Literal["bearer", "x-api-key"] | None = Field(
        default=None,
        description="Which header carries the key. null: X-API-Key on /v1/messages, else Authorization: Bearer.",
    )
    apis: Annotated[Apis | None, Word("list of chat, completions, messages, responses, …")] = Field(
        default=None,
        description="What it speaks. Requests in another dialect of conversations are translated; what is neither"
        " is refused. null: everything, passed through.",
    )
    lossy: bool = Field(
        default=False,
        description="true: what cannot be translated is dropped, and listed in X-LLMux-Dropped, instead of 400.",
    )
    region: Region | None = Field(default=None, description="Where it is, as eu; `routes` may allow regions only.")
    models: Annotated[Mapping[Name, Name], AfterValidator(_some_models)] = Field(
        description="Its models: the name here, to which the remote's and a slash are put in front, and its own."
    )
    timeouts: RemoteTimeoutsConfig = Field(
        default_factory=RemoteTimeoutsConfig.of_defaults, description="How long each step may take."
    )
    max_in_flight: PositiveCount | None = Field(
        default=None, description="Requests under way at once; more go elsewhere, or get 503. null: no limit."
    )
    ca: Annotated[str, AfterValidator(_ca), Word("path")] | None = Field(
        default=None,
        description="File of the certificates (PEM) that its own must be signed by. null: the system's.",
    )

    @property
    def address(self) -> Address:
        """Its address."""
        return parse_address(self.url)

    @property
    def deprecates_max_tokens(self) -> bool:
        """Whether it is OpenAI: some of its models refuse `max_tokens`, all take `max_completion_tokens`."""
        return f".{self.address.host.lower()}".endswith(".api.openai.com")

    @property
    def secret(self) -> str | None:
        """The key, from wherever it is. ValueError if its file is gone."""
        if self.key_file is not None:
            return key_in(FilePath(self.key_file)).get_secret_value()
        return None if self.key is None else self.key.get_secret_value()


class SpillConfig(Section):
    """When requests for a model are served by a remote instead."""

    to: Name = Field(description="The remote's model, as openrouter/qwen3, or a virtual model of such.")
    over: Duration = Field(description="When the wait of a request is expected to exceed this.")
    below: Amount | None = Field(
        default=None,
        description="And it can cost no more than this there, by `prices.models`. null: whatever it costs.",
    )


class WhenConfig(Section):
    """What a request is like. All that is given must hold."""

    model: Globs | None = Field(default=None, description="It asks for a name that matches.")
    key: Names | None = Field(default=None, description="It shows the key of this name.")
    role: Names | None = Field(default=None, description="Its key has this role.")
    path: Annotated[
        Annotated[
            tuple[str, ...],
            BeforeValidator(_one_or_more, json_schema_input_type=str | tuple[str, ...]),
            AfterValidator(check_globs),
            Word("path, or list of paths"),
        ]
        | None,
        Field(),
    ] = Field(default=None, description="It is for a path that matches, as /v1/embeddings.")
    images: bool | None = Field(default=None, description="Whether it has images.")
    tools: bool | None = Field(default=None, description="Whether it offers tools.")
    stream: bool | None = Field(default=None, description="Whether it asks for a stream.")
    tokens_over: Count | None = Field(default=None, description="It has more tokens than this, by estimate.")
    wait_over: Duration | None = Field(
        default=None, description="The model that it asks for is expected to be awake for it later than this."
    )

    @property
    def of_content(self) -> bool:
        """Whether it requires a look into the request's body."""
        return any(each is not None for each in (self.images, self.tools, self.stream, self.tokens_over))


class RouteConfig(Section):
    """One rule: where requests go that are like this. The first that fits is followed."""

    when: WhenConfig = Field(default_factory=WhenConfig.of_defaults, description="Which requests. Nothing: all.")
    to: Name | None = Field(
        default=None,
        description="The name that is served in place of the one asked for. Not given: the one asked for. null:"
        " none, which is 403; with `regions`, none outside of them.",
    )
    regions: tuple[Region, ...] | None = Field(
        default=None, description="The regions of remotes that may serve them; this host always may."
    )

    @property
    def refuses(self) -> bool:
        """Whether requests that match are refused, wherever they could be served."""
        return self.to is None and "to" in self.model_fields_set and self.regions is None


def check_remotes(config: "Config") -> Iterator[Problem]:
    """Yield the problems of the remotes, and of what leads to them."""
    for name, remote in config.remotes.items():
        at: Path = ("remotes", name)
        if remote.key is not None and remote.key_file is not None:
            yield Problem(at, "has both `key` and `key_file`; keep one of them")
        if remote.ca is not None and not remote.address.tls:
            yield Problem((*at, "ca"), "is for https, but `url` is http")
    known = (*config.names, *config.variants, *config.virtual, *config.remote_models)
    for index, route in enumerate(config.routes):
        yield from _check_route(config, route, ("routes", index), known)
    for name, model in config.models.items():
        if model.spill is not None:
            yield from _check_spill(config, model.spill, ("models", name, "spill"))


def _check_route(config: "Config", route: RouteConfig, at: Path, known: Iterable[str]) -> Iterator[Problem]:
    if route.to is not None and route.to not in known:
        yield Problem((*at, "to"), f"{route.to!r} is not configured; {_meant(route.to, known)}")
    when = route.when
    keys = [entry.name for entry in config.api_keys if entry.name is not None]
    for word, given, there, where in (
        ("key", when.key, keys, "the named `api_keys`"),
        ("role", when.role, list(config.roles), "`roles`"),
    ):
        for name in given or ():
            if name not in there:
                among = ", ".join(there) or "none is set"
                yield Problem((*at, "when", word), f"{name!r} is not one of {where}: {among}")


def _check_spill(config: "Config", spill: SpillConfig, at: Path) -> Iterator[Problem]:
    remote = config.remote_models
    ends = config.leaves(spill.to)
    if spill.to not in config.virtual and spill.to not in remote:
        yield Problem((*at, "to"), f"{spill.to!r} is not a model of a remote; {_meant(spill.to, remote)}")
    elif not all(end in remote for end in ends):
        inner = next(end for end in ends if end not in remote)
        yield Problem((*at, "to"), f"{spill.to!r} may end at {inner!r}, which is here; name remotes' models only")


def _meant(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {in_short(known) or 'none'}"


def remotes_warnings(config: "Config") -> Iterator[str]:
    """Yield what is allowed but probably a mistake."""
    for name, remote in config.remotes.items():
        has_key = remote.key is not None or remote.key_file is not None
        if has_key and not remote.address.tls and not is_loopback(remote.address.host):
            yield f"remotes.{name}.url: is http: its key and all requests go over the network in the clear"
    leave = config.remotes_for_all or any(config.may_leave(entry) for entry in config.api_keys)
    if config.remotes and not leave:
        how = "`remote: true` for a key or a role" if config.api_keys else "`remotes_for_all: true`"
        yield f"remotes: no request may leave this host; set {how} if that is meant"
    regions = {remote.region for remote in config.remotes.values() if remote.region is not None}
    for index, route in enumerate(config.routes):
        for region in route.regions or ():
            if region not in regions:
                among = ", ".join(sorted(regions)) or "none has one"
                yield f"routes[{index}].regions: {region!r} is the `region` of no remote: {among}"
    if config.remotes_for_all and config.api_keys:
        yield "remotes_for_all: has no effect with `api_keys`; set `remote: true` for keys or roles"
    yield from _spill_warnings(config)


def _spill_warnings(config: "Config") -> Iterator[str]:
    prices = {} if config.prices is None else config.prices.models
    for name, model in config.models.items():
        spill, wake = model.spill, model.cost.wake
        if spill is not None and spill.below is not None:
            for end in config.leaves(spill.to):
                if end not in prices:
                    yield (
                        f"models.{name}.spill.below: what {end} costs is not known: it counts as dear; give"
                        f" `prices.models.{end}`"
                    )
        if spill is not None and wake is not None and wake > spill.over:
            yield (
                f"models.{name}.spill.over: is shorter than its `cost.wake`: while it sleeps all its requests go"
                " to the remote, and none wakes it"
            )


def matches(globs: Iterable[str], name: str) -> bool:
    """Return whether a name matches one of the globs of `routes`."""
    return any(fnmatchcase(name, glob) for glob in globs)
