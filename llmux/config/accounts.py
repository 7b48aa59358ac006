"""The settings of the ledger: which key used what, and what it costs."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from llmux.config.problems import Path, Problem, in_short
from llmux.config.setting_types import (
    Default,
    Duration,
    Name,
    PositiveCount,
    PositiveDuration,
    PositiveSize,
    Section,
    Word,
)

if TYPE_CHECKING:
    from llmux.config.access import ApiKeyConfig
    from llmux.config.schema import Config


def _path(value: Any) -> Any:
    if isinstance(value, bool):
        return value or None
    if not isinstance(value, str | None) or value == "":
        raise ValueError("must be a path, or true for a file beside the state file")
    return value


LedgerPath = Annotated[
    str | bool | None, BeforeValidator(_path, json_schema_input_type=str | bool | None), Word("path, true or null")
]
"""A path as it was given, or True for the file beside the state file."""


HOUSE = "(house)"
"""What is in the ledger in a key's place where none is to pay."""
_CURRENCY = re.compile(r"[a-z]{2,8}\Z")
_MOST = 1e9


def _amount(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be an amount, as 0.90")  # noqa: TRY004 - pydantic turns ValueError into a problem
    try:
        amount = float(value)
    except (ValueError, OverflowError):
        amount = math.nan
    if not 0 <= amount <= _MOST:
        raise ValueError(f"must be an amount from 0 on, as 0.90, not {str(value)[:40]!r}")
    return amount


def _currency(value: str) -> str:
    if not _CURRENCY.match(value.lower()):
        raise ValueError(f"{value[:40]!r} is not a currency; write two to eight letters, as usd")
    return value.lower()


Amount = Annotated[
    float,
    BeforeValidator(_amount),
    Word("amount"),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]}),
]
Currency = Annotated[str, AfterValidator(_currency), Word("currency")]


class TokenPriceConfig(Section):
    """What a million tokens cost."""

    input: Amount = Field(default=0.0, description="What a million tokens cost that the model reads.")
    cached: Amount | None = Field(
        default=None, description="The same of those that come from a cache. null: as `input`."
    )
    output: Amount = Field(default=0.0, description="What a million tokens cost that the model writes.")


class PricesConfig(Section):
    """What it costs."""

    currency: Currency = Field(default="usd", description="The currency of all prices and budgets.")
    gpu_hour: Amount = Field(default=0.0, description="What it costs to hold the GPU for an hour.")
    models: Mapping[Name, TokenPriceConfig] = Field(
        default_factory=dict,
        description="Models that cost by the token instead: {NAME: {input: …, output: …}}.",
    )


class ChargeConfig(Section):
    """Which keys pay."""

    switch: Literal["causers", "everyone", "house"] = Field(
        default="causers",
        description="Which keys pay for a switch: those whose requests waited for its model, all, or none.",
    )


class Rate(NamedTuple):
    """So many in so many seconds."""

    number: int
    seconds: float


_RATE = re.compile(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([kKM]?)\s*/\s*(s|m|h|d)\s*\Z")
_TIMES = {"": 1, "k": 1000, "K": 1000, "M": 1_000_000}
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def _rates(value: Any) -> Any:
    given = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(each if isinstance(each, Rate) else _rate(each) for each in given)


def _rate(value: Any) -> Rate:
    found = _RATE.match(value) if isinstance(value, str) else None
    count = 0 if found is None else round(float(found[1]) * _TIMES[found[2]])
    if found is None or count < 1:
        raise ValueError(f"{str(value)[:40]!r} is not a rate; write it as 60/m, 100k/d, or as a list of such")
    return Rate(count, _UNITS[found[3]])


Rates = Annotated[
    tuple[Rate, ...],
    BeforeValidator(_rates),
    Word("rate, or list of rates"),
    Default("[]"),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Word("list of globs")]


class LimitsConfig(Section):
    """How much a key may use; a key's own limit goes before its role's."""

    requests: Rates = Field(default=(), description="Requests, as 60/m, or [60/m, 1000/d].")
    tokens: Rates = Field(default=(), description="Tokens read and written, as 100k/d.")
    concurrent: PositiveCount | None = Field(
        default=None, description="Requests under way at once, waiting ones too."
    )


_BUDGET = frozenset({"per", "soft", "then"})


def _with_currency(schema: dict[str, Any]) -> None:
    """Make the schema accept ``usd: 5`` for an amount and its currency."""
    del schema["required"]
    schema["patternProperties"] = {
        "^[A-Za-z]{2,8}$": {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]}
    }


