"""Names beside the models' own: variants, which are a model with other parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from llmux.config.fields import Section, Word
from llmux.config.problems import Path, Problem

if TYPE_CHECKING:
    from llmux.config.schema import Config

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}(?:\.[A-Za-z_][A-Za-z0-9_-]{0,63}){0,7}\Z")


def _field(value: str) -> str:
    if not _FIELD.match(value):
        raise ValueError(f"{value!r} is not a field of a request; write it as temperature or reasoning.effort")
    if value == "model":
        raise ValueError("`model` chooses the variant; what the engine calls the model is `upstream_model`")
    return value


def _literal(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("is not a value that JSON has") from None
    return value


def _present(value: Any) -> Any:
    if value is None:
        raise ValueError("is null, which is the same as no value; remove it")
    return _literal(value)


def _limit(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a number, as 1024: what the field is at most")
    return value


FieldName = Annotated[str, AfterValidator(_field), Word("field")]
_ANYTHING = WithJsonSchema({})
Literal = Annotated[Any, AfterValidator(_literal), _ANYTHING]
Present = Annotated[Any, AfterValidator(_present), _ANYTHING]
Limit = Annotated[Any, BeforeValidator(_limit), WithJsonSchema({"type": "number"})]


class VariantConfig(Section):
    """A model with other parameters, under a name of its own: the same engine, without a switch.

    Its rules are for fields of the request's JSON body, dotted for fields of objects within.
    """

    set: Mapping[FieldName, Literal] = Field(
        default_factory=dict, description="Fields that get this value, whatever the client says."
    )
    default: Mapping[FieldName, Present] = Field(
        default_factory=dict, description="Fields that get this value where the client gives none, or null."
    )
    strip: Annotated[tuple[FieldName, ...], Word("list of fields")] = Field(
        default=(), description="Fields that are left out."
    )
    cap: Mapping[FieldName, Limit] = Field(
        default_factory=dict,
        description="Numbers that a field is at most. What the client leaves out stays out; see `default`.",
    )


def check_targets(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the names beside the models' own."""
    aliases = {alias: name for name, model in config.models.items() for alias in model.aliases}
    owners: dict[str, str] = {}
    for name, model in config.models.items():
        for variant, rules in model.variants.items():
            path: Path = ("models", name, "variants", variant)
            if variant in config.models:
                yield Problem(path, f"{variant!r} is the name of a model; choose another")
            elif variant in aliases:
                yield Problem(path, f"{variant!r} is an alias of {aliases[variant]}; choose another")
            elif variant in owners:
                yield Problem(path, f"{variant!r} is already a variant of {owners[variant]}; choose another")
            owners.setdefault(variant, name)
            yield from _check_rules(path, rules)


def _check_rules(path: Path, rules: VariantConfig) -> Iterator[Problem]:
    places: list[tuple[str, str, Path]] = [
        *((field, "set", (*path, "set", field)) for field in rules.set),
        *((field, "default", (*path, "default", field)) for field in rules.default),
        *((field, "cap", (*path, "cap", field)) for field in rules.cap),
        *((field, "strip", (*path, "strip", index)) for index, field in enumerate(rules.strip)),
    ]
    seen: dict[str, str] = {}
    for field, rule, at in places:
        for other, by in seen.items():
            if other == field and {rule, by} == {"default", "cap"}:
                default, limit = rules.default[field], rules.cap[field]
                if isinstance(default, bool) or not isinstance(default, int | float) or default > limit:
                    yield Problem(at, f"the default of {field} is not a number up to this; change one of them")
            elif other == field:
                yield Problem(at, f"{field} is under `{by}` already; keep one of them")
            elif field.startswith(f"{other}.") or other.startswith(f"{field}."):
                yield Problem(at, f"{field} and {other}, which is under `{by}`, overlap; keep one of them")
        seen.setdefault(field, rule)
