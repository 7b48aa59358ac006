"""A request's id: the client's own where it is usable, else a new one."""

from __future__ import annotations

import os
import random
import re

_USABLE = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,126}[\x21-\x7e])?")
_bits = random.Random(os.urandom(32)).getrandbits  # noqa: S311 - no secret, and a system call each would cost more


def new_id() -> str:
    """Return 32 hexadecimal digits that no other request has."""
    return f"{_bits(128):032x}"


def request_id(given: str | None) -> str:
    """Return ``given`` if it is 1 to 128 printable ASCII characters, else a new random id."""
    if given is not None and _USABLE.fullmatch(given):
        return given
    return new_id()
