"""The whole configuration, with the settings of the policy and of its guard rails."""

import hashlib
import itertools
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llmux.config.access import DEFAULT_FORWARD, ApiKey, ApiKeyConfig, Key, check_globs, expand
from llmux.config.accounts import (
    CapturesConfig,
    ChargeConfig,
    FairConfig,
    LedgerPath,
    PricesConfig,
    RideAlongConfig,
    RoleConfig,
)
from llmux.config.checks import check, find_warnings
from llmux.config.load import SECS, Whole, load
from llmux.config.model_settings import CostConfig, ModelConfig, TimeoutsConfig, with_ports
from llmux.config.problems import raise_problems
from llmux.config.remotes import RemoteConfig, RemoteName, RouteConfig, matches
from llmux.config.residency import GpuSizes, GroupConfig
from llmux.config.setting_types import (
    Default,
    Duration,
    Host,
    HostName,
    Name,
    Origin,
    OwnPort,
    PositiveCount,
    PositiveDuration,
    PositiveSize,
    Section,
    StoreSetting,
    Word,
    parse_address,
)
from llmux.config.targets import Spoken, VirtualConfig, lacks_a_dialect, leaves
from llmux.errors import ConfigError

WITH_SECS = ("request_timeout", "max_wait", "min_active", "drain_timeout")
"""Settings that may also be written as in llmux 2.x: ``request_timeout_secs``."""


def _collector(value: str) -> str:
    return parse_address(value, "write it as http://127.0.0.1:4318").url


Collector = Annotated[str, AfterValidator(_collector), Word("URL")]


class ShadowConfig(Section):
    """A policy that is asked what it would do, and is not followed."""

    use: str = Field(min_length=1, description="As `policy.use`.")
    options: Mapping[str, Any] = Field(default_factory=dict, description="As `policy.options`.")


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"use": value}
    if not isinstance(value, ShadowConfig | Mapping):
        raise ValueError(f"must be the name of a policy, or {{use: NAME, options: {{…}}}}, not {value!r}")  # noqa: TRY004
    for key in value if isinstance(value, Mapping) else ():
        if key not in ShadowConfig.model_fields:
            raise ValueError(f"has no setting {key!r}; it takes `use` and `options`")
    return value


class PolicyConfig(Section):
    """When to switch: which policy decides, and the limits that hold over any policy."""

    use: str = Field(
        default="adaptive",
        min_length=1,
        description="The policy: a shipped NAME, package.module:Class, or ./file.py:Class.",
    )
    options: Mapping[str, Any] = Field(
        default_factory=dict, description="Options of the policy, checked by the policy when it is loaded."
    )
    shadow: Annotated[
        tuple[Annotated[ShadowConfig, BeforeValidator(_named)], ...], Word("list of policies"), Default("[]")
    ] = Field(
        default=(),
        description="Policies whose answers are only counted: as `use`, or {use: NAME, options: {…}}.",
    )
    manual: bool = Field(
        default=False,
        description="true: only operators switch; requests for a model that is asleep wait for them.",
    )
    request_timeout: Duration | None = Field(
        default=None,
        description="How long a request may wait for its model; then 504. null: as long as its client does.",
    )
    max_wait: Duration = Field(
        default=600.0,
        description="When a model's oldest waiter has waited this long, the next switch goes to that model,"
        " whatever the policy says. With `fair`, what a key that floods waits for counts from when the model let"
        " that key in last.",
    )
    min_active: Duration = Field(
        default=0.0, description="How long a model stays awake at least before a switch may displace it."
    )
    anticipate: bool = Field(
        default=False,
        description="true: while all is quiet the policy may wake the model that is likely to be asked next,"
        " though no request waits for it; for agents that alternate between models. `adaptive` can.",
    )
    fair: Annotated[FairConfig | None, Word("settings or null")] = Field(
        default=None,
        description="Serve first what waits for the key that has had least, weigh for the policy only what is"
        " about its turn, and hold back a key that floods once it has made the others wait for its part;"
        " `max_wait` goes before it. `{}` has the counts below. null: first come, first served.",
    )
    ride_along: RideAlongConfig = Field(
        default_factory=RideAlongConfig.of_defaults, description="When keys of the class ride_along are served."
    )
    drain_before_switch: bool = Field(
        default=True,
        description="Let running answers finish before a switch. false: the same as `drain_timeout: 0`.",
    )
    drain_timeout: Duration | None = Field(
        default=None, description="How long a switch waits for running answers. null: they are never cut."
    )

    @model_validator(mode="before")
    @classmethod
    def _seconds(cls, data: Any) -> Any:
        """Accept llmux 2.x's names."""
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for name in WITH_SECS:
            if name + SECS not in data:
                continue
            if name in data:
                raise PydanticCustomError("both", f"says both `{name}` and `{name}{SECS}`; keep one of them")
            data[name] = data.pop(name + SECS)
        return data

    @model_validator(mode="after")
    def _one_drain(self) -> Self:
        if not self.drain_before_switch and self.drain_timeout:
            raise PydanticCustomError(
                "drain",
                "says both `drain_before_switch: false` and a `drain_timeout`; keep one of them",
            )
        return self

    @property
    def effective_drain_timeout(self) -> float | None:
        """Seconds that a drain may take: None for no limit, 0 to cut off at once."""
        return self.drain_timeout if self.drain_before_switch else 0.0


