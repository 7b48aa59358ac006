"""A request in the neutral form, and how fields are handled that a dialect lacks."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmux.errors import BadRequestError

V = TypeVar("V")
CODE = "cannot_translate"


@dataclass(slots=True)
class Text:
    """What is said."""

    text: str


@dataclass(slots=True)
class Image:
    """A picture: at ``url``, or its bytes in base64 as ``data``."""

    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    detail: str | None = None


@dataclass(slots=True)
class Document:
    """A file: at ``url``, as plain ``text``, or its bytes in base64 as ``data``."""

    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    text: str | None = None
    title: str | None = None


@dataclass(slots=True)
class Call:
    """A tool is called; ``arguments`` are JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Result:
    """The result of a call."""

    id: str
    parts: list[Text | Image | Document]
    failed: bool = False


@dataclass(slots=True)
class Thinking:
    """The model's thinking. ``signature`` is the mark by which its provider recognizes it."""

    text: str
    signature: str = ""


@dataclass(slots=True)
class Redacted:
    """The model's thinking, readable only for its provider."""

    data: str


@dataclass(slots=True)
class Refusal:
    """The model says why it does not answer."""

    text: str


Part = Text | Image | Document | Call | Result | Thinking | Redacted | Refusal


@dataclass(slots=True)
class Turn:
    """One turn: of ``system``, ``developer``, ``user``, ``assistant`` or ``tool``. ``at`` is its path."""

    role: str
    parts: list[Part]
    at: str = ""


