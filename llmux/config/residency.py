"""Which models may be awake together, and how deeply others may sleep.

That depends on the memory of one GPU or several, or on groups if memory is not stated; and on sleep levels with
the host memory that each uses.
"""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from llmux.config.problems import Problem
from llmux.config.setting_types import Name, PositiveSize, Section, Word, format_size, parse_size

if TYPE_CHECKING:
    from llmux.config.schema import Config
    from llmux.core.spec import Memory

_LEVEL_NAME = re.compile(r"[\w.-]+\Z")
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
        name = _level_name(given)
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


def _level_name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a name of a level; {_HOW}")  # noqa: TRY004
    name = str(value)
    if not _LEVEL_NAME.match(name):  # `ram 18GiB` and `ram:18GiB` are typing errors
        raise ValueError(f"{value!r} is not a name of a level (letters, digits, . _ -); {_HOW}")
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


def check_levels(config: "Config") -> Iterator[Problem]:
    """Yield the problems of levels and their memory."""
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


def levels_warnings(config: "Config") -> Iterator[str]:
    """Yield what is allowed but probably a mistake."""
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


def _gpu(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise ValueError("is not a name of a GPU; write its number, or any name of `gpus`")
    return str(value).strip()


def _gpu_list(value: Any) -> Any:
    if isinstance(value, int | str) and not isinstance(value, bool):
        raise ValueError(f"must be a list; write [{value}]")  # noqa: TRY004
    return value


def _memory(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return parse_size(value)
    if not value:
        raise ValueError("names no GPU; write a size, or one for each GPU, as {0: 10GiB, 1: 6GiB}")
    sizes = {}
    for gpu, size in value.items():
        try:
            sizes[_gpu(gpu)] = parse_size(size)
        except ValueError as error:
            raise ValueError(f"{gpu}: {error}") from None
    return sizes


Gpu = Annotated[
    str, BeforeValidator(_gpu), WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]}), Word("GPU")
]
Gpus = Annotated[tuple[Gpu, ...], BeforeValidator(_gpu_list)]
GpuSizes = Annotated[Mapping[Gpu, PositiveSize], Word("size by GPU")]
ModelMemory = Annotated[
    int | Mapping[str, int],
    BeforeValidator(_memory),
    WithJsonSchema({"anyOf": [_SIZE, {"type": "object", "minProperties": 1, "additionalProperties": _SIZE}]}),
    Word("size, or size by GPU"),
]
"""Bytes, >= 0: of the one GPU, spread evenly over several, or of each by its name."""


class GroupConfig(Section):
    """Models that may, or may not, be awake together."""

    models: tuple[Name, ...] = Field(min_length=1, description="The models in the group.")
    together: bool = Field(
        default=False, description="true: they may all be awake at once. false: they take turns."
    )
    exclusive: bool = Field(
        default=True, description="true: no model of another group is awake beside one of these."
    )
    persistent: bool = Field(
        default=False, description="true: these never make room for another group, exclusive or not."
    )


# ---- the resulting memory and groups


def capacity_of(config: "Config") -> "Memory | None":
    """Return the memory of each GPU, or None if it is not stated."""
    return config.capacity if config.gpus is None else dict(config.gpus)


def memory_of(config: "Config", name: str) -> "Memory | None":
    """Return what a model uses of each GPU. It is spread evenly; the first GPU has the remainder."""
    memory, gpus = config.models[name].memory, _gpus_of(config, name)
    if memory is None or config.gpus is None or isinstance(memory, Mapping):
        return memory
    share, rest = divmod(memory, len(gpus))
    return {gpu: share + (rest if index == 0 else 0) for index, gpu in enumerate(gpus)}


def _gpus_of(config: "Config", name: str) -> tuple[str, ...]:
    """Return the GPUs that a model names; with only one GPU it need not name any."""
    model = config.models[name]
    if model.gpus:
        return model.gpus
    return tuple(config.gpus) if config.gpus is not None and len(config.gpus) == 1 else ()


def companions_of(config: "Config", name: str) -> frozenset[str] | None:
    """Return the models that may be awake together with a model, by the groups; None without groups.

    A model in no group is a group of its own.
    """
    if not config.groups:
        return None
    return frozenset(other for other in config.models if other != name and _together(config, name, other))


def _together(config: "Config", one: str, other: str) -> bool:
    return any(
        a.together if a is b else a.persistent or b.persistent or not (a.exclusive or b.exclusive)
        for a in _groups_of(config, one)
        for b in _groups_of(config, other)
    )


def _groups_of(config: "Config", name: str) -> list[GroupConfig]:
    mine = [group for group in config.groups.values() if name in group.models]
    return mine or [GroupConfig(models=(name,))]


# ---- problems


