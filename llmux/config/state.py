"""Where the state file lies when the configuration does not say."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llmux.errors import ConfigError


def default_state(source: Path) -> Path:
    """Return the state file for the configuration ``source`` (absolute): two of them never share one.

    Raises:
        ConfigError: neither ``$XDG_STATE_HOME`` nor a home folder is known.

    """
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:10]
    return _state_home() / "llmux" / f"{source.stem}-{digest}.json"


def _state_home() -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(given):  # noqa: PTH117 (the XDG specification says to ignore a relative one)
        return Path(given)
    try:
        return Path.home() / ".local" / "state"
    except RuntimeError:
        raise ConfigError(
            "no home folder is known for the state file; give a path, or null for none", path="state"
        ) from None
