"""Checks that need more than one setting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmux.config.access import check_keys
from llmux.config.address import covers, is_loopback
from llmux.config.problems import Problem
from llmux.config.residency import check_levels, check_residency, levels_warnings

if TYPE_CHECKING:
    from llmux.config.schema import Config

SMALLEST_PLAUSIBLE = 2**20  # bytes; `memory: 18` means GiB


def check(config: Config) -> list[Problem]:
    """Return everything that makes ``config`` unusable, as a whole."""
    problems = [*_names(config), *_addresses(config), *check_residency(config)]
    return [*problems, *check_levels(config), *_backoff(config), *check_keys(config), *_openness(config)]


def _names(config: Config) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for name, model in config.models.items():
        for index, alias in enumerate(model.aliases):
            path = ("models", name, "aliases", index)
            if alias in config.models:
                yield Problem(path, f"{alias!r} is the name of a model; choose another")
            elif alias in owners:
                yield Problem(path, f"{alias!r} is already an alias of {owners[alias]}; keep one of them")
            owners.setdefault(alias, name)


def _addresses(config: Config) -> Iterator[Problem]:
    taken: dict[tuple[tuple[str, int], str], list[str]] = defaultdict(list)
    for name, model in config.models.items():
        address = model.address
        taken[address.endpoint, address.base_path].append(name)
        if covers(config.host, address.host) and config.port == address.port:
            yield Problem(
                ("models", name, _address_key(config, name)),
                f"{address.authority} is llmux's own address; change this port or the top-level `port`",
            )
    for names in taken.values():
        if len(names) == 1 or all(config.models[name].upstream_model for name in names):
            continue
        alone = [name for name in names if not config.models[name].shared_address]
        for name in alone:
            other = next(peer for peer in names if peer != name)
            yield Problem(
                ("models", name, _address_key(config, name)),
                f"{config.models[name].address.authority} is also the address of {other};"
                " give each its own port, or `upstream_model` to each if one engine serves both,"
                " or `shared_address: true` to each if they take turns",
            )


def _address_key(config: Config, name: str) -> str:
    return "url" if config.models[name].url is not None else "port"


def _backoff(config: Config) -> Iterator[Problem]:
    if config.backoff.first > config.backoff.max:
        yield Problem(("backoff", "first"), "is longer than `backoff.max`; make it shorter")


def find_warnings(config: Config) -> tuple[str, ...]:
    """Return what is allowed but probably not meant."""
    return tuple(_warnings(config))


def _openness(config: Config) -> Iterator[Problem]:
    problem = open_to_all(config.host, config)
    if problem:
        yield Problem(("host",), problem)


def open_to_all(host: str, config: Config) -> str:
    """Say what is wrong with listening on ``host`` under this configuration; "" when nothing is."""
    if is_loopback(host) or config.api_keys or config.insecure:
        return ""
    return (
        f"is {host}, beyond this machine, without `api_keys`: every client that reaches it could use llmux;"
        " give `api_keys` (`llmux key new` makes one), or say `insecure: true` if that is meant"
    )


def operators(config: Config) -> str:
    """Return which clients may operate llmux: wake, put to sleep, pin, lease, and reach engines directly."""
    if config.admin_key is not None:
        return "whoever shows `admin_key`"
    if config.api_keys:
        return "the llmux command of the same user on this host; over HTTP no client, as `admin_key` is not set"
    return "any program on this host, without a key; set `api_keys` before a proxy on this host passes requests on"


def _warnings(config: Config) -> Iterator[str]:
    if config.policy.request_timeout == 0:
        yield (
            "policy.request_timeout: is 0: a request whose model is not awake is refused at once;"
            " null means no limit"
        )
    yield from _sizes(config)
    yield from levels_warnings(config)
    endpoints = [model.address.endpoint for model in config.models.values()]
    for name, model in config.models.items():
        if model.shared_address and endpoints.count(model.address.endpoint) == 1:
            yield f"models.{name}.shared_address: no other model has this address"


def _sizes(config: Config) -> Iterator[str]:
    given: dict[str, Any] = {"capacity": config.capacity, "host_memory": config.host_memory}
    given |= {f"gpus.{gpu}": size for gpu, size in (config.gpus or {}).items()}
    for name, model in config.models.items():
        at = f"models.{name}.memory"
        if isinstance(model.memory, Mapping):
            given |= {f"{at}.{gpu}": size for gpu, size in model.memory.items()}
        else:
            given[at] = model.memory
        given |= {f"models.{name}.levels.{level}": size for level, size in model.levels.items()}
    for at, size in given.items():
        if size is not None and 0 < size < SMALLEST_PLAUSIBLE:
            yield f"{at}: is only {size} bytes; write a unit, as {size}GiB"
    for name, model in config.models.items():
        if model.memory is not None and config.capacity is None and config.gpus is None:
            yield f"models.{name}.memory: has no effect without the top-level `capacity`"