def check_residency(config: "Config") -> Iterator[Problem]:
    """Yield the problems of memory and groups."""
    yield from _groups(config)
    yield from _staying(config)
    if config.capacity is not None and config.gpus is not None:
        yield Problem(("gpus",), "is there beside `capacity`; keep `gpus` for several GPUs, `capacity` for one")
        return
    if config.capacity is None and config.gpus is None:
        for name, model in config.models.items():
            if model.gpus or isinstance(model.memory, Mapping):
                key = "gpus" if model.gpus else "memory"
                yield Problem(
                    ("models", name, key), "names a GPU; say at the top level what each has, as `gpus: {0: 24GiB}`"
                )
        return
    missing = [name for name, model in config.models.items() if model.memory is None]
    if missing:
        key = "capacity" if config.gpus is None else "gpus"
        yield Problem(
            (key,),
            f"needs the `memory` of every model; missing for {', '.join(missing)}; give it, or remove `{key}`",
        )
    for name in config.models:
        yield from _model(config, name)


def _model(config: "Config", name: str) -> Iterator[Problem]:
    model, at = config.models[name], ("models", name)
    if model.memory is None:
        return
    if config.gpus is None:
        if model.gpus or isinstance(model.memory, Mapping):
            key = "gpus" if model.gpus else "memory"
            yield Problem((*at, key), "names a GPU; give `gpus` at the top level in place of `capacity`")
        elif config.capacity is not None and model.memory > config.capacity:
            excess = format_size(model.memory - config.capacity)
            yield Problem(
                (*at, "memory"),
                f"{format_size(model.memory)} does not fit into the capacity of {format_size(config.capacity)}:"
                f" {excess} too much, so it could never wake",
            )
        return
    yield from _placed(config, name)


def _placed(config: "Config", name: str) -> Iterator[Problem]:
    model, at = config.models[name], ("models", name)
    known = config.gpus or {}
    for index, gpu in enumerate(model.gpus):
        if gpu not in known:
            yield Problem((*at, "gpus", index), f"{gpu!r} is not one of `gpus`: {', '.join(known)}")
        elif gpu in model.gpus[:index]:
            yield Problem((*at, "gpus", index), f"{gpu!r} is there twice; keep one of them")
    if isinstance(model.memory, Mapping):
        stray = [gpu for gpu in model.memory if gpu not in (model.gpus or known)]
        for gpu in stray:
            other = "the model's own `gpus`" if model.gpus else "`gpus`"
            yield Problem((*at, "memory"), f"names GPU {gpu!r}, which is not one of {other}")
        if stray:
            return
    elif not _gpus_of(config, name):
        yield Problem((*at, "memory"), f"is on which GPU? Give `gpus`, a list out of {', '.join(known)}")
        return
    memory = memory_of(config, name)
    assert isinstance(memory, Mapping)
    for gpu, need in memory.items():
        if gpu in known and need > known[gpu]:
            excess = format_size(need - known[gpu])
            yield Problem(
                (*at, "memory"),
                f"{format_size(need)} does not fit into the {format_size(known[gpu])} of GPU {gpu}:"
                f" {excess} too much, so it could never wake",
            )


def _staying(config: "Config") -> Iterator[Problem]:
    if config.default_model is not None and config.default_model not in config.models:
        yield Problem(("default_model",), _no_model(config, config.default_model))
    for name, model in config.models.items():
        if model.keep_awake and model.idle_sleep is not None:
            yield Problem(("models", name, "idle_sleep"), "is there beside `keep_awake: true`; keep one of them")


def staying_warnings(config: "Config") -> Iterator[str]:
    """Yield which models are to be awake without a request, and cannot be beside others which are, too."""
    for setting in ("preload", "keep_awake"):
        names = [name for name, model in config.models.items() if getattr(model, setting)]
        if len(names) > 1:
            yield from _too_many(config, setting, names)


def _too_many(config: "Config", setting: str, names: list[str]) -> Iterator[str]:
    from llmux.core.residency import fits  # noqa: PLC0415 - few configurations need the rules of the core
    from llmux.core.spec import ModelSpec  # noqa: PLC0415

    there: list[ModelSpec] = []
    for name in names:
        model = config.models[name]
        spec = ModelSpec(
            name,
            memory=memory_of(config, name),
            companions=companions_of(config, name),
            shared_address=str(model.address.endpoint) if model.shared_address else None,
        )
        if fits([*there, spec], capacity_of(config)):
            there.append(spec)
        else:
            others = " and ".join(each.name for each in there)
            yield f"models.{name}.{setting}: cannot be awake beside {others}, and so waits for a request"


def _groups(config: "Config") -> Iterator[Problem]:
    for label, group in config.groups.items():
        for index, name in enumerate(group.models):
            at = ("groups", label, "models", index)
            if name in group.models[:index]:
                yield Problem(at, f"{name!r} is there twice; keep one of them")
            elif name not in config.models:
                yield Problem(at, _no_model(config, name))


def _no_model(config: "Config", name: str) -> str:
    owner = config.names.get(name)
    near = get_close_matches(name, list(config.models), n=1)
    hint = f"it is an alias of {owner!r}: name that" if owner else "name one of `models`"
    return f"{name!r} is not a model; " + (f"did you mean {near[0]!r}?" if near else hint)