@dataclass(slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


@dataclass(slots=True)
class Choice:
    """Which tools the model may or must call: ``auto``, ``none``, ``any``, or ``tool`` with its name."""

    kind: str
    name: str | None = None


@dataclass(slots=True)
class Format:
    """The form of the answer: ``schema``, or any JSON if that is None."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


@dataclass(slots=True)
class Request:
    """A request. ``options`` are the other fields, by the names that the client gave them."""

    model: str
    turns: list[Turn] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    choice: Choice | None = None
    parallel: bool | None = None
    stream: bool | None = None
    usage_in_stream: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: list[str] = field(default_factory=list)
    effort: str | None = None
    format: Format | None = None
    user: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


# Fields that some dialect defines, beyond those of ``Request``. Which of them a dialect has, its codec says; any
# other field is an engine's own.
DEFINED = frozenset(
    {
        "audio", "background", "client_metadata", "container", "context_management", "conversation",
        "frequency_penalty", "function_call", "functions", "include", "inference_geo", "logit_bias",
        "logprobs", "max_tool_calls", "mcp_servers", "metadata", "modalities", "moderation", "n", "prediction",
        "presence_penalty", "previous_response_id", "prompt", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "safety_identifier", "seed", "service_tier", "speed", "store",
        "top_logprobs", "truncation", "verbosity", "web_search_options",
    }
)  # fmt: skip
# They do not change the answer.
HINTS = frozenset(
    {
        "cache_control", "client_metadata", "inference_geo", "metadata", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "speed",
    }
)  # fmt: skip
# These values are the defaults.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "frequency_penalty": (0,),
    "include": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "store": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
}
# Dropping these would answer another question.
NEVER_DROPPED = frozenset({"conversation", "previous_response_id", "prompt"})

_INDEX = re.compile(r"\[\d+\]")


class Losses:
    """The fields that the engine's dialect lacks. Not ``lossy``: they are refused."""

    def __init__(self, *, lossy: bool = False) -> None:
        self.lossy = lossy
        self._dropped: dict[str, None] = {}

    def hint(self, at: str) -> None:
        """Drop a field that cannot change the answer."""
        self._dropped[_INDEX.sub("[]", at)] = None

    def loss(self, at: str, why: str = "the model's engine does not speak the dialect that has it") -> None:
        """Drop a field that can. BadRequestError unless that is wanted."""
        if not self.lossy:
            raise cannot(at, f"{why} (if the model is set to be `lossy`, it is dropped)")
        self.hint(at)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The paths of all that was dropped, each once, without positions in lists."""
        return tuple(self._dropped)


def cannot(at: str, why: str) -> BadRequestError:
    """Return the error for a field that cannot be translated."""
    return BadRequestError(f"{at} cannot be translated: {why}", code=CODE, param=at)


def keep_options(request: Request, own: frozenset[str], losses: Losses) -> dict[str, Any]:
    """Return the options that a dialect has, and those that no dialect knows."""
    kept: dict[str, Any] = {}
    for name, value in request.options.items():
        if name in own or name not in DEFINED:
            kept[name] = value
        elif name in NEVER_DROPPED:
            raise cannot(name, "what it refers to is not kept here")
        elif name in HINTS:
            losses.hint(name)
        elif value not in NEUTRAL.get(name, ()):
            losses.loss(name)
    return kept


# ---- reading what a client sent


def wrong(at: str, wanted: str) -> BadRequestError:
    """Return the error for a value of the wrong type."""
    return BadRequestError(f"{at} must be {wanted}", code="invalid_type", param=at)


def text(value: Any, at: str) -> str:
    """Return a text. BadRequestError if it is none."""
    if not isinstance(value, str):
        raise wrong(at, "a text")
    return value


def mapping(value: Any, at: str) -> dict[str, Any]:
    """Return an object without its nulls. BadRequestError if it is none."""
    if not isinstance(value, dict):
        raise wrong(at, "an object")
    return {key: item for key, item in value.items() if item is not None}


def whole(value: Any, at: str) -> dict[str, Any]:
    """Return an object as it is. BadRequestError if it is none."""
    if not isinstance(value, dict):
        raise wrong(at, "an object")
    return value


def items(value: Any, at: str) -> Iterator[tuple[Any, str]]:
    """Yield the elements of a list, each with its path. BadRequestError if it is none."""
    if not isinstance(value, list):
        raise wrong(at, "a list")
    for index, item in enumerate(value):
        yield item, f"{at}[{index}]"


def flag(value: Any, at: str) -> bool:
    """Return a truth value. BadRequestError if it is none."""
    if not isinstance(value, bool):
        raise wrong(at, "true or false")
    return value


def number(value: Any, at: str) -> Any:
    """Return a number as it is. BadRequestError if it is none, or without end: JSON has no such."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(at, "a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong(at, "a number")
    return value


def take(left: dict[str, Any], name: str, read: Callable[[Any, str], V], within: str = "") -> V | None:
    """Take a member out of an object, as ``read`` returns it; None if it is not there."""
    value = left.pop(name, None)
    return None if value is None else read(value, f"{within}{name}")


def nothing_else(left: dict[str, Any], at: str, losses: Losses) -> None:
    """Report the members of an object that were not taken out of it."""
    for name in left:
        (losses.hint if name in HINTS else losses.loss)(f"{at}.{name}")


# ---- small things that several dialects share


def join(parts: list[Part]) -> str:
    """Return what is said in parts that are texts."""
    return "\n".join(part.text for part in parts if isinstance(part, Text))


def data_url(media_type: str | None, data: str) -> str:
    """Return bytes in base64 as a URL."""
    return f"data:{media_type or 'application/octet-stream'};base64,{data}"


def parse_data_url(url: str) -> tuple[str, str] | None:
    """Return the media type and the base64 of a data URL; None where it is no such."""
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        return None
    return head[len("data:") : -len(";base64")].partition(";")[0], data


CHOICES = {"auto": "auto", "none": "none", "required": "any"}
"""The words of chat completions and responses for kinds of a ``Choice``."""
CHOSEN = {kind: word for word, kind in CHOICES.items()}


def read_choice(value: Any, losses: Losses, dialect: str, within: str = "") -> Choice | None:
    """Return the choice that a chat completion or a response states; ``within`` is the member with its name."""
    if isinstance(value, str):
        if value not in CHOICES:
            raise wrong("tool_choice", "none, auto, required or a function")
        return Choice(CHOICES[value])
    left = mapping(value, "tool_choice")
    if left.get("type") == "function":
        at = f"tool_choice.{within}" if within else "tool_choice"
        named = mapping(left.get(within), at) if within else left
        return Choice("tool", text(named.get("name"), f"{at}.name"))
    losses.loss("tool_choice", f"choices of the type {left.get('type')!r} are only known to {dialect}")
    return None


def read_format(left: dict[str, Any], losses: Losses, at: str, dialect: str, within: str = "") -> Format | None:
    """Return the form that a chat completion or a response wants; ``within`` is the member with the schema."""
    match left.get("type"):
        case "text":
            return None
        case "json_object":
            return Format()
        case "json_schema":
            at = f"{at}.{within}" if within else at
            inner = mapping(left.get(within), at) if within else left
            schema = whole(inner.get("schema", {}), f"{at}.schema")
            return Format(schema, inner.get("name"), inner.get("description"), inner.get("strict"))
    losses.loss(at, f"this format is only known to {dialect}")
    return None


def named_schema(wanted: Format) -> dict[str, Any]:
    """Return a form's name and schema, and what is said of them."""
    more = {"description": wanted.description, "strict": wanted.strict}
    named = {"name": wanted.name or "answer", "schema": wanted.schema}
    return named | {name: value for name, value in more.items() if value is not None}


def read_image(url: str, detail: str | None) -> Image:
    """Return the picture at a URL, or in it."""
    detail, inline = None if detail == "auto" else detail, parse_data_url(url)
    return Image(url=url, detail=detail) if inline is None else Image(*inline, detail=detail)


_SEAL = "llmux-chat."
TOOL_CALL = "tool_call"
"""The type of what an engine of chat says of a call, and wants back with it."""


def seal(detail: dict[str, Any]) -> str:
    """Return what an engine of chat wants back, as other dialects keep it: a signature, or hidden thinking."""
    return _SEAL + base64.urlsafe_b64encode(json.dumps(detail).encode()).decode()


def unseal(kept: str) -> dict[str, Any] | None:
    """Return what an engine of chat wants back; None if this is another provider's."""
    if not kept.startswith(_SEAL):
        return None
    try:
        detail = json.loads(base64.urlsafe_b64decode(kept[len(_SEAL) :]))
    except (ValueError, RecursionError):
        return None
    return detail if isinstance(detail, dict) else None


def told(result: Result) -> str:
    """Return the text of a result, for dialects that have no mark for one that failed."""
    said = join(list(result.parts))
    if not result.failed or said.lower().startswith("error"):
        return said
    return f"Error: {said}" if said else "Error"


LONGEST_NAME = 64
"""Characters of a tool's name, of the id of a call, and of a user: the least that a provider takes."""
_ODD = re.compile(r"[^A-Za-z0-9_-]")


def fitted(name: str) -> str:
    """Return a name, or the id of a call, as every engine takes it: letters, digits, ``_`` and ``-``."""
    if len(name) <= LONGEST_NAME and not _ODD.search(name):
        return name
    return f"{_ODD.sub('_', name)[: LONGEST_NAME - 9]}_{_digest(name)[:8]}"


def short_id(given: str) -> str:
    """Return the id of a call, shortened if it is too long; engines that made an odd one want it back."""
    return given if len(given) <= LONGEST_NAME else fitted(given)


_PERSONAL = re.compile(r"@|^\+?[\d\s().-]{7,}$")  # an address, or a telephone number


def short_user(user: str) -> str:
    """Return a user's name as providers take it; the digest of a long one."""
    return user if len(user) <= LONGEST_NAME else _digest(user)


def opaque_user(user: str) -> str:
    """Return a user's name for providers which also refuse to be told an address or a telephone number."""
    return _digest(user) if _PERSONAL.search(user) else short_user(user)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def object_schema(schema: dict[str, Any] | None) -> dict[str, Any]:
    """Return the schema of a tool's arguments with its type and its properties, which some providers demand."""
    whole: dict[str, Any] = schema if schema and schema.get("type") else {"type": "object", **(schema or {})}
    return {**whole, "properties": {}} if whole["type"] == "object" and "properties" not in whole else whole


class ToolNames:
    """Names of tools as every engine takes them: 64 letters, digits, ``_`` and ``-`` at most; and the way back."""

    def __init__(self) -> None:
        self._own: dict[str, str] = {}

    def fit(self, name: str) -> str:
        """Return the name for the engine."""
        short = fitted(name)
        if short != name:
            self._own[short] = name
        return short

    def back(self, name: str) -> str:
        """Return the client's name for it."""
        return self._own.get(name, name)


def arguments_object(call: Call, at: str, losses: Losses) -> dict[str, Any]:
    """Return a call's arguments as an object."""
    if not call.arguments.strip():
        return {}
    try:
        value = json.loads(call.arguments)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    losses.loss(at, "these arguments are not a JSON object")
    return {}
