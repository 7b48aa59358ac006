"""How deeply models may sleep: their levels, and the host memory that each takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from llmux.config.problems import Problem
from llmux.config.sizes import format_size, parse_size
from llmux.config.words import Word

if TYPE_CHECKING:
    from llmux.config.schema import Config

_NAME = re.compile(r"[\w.-]+\Z")
_HOW = "write them lightest first, as [ram: 18GiB, disk]"
_SIZE = {"type": ["integer", "string"]}
_BY_NAME = {"type": "object", "minProperties": 1, "additionalProperties": _SIZE}


def _levels(value: Any) -> Any:
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list | tuple):
        pairs = [pair for item in value for pair in _item(item)]
    else:
        raise ValueError(f"must be a list of levels; {_HOW}")  # noqa: TRY004 (pydantic turns ValueError into a problem)
    levels: dict[str, int] = {}
    for given, size in pairs:
        name = _name(given)
        if name in levels:
            raise ValueError(f"{name!r} is there twice; keep one of them")
        try:
            levels[name] = parse_size(size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for (before, more), (name, need) in pairwise(levels.items()):
        if need > more:
            raise ValueError(
                f"{name!r} takes {format_size(need)} of host memory, more than {before!r} before it"
                f" ({format_size(more)}); the lightest sleep, which takes the most, comes first"
            )
    return levels


def _item(item: Any) -> list[tuple[Any, Any]]:
    if not isinstance(item, Mapping):
        return [(item, 0)]
    if len(item) != 1:
        raise ValueError(f"an item holds {len(item)} levels; {_HOW}")
    return list(item.items())


def _name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no name of a level; {_HOW}")  # noqa: TRY004
    name = str(value)
    if not _NAME.match(name):  # `ram 18GiB` and `ram:18GiB` are slips
        raise ValueError(f"{value!r} is no name of a level (letters, digits, . _ -); {_HOW}")
    return name


Levels = Annotated[
    Mapping[str, int],
    BeforeValidator(_levels),
    WithJsonSchema(
        {
            "anyOf": [
                _BY_NAME,
                {"type": "array", "items": {"anyOf": [_SIZE, {**_BY_NAME, "maxProperties": 1}]}},
            ]
        }
    ),
    Word("list of levels"),
]
"""Bytes of host memory by level, the lightest sleep first; none takes more than the one before."""


def check_levels(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with levels and the memory that there is for them."""
    if config.host_memory is None:
        return
    for name, model in config.models.items():
        needs, at = list(model.levels.values()), ("models", name, "levels")
        if len(needs) > 1 and not any(needs):
            yield Problem(at, "take no host memory; with `host_memory`, say how much, as [ram: 18GiB, disk]")
        elif needs and needs[-1] > config.host_memory:
            deepest, excess = list(model.levels)[-1], format_size(needs[-1] - config.host_memory)
            yield Problem(
                at,
                f"{deepest!r}, the deepest, takes {format_size(needs[-1])} of a host memory of"
                f" {format_size(config.host_memory)}: {excess} too much, so it could never sleep",
            )


def levels_warnings(config: Config) -> Iterator[str]:
    """Yield what is allowed but probably not meant."""
    using = {name: model.levels for name, model in config.models.items() if model.levels}
    if config.host_memory is None:
        for name, levels in using.items():
            if len(levels) > 1:
                yield (
                    f"models.{name}.levels: only the first is used without the top-level `host_memory`"
                    " (and the last to clean up)"
                )
        return
    if not using:
        yield "host_memory: has no effect, as no model has `levels`"
    deepest = sum(list(levels.values())[-1] for levels in using.values())
    if deepest > config.host_memory:
        yield (
            f"host_memory: {format_size(config.host_memory)} is not enough when all sleep:"
            f" even at their deepest levels they take {format_size(deepest)}"
        )
