"""What llmux tells the outside about itself: log, metrics, audit, and the state that survives a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from llmux.observability.audit import Audit


def open_audit(path: Path | None, tell: Callable[..., None]) -> Audit | None:
    """Return the audit that is written to a file; without one, None. Raises ConfigError where that cannot be."""
    if path is None:
        return None
    from llmux.observability.audit import Audit  # noqa: PLC0415 - most configurations have no use for it

    return Audit(path, tell)


def put_audit(new: Audit | None, old: Audit | None, registry: CollectorRegistry) -> Audit | None:
    """Begin an audit in place of another, or end that; return the new one."""
    if old is not None:
        old.moved(new, registry)
    elif new is not None:
        registry.register(new)
    return new
