"""llama-swap's settings under their names there, and its file, read and filled in, with lines.

Notes say what a user must know about the result; marks replace values that are known only later, while YAML is
parsed and macros are filled in. They are characters that Unicode has reserved for use inside a program, so no file
contains them.

``${name}`` is one of llama-swap's macros, built-in ones included. They are filled in as in llama-swap: the last
one first, so that a macro may use earlier ones; a value that consists of a macro alone has the macro's type.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmux.config.load import read_document
from llmux.config.problems import Lines, Path, Problem, dotted, explain, raise_all

# ruff: noqa: N815


class Part(BaseModel):
    """A mapping of settings. Unknown ones are kept, to be listed. An empty value means the default."""

    model_config = ConfigDict(
        extra="allow", frozen=True, coerce_numbers_to_str=True, hide_input_in_errors=True, defer_build=True
    )

    @model_validator(mode="before")
    @classmethod
    def _default_for_null(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data


def _texts(value: Any) -> Any:
    """Take `true` for the text that it is there; pydantic does so for numbers."""
    if isinstance(value, list):
        return [_text(each) if isinstance(each, bool) else each for each in value]
    return value


def _named(value: Any) -> Any:
    """Take an empty value for the default of what it names."""
    if isinstance(value, Mapping):
        return {name: {} if part is None else part for name, part in value.items()}
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a whole number, not {str(value).lower()}")  # noqa: TRY004 (pydantic wants it)
    return value


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Number = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Number, Field(ge=0)]


class Filters(Part):
    """Changes to requests."""

    stripParams: str = ""
    strip_params: str = ""
    setParams: Mapping[str, Any] = Field(default_factory=dict)
    setParamsByID: Mapping[str, Any] = Field(default_factory=dict)


class Capabilities(Part):
    """What a model can do: kinds of input and output, and more."""

    takes: Texts = Field(default=(), alias="in")
    out: Texts = ()
    tools: bool = False
    reranker: bool = False
    context: Count = 0


class Model(Part):
    """One model and its server."""

    cmd: str = ""
    cmdStop: str = ""
    proxy: str = ""
    checkEndpoint: str = "/health"
    ttl: Annotated[Number, Field(ge=-1)] = -1
    unloadTimeout: Count = 0
    env: Texts = ()
    aliases: Texts = ()
    useModelName: str = ""
    concurrencyLimit: Number = 0
    filters: Filters = Field(default_factory=Filters)
    unlisted: bool = False
    name: str = ""
    description: str = ""
    capabilities: Capabilities = Field(default_factory=Capabilities)


class Group(Part):
    """Models that may or may not run together."""

    swap: bool = True
    exclusive: bool = True
    persistent: bool = False
    members: Texts = ()


Groups = Annotated[Mapping[str, Group], BeforeValidator(_named)]


class Matrix(Part):
    """Sets of models that may run together, as expressions."""

    vars: Mapping[str, str] = Field(default_factory=dict)
    evict_costs: Mapping[str, Number] = Field(default_factory=dict)
    sets: Mapping[str, str] = Field(min_length=1)


class RouterSettings(Part):
    """Settings of both routers; only one is in use."""

    groups: Groups = Field(default_factory=dict)
    matrix: Matrix | None = None


class Router(Part):
    """Which of the two routers is in use."""

    use: Literal["group", "matrix"] | None = None
    settings: RouterSettings = Field(default_factory=RouterSettings)


class Fifo(Part):
    """The order of the queue."""

    priority: Mapping[str, Number] = Field(default_factory=dict)


class SchedulerSettings(Part):
    """Settings of the scheduler."""

    fifo: Fifo = Field(default_factory=Fifo)


class Scheduler(Part):
    """Which model is served first."""

    use: str = "fifo"
    settings: SchedulerSettings = Field(default_factory=SchedulerSettings)


class Routing(Part):
    """Which models run together, and which is first, in the form of newer versions."""

    router: Router = Field(default_factory=Router)
    scheduler: Scheduler = Field(default_factory=Scheduler)


class OnStartup(Part):
    """What to do at start."""

    preload: Texts = ()


class Hooks(Part):
    """What to do on events."""

    on_startup: OnStartup = Field(default_factory=OnStartup)


class Selector(Part):
    """A name that stands for one of several models."""

    strategy: str = ""
    targets: Texts = ()


class PeerTimeouts(Part):
    """How long each step may take, in seconds; 0: no limit."""

    connect: Count = 30
    responseHeader: Count = 60


class Peer(Part):
    """An endpoint on another host."""

    proxy: str
    models: Texts = ()
    apiKey: str = ""
    timeouts: PeerTimeouts = Field(default_factory=PeerTimeouts)
    filters: Filters = Field(default_factory=Filters)


class LlamaSwap(Part):
    """The whole file."""

    models: Annotated[Mapping[str, Model], BeforeValidator(_named)] = Field(default_factory=dict)
    healthCheckTimeout: Number | None = None
    globalTTL: Count = 0
    unloadTimeout: Count = 0
    startPort: Number = 5800
    logLevel: str = ""
    logRequests: bool = False
    apiKeys: Texts = ()
    groups: Groups = Field(default_factory=dict)
    matrix: Matrix | None = None
    routing: Routing = Field(default_factory=Routing)
    hooks: Hooks = Field(default_factory=Hooks)
    sendLoadingState: bool = False
    includeAliasesInList: bool = False
    selectors: Mapping[str, Selector] = Field(default_factory=dict)
    peers: Mapping[str, Peer] = Field(default_factory=dict)


def unknown_within(part: Part, at: Path = ()) -> Iterator[Path]:
    """Yield where there are unknown settings in the parts of ``part``, but not in itself or in a model."""
    for name in type(part).model_fields:
        value = getattr(part, name)
        named = isinstance(value, Mapping)
        parts = {(name, key): each for key, each in value.items()} if named else {(name,): value}
        for place, each in parts.items():
            if isinstance(each, Part):
                if not isinstance(each, Model):
                    yield from ((*at, *place, unknown) for unknown in each.model_extra or {})
                yield from unknown_within(each, (*at, *place))


@dataclass(frozen=True, slots=True)
class Note:
    """Something that is ``lost``, or not quite equivalent. ``path`` is in llama-swap's file."""

    path: Path
    message: str
    lost: bool = True
    line: int | None = None

    def __str__(self) -> str:
        """Format it in one line."""
        place = [dotted(self.path)] if self.path else []
        return ": ".join([*place, *(["not carried over"] if self.lost else []), self.message])


