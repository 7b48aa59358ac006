"""Where it is written down which key used what, and what that costs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from llmux.config.fields import Name, Section, Word
from llmux.config.problems import Problem

if TYPE_CHECKING:
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
        raise ValueError(f"{value[:40]!r} is no currency; write two to eight letters, as usd")
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


def check_accounts(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the accounts as a whole."""
    if config.ledger is True and "state" in config.model_fields_set and config.state is None:
        yield Problem(("ledger",), "true means a file beside the state file, but `state` is null; give a path")
    for index, entry in enumerate(config.api_keys):
        if entry.name == HOUSE:
            yield Problem(("api_keys", index, "name"), f"{HOUSE!r} stands for what no key pays; choose another")


def accounts_warnings(config: Config) -> Iterator[str]:
    """Yield what is allowed there but probably not meant."""
    if config.prices is None:
        return
    if config.ledger is None:
        yield "prices: nothing is written down without `ledger`"
    known = {*config.models, *config.variants}
    for name in config.prices.models:
        if name not in known:
            yield f"prices.models.{name}: no model has this name"
