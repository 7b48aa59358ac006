"""Keys and their hashes: making them, and checking one against a hash.

A hash is Argon2id in the usual form, ``$argon2id$v=19$m=…,t=…,p=…$salt$hash``; one that another program made
is as good. ``argon2-cffi`` is imported when it is needed: without hashes nothing waits for it.
"""

from __future__ import annotations

import re
import secrets

BEGINNING = "sk-llmux-"
# OWASP's choice for the smallest memory: 19 MiB, two passes, one thread. A key that was made here has 256 bits of
# chance, so no hash of it can be guessed; this is for the keys that people think of.
MEMORY, PASSES, THREADS = 19 * 1024, 2, 1
# A hash that wants more would be a way to stop llmux.
MOST_MEMORY, MOST_PASSES, MOST_THREADS = 1024 * 1024, 64, 16  # KiB, …

_HASH = re.compile(
    r"\$argon2id\$v=19\$m=(?P<m>\d{1,9}),t=(?P<t>\d{1,9}),p=(?P<p>\d{1,9})"
    r"\$[A-Za-z0-9+/]{11,}\$[A-Za-z0-9+/]{16,}"
)


def new_key() -> str:
    """Return a key that cannot be guessed: ``sk-llmux-`` and 43 characters."""
    return BEGINNING + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """Return the Argon2id hash of a key."""
    from argon2 import PasswordHasher  # noqa: PLC0415

    return str(PasswordHasher(time_cost=PASSES, memory_cost=MEMORY, parallelism=THREADS).hash(key))


def is_hash(text: str) -> bool:
    """Whether a setting holds a hash; else it is the key itself."""
    return text.startswith("$argon2")


def check_hash(text: str) -> None:
    """See to it that a hash can be used. ValueError, which does not repeat it, when not."""
    if not text.startswith("$argon2id$v=19$"):
        raise ValueError("is a hash of another kind than Argon2id (v=19); `llmux key hash` makes one")
    found = _HASH.fullmatch(text)
    if found is None:
        raise ValueError("is no whole hash; copy all of it, in quotes: within [ ] or { } a comma in it ends it")
    memory, passes, threads = (int(found[name]) for name in "mtp")
    if not (8 * threads <= memory <= MOST_MEMORY and 1 <= passes <= MOST_PASSES and 1 <= threads <= MOST_THREADS):
        raise ValueError(
            f"takes more than {MOST_MEMORY // 1024} MiB, {MOST_PASSES} passes or {MOST_THREADS} threads,"
            " or less than Argon2 knows; `llmux key hash` makes one that will do"
        )


def fits(key: bytes, text: str) -> bool:
    """Whether a key is the one that a hash was made of. Takes 20 to 50 ms, without the interpreter's lock."""
    from argon2.exceptions import Argon2Error, InvalidHashError  # noqa: PLC0415
    from argon2.low_level import Type, verify_secret  # noqa: PLC0415

    try:
        return bool(verify_secret(text.encode(), key, Type.ID))
    except (Argon2Error, InvalidHashError):
        return False