ENV_OPEN, ENV_CLOSE, PORT, PID = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
ENV = re.compile(f"{ENV_OPEN}([A-Za-z_][A-Za-z0-9_]*){ENV_CLOSE}")
ANY = re.compile(f"{ENV.pattern}|{PORT}|{PID}")
_WRITTEN = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}")


def mark_environment(text: str) -> str:
    """Put a mark in place of each ``${env.NAME}``, as YAML could not parse the braces."""
    return _WRITTEN.sub(rf"{ENV_OPEN}\1{ENV_CLOSE}", text)


def variables(text: str) -> list[str]:
    """Return the environment variables that are marked in ``text``."""
    return ENV.findall(text)


def fill(text: str, environ: Mapping[str, str]) -> str:
    """Put in the values of environment variables. Unset ones become empty."""
    return ENV.sub(lambda found: environ.get(found[1], ""), text)


def as_in_file(text: str) -> str:
    """Return ``text`` as in the file, for messages."""
    text = ENV.sub(lambda found: f"${{env.{found[1]}}}", text)
    return text.replace(PORT, "${PORT}").replace(PID, "${PID}")


RESERVED = frozenset({"PID", "PORT", "MODEL_ID"})
DEFAULT_PROXY = "http://localhost:${PORT}"
DEFAULT_START_PORT = 5800
LONGEST_NAME = 63

_NAME = re.compile(r"[A-Za-z0-9_-]+\Z")
_USE = re.compile(r"\$\{([A-Za-z0-9_-]+)\}")
_COMMANDS = ("cmd", "cmdStop")

Macros = Mapping[str, Any]


