"""Which clients may use llmux, and which of their paths reach the engines.

A hash of a key is Argon2id in the usual form, ``$argon2id$v=19$m=…,t=…,p=…$salt$hash``; other programs may have
made it. ``argon2-cffi`` is imported when it is needed: without hashes nothing waits for it.
"""

import difflib
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from llmux.config.accounts import BudgetConfig, Globs, LimitsConfig
from llmux.config.problems import Problem
from llmux.config.setting_types import Name, Section, Word

BEGINNING = "sk-llmux-"
OPERATORS = "admin_key"
"""The name of the operators' key, in logs and accounts."""
# OWASP's choice for the smallest memory: 19 MiB, two passes, one thread. A key that was made here has 256 bits of
# entropy, so it cannot be guessed from its hash; this is for keys that people invent.
MEMORY, PASSES, THREADS = 19 * 1024, 2, 1
# A hash that needs more could be used to stop llmux.
MOST_MEMORY, MOST_PASSES, MOST_THREADS = 1024 * 1024, 64, 16  # KiB, …

_HASH = re.compile(
    r"\$argon2id\$v=19\$m=(?P<m>\d{1,9}),t=(?P<t>\d{1,9}),p=(?P<p>\d{1,9})"
    r"\$[A-Za-z0-9+/]{11,}\$[A-Za-z0-9+/]{16,}"
)
_OUR_KIND = re.compile(r"\$argon2id\$(v=19\$|(?!v=))")  # or cut before it says which version, as in examples


def new_key() -> str:
    """Return a key that cannot be guessed: ``sk-llmux-`` and 43 characters."""
    return BEGINNING + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """Return the Argon2id hash of a key."""
    from argon2 import PasswordHasher  # noqa: PLC0415

    return str(PasswordHasher(time_cost=PASSES, memory_cost=MEMORY, parallelism=THREADS).hash(key))


def is_hash(text: str) -> bool:
    """Return whether a setting holds a hash; else it is the key itself."""
    return text.startswith("$argon2")


def check_hash(text: str) -> None:
    """Check that a hash can be used. Raises ValueError, which does not repeat it."""
    if not _OUR_KIND.match(text):
        raise ValueError("is a hash of another kind than Argon2id (v=19); `llmux key hash` makes one")
    found = _HASH.fullmatch(text)
    if found is None:
        raise ValueError("is not a whole hash; copy all of it, in quotes: within [ ] or { } a comma in it ends it")
    memory, passes, threads = (int(found[name]) for name in "mtp")
    if not (8 * threads <= memory <= MOST_MEMORY and 1 <= passes <= MOST_PASSES and 1 <= threads <= MOST_THREADS):
        raise ValueError(
            f"takes more than {MOST_MEMORY // 1024} MiB, {MOST_PASSES} passes or {MOST_THREADS} threads,"
            " or less than Argon2 knows; `llmux key hash` makes one that will do"
        )


def fits(key: bytes, text: str) -> bool:
    """Return whether a hash was made from a key. Takes 20 to 50 ms, without the interpreter's lock."""
    from argon2.exceptions import Argon2Error, InvalidHashError  # noqa: PLC0415
    from argon2.low_level import Type, verify_secret  # noqa: PLC0415

    try:
        return bool(verify_secret(text.encode(), key, Type.ID))
    except (Argon2Error, InvalidHashError):
        return False


def check_key(text: str) -> None:
    """Check that a header can carry a key. Raises ValueError, without the key: it may end up in a log."""
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("must be printable ASCII without spaces, at least one character; a header carries it")


def _key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if is_hash(text):
        check_hash(text)
    check_key(text)
    return value


Key = Annotated[SecretStr, AfterValidator(_key), Word("key or its hash")]
"""An Argon2id hash, or a key as it is."""


