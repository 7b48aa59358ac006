"""The configuration of ``llmux gateway``: the hosts, and how one is chosen for a request.

Settings that it shares with a host's own configuration have the same names and meanings, except ``hosts``: here
these are the machines, and the names by which clients may call the gateway are ``server_names``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from llmux.config.access import DEFAULT_FORWARD, ApiKey, ApiKeyConfig, Key, check_key, check_keys, expand, is_hash
from llmux.config.accounts import PricesConfig, RoleConfig, check_budget, check_role
from llmux.config.checks import NO_DRAIN, cors_warnings, open_to_all
from llmux.config.load import Whole, load, read_document
from llmux.config.problems import Problem, raise_problems
from llmux.config.schema import GIB, MIB, default_state
from llmux.config.setting_types import (
    EMBEDDED,
    Address,
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
from llmux.errors import ConfigError
from llmux.normal_path import can_be_in_path

UNIX = "unix:"
_LONGEST_SOCKET = 107  # bytes of a Unix address
_HOW = "write it as http://gpu1:3000, or unix:/run/llmux/gpu1.sock"


def _url(value: str) -> str:
    text = value.strip()
    if text.startswith(UNIX):
        path = text.removeprefix(UNIX)
        if not path.startswith("/") or path.startswith("//") or "\0" in path:
            raise ValueError(f"{value!r} names no socket; {_HOW}")
        if len(path.encode()) > _LONGEST_SOCKET:
            raise ValueError(f"its path is longer than {_LONGEST_SOCKET} bytes, which no Unix socket takes")
        return text
    address = parse_address(text, _HOW)
    return address.url


def _shown_key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if is_hash(text):
        raise ValueError("is a hash; the gateway has to show the key itself, as ${GPU1_KEY} from the environment")
    check_key(text)
    return value


class HostConfig(Section):
    """One host: where its llmux listens, and the keys that the gateway shows it."""

    url: Annotated[str, AfterValidator(_url), Word("address")] = Field(
        description="Where its llmux listens: http://HOST:PORT, https://HOST, or unix:/PATH of a socket."
    )
    key: Annotated[SecretStr, AfterValidator(_shown_key), Word("key")] | None = Field(
        default=None,
        description="The key that the gateway shows it: one of its `api_keys`, with `gateway: true` there.",
    )
    admin_key: Annotated[SecretStr, AfterValidator(_shown_key), Word("key")] | None = Field(
        default=None, description="Its `admin_key`, which `llmux fleet drain` takes. null: `key`."
    )

    @property
    def socket(self) -> str:
        """The path of its socket; empty without one."""
        return self.url.removeprefix(UNIX) if self.url.startswith(UNIX) else ""

    @property
    def address(self) -> Address:
        """Host and port, if there is no socket."""
        return parse_address(self.url)


class FleetConfig(Section):
    """How the hosts are found and followed, and how long requests wait for one."""

    store: StoreSetting | None = Field(
        default=None,
        description="Valkey or Redis, as redis://HOST:6379/0 (rediss: TLS; redis://:PASSWORD@HOST), in which hosts"
        " make themselves known; takes the extra `fleet`. embedded: a child process, for this machine. null: only"
        " `hosts`, and without those embedded.",
    )
    key: Annotated[SecretStr, AfterValidator(_shown_key), Word("key")] | None = Field(
        default=None, description="The key that hosts out of the store are shown."
    )
    admin_key: Annotated[SecretStr, AfterValidator(_shown_key), Word("key")] | None = Field(
        default=None, description="Their `admin_key`, for `llmux fleet drain`. null: `key`."
    )
    report_every: PositiveDuration = Field(
        default=1.0, ge=0.2, le=5.0, description="How often each host is asked for a report, between its changes."
    )
    max_queued: PositiveCount = Field(
        default=1000, description="Requests for one model that may wait in the gateway for a host; more get 429."
    )
    max_wait: PositiveDuration = Field(
        default=30.0, description="How long one waits there; then 503. In a host's queue the host's limits hold."
    )


class RouteConfig(Section):
    """The rule that chooses a host."""

    use: str = Field(
        default="least_wait",
        min_length=1,
        description="least_wait, affinity, least_in_flight, power_of_two, random, round_robin, static,"
        " package.module:Class, or ./file.py:Class.",
    )
    options: Mapping[str, Any] = Field(
        default_factory=dict, description="Options of the route, checked when it is loaded."
    )


class GatewayConfig(Whole):
    """Everything that a gateway is told. ``folder`` is what paths are relative to."""

    host: Host = Field(
        default="127.0.0.1",
        description="Address to listen on. 0.0.0.0 opens it to the network, which takes `api_keys`.",
    )
    port: OwnPort = Field(default=4000, description="Port to listen on. 0: any free one.")
    hosts: Mapping[Name, HostConfig] = Field(
        default_factory=dict, description="The hosts by name; with `fleet.store` beside those that it knows."
    )
    fleet: FleetConfig = Field(default_factory=FleetConfig.of_defaults, description="How the hosts are followed.")
    route: RouteConfig = Field(default_factory=RouteConfig.of_defaults, description="How a host is chosen.")
    server_names: tuple[HostName, ...] = Field(
        default=(),
        description="Names by which the gateway may be called, beside localhost and loopback addresses; * for any."
        " Only held on loopback without `api_keys`.",
    )
    admin_key: Key | None = Field(
        default=None,
        description="Key for `llmux fleet drain`, or its hash. null: only this machine may use it; with"
        " `api_keys`, only the llmux command on it.",
    )
    api_keys: tuple[ApiKey, ...] = Field(
        default=(),
        description="Keys of which a client must send one; hosts are told the name alone. Their roles, limits and"
        " budgets count over all gateways.",
    )
    roles: Mapping[Name, RoleConfig] = Field(
        default_factory=dict, description="What keys may, by the name that they have as `role`."
    )
    prices: Annotated[PricesConfig | None, Word("prices or null")] = Field(
        default=None, description="What requests cost, for budgets. null: nothing."
    )
    state: str | None = Field(
        default=None,
        description="File in which it is kept what budgets have spent. null: one in the state folder of the user,"
        " where there are budgets.",
    )
    insecure: bool = Field(
        default=False, description="true: listen beyond this machine without `api_keys`, which is an error else."
    )
    shutdown_grace: Duration = Field(default=30.0, description="How long running answers may go on after a TERM.")
    max_body: PositiveSize = Field(default=256 * MIB, description="Largest request body; beyond: 413.")
    max_buffered: PositiveSize = Field(default=GIB, description="All request bodies held at once; beyond: 503.")
    max_connections: PositiveCount | None = Field(
        default=None, description="Open client connections. null: nearly half of the files that it may open."
    )
    header_timeout: PositiveDuration = Field(default=20.0, description="How long a request's head may take.")
    keepalive_timeout: PositiveDuration = Field(default=150.0, description="How long a connection may be idle.")
    body_idle_timeout: PositiveDuration = Field(
        default=60.0, description="How long a client may pause while it sends its body; then 408."
    )
    forward: Annotated[tuple[str, ...], AfterValidator(expand), Word("list of globs"), Default("[default]")] = (
        Field(
            default=DEFAULT_FORWARD,
            description="Paths that reach the hosts. A list replaces the default, which `default` in it means.",
        )
    )
    cors: tuple[Origin, ...] = Field(
        default=(), description="Origins of web pages that may call the gateway, or *."
    )
    progress: bool = Field(
        default=False, description="Tell clients that wait where they stand, before their answer."
    )
    audit: str | None = Field(
        default=None,
        description="File that a line is appended to for every act of an operator, reload and event of a key."
        " null: none.",
    )
    watch: bool = Field(default=True, description="Read the configuration again when its file changes.")
    access_log: bool = Field(default=False, description="One log line per request.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least severe log lines to write."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto: console on a terminal, else json."
    )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, environ: Mapping[str, str] | None = None) -> Self:
        """Read a YAML or JSON file; ``environ`` (default: the process's) fills in ``${VAR}``.

        Raises:
            ConfigErrors: all of its errors.

        """
        return load(cls, Path(path), os.environ if environ is None else environ)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        problems = [*_same_url(self), *check_keys(self), *_kept_here(self), *_check_grants(self)]
        if not self.hosts and self.store is None:
            problems.append(Problem(("hosts",), "is empty: give the hosts by name, or `fleet.store`"))
        raise_problems([*problems, *open_to_all(self.host, self)])
        return self

    def with_port(self, port: int) -> Self:
        """Return the same configuration with another port to listen on."""
        return self.model_copy(update={"port": port})

    @property
    def audit_path(self) -> Path | None:
        """The file of the audit, absolute; None for no audit."""
        return None if self.audit is None else self.folder / Path(self.audit).expanduser()

    @property
    def state_path(self) -> Path:
        """The file of the spending under budgets, absolute.

        Raises:
            ConfigError: the default applies, but there is no home folder.

        """
        if self.state is not None:
            return self.folder / Path(self.state).expanduser()
        file = self.file or self.folder / f"{self.host}.yaml"
        return default_state(file.with_name(f"{file.stem}_{self.port}"))

    @property
    def store(self) -> SecretStr | None:
        """The store's address. Without hosts, the section ``fleet`` alone means an embedded one."""
        alone = not self.hosts and "fleet" in self.model_fields_set
        return SecretStr(EMBEDDED) if self.fleet.store is None and alone else self.fleet.store

    @property
    def captured(self) -> tuple[str, ...]:
        """The names of the keys whose requests are captured: hosts do that."""
        return ()

    def may_leave(self, entry: ApiKeyConfig) -> bool:  # noqa: ARG002 - as a host's
        """Return False: the hosts' configurations say what may leave a host."""
        return False

    @property
    def called(self) -> tuple[str, ...]:
        """The names by which it may be called."""
        return self.server_names

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but probably a mistake; one line each."""
        hosts = [f"hosts.{name}: {NO_DRAIN}" for name in self.hosts if not can_be_in_path(name)]
        return (*hosts, *cors_warnings(self.cors))


def _same_url(config: GatewayConfig) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for name, host in config.hosts.items():
        where = host.socket or str(host.address.endpoint) + host.address.base_path
        owner = owners.setdefault(where, name)
        if owner != name:
            yield Problem(
                ("hosts", name, "url"), f"{host.url} is the address of {owner}, too; each host has one of its own"
            )


_HERE = frozenset({"key", "name", "progress", "role", "models", "limits", "budget"})


def _kept_here(config: GatewayConfig) -> Iterator[Problem]:
    """Reject settings that a gateway lacks: the bill must not be the first to show that they are ignored."""
    words = "is held by hosts only: set it there for a key of the same name, which the gateway tells them"
    for index, entry in enumerate(config.api_keys):
        for setting in sorted(entry.model_fields_set - _HERE):
            if getattr(entry, setting) != type(entry).model_fields[setting].default:
                yield Problem(("api_keys", index, setting.rstrip("_")), words)
    for name, role in config.roles.items():
        if role.remote:
            yield Problem(("roles", name, "remote"), words)


def _check_grants(config: GatewayConfig) -> Iterator[Problem]:
    for role, given in config.roles.items():
        yield from check_budget(given.budget, config.prices, ("roles", role, "budget"))
    for index, entry in enumerate(config.api_keys):
        at = ("api_keys", index)
        yield from check_role(entry, config.roles, at)
        yield from check_budget(entry.budget, config.prices, (*at, "budget"))


def is_gateway(file: Path) -> bool:
    """Return whether a file configures a gateway: ``hosts`` is a mapping, and there are no ``models``."""
    try:
        data = read_document(file).data
    except (ConfigError, OSError):
        return False
    if not isinstance(data, Mapping) or "models" in data:
        return False
    return isinstance(data.get("hosts"), Mapping) or "route" in data or isinstance(data.get("fleet"), Mapping)