@dataclass(slots=True)
class Filled:
    """The file without its macros. ``ports`` holds those that llama-swap would have assigned, by model."""

    data: dict[str, Any]
    ports: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def fill_macros(data: Mapping[str, Any]) -> Filled:
    """Fill in the macros of a whole file. ``data`` is not changed."""
    filled = Filled({key: value for key, value in data.items() if key != "macros"})
    common = _declared(data.get("macros"), ("macros",), filled.problems)
    for key, value in filled.data.items():
        if key != "models":
            filled.data[key] = _fill(value, common)
    models = filled.data.get("models")
    if isinstance(models, Mapping):
        filled.data["models"] = _fill_models(models, common, filled)
    for key, value in filled.data.items():
        # Parts that llmux does not use need not be valid.
        if key != "models" and key in LlamaSwap.model_fields:
            filled.problems += _left((key,), value, common)
    return filled


def without_comments(command: str) -> str:
    """Drop the lines that begin with ``#``."""
    return "\n".join(line for line in command.split("\n") if not line.strip().startswith("#"))


def _fill_models(models: Mapping[str, Any], common: Macros, filled: Filled) -> dict[str, Any]:
    done = {name: _fill_model(name, model, common, filled) for name, model in models.items()}
    number = filled.data.get("startPort", DEFAULT_START_PORT)
    if number is None:
        number = DEFAULT_START_PORT
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 65535:  # noqa: PLR2004 (ports)
        filled.problems.append(Problem(("startPort",), "must be a port, 1 to 65535"))
        number = DEFAULT_START_PORT
    for name in sorted(done):  # as llama-swap does, whatever their order in the file
        model = done[name]
        if isinstance(model, dict) and "${PORT}" in str(model.get("cmd", "")):
            filled.ports[name] = number
            for key, value in model.items():
                model[key] = _replace(value, "PORT", PORT if key in _COMMANDS else number)
            _fill_keys(model, {"PORT": number})
            number += 1
    return done


def _fill_model(name: str, model: Any, common: Macros, filled: Filled) -> Any:
    if not isinstance(model, Mapping):
        return model
    own = _declared(model.get("macros"), ("models", name, "macros"), filled.problems)
    macros = {"MODEL_ID": name, **common, **own}
    done = {key: value for key, value in model.items() if key != "macros"}
    for key in _COMMANDS:
        # Before the macros: a comment must not become a command because its macro has two lines.
        if isinstance(done.get(key), str):
            done[key] = without_comments(done[key])
    done = {key: _fill(value, macros) for key, value in done.items()}
    _fill_keys(done, macros)
    has_port = "${PORT}" in str(done.get("cmd", ""))
    for key, value in done.items():
        if key in Model.model_fields:
            # If the port of a `proxy` is given elsewhere, llmux does not require ${PORT}.
            known = {"PORT"} if has_port or key == "proxy" else set()
            known |= {"PID"} if key == "cmdStop" else set()
            filled.problems += _left(("models", name, key), value, macros, known)
    if isinstance(done.get("cmdStop"), str):
        done["cmdStop"] = done["cmdStop"].replace("${PID}", PID)
    return done


def _fill_keys(model: dict[str, Any], macros: Macros) -> None:
    """Fill in the only keys that may contain macros: names of the model."""
    filters = model.get("filters")
    if isinstance(filters, dict) and isinstance(filters.get("setParamsByID"), dict):
        filters["setParamsByID"] = {
            _text(_fill(key, macros)): value for key, value in filters["setParamsByID"].items()
        }


def _declared(macros: Any, path: Path, problems: list[Problem]) -> dict[str, Any]:
    if macros is None:
        return {}
    if not isinstance(macros, Mapping):
        problems.append(Problem(path, "must be a mapping of names to values"))
        return {}
    for name, value in macros.items():
        wrong = _wrong(name, value)
        if wrong:
            problems.append(Problem((*path, name), wrong))
    return {name: value for name, value in macros.items() if not _wrong(name, value)}


def _wrong(name: str, value: Any) -> str:
    if name in RESERVED:
        return "is a name that llama-swap fills in itself; choose another"
    if not _NAME.match(name) or len(name) > LONGEST_NAME:
        return f"is not a name for a macro: up to {LONGEST_NAME} letters, digits, _ and -"
    if not isinstance(value, str | int | float):
        return "must be text, a number, true or false"
    if isinstance(value, str) and f"${{{name}}}" in value:
        return "uses itself"
    return ""