def default_state(source: Path) -> Path:
    """Return the state file for the configuration ``source`` (absolute): no two configurations share one.

    Raises:
        ConfigError: neither ``$XDG_STATE_HOME`` nor a home folder is known.

    """
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:10]
    return _state_home() / "llmux" / f"{source.stem}-{digest}.json"


def _state_home() -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(given):  # noqa: PTH117 (the XDG specification says to ignore a relative one)
        return Path(given)
    try:
        return Path.home() / ".local" / "state"
    except RuntimeError:
        raise ConfigError(
            "no home folder is known for the state file; give a path, or null for none", path="state"
        ) from None


__all__ = [
    "ApiKeyConfig",
    "BackoffConfig",
    "Config",
    "CostConfig",
    "GroupConfig",
    "ModelConfig",
    "PolicyConfig",
    "TimeoutsConfig",
]

MIB = 2**20
GIB = 2**30


class BackoffConfig(Section):
    """How long a model whose wake or sleep failed is left alone: doubling from `first` to `max`, ±20 %."""

    first: PositiveDuration = Field(default=1.0, description="Pause after the first failure.")
    max: PositiveDuration = Field(default=20.0, description="Longest pause.")


class JoinConfig(Section):
    """How gateways find this host: by its entry in a store that it shares with them."""

    store: StoreSetting = Field(
        description="Valkey or Redis, as redis://HOST:6379/0 (rediss: TLS; redis://:PASSWORD@HOST), or embedded,"
        " that of this machine; takes the extra `fleet`."
    )
    name: Name = Field(description="What this host is called; no two have one name.")
    url: str = Field(
        min_length=1, description="Where gateways reach it: http://HOST:PORT, or unix:/PATH on their machine."
    )


