"""Where it is written down which key used what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from llmux.config.fields import Word
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


def check_accounts(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the accounts as a whole."""
    if config.ledger is True and "state" in config.model_fields_set and config.state is None:
        yield Problem(("ledger",), "true means a file beside the state file, but `state` is null; give a path")