def _fill(value: Any, macros: Macros) -> Any:
    for name in reversed(list(macros)):
        value = _replace(value, name, macros[name])
    return value


def _replace(value: Any, name: str, new: Any) -> Any:
    """Replace one macro everywhere in ``value``, except in the keys of its mappings."""
    if isinstance(value, str):
        return new if value == f"${{{name}}}" else value.replace(f"${{{name}}}", _text(new))
    if isinstance(value, Mapping):
        return {key: _replace(item, name, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, name, new) for item in value]
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _left(path: Path, value: Any, macros: Macros, known: set[str] | None = None) -> Iterator[Problem]:
    """Yield the macros that have not been filled in."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _left((*path, key), item, macros, known)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _left((*path, index), item, macros, known)
    elif isinstance(value, str):
        for name in dict.fromkeys(_USE.findall(value)):
            if name not in (known or ()):
                yield Problem(path, _unknown(name, macros))


def _unknown(name: str, macros: Macros) -> str:
    if name == "PORT":
        return "uses ${PORT}, which llama-swap only fills in where the model's `cmd` uses it too"
    if name == "PID":
        return "uses ${PID}, which is only known in `cmdStop`"
    if name in macros:
        return f"uses ${{{name}}}, which is declared after a macro that uses it; move it before that"
    near = difflib.get_close_matches(name, macros, n=1)
    mean = f"did you mean ${{{near[0]}}}?" if near else "declare it under `macros`"
    return f"uses ${{{name}}}, which is not a macro; {mean}"


# In these a variable is carried over as such. Values of others are never used.
_KEPT = frozenset({"cmd", "cmdStop", "env"})
_USED = frozenset(LlamaSwap.model_fields)


@dataclass(frozen=True, slots=True)
class Source:
    """The contents of the file. ``config`` has marks for values known only later; ``raw`` is everything."""

    config: LlamaSwap
    raw: Mapping[str, Any]
    ports: Mapping[str, int]
    lines: Lines
    file: FilePath


def read(file: FilePath, environ: Mapping[str, str]) -> Source:
    """Read llama-swap's configuration; ``environ`` fills in ``${env.NAME}`` where llmux would not do so later.

    Raises:
        ConfigErrors: all of its errors.

    """
    document = read_document(file, prepare=mark_environment)
    problems = list(document.problems)
    if not isinstance(document.data, Mapping):
        if not problems:
            problems = [Problem((), "must be a mapping: `models:` and other settings at the top level")]
        raise_all(problems, file=str(file), lines=document.lines)
    filled = fill_macros(document.data)
    problems += filled.problems
    data, unset = _settle(filled.data, environ)
    problems += unset
    config = None
    try:
        config = LlamaSwap.model_validate(data)
    except ValidationError as error:
        known = {problem.path for problem in problems}
        problems += [problem for problem in explain(error, LlamaSwap) if problem.path not in known]
    raise_all(
        [Problem(problem.path, as_in_file(problem.message), problem.line) for problem in problems],
        file=str(file),
        lines=document.lines,
    )
    assert config is not None  # raise_all did not
    return Source(config, data, filled.ports, document.lines, file)


def _settle(data: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """Fill in the environment where its values determine what is written."""
    problems: list[Problem] = []

    def walk(value: Any, path: Path) -> Any:
        if _is_kept(path):
            return value
        if isinstance(value, Mapping):
            return {key: walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or not variables(value):
            return value
        missing = [name for name in variables(value) if name not in environ]
        problems.extend(_unset(path, missing))
        return fill(value, environ)

    return {key: walk(value, (key,)) for key, value in data.items()}, problems


def _is_kept(path: Path) -> bool:
    if path[0] == "models":
        return len(path) > 2 and (path[2] in _KEPT or path[2] not in Model.model_fields)  # noqa: PLR2004
    if path[0] == "peers":
        return len(path) > 2 and path[2] == "apiKey"  # noqa: PLR2004
    return path[0] == "apiKeys" or path[0] not in _USED


def _unset(path: Path, names: list[str]) -> Iterator[Problem]:
    for name in dict.fromkeys(names):
        yield Problem(path, f"uses ${{env.{name}}}, and the variable {name} is not set; set it for the import")
