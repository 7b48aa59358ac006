"""The errors in a configuration, all of them at once, in the user's terms."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from llmux.errors import ConfigError

Path = tuple[str | int, ...]
"""A place in the file: mapping keys and list indexes from the top."""

Lines = Mapping[Path, int]
"""Where each place begins, counted from 1."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One error, and what to do about it. ``line`` is None if only the path is known."""

    path: Path
    message: str
    line: int | None = None


class ConfigErrors(ConfigError):  # noqa: N818 (it is several)
    """One or more problems; ``problems`` holds a ConfigError for each, in the order of the file."""

    def __init__(self, problems: Iterable[ConfigError]) -> None:
        self.problems = tuple(problems)
        self.rest: object = None  # the configuration without the invalid settings, if that can be validated
        first = self.problems[0]
        super().__init__(first.message, path=first.path, file=first.file, line=first.line)
        self.args = ("\n".join(str(problem) for problem in self.problems),)


def dotted(path: Path) -> str:
    """Format a path for people: ``models.llama.aliases[0]``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if part.isprintable() else repr(part)
            text += f".{shown}" if text else shown
    return text


def line_of(path: Path, lines: Lines) -> int | None:
    """Return the line of ``path``, or of its nearest parent that is in the file."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return lines.get(())


def with_lines(texts: Iterable[str], lines: Lines) -> Iterator[tuple[str, int | None]]:
    """Yield messages, each with the line of the place that it begins with (``policy.use: no such policy``)."""
    known = {dotted(path): line for path, line in lines.items() if path}
    for text in texts:
        where = text.partition(": ")[0]
        ends = [len(where), *(found.start() for found in re.finditer(r"[.\[]", where))]
        yield text, next((known[where[:end]] for end in sorted(ends, reverse=True) if where[:end] in known), None)


def raise_all(problems: Iterable[Problem], *, file: str, lines: Lines) -> None:
    """Raise ConfigErrors for ``problems``, sorted by line; do nothing without any."""
    located = [
        ConfigError(
            problem.message,
            path=dotted(problem.path),
            file=file,
            line=problem.line if problem.line is not None else line_of(problem.path, lines),
        )
        for problem in problems
    ]
    if located:
        raise ConfigErrors(sorted(located, key=lambda error: error.line or 0))


WHOLE = "problems"
_SECRETS = frozenset({"admin_key", "api_keys", "key"})
_HOOKS = ("wake", "sleep", "alive")
_LONGEST_VALUE = 60  # characters of a wrong value that are repeated


def raise_problems(problems: Iterable[Problem]) -> None:
    """Pass problems found in a validator to pydantic; `explain` extracts them again."""
    found = list(problems)
    if found:
        text = "\n".join(f"{dotted(problem.path)}: {problem.message}" for problem in found)
        raise PydanticCustomError(WHOLE, "{text}", {"text": text, WHOLE: found})


def checked_as_whole(error: ValidationError) -> bool:
    """Return whether each setting was valid by itself, so that the errors are between settings."""
    return any(details["type"] == WHOLE for details in error.errors(include_url=False, include_input=False))


def explain(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """Turn the errors of validating ``root`` into problems."""
    problems: list[Problem] = []
    for details in error.errors(include_url=False):
        if details["type"] == WHOLE:
            problems += details["ctx"][WHOLE]
        else:
            path = tuple(part for part in details["loc"] if part != "[key]")
            problems.append(Problem(path, _message(details, path, root)))
    return problems


def _message(details: ErrorDetails, path: Path, root: type[BaseModel]) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path, root)
    if kind == "missing":
        more = "; every model needs the hooks wake, sleep and alive (`hooks: NAME` gives all of them)"
        return f"is missing{more if path[-1] in _HOOKS else ''}"
    text = _TEXTS.get(kind)
    if text is None:
        return details["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        text = text.format(expected=context["expected"].replace("'", ""))
    elif context:
        text = text.format(**context)
    return text if _SECRETS.intersection(path) else f"{text}, not {_shown(details['input'])}"


_TEXTS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text (in quotes where YAML would read something else)",
    "dict_type": "must be a mapping of names to values",
    "mapping_type": "must be a mapping of names to values",
    "model_type": "must be a mapping of settings",
    "tuple_type": "must be a list",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "needs at least one entry",
}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


