"""Every setting as one table, for the documentation."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from llmux.config.durations import format_duration
from llmux.config.explain import sections
from llmux.config.problems import dotted
from llmux.config.schema import Config
from llmux.config.sizes import format_size
from llmux.config.words import Default, Word

_PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text", SecretStr: "secret"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One row. ``default`` is as a user would write it, ``required`` where there is none."""

    path: str
    type: str
    default: str
    description: str


def settings() -> Iterator[Setting]:
    """Yield every setting, section by section, in the order of the schema."""
    for place, section in sections(Config):
        for name, field in section.model_fields.items():
            word = _word(field)
            if word:
                yield Setting(dotted((*place, name)), word, _default(field, word), field.description or "")


def settings_table() -> str:
    """Return the settings as a Markdown table."""
    rows = ["| setting | type | default | what it does |", "|---|---|---|---|"]
    rows += [
        f"| `{row.path}` | {_cell(row.type)} | `{_cell(row.default)}` | {_cell(row.description)} |"
        for row in settings()
    ]
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _word(field: FieldInfo) -> str:
    """Name the type of a setting; empty for a section, whose settings have rows of their own."""
    for mark in field.metadata:
        if isinstance(mark, Word):
            return mark.text
    return _word_of(field.annotation)


def _word_of(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        marks = [mark.text for mark in arguments[1:] if isinstance(mark, Word)]
        return marks[0] if marks else _word_of(arguments[0])
    if origin in (Union, types.UnionType):
        words = [_word_of(argument) for argument in arguments if argument is not type(None)]
        return " or ".join([*words, "null"])
    if origin is Literal:
        return f"{', '.join(arguments[:-1])} or {arguments[-1]}"
    if origin is tuple:
        return f"list of {_word_of(arguments[0])}s"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        value = arguments[1]
        return "" if isinstance(value, type) and issubclass(value, BaseModel) else "mapping"
    return _PLAIN.get(annotation, "")


def _default(field: FieldInfo, word: str) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    text = "{}" if isinstance(value, Mapping) else str(value)
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, tuple):
        text = f"[{', '.join(value)}]"
    elif word.startswith("duration"):
        text = format_duration(value)
    elif word.startswith("size"):
        text = format_size(value)
    return next((mark.text for mark in field.metadata if isinstance(mark, Default)), text)
