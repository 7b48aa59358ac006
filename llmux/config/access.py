"""Which clients may use llmux, and which of their paths reach the engines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from llmux.config.fields import Name, Section, Word
from llmux.config.problems import Problem
from llmux.keys import check_hash, is_hash

if TYPE_CHECKING:
    from llmux.config.schema import Config


def _key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    # Said without the value: it may end up in a log.
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("must be printable ASCII without spaces, at least one character; a header carries it")
    if is_hash(text):
        check_hash(text)
    return value


Key = Annotated[SecretStr, AfterValidator(_key), Word("key or its hash")]
"""An Argon2id hash, or a key as it is."""


class ApiKeyConfig(Section):
    """One key, or its hash, and the name of its owner."""

    key: Key = Field(description="The key's Argon2id hash, as `llmux key new` prints it; or the key itself.")
    name: Name | None = Field(default=None, description="Name of its owner, for the access log.")
    progress: bool | None = Field(default=None, description="The top-level `progress` for clients that send it.")


def _entry(value: Any) -> Any:
    if isinstance(value, str):
        _key(SecretStr(value))
        return {"key": value}
    if not isinstance(value, ApiKeyConfig | Mapping):
        raise ValueError("must be a key, its hash, or {name: …, key: …}")  # noqa: TRY004
    for key in value if isinstance(value, Mapping) else ():
        if key not in ApiKeyConfig.model_fields:
            takes = ", ".join(f"`{name}`" for name in ApiKeyConfig.model_fields)
            raise ValueError(f"has a setting that is not known here; it takes {takes}")
    return value


ApiKey = Annotated[ApiKeyConfig, BeforeValidator(_entry, json_schema_input_type=str | ApiKeyConfig), Word("key")]
"""An entry of ``api_keys``: a text stands for ``{key: text}``."""


def check_keys(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the keys as a whole."""
    names: dict[str, int] = {}
    for index, entry in enumerate(config.api_keys):
        if entry.name is not None and names.setdefault(entry.name, index) != index:
            path = ("api_keys", index, "name")
            yield Problem(path, f"{entry.name!r} is the name of another key already; choose another")


DEFAULT = "default"
DEFAULT_FORWARD: tuple[str, ...] = (
    "/v1/**",
    "/completion",
    "/completions",
    "/chat/completions",
    "/infill",
    "/embedding",
    "/embeddings",
    "/rerank",
    "/reranking",
    "/score",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/sdapi/v1/**",
)


def expand(globs: tuple[str, ...]) -> tuple[str, ...]:
    """Replace the element ``default`` by the default list; each glob once, in order.

    Raises:
        ValueError: a glob does not start with ``/``.

    """
    whole: dict[str, None] = {}
    for glob in globs:
        if glob == DEFAULT:
            whole |= dict.fromkeys(DEFAULT_FORWARD)
        elif not glob.startswith("/"):
            raise ValueError(f"{glob!r} is not a path; write one as /v1/**, or `default` for the default list")
        else:
            glob_expression(glob)
            whole[glob] = None
    return tuple(whole)


def glob_expression(glob: str) -> str:
    """Return the regular expression of a ``forward`` glob.

    ``*`` stays within one segment, ``**`` (a whole segment) is any depth, none included.

    Raises:
        ValueError: it cannot be one.

    """
    if not glob.startswith("/"):
        raise ValueError(f"{glob!r} does not begin with a slash")
    parts = []
    for segment in glob.split("/")[1:]:
        if segment == "**":
            parts.append("(?:/[^/]+)*")
        elif "**" in segment:
            raise ValueError(f"{glob!r}: ** stands for whole segments")
        else:
            parts.append("/" + "[^/]*".join(re.escape(piece) for piece in segment.split("*")))
    return "".join(parts)