# Other programs' names of the setting for the policy's name.
_USE = (("policy", "policy"), ("policy", "name"))
# The terms of llama-swap, Ollama, llama-server and vLLM, by the setting with the same effect.
_FOREIGN: Mapping[str, str] = {
    **dict.fromkeys(
        ("ttl", "globalttl", "idle_timeout", "idle_ttl", "keep_alive", "unload_after", "unload_timeout"),
        "idle_sleep",
    ),
    "cmdstop": "stop",
    "cmd_stop": "stop",
    "stop_cmd": "stop",
    "command": "cmd",
    "proxy": "url",
    "endpoint": "url",
    "base_url": "url",
    "checkendpoint": "alive",
    "health_check": "alive",
    "usemodelname": "upstream_model",
    "served_model_name": "upstream_model",
    **dict.fromkeys(
        ("concurrencylimit", "concurrency", "max_concurrent", "num_parallel", "max_num_seqs"), "max_in_flight"
    ),
    "max_queue": "max_queued",
    "healthchecktimeout": "timeouts.wake",
    "load_timeout": "timeouts.wake",
    **dict.fromkeys(("vram", "gpu_memory", "gpu_mem"), "memory"),
    "environment": "env",
    "alias": "aliases",
    "loglevel": "log_level",
    "listen": "host",
    "apikeys": "api_keys",
    "includealiasesinlist": "list_aliases",
    **dict.fromkeys(("ctx", "ctx_size", "context_length", "max_model_len"), "context"),
    "persistent": "keep_awake",
}
_FEW = 8  # settings that are listed
LISTED = 100  # of the names in a configuration, which may have thousands


def _unknown(path: Path, root: type[BaseModel]) -> str:
    """Suggest the nearest name here, else the section to which the name belongs."""
    name = str(path[-1])
    section = section_at(path[:-1], root)
    here = list(section.model_fields) if section else []
    foreign = _FOREIGN.get(name.lower().replace("-", "_"))
    if foreign is not None and foreign.partition(".")[0] in here:
        return f"unknown setting; here it is `{foreign}`"
    near = ["use"] if path in _USE else difflib.get_close_matches(name, here, n=1)
    elsewhere = _elsewhere(name, root)
    # A setting of another section is more likely misplaced than a typo, unless one letter differs.
    if near and (elsewhere is None or path in _USE or difflib.get_close_matches(name, here, cutoff=_A_LETTER)):
        return f"unknown setting; did you mean `{near[0]}`?"
    if elsewhere is not None:
        return f"unknown setting here; it belongs {elsewhere}"
    if foreign is not None and (elsewhere := _elsewhere(foreign, root)):
        return f"unknown setting here; `{foreign}`, which does that, belongs {elsewhere}"
    if len(here) <= _FEW:
        return f"unknown setting; known here: {', '.join(here)}"
    return "unknown setting; `llmux schema` prints all that there are"


_A_LETTER = 0.85  # the similarity of `key` and `keys`


def _elsewhere(name: str, root: type[BaseModel]) -> str | None:
    for place, section in sections(root):
        if name in section.model_fields:
            return f"under `{dotted(place)}`" if place else "at the top level"
    return None


def in_short(names: Iterable[str]) -> str:
    """Format names for an error: the first ``LISTED``, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return ", ".join(known[:LISTED]) + more


def sections(root: type[BaseModel]) -> Iterable[tuple[Path, type[BaseModel]]]:
    """Yield every section with its path, with ``NAME`` for a model's name; without those in lists."""
    return ((place, section) for place, section in _sections(root) if 0 not in place)


def _sections(root: type[BaseModel], at: Path = ()) -> Iterable[tuple[Path, type[BaseModel]]]:
    yield at, root
    for name, info in root.model_fields.items():
        model, within = _section_of(info.annotation)
        if model is not None:
            yield from _sections(model, (*at, name, *within))


def section_at(path: Path, root: type[BaseModel]) -> type[BaseModel] | None:
    """Return the section at a place in the file, or None."""
    path = tuple(0 if isinstance(part, int) else part for part in path)
    for place, section in _sections(root):
        if len(place) == len(path) and all(want in ("NAME", part) for want, part in zip(place, path, strict=True)):
            return section
    return None


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, Path]:
    """Return the section in a field's type, and the path to it: ``NAME`` for any name, 0 for any index."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ()
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return _section_of(arguments[1])[0], ("NAME",)
    if origin is tuple:
        return _section_of(arguments[0])[0], (0,)
    if origin is Annotated:
        return _section_of(arguments[0])
    if origin in (Union, types.UnionType):
        for argument in arguments:
            found = _section_of(argument)
            if found[0] is not None:
                return found
    return None, ()
