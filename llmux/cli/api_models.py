"""The responses of llmux's own endpoints, as far as the command line shows them.

Plain dataclasses, read by `decode`: `llmux status` starts several times faster than with a validation
library.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(slots=True)
class Commanded:
    """The answer to an operator's command about a model; ``switch`` is the one that carries it out."""

    model: str
    switch: int | None
    phase: str | None


@dataclass(slots=True)
class Leased:
    """The answer to a request for a lease of the GPU."""

    id: str
    held: bool
    switch: int | None
    reason: str | None
    expires_in: float | None
    requests: str


@dataclass(frozen=True, slots=True)
class Served:
    """A request in flight."""

    request_id: str
    seconds: float = field(metadata={"name": "for"})
    answering: bool


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model. Durations are seconds, ``backoff_until`` is a Unix time."""

    phase: str
    queued: int
    in_flight: int
    oldest_wait: float | None
    expected_wait: float | None  # for a request that arrives now; None: it would be rejected
    awake_for: float | None
    backoff_until: float | None
    last_error: str | None
    pinned: bool
    pin_expires_in: float | None
    pin_reason: str | None
    level: str | None = None
    streamed: int | None = None  # events, counted while a client listens
    riding: int = 0  # requests that cause no switch
    serving: list[Served] = field(default_factory=list)  # the longest in flight
    aliases: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SwitchStatus:
    """The switch under way."""

    id: int
    sources: list[str] = field(metadata={"name": "from"})
    to: str | None
    phase: str
    since: float
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """The lease of the GPU."""

    id: str
    reason: str | None
    held: bool
    expires_in: float | None
    requests: Literal["wait", "reject"]


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that has ended. ``time`` is a Unix time, durations are seconds."""

    time: float
    model: str | None
    status: int
    waited: float
    first_byte: float | None
    duration: float
    input_tokens: int | None
    output_tokens: int | None
    tokens_per_second: float | None
    request_id: str
    error: str | None
    key: str | None = None
    id: int = 0
    cost: float | None = None
    currency: str | None = None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Usage: a row of ``/llmux/usage``, or a sum of its rows. ``estimated`` counts requests."""

    requests: int
    failed: int
    estimated: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    waited_seconds: float
    service_seconds: float
    cost: float | None
    currency: str | None


@dataclass(frozen=True, slots=True)
class Usage:
    """``/llmux/usage``. ``total`` has a sum for each currency, ``lost`` counts rows that could not be written."""

    by: list[str]
    usage: list[UsageRow]
    total: list[UsageRow]
    lost: int


@dataclass(frozen=True, slots=True)
class FinishedRequests:
    """``/llmux/activity``: the newest first."""

    requests: list[FinishedRequest]


@dataclass(frozen=True, slots=True)
class History:
    """``/llmux/history``: the output of hooks; null for a client without an operator's rights."""

    output: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: bytes, a share of 1, °C, W; null if the driver does not report it."""

    index: int
    name: str
    memory_used: int | None
    memory_total: int | None
    load: float | None
    temperature: float | None
    power: float | None


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs, or why they are unknown."""

    gpus: list[Gpu]
    error: str | None


@dataclass(frozen=True, slots=True)
class AutoStatus:
    """Which of several policies decides."""

    chosen: str
    error: str | None = None  # why the last look back failed


@dataclass(frozen=True, slots=True)
class PolicyStatus:
    """The policy in use."""

    use: str
    auto: AutoStatus | None = None


@dataclass(frozen=True, slots=True)
class DecisionStatus:
    """One decision."""

    reason: str
    switch: int | None


@dataclass(frozen=True, slots=True)
class RemoteStatus:
    """A remote in the status."""

    state: str
    in_flight: int
    last_error: str | None
    retry_in: float | None


@dataclass(frozen=True, slots=True)
class ControlledTwice:
    """An engine that another llmux controls, too."""

    engine: str
    pid: int | None
    config: str | None


@dataclass(frozen=True, slots=True)
class Status:
    """``/llmux/status``."""

    version: str
    uptime: float
    ready: bool
    policy: PolicyStatus
    awake: list[str]
    switch: SwitchStatus | None
    manual: bool
    lease: LeaseStatus | None
    models: Mapping[str, ModelStatus]
    decisions: list[DecisionStatus]
    reload_error: str | None
    remotes: Mapping[str, RemoteStatus] = field(default_factory=dict)
    controlled_twice: list[ControlledTwice] = field(default_factory=list)


# ---- decoding them


def decode(shape: type[T], document: object) -> T:
    """Decode a JSON value as one of these classes; unknown fields are ignored.

    Raises:
        ValueError: a field is missing, or of another type; the message begins with its path.

    """
    read: T = _value(shape, document, "")
    return read


@cache
def _hints(shape: type) -> dict[str, Any]:
    return get_type_hints(shape)


def _value(kind: Any, value: Any, at: str) -> Any:
    """Decode a value as a class, a union with None, a list, a mapping with text keys, or a Literal."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or (value is None and types.NoneType in arguments):
        return value
    if origin in (Union, types.UnionType):
        (kind,) = (each for each in arguments if each is not types.NoneType)
        read = _value(kind, value, at)
    elif origin is Literal:
        read = _checked(value in arguments, value, at, f"one of {', '.join(map(str, arguments))}")
    elif origin is list:
        items = _checked(isinstance(value, list), value, at, "a list")
        read = [_value(arguments[0], item, f"{at}[{index}]") for index, item in enumerate(items)]
    elif origin is not None:
        entries = _checked(isinstance(value, dict), value, at, "an object")
        read = {key: _value(arguments[1], item, f"{at}.{key}") for key, item in entries.items()}
    elif is_dataclass(kind):
        read = _object(kind, _checked(isinstance(value, dict), value, at, "an object"), at)
    else:
        taken = (int, float) if kind is float else kind
        fits = isinstance(value, taken) and (kind is bool or not isinstance(value, bool))
        read = kind(_checked(fits, value, at, kind.__name__))
    return read


def _object(shape: Any, document: dict[str, Any], at: str) -> Any:
    given = {}
    for each in fields(shape):
        name = each.metadata.get("name", each.name)
        if name in document:
            given[each.name] = _value(_hints(shape)[each.name], document[name], f"{at}.{name}")
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{at}.{name}: is missing".lstrip("."))
    return shape(**given)


def _checked(whole: bool, value: Any, at: str, wanted: str) -> Any:
    if not whole:
        raise ValueError(f"{at or 'the answer'}: must be {wanted}, not {str(value)[:40]!r}".lstrip("."))
    return value