class BudgetConfig(Section):
    """What a key may spend: ``{usd: 5, per: month}``."""

    model_config = ConfigDict(json_schema_extra=_with_currency)

    amount: Amount = Field(description="What it may spend; written as `usd: 5`, with the currency of `prices`.")
    currency: Currency = Field(description="The currency.")
    per: Literal["day", "month"] = Field(default="month", description="How long it is for, in UTC.")
    soft: float = Field(
        default=1.0, gt=0, le=1, description="The part of it, as 0.8, from which on `then` applies."
    )
    then: Literal["awake_only", "refuse"] = Field(
        default="refuse",
        description="From `soft` on: only what is awake serves it, or nothing. When all is spent: nothing.",
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """Read ``usd: 5`` as an amount and its currency."""
        if not isinstance(data, Mapping) or "amount" in data:
            return data
        currencies = [name for name in data if name not in _BUDGET]
        if len(currencies) != 1:
            raise PydanticCustomError("budget", "must say one amount with its currency, as {usd: 5, per: month}")
        rest = {name: value for name, value in data.items() if name in _BUDGET}
        return {"amount": data[currencies[0]], "currency": str(currencies[0]), **rest}


class RoleConfig(Section):
    """What keys may that have this role."""

    models: Globs = Field(default=("*",), description="The models that they may use, by name.")
    remote: bool = Field(default=False, description="Whether their requests may leave this host.")
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig.of_defaults, description="How much each of them may use."
    )
    budget: Annotated[BudgetConfig | None, Word("budget or null")] = Field(
        default=None, description="What each of them may spend. null: no limit."
    )


class CapturesConfig(Section):
    """What some keys ask and are answered, in files; credentials are never in them."""

    keys: Annotated[tuple[Name, ...], Field(min_length=1), Word("list of names")] = Field(
        description="The keys, by their names, whose requests and answers are kept."
    )
    keep: PositiveDuration = Field(default=7 * 86_400.0, description="How long a file is kept.")
    max: PositiveSize = Field(
        default=2**30, description="What all files may take together; the oldest are deleted first."
    )
    folder: Annotated[str | None, Field(min_length=1)] = Field(
        default=None, description="Where they are. null: `captures` beside the state file."
    )
    remove: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Word("list of names"), Default("[]")] = (
        Field(default=(), description="Names of header fields and JSON fields whose values are not written.")
    )


_WINDOW = re.compile(r"\s*([01]?\d|2[0-3]):([0-5]\d)\s*-\s*([01]?\d|2[0-3]):([0-5]\d)\s*\Z")


def _window(value: Any) -> Any:
    found = _WINDOW.match(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f'{str(value)[:40]!r} is not a window of the day; write it in quotes, as "22:00-06:00"')
    return value


class RideAlongConfig(Section):
    """When requests of the class ride_along are served though their model is not awake."""

    window: Annotated[str, BeforeValidator(_window), Word("window")] | None = Field(
        default=None, description='When they may cause a switch, in local time, as "22:00-06:00". null: never.'
    )
    max_wait: Duration = Field(default=86_400.0, description="How long one waits until it may cause a switch.")

    @property
    def minutes(self) -> tuple[int, int] | None:
        """The minutes of the day at which the window begins and ends."""
        found = None if self.window is None else _WINDOW.match(self.window)
        if found is None:
            return None
        begin_hour, begin, end_hour, end = map(int, found.groups())
        return begin_hour * 60 + begin, end_hour * 60 + end


Count = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False), Word("number")]


class FairConfig(Section):
    """What is fair among keys: each has a counter of what it has had, and the lowest is served first."""

    by: Annotated[Literal["key"], Word("`key`")] = Field(default="key", description="Whose turn it is: a key's.")
    input: Count = Field(default=1.0, description="What a token that is read counts for.")
    output: Count = Field(default=2.0, description="What a token that is written counts for.")
    switch_second: Count = Field(
        default=500.0,
        description="What a second of a switch counts for; the keys whose requests waited for it share it.",
    )


def check_accounts(config: "Config") -> Iterator[Problem]:
    """Yield the problems of the accounts as a whole."""
    if config.ledger is True and "state" in config.model_fields_set and config.state is None:
        yield Problem(("ledger",), "true means a file beside the state file, but `state` is null; give a path")
    for index, entry in enumerate(config.api_keys):
        if entry.name == HOUSE:
            yield Problem(("api_keys", index, "name"), f"{HOUSE!r} stands for what no key pays; choose another")
    yield from _check_captures(config)
    yield from _check_grants(config)
    yield from _check_fair(config)