class ApiKeyConfig(Section):
    """One key, or its hash, and the name of its owner."""

    key: Key = Field(description="The key's Argon2id hash, as `llmux key new` prints it; or the key itself.")
    name: Name | None = Field(default=None, description="Name of its owner, for the access log.")
    progress: bool | None = Field(default=None, description="The top-level `progress` for clients that send it.")
    role: Name | None = Field(default=None, description="One of `roles`. What is set here goes before it.")
    models: Globs | None = Field(
        default=None, description="The models that it may use, by name. null: its role's."
    )
    remote: bool | None = Field(default=None, description="Whether its requests may leave this host.")
    limits: LimitsConfig | None = Field(default=None, description="How much it may use. null: its role's.")
    budget: BudgetConfig | None = Field(default=None, description="What it may spend. null: its role's.")

    gateway: bool = Field(
        default=False,
        description="true: it is a gateway's, which tells whose its requests are, by `X-LLMux-Key`.",
    )

    class_: Literal["interactive", "ride_along"] = Field(
        default="interactive",
        alias="class",
        description="ride_along: its requests never cause a switch; see `policy.ride_along`.",
    )

    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=1.0, description="With `policy.fair`: how many times the share of a key with weight 1 it gets."
    )

    @property
    def rides(self) -> bool:
        """Whether its requests never cause a switch."""
        return self.class_ == "ride_along"

    @property
    def managed(self) -> bool:
        """Whether it has restrictions."""
        return any(each is not None for each in (self.role, self.models, self.limits, self.budget))


def _entry(value: Any) -> Any:
    if isinstance(value, str):
        _key(SecretStr(value))
        return {"key": value}
    if not isinstance(value, ApiKeyConfig | Mapping):
        raise ValueError("must be a key, its hash, or {name: …, key: …}")  # noqa: TRY004
    known = [field.alias or name for name, field in ApiKeyConfig.model_fields.items()]
    for key in value if isinstance(value, Mapping) else ():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)  # the name may be a key, which is not repeated
            takes = "it takes " + ", ".join(f"`{name}`" for name in known)
            takes = f"did you mean `{near[0]}`?" if near else takes
            raise ValueError(f"has a setting that is not known here; {takes}")
    return value


ApiKey = Annotated[ApiKeyConfig, BeforeValidator(_entry, json_schema_input_type=str | ApiKeyConfig), Word("key")]
"""An entry of ``api_keys``: a text stands for ``{key: text}``."""


class Access(Protocol):
    """The settings for keys of a configuration: a host's, or a gateway's."""

    @property
    def admin_key(self) -> SecretStr | None:
        """The operators' key, or its hash."""

    @property
    def api_keys(self) -> Sequence[ApiKeyConfig]:
        """The clients' keys."""

    @property
    def captured(self) -> Sequence[str]:
        """The names of the keys whose requests are captured."""

    def may_leave(self, entry: ApiKeyConfig) -> bool:
        """Return whether requests with this key may leave this host."""

    @property
    def insecure(self) -> bool:
        """Whether operation without keys is intended, whatever the listening address."""


def check_keys(config: Access) -> Iterator[Problem]:
    """Yield the problems of the keys as a whole."""
    names: dict[str, int] = {}
    for index, entry in enumerate(config.api_keys):
        if entry.name is not None and names.setdefault(entry.name, index) != index:
            path = ("api_keys", index, "name")
            yield Problem(path, f"{entry.name!r} is the name of another key already; choose another")
        if entry.name == OPERATORS and config.admin_key is not None:  # what it may is no limit for them
            yield Problem(("api_keys", index, "name"), f"{OPERATORS!r} is the name of `admin_key`; choose another")


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
    "/v2/rerank",
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


def check_globs(globs: tuple[str, ...]) -> tuple[str, ...]:
    """Return the globs as they are.

    Raises:
        ValueError: one of them is not a path.

    """
    for glob in globs:
        if not glob.startswith("/"):
            raise ValueError(f"{glob!r} is not a path; write one as /props")
        glob_expression(glob)
    return globs


def glob_expression(glob: str) -> str:
    """Return the regular expression of a ``forward`` glob.

    ``*`` stays within one segment, ``**`` (a whole segment) matches any depth, zero included.

    Raises:
        ValueError: it is invalid.

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
