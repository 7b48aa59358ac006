"""Every setting: as a table for the documentation, and as a JSON schema (draft 2020-12) for editors and checks."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from llmux.config.load import SECS
from llmux.config.problems import dotted, sections
from llmux.config.schema import WITH_SECS, Config
from llmux.config.setting_types import Default, Word, format_duration, format_size

_PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text", SecretStr: "secret"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One row. ``default`` is as a user would write it, ``required`` if there is none."""

    path: str
    type: str
    default: str
    description: str


def settings(root: type[BaseModel] = Config) -> Iterator[Setting]:
    """Yield every setting, section by section, in the order of the schema."""
    for place, section in sections(root):
        for name, field in section.model_fields.items():
            word = _word(field)
            if word:
                yield Setting(dotted((*place, name)), word, _default(field, word), field.description or "")


def settings_table(root: type[BaseModel] = Config) -> str:
    """Return the settings as a Markdown table."""
    rows = ["| setting | type | default | what it does |", "|---|---|---|---|"]
    rows += [
        f"| `{row.path}` | {_cell(row.type)} | `{_cell(row.default)}` | {_cell(row.description)} |"
        for row in settings(root)
    ]
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _word(field: FieldInfo) -> str:
    """Return the name of a setting's type; empty for a section, whose settings have rows of their own."""
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


DRAFT = "https://json-schema.org/draft/2020-12/schema"
_VARIABLE = {"type": "string", "pattern": r"\$\{"}
_NOTES = frozenset({"default", "description", "title"})


def json_schema() -> dict[str, Any]:
    """Return the schema. It accepts every file that loads, except for checks across settings."""
    schema: dict[str, Any] = _with_variables(Config.model_json_schema(mode="validation"))
    sections = schema["$defs"]
    # Exactly one of the two, which pydantic cannot express.
    model = sections["ModelConfig"]
    model["oneOf"] = [
        {**_given("port")},
        {**_given("url")},
        {"not": {"anyOf": [_given("port"), _given("url")]}, **_given("cmd")},
    ]
    model["anyOf"] = [{"required": model.pop("required")}, _given("hooks"), _given("cmd")]
    policy = sections["PolicyConfig"]["properties"]
    for name in WITH_SECS:
        note = f"The same as `{name}`, as llmux 2.x spells it."
        policy[name + SECS] = policy[name] | {"description": note}
    schema["patternProperties"] = {"^x-": {"description": "Ignored; a place for YAML anchors."}}
    return {"$schema": DRAFT} | schema | {"title": "llmux"}


def gateway_schema() -> dict[str, Any]:
    """Return the schema of a gateway's configuration."""
    from llmux.config.gateway import GatewayConfig  # noqa: PLC0415 - one host has no use for it

    schema: dict[str, Any] = _with_variables(GatewayConfig.model_json_schema(mode="validation"))
    schema["patternProperties"] = {"^x-": {"description": "Ignored; a place for YAML anchors."}}
    return {"$schema": DRAFT} | schema | {"title": "llmux gateway"}


def _given(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def _with_variables(node: Any) -> Any:
    """Allow ``${VAR}`` wherever the schema requires something other than text, and drop generated titles."""
    if isinstance(node, list):
        return [_with_variables(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {
        key: {name: _with_variables(item) for name, item in value.items()}
        if key in ("properties", "$defs")
        else _with_variables(value)
        for key, value in node.items()
        if key != "title"
    }
    if "anyOf" in node:
        nested = [item.get("anyOf", [item]) for item in node["anyOf"]]
        flat = [choice for choices in nested for choice in choices]
        return node | {"anyOf": [choice for index, choice in enumerate(flat) if choice not in flat[:index]]}
    if node.get("type") in ("integer", "boolean", "number") or "enum" in node:
        notes = {key: value for key, value in node.items() if key in _NOTES}
        rest = {key: value for key, value in node.items() if key not in _NOTES}
        return {"anyOf": [rest, _VARIABLE]} | notes
    return node