class Config(Whole):
    """Everything that llmux is told: made from a file, or in Python.

    ``folder`` is where hooks run and what paths are relative to: the file's, or without a file the current
    folder when the configuration was made.
    """

    host: Host = Field(
        default="127.0.0.1",
        description="Address to listen on. 0.0.0.0 opens it to the network, which takes `api_keys`.",
    )
    port: OwnPort = Field(default=3000, description="Port to listen on. 0: any free one.")
    models: Mapping[Name, ModelConfig] = Field(
        default_factory=dict,
        description="The models by the name that clients ask for; at least one, if there are no `remotes`.",
    )
    virtual: Mapping[Name, VirtualConfig] = Field(
        default_factory=dict, description="Names that stand for a choice between models."
    )
    remotes: Mapping[RemoteName, RemoteConfig] = Field(
        default_factory=dict, description="Endpoints on other hosts, whose models can be asked for, too."
    )
    remotes_for_all: bool = Field(
        default=False,
        description="true: requests may leave this host; without `api_keys`. With them `remote: true` of a key or"
        " its role says so.",
    )
    routes: Annotated[tuple[RouteConfig, ...], Word("list of routes")] = Field(
        default=(), description="Rules for where requests go; the first that fits is followed."
    )
    policy: PolicyConfig = Field(default_factory=PolicyConfig.of_defaults, description="When to switch.")
    capacity: PositiveSize | None = Field(
        default=None,
        description="GPU memory; with every model's `memory`, those that fit are awake together. null: one.",
    )
    gpus: GpuSizes | None = Field(
        default=None, description="In place of `capacity`: the memory of each GPU, as {0: 24GiB, 1: 24GiB}."
    )
    host_memory: PositiveSize | None = Field(
        default=None,
        description="Host memory for models that sleep: where it is short, the least likely go to deeper `levels`."
        " null: no limit.",
    )
    groups: Mapping[Name, GroupConfig] = Field(
        default_factory=dict,
        description="Which models may be awake together, where their memory is not stated.",
    )
    backoff: BackoffConfig = Field(
        default_factory=BackoffConfig.of_defaults, description="How long a model that failed is left alone."
    )
    alive_every: Duration = Field(
        default=15.0, description="How often awake models are probed with their alive hook. 0: never."
    )
    alive_failures: PositiveCount = Field(
        default=3, description="Failed probes in a row after which an engine counts as lost."
    )
    idle_sleep: PositiveDuration | None = Field(
        default=None,
        description="Put any model to sleep after this long without a request. null: never.",
    )
    default_model: Name | None = Field(
        default=None, description="The model to return to when no request has come for `default_after`."
    )
    default_after: PositiveDuration = Field(
        default=300.0, description="How long all must be quiet until the `default_model` is woken."
    )
    lease_requests: Literal["reject", "wait"] = Field(
        default="reject",
        description="While the GPU is leased requests wait for its end, or get 503 with Retry-After.",
    )
    state: Annotated[str | None, Default("$XDG_STATE_HOME/llmux/…")] = Field(
        default=None,
        description="File that records which models may hold the GPU. null: none.",
    )
    record: str | None = Field(
        default=None,
        description="File that a line is appended to for each request, switch and decision. null: none.",
    )
    record_size: PositiveSize = Field(
        default=64 * MIB, ge=MIB, description="Size at which the record becomes FILE.1, in place of the last one."
    )
    audit: str | None = Field(
        default=None,
        description="File that a line is appended to for every act of an operator, reload and event of a key."
        " null: none.",
    )
    captures: Annotated[CapturesConfig | None, Word("captures or null")] = Field(
        default=None, description="Keep what some keys ask and are answered, in files. null: no prompt is kept."
    )
    ledger: LedgerPath = Field(
        default=None,
        description="SQLite file with a row for each request: its key, model, tokens and times. true: beside the"
        " state file. null: none.",
    )
    ledger_keep: PositiveDuration | None = Field(
        default=400 * 86400.0,
        description="How long rows of the ledger are kept; their hourly sums stay. null: for ever.",
    )
    usage: Literal["reported", "exact"] = Field(
        default="reported",
        description="exact: streams whose clients do not ask for the usage are asked for it, and do not show it.",
    )
    prices: Annotated[PricesConfig | None, Word("prices or null")] = Field(
        default=None, description="What the GPU's time, or tokens, cost. null: no money in the ledger."
    )
    charge: ChargeConfig = Field(
        default_factory=ChargeConfig.of_defaults, description="Which keys pay for what no request did."
    )
    on_exit: Literal["leave", "sleep"] = Field(
        default="leave", description="What happens to awake engines when llmux ends."
    )
    shutdown_grace: Duration = Field(default=30.0, description="How long running answers may go on after a TERM.")
    max_body: PositiveSize = Field(default=256 * MIB, description="Largest request body; beyond: 413.")
    max_buffered: PositiveSize = Field(default=GIB, description="All request bodies held at once; beyond: 503.")
    max_connections: PositiveCount | None = Field(
        default=None,
        description="Open client connections; beyond, the one that is idle longest is closed; else 503, but for"
        " /health and operators. null: nearly half of the files llmux may open.",
    )
    header_timeout: PositiveDuration = Field(
        default=20.0,
        description="How long a request's head may take, from the connection's begin or its first byte; then 408.",
    )
    keepalive_timeout: PositiveDuration = Field(
        default=150.0,
        description="How long a connection may be idle after an answer; then it is closed. "
        "Longer than proxies keep theirs: one may just have sent a request.",
    )
    body_idle_timeout: PositiveDuration = Field(
        default=60.0, description="How long a client may pause while it sends its body; then 408."
    )
    forward: Annotated[tuple[str, ...], AfterValidator(expand), Word("list of globs"), Default("[default]")] = (
        Field(
            default=DEFAULT_FORWARD,
            description="Paths that reach the engines. A list replaces the default, which `default` in it means.",
        )
    )
    passive: Annotated[tuple[str, ...], AfterValidator(check_globs), Word("list of globs")] = Field(
        default=(),
        description="Paths that are forwarded, too, but on which a request neither wakes a model nor keeps it"
        " awake, as /props; if it is not awake: 503. Below /upstream/MODEL as well.",
    )
    list_aliases: bool = Field(
        default=False, description="`/v1/models` lists aliases, too, each with an entry of its own."
    )
    cors: tuple[Origin, ...] = Field(
        default=(), description="Origins of web pages that may call llmux, as http://localhost:5173, or *."
    )
    hosts: tuple[HostName, ...] = Field(
        default=(),
        description="Names by which llmux may be called, beside localhost and loopback addresses; * for any. Only"
        " held on loopback without `api_keys`.",
    )
    admin_key: Key | None = Field(
        default=None,
        description="Key for the admin API, or its hash. null: only this machine may use it; with `api_keys`, only"
        " the llmux command on it.",
    )
    api_keys: tuple[ApiKey, ...] = Field(
        default=(),
        description="Keys of which a client must send one: hashes that `llmux key new` prints, each alone or as"
        " {name: …, key: …}. Empty: every client may use llmux.",
    )
    roles: Mapping[Name, RoleConfig] = Field(
        default_factory=dict, description="What keys may use, for several of them at once."
    )
    insecure: bool = Field(
        default=False, description="true: listen beyond this machine without `api_keys`, which is an error else."
    )
    progress: bool = Field(
        default=False,
        description="Tell clients that wait where they stand, before their answer; fixes its status at 200.",
    )
    progress_every: PositiveDuration = Field(
        default=5.0, description="How long a client waits until it is told so first, and between two times."
    )
    watch: bool = Field(
        default=True, description="Read the configuration again when its file, or the policy's, changes."
    )
    access_log: bool = Field(default=False, description="One log line per request.")
    fleet: JoinConfig | None = Field(
        default=None, description="The store in which this host makes itself known to gateways. null: none."
    )
    otlp: Collector | None = Field(
        default=None,
        description="Where traces are sent, by OTLP over HTTP, as http://127.0.0.1:4318; takes the extra `otel`."
        " null: none.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least severe log lines to write."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto: console on a terminal, else json."
    )

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        environ: Mapping[str, str] | None = None,
        changed: Mapping[tuple[str | int, ...], Any] | None = None,
    ) -> Self:
        """Read a YAML or JSON file; ``environ`` (default: the process's) fills in ``${VAR}``.

        ``changed`` are settings, by their paths, that differ from the file.

        Raises:
            ConfigErrors: all of its errors.

        """
        return load(cls, Path(path), os.environ if environ is None else environ, changed)

    @model_validator(mode="before")
    @classmethod
    def _give_ports(cls, data: Any) -> Any:
        """Give a port to models that need one."""
        if not isinstance(data, Mapping) or not isinstance(data.get("models"), Mapping):
            return data
        return {**data, "models": with_ports(data["models"], data.get("port", 3000))}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        raise_problems(check(self))
        return self

    def with_port(self, port: int) -> Self:
        """Return the same configuration with another port to listen on.

        Raises:
            ConfigError: an engine has that port.

        """
        copy = self.model_copy(update={"port": port})
        for problem in check(copy):
            raise ConfigError(problem.message, path="port")
        return copy

    @property
    def captured(self) -> tuple[str, ...]:
        """The names of the keys whose requests are captured."""
        return () if self.captures is None else tuple(self.captures.keys)

    @property
    def called(self) -> tuple[str, ...]:
        """The names by which llmux may be called, besides this machine's."""
        return self.hosts

    @property
    def state_path(self) -> Path | None:
        """The state file, absolute; None for no state file.

        Raises:
            ConfigError: the default applies, but there is no home folder.

        """
        if "state" not in self.model_fields_set:
            return default_state(self.file or self.folder / f"{self.host}_{self.port}")
        return None if self.state is None else self.folder / Path(self.state).expanduser()

    @property
    def record_path(self) -> Path | None:
        """The file of the record, absolute; None for no record."""
        return None if self.record is None else self.folder / Path(self.record).expanduser()

    @property
    def captures_path(self) -> Path | None:
        """The folder of the captures, absolute; None for no captures.

        Raises:
            ConfigError: it is next to the default state file, but there is no home folder.

        """
        if self.captures is None:
            return None
        if self.captures.folder is None and (state := self.state_path) is not None:
            return state.with_name(f"{state.stem}-captures")
        return self.folder / Path(self.captures.folder or "captures").expanduser()

    @property
    def audit_path(self) -> Path | None:
        """The file of the audit, absolute; None for no audit."""
        return None if self.audit is None else self.folder / Path(self.audit).expanduser()

    @property
    def ledger_path(self) -> Path | None:
        """The file of the ledger, absolute; None for no ledger.

        Raises:
            ConfigError: it is next to the default state file, but there is no home folder.

        """
        if self.ledger is True and (state := self.state_path) is not None:
            return state.with_name(f"{state.stem}-ledger.db")
        return self.folder / Path(self.ledger).expanduser() if isinstance(self.ledger, str) else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but probably a mistake; one line each, beginning with the setting's path."""
        return tuple(find_warnings(self))

    @cached_property  # used for each model
    def names(self) -> Mapping[str, str]:
        """Every name that a client may use → the model's name: the models' own and their aliases."""
        own = {name: name for name in self.models}
        return own | {alias: name for name, model in self.models.items() for alias in model.aliases}

    @cached_property  # used for each model
    def translated(self) -> frozenset[str]:
        """The models whose engines lack a dialect in which clients may send requests for them."""
        return frozenset(name for name, model in self.models.items() if lacks_a_dialect(model.apis))

    @property
    def spoken(self) -> Mapping[str, Spoken]:
        """The `apis` of the models that state them, where relevant, and how requests are translated into these."""
        here = {name: self.models[name] for name in self.translated}
        there = {name: self.remotes[remote] for name, (remote, _) in self.remote_models.items()}
        return {
            name: Spoken(
                frozenset(each.apis), each.lossy, isinstance(each, RemoteConfig) and each.deprecates_max_tokens
            )
            for name, each in (here | there).items()
            if each.apis is not None
        }

    @property
    def ruled(self) -> frozenset[str]:
        """The names on this host to which `routes` may apply."""
        ruled = [route.when.model or ("*",) for route in self.routes]
        names = itertools.chain(self.names, self.variants, self.virtual)
        return frozenset(name for name in names if any(matches(globs, name) for globs in ruled))

    @cached_property  # used for each model
    def variants(self) -> Mapping[str, str]:
        """The name of every variant → the model's name."""
        return {variant: name for name, model in self.models.items() for variant in model.variants}

    @cached_property  # used for each model
    def remote_models(self) -> Mapping[str, tuple[str, str]]:
        """The name of every remote model, as ``remote/model`` → the remote, and the model's name there."""
        return {
            f"{remote}/{ours}": (remote, theirs)
            for remote, settings in self.remotes.items()
            for ours, theirs in settings.models.items()
        }

    def may_leave(self, entry: ApiKeyConfig) -> bool:
        """Return whether requests with this key may leave this host."""
        role = None if entry.role is None else self.roles.get(entry.role)
        return entry.remote if entry.remote is not None else role is not None and role.remote

    def leaves(self, name: str) -> tuple[str, ...]:
        """Return the models, including remote ones, to which a configured name may lead."""
        return leaves(self, name)

    @property
    def listed(self) -> tuple[str, ...]:
        """The names in an error: models with their aliases in brackets, and other names; none unlisted."""
        shown = [(name, model) for name, model in self.models.items() if not model.info.unlisted]
        found = [f"{name} ({', '.join(it.aliases)})" if it.aliases else name for name, it in shown]
        return tuple(sorted([*found, *self.variants, *self.virtual, *self.remote_models]))

    @cached_property
    def unlisted(self) -> frozenset[str]:
        """The models that are served and not shown, and their aliases."""
        return frozenset(name for name, model in self.names.items() if self.models[model].info.unlisted)

    def listed_among(self, names: frozenset[str]) -> tuple[str, ...]:
        """Return those of these names that an error shows."""
        return tuple(sorted(names - self.unlisted))

    def idle_sleep_of(self, name: str) -> float | None:
        """Seconds without a request after which the model ``name`` sleeps; None for never."""
        model = self.models[name]
        if model.keep_awake:
            return None
        # An explicit null of the model overrides the global setting.
        return model.idle_sleep if "idle_sleep" in model.model_fields_set else self.idle_sleep
