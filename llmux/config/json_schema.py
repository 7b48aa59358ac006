"""The configuration as a JSON schema (draft 2020-12), for editors and for checks elsewhere."""

from __future__ import annotations

from typing import Any

from llmux.config.policy import SECS, WITH_SECS
from llmux.config.schema import Config

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_VARIABLE = {"type": "string", "pattern": r"\$\{"}
_NOTES = frozenset({"default", "description", "title"})


def json_schema() -> dict[str, Any]:
    """Return the schema. It accepts every file that loads, checks across settings aside."""
    schema: dict[str, Any] = _with_variables(Config.model_json_schema(mode="validation"))
    sections = schema["$defs"]
    # Exactly one of the two; pydantic cannot say so itself.
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


def _given(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def _with_variables(node: Any) -> Any:
    """Let ``${VAR}`` stand wherever the schema wants something that is no text, and drop made-up titles."""
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