def _check_captures(config: "Config") -> Iterator[Problem]:
    captures = config.captures
    if captures is None:
        return
    names = {entry.name for entry in config.api_keys}
    known = ", ".join(sorted(name for name in names if name)) or "none has a name"
    for index, name in enumerate(captures.keys):
        if name not in names:
            yield Problem(("captures", "keys", index), f"{name!r} is not the name of one of `api_keys`: {known}")
    if captures.folder is None and "state" in config.model_fields_set and config.state is None:
        yield Problem(("captures",), "are kept beside the state file, but `state` is null; give a `folder`")


def _check_fair(config: "Config") -> Iterator[Problem]:
    for index, entry in enumerate(config.api_keys):
        if entry.weight != 1.0 and entry.name is None:
            yield Problem(("api_keys", index), "needs a `name`: its `weight` goes by that")
    fair = config.policy.fair
    if fair is None:
        return
    if not any(entry.name is not None for entry in config.api_keys):
        yield Problem(("policy", "fair"), "needs `api_keys` with names: whose turn it is goes by key")
    if not (fair.input or fair.output or fair.switch_second):
        yield Problem(("policy", "fair"), "counts nothing: `input`, `output` and `switch_second` are all 0")


def _check_grants(config: "Config") -> Iterator[Problem]:
    names = {*config.names, *config.variants, *config.virtual, *config.remote_models}
    for role, given in config.roles.items():
        yield from _check_globs(given.models, names, ("roles", role, "models"))
        yield from _check_budget(given.budget, config, ("roles", role, "budget"))
    for index, entry in enumerate(config.api_keys):
        at = ("api_keys", index)
        yield from check_role(entry, config.roles, at)
        yield from _check_globs(entry.models or (), names, (*at, "models"))
        yield from _check_budget(entry.budget, config, (*at, "budget"))


def _check_globs(globs: Iterable[str], names: Iterable[str], at: Path) -> Iterator[Problem]:
    for index, glob in enumerate(globs):
        if glob != "*" and not any(fnmatchcase(name, glob) for name in names):
            yield Problem(
                (*at, index), f"{glob!r} matches no model; there are {in_short(sorted(names)) or 'none'}"
            )


def _check_budget(budget: BudgetConfig | None, config: "Config", at: Path) -> Iterator[Problem]:
    yield from check_budget(budget, config.prices, at)
    if budget is not None and config.ledger is None:
        yield Problem(at, "needs `ledger`: what was spent is kept there")


def check_role(entry: "ApiKeyConfig", roles: Mapping[str, RoleConfig], at: Path) -> Iterator[Problem]:
    """Yield what is wrong with a key's role, or with its having one."""
    if entry.role is not None and entry.role not in roles:
        known = ", ".join(roles) or "none is set"
        yield Problem((*at, "role"), f"{entry.role!r} is not one of `roles`: {known}")
    if entry.managed and entry.name is None:
        yield Problem(at, "needs a `name`: what it uses is counted by that")


def check_budget(budget: BudgetConfig | None, prices: PricesConfig | None, at: Path) -> Iterator[Problem]:
    """Yield why a budget cannot be reckoned with these prices."""
    if budget is not None and prices is None:
        yield Problem(at, "needs `prices`: what a request costs is not known without them")
    elif budget is not None and prices is not None and prices.currency != budget.currency:
        yield Problem(at, f"is in {budget.currency}, but `prices.currency` is {prices.currency}")


def accounts_warnings(config: "Config") -> Iterator[str]:
    """Yield what is allowed there but probably a mistake."""
    for index, entry in enumerate(config.api_keys):
        if entry.gateway and entry.managed:
            yield (
                f"api_keys[{index}]: is a gateway's: its role, `models`, `limits` and `budget` do not hold for"
                " requests of keys that the gateway names; set them there, or for keys of these names here"
            )
    if config.usage == "exact" and config.ledger is None:
        yield "usage: exact is of no use without `ledger`, where the tokens are kept"
    if config.prices is None:
        return
    unpriced = [name for name in config.remote_models if name not in config.prices.models]
    if unpriced and config.prices.currency != "usd":
        yield f"prices: {', '.join(unpriced)} cost nothing: prices that are listed elsewhere are in usd"
    if config.ledger is None:
        yield "prices: nothing is written down without `ledger`"
    known = {*config.models, *config.variants, *config.remote_models}
    for name in config.prices.models:
        if name not in known:
            yield f"prices.models.{name}: no model has this name"
