"""A request's id: the client's own where it is usable, else a new one."""

from __future__ import annotations

import os
import re

_USABLE = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,126}[\x21-\x7e])?")


def request_id(given: str | None) -> str:
    """Return ``given`` if it is 1 to 128 printable ASCII characters, else a new random id."""
    if given is not None and _USABLE.fullmatch(given):
        return given
    return os.urandom(16).hex()
