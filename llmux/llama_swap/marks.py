"""Stand-ins for what is only known later, while YAML is read and macros are filled in.

They are characters that Unicode has reserved for use inside a program, so no file holds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

ENV_OPEN, ENV_CLOSE, PORT, PID = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
ENV = re.compile(f"{ENV_OPEN}([A-Za-z_][A-Za-z0-9_]*){ENV_CLOSE}")
ANY = re.compile(f"{ENV.pattern}|{PORT}|{PID}")
_WRITTEN = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}")


def mark_environment(text: str) -> str:
    """Put a mark in place of each ``${env.NAME}``, before YAML stumbles over the braces."""
    return _WRITTEN.sub(rf"{ENV_OPEN}\1{ENV_CLOSE}", text)


def variables(text: str) -> list[str]:
    """Return the environment variables that are marked in ``text``."""
    return ENV.findall(text)


def fill(text: str, environ: Mapping[str, str]) -> str:
    """Put in the values of environment variables. Those that are not set become empty."""
    return ENV.sub(lambda found: environ.get(found[1], ""), text)


def written(text: str) -> str:
    """Return ``text`` as it stands in the file, for messages."""
    text = ENV.sub(lambda found: f"${{env.{found[1]}}}", text)
    return text.replace(PORT, "${PORT}").replace(PID, "${PID}")
