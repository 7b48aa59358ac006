"""llama-swap's settings, as far as they mean something to llmux, under the names that they have there.

Notes say what a person must know about the result; marks are stand-ins for what is only known later, while
YAML is read and macros are filled in.

They are characters that Unicode has reserved for use inside a program, so no file holds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llmux.config.problems import Path, dotted

# ruff: noqa: N815


class Part(BaseModel):
    """A mapping of settings. Unknown ones are kept, to be named. An empty value stands for the default."""

    model_config = ConfigDict(
        extra="allow", frozen=True, coerce_numbers_to_str=True, hide_input_in_errors=True, defer_build=True
    )

    @model_validator(mode="before")
    @classmethod
    def _default_for_null(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data


def _list(value: Any) -> Any:
    return () if value is None else value


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a whole number, not {str(value).lower()}")  # noqa: TRY004 (pydantic wants it)
    return value


Texts = Annotated[tuple[str, ...], BeforeValidator(_list)]
Number = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Number, Field(ge=0)]


class Filters(Part):
    """Changes to requests."""

    stripParams: str = ""
    strip_params: str = ""
    setParams: Mapping[str, Any] = Field(default_factory=dict)
    setParamsByID: Mapping[str, Any] = Field(default_factory=dict)


class Model(Part):
    """One model and its server."""

    cmd: str
    cmdStop: str = ""
    proxy: str = ""
    checkEndpoint: str = "/health"
    ttl: Annotated[Number, Field(ge=-1)] = -1
    unloadTimeout: Count = 0
    env: Texts = ()
    aliases: Texts = ()
    useModelName: str = ""
    concurrencyLimit: Count = 0
    filters: Filters = Field(default_factory=Filters)
    unlisted: bool = False


class Group(Part):
    """Models that may or may not run together."""

    swap: bool = True
    exclusive: bool = True
    persistent: bool = False
    members: Texts = ()


class Matrix(Part):
    """Sets of models that may run together, as expressions."""

    vars: Mapping[str, str] = Field(default_factory=dict)
    evict_costs: Mapping[str, Number] = Field(default_factory=dict)
    sets: Mapping[str, str] = Field(min_length=1)


class RouterSettings(Part):
    """What both routers are told; only one is in use."""

    groups: Mapping[str, Group] = Field(default_factory=dict)
    matrix: Matrix | None = None


class Router(Part):
    """Which of the two ways is in use."""

    use: Literal["group", "matrix"] | None = None
    settings: RouterSettings = Field(default_factory=RouterSettings)


class Fifo(Part):
    """The order of the queue."""

    priority: Mapping[str, Number] = Field(default_factory=dict)


class SchedulerSettings(Part):
    """What the scheduler is told."""

    fifo: Fifo = Field(default_factory=Fifo)


class Scheduler(Part):
    """Which model is served first."""

    use: str = "fifo"
    settings: SchedulerSettings = Field(default_factory=SchedulerSettings)


class Routing(Part):
    """Which models run together, and which is first, as newer versions write it."""

    router: Router = Field(default_factory=Router)
    scheduler: Scheduler = Field(default_factory=Scheduler)


class OnStartup(Part):
    """What is done at start."""

    preload: Texts = ()


class Hooks(Part):
    """What is done when something happens."""

    on_startup: OnStartup = Field(default_factory=OnStartup)


class Selector(Part):
    """A name that stands for one of several models."""

    strategy: str = ""
    targets: Texts = ()


class LlamaSwap(Part):
    """The whole file."""

    models: Mapping[str, Model] = Field(min_length=1)
    healthCheckTimeout: Number | None = None
    globalTTL: Count = 0
    unloadTimeout: Count = 0
    startPort: Number = 5800
    logLevel: Literal["debug", "info", "warn", "error"] | None = None
    logRequests: bool = False
    apiKeys: Texts = ()
    groups: Mapping[str, Group] = Field(default_factory=dict)
    matrix: Matrix | None = None
    routing: Routing = Field(default_factory=Routing)
    hooks: Hooks = Field(default_factory=Hooks)
    sendLoadingState: bool = False
    selectors: Mapping[str, Selector] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Note:
    """Something that is ``lost``, or that is there but not quite the same. ``path`` is in llama-swap's file."""

    path: Path
    message: str
    lost: bool = True
    line: int | None = None

    def __str__(self) -> str:
        """Say it in one line."""
        place = [dotted(self.path)] if self.path else []
        return ": ".join([*place, *(["not carried over"] if self.lost else []), self.message])


ENV_OPEN, ENV_CLOSE, PORT, PID = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
ENV = re.compile(f"{ENV_OPEN}([A-Za-z_][A-Za-z0-9_]*){ENV_CLOSE}")
ANY = re.compile(f"{ENV.pattern}|{PORT}|{PID}")
_WRITTEN = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}")


def mark_environment(text: str) -> str:
    """Put a mark in place of each ``${env.NAME}``, before YAML stumbles over the braces."""
    return _WRITTEN.sub(rf"{ENV_OPEN}\1{ENV_CLOSE}", text)


def variables(text: str) -> list[str]:
    """Return the environment variables that are marked in ``text``."""
    return ENV.findall(text)


def fill(text: str, environ: Mapping[str, str]) -> str:
    """Put in the values of environment variables. Those that are not set become empty."""
    return ENV.sub(lambda found: environ.get(found[1], ""), text)


def written(text: str) -> str:
    """Return ``text`` as it stands in the file, for messages."""
    text = ENV.sub(lambda found: f"${{env.{found[1]}}}", text)
    return text.replace(PORT, "${PORT}").replace(PID, "${PID}")
