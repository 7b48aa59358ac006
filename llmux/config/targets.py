"""Names besides the models' own.

Variants are a model with other parameters. Virtual models are a choice between targets: models, aliases, variants,
remotes' models, and other virtual models.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from llmux.config.problems import Path, Problem
from llmux.config.setting_types import LONGEST_NAME, Name, Section, Word

if TYPE_CHECKING:
    from llmux.config.schema import Config


FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}(?:\.[A-Za-z_][A-Za-z0-9_-]{0,63}){0,7}\Z")


def _field(value: str) -> str:
    if not FIELD.match(value):
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


def _some(value: Any) -> Any:
    if not value:
        raise ValueError("needs at least one entry")
    return value


def _weight(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError("must be a number above 0: the target's share, as 90")
    return value


Api = Literal["chat", "completions", "messages", "responses", "embeddings", "count_tokens"]
Apis = Annotated[tuple[Api, ...], AfterValidator(_some), Word("list of chat, completions, messages, responses, …")]
_DIALECTS = frozenset({"chat", "messages", "responses"})


def lacks_a_dialect(apis: tuple[str, ...] | None) -> bool:
    """Return whether an engine with these (None: all) speaks some dialects of conversations, but not all."""
    return apis is not None and bool(_DIALECTS.intersection(apis)) and not _DIALECTS.issubset(apis)


class Spoken(NamedTuple):
    """The `apis` of an engine, and how requests are translated into these."""

    apis: frozenset[str] | None = None  # None: everything
    lossy: bool = False
    deprecates_max_tokens: bool = False  # it takes `max_completion_tokens` in its place


FieldName = Annotated[str, AfterValidator(_field), Word("field")]
_ANYTHING = WithJsonSchema({})
Value = Annotated[Any, AfterValidator(_literal), _ANYTHING]
Present = Annotated[Any, AfterValidator(_present), _ANYTHING]
Weight = Annotated[Any, BeforeValidator(_weight), WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]
Limit = Annotated[Any, BeforeValidator(_limit), WithJsonSchema({"type": "number"})]


class VariantConfig(Section):
    """A model with other parameters, under a name of its own: the same engine, without a switch.

    Its rules are for fields of the request's JSON body, dotted for fields of objects within.
    """

    set: Mapping[FieldName, Value] = Field(
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
    unlisted: bool = Field(default=False, description="true: `/v1/models` does not list it.")


Targets = Annotated[tuple[Name, ...], AfterValidator(_some)]


class VirtualConfig(Section):
    """A name that stands for a choice between targets. One of `awake`, `first`, `ladder` and `split`."""

    awake: Targets | None = Field(
        default=None, description="The first of these that is awake or being woken; else the first of all."
    )
    first: Targets | None = Field(
        default=None, description="The first of these that can be had: the next one when it cannot."
    )
    ladder: Targets | None = Field(
        default=None,
        description="From the best to the cheapest: the best that is awake, at or above the `floor`; else the one"
        " with the shortest wait.",
    )
    floor: Mapping[Name, Name] = Field(
        default_factory=dict,
        description="The lowest rung of the `ladder` for each role of a key; `*`: for all others.",
    )
    split: Annotated[Mapping[Name, Weight] | None, Field(min_length=1)] = Field(
        default=None, description="Each of these for its share of the requests, as {qwen: 90, llama: 10}."
    )
    sticky: Literal["key", "conversation"] = Field(
        default="conversation", description="What stays with its share of a `split`."
    )

    @property
    def kind(self) -> str | None:
        """The kind of choice; None for none, or more than one."""
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        return given[0] if len(given) == 1 else None

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets to choose from, in the order of the configuration."""
        return tuple(getattr(self, self.kind)) if self.kind else ()


_NAMEABLE = "name a model, an alias, a variant or another virtual model, or a remote's model"
DEEPEST = 8  # virtual models within one another
KINDS = ("awake", "first", "ladder", "split")


def check_targets(config: "Config") -> Iterator[Problem]:
    """Yield the problems of the names besides the models' own."""
    aliases = {alias: name for name, model in config.models.items() for alias in model.aliases}
    taken = dict.fromkeys(config.models, "the name of a model")
    taken |= {alias: f"an alias of {name}" for alias, name in aliases.items() if alias not in taken}
    for name, model in config.models.items():
        for variant, rules in model.variants.items():
            path: Path = ("models", name, "variants", variant)
            if variant in taken:
                yield Problem(path, f"{variant!r} is already {taken[variant]}; choose another")
            taken.setdefault(variant, f"a variant of {name}")
            yield from _check_rules(path, rules)
    yield from _check_remote_names(config, taken)
    for name, virtual in config.virtual.items():
        if name in taken:
            yield Problem(("virtual", name), f"{name!r} is already {taken[name]}; choose another")
        yield from _check_virtual(name, virtual, {*taken, *config.virtual})
        for role in virtual.floor:
            if config.roles and role not in {*config.roles, "*"}:
                known = ", ".join(config.roles)
                yield Problem(("virtual", name, "floor", role), f"{role!r} is not one of `roles`: {known}")
    yield from _check_cycles(config)


def _check_remote_names(config: "Config", taken: dict[str, str]) -> Iterator[Problem]:
    for name, (remote, _) in config.remote_models.items():
        path: Path = ("remotes", remote, "models", name.removeprefix(f"{remote}/"))
        if len(name) > LONGEST_NAME:
            yield Problem(path, f"is longer than {LONGEST_NAME} characters with {remote}/ in front; shorten it")
        if name in taken:
            yield Problem(path, f"{name!r} is already {taken[name]}; choose another")
        taken.setdefault(name, f"a model of the remote {remote}")


def _check_virtual(name: str, virtual: VirtualConfig, known: set[str]) -> Iterator[Problem]:
    path: Path = ("virtual", name)
    kind = virtual.kind
    if kind is None:
        yield Problem(path, "needs one of `awake`, `first`, `ladder` and `split`, and only one")
        return
    for index, target in enumerate(virtual.targets):
        at = (*path, kind, target if kind == "split" else index)
        if target not in known:
            near = difflib.get_close_matches(target, known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else _NAMEABLE
            yield Problem(at, f"{target!r} is not configured; {advice}")
        elif target in virtual.targets[:index]:
            yield Problem(at, f"{target!r} is there twice; keep one of them")
    if virtual.floor and kind != "ladder":
        yield Problem((*path, "floor"), "belongs to a `ladder`; remove it")
    for role, rung in virtual.floor.items():
        if kind == "ladder" and rung not in virtual.targets:
            rungs = ", ".join(virtual.targets)
            yield Problem((*path, "floor", role), f"{rung!r} is not on the ladder; choose one of {rungs}")
    if "sticky" in virtual.model_fields_set and kind != "split":
        yield Problem((*path, "sticky"), "belongs to a `split`; remove it")


def _check_cycles(config: "Config") -> Iterator[Problem]:
    """Yield virtual models that lead to themselves, each cycle once, and the first that is nested too deeply."""
    longest: dict[str, tuple[str, ...]] = {}  # of each that is done: the longest way down from it
    for start in config.virtual:
        way: dict[str, None] = {}
        pending: list[tuple[str, bool]] = [(start, False)]
        while pending:
            name, left = pending.pop()
            if left:
                del way[name]
                below = (longest[target] for target in config.virtual[name].targets if target in longest)
                longest[name] = down = (name, *max(below, key=len, default=()))
                if len(down) > DEEPEST:
                    yield Problem(
                        ("virtual", name), f"is more than {DEEPEST} virtual models deep: {' → '.join(down)}"
                    )
                    return
            elif name in way:
                names = list(way)
                circle = [*names[names.index(name) :], name]
                yield Problem(("virtual", name), f"chooses from itself: {' → '.join(circle)}; take one out")
            elif name not in longest and name in config.virtual:
                way[name] = None
                pending.append((name, True))
                pending += [(target, False) for target in reversed(config.virtual[name].targets)]


def leaves(config: "Config", name: str) -> tuple[str, ...]:
    """Return the models, including remote ones, to which a name may lead, each once, in order."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    pending = [name]
    while pending:
        one = pending.pop(0)
        virtual = config.virtual.get(one)
        if virtual is not None:
            if one not in seen:  # a cycle is an error, which is reported elsewhere
                pending = [*virtual.targets, *pending]
            seen.add(one)
        else:
            found[config.names.get(one) or config.variants.get(one) or one] = None
    return tuple(found)


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
