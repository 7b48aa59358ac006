"""What llmux reports: log, metrics, spans, audit; and the state that outlives a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmux.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from llmux.observability.audit import Audit
    from llmux.observability.spans import Tracing


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


def open_tracing(endpoint: str | None, provider: Any = None) -> Tracing | None:
    """Return what traces, into ``provider`` or to an OTLP/HTTP ``endpoint``; None without either.

    Raises ConfigError when OpenTelemetry is not installed.
    """
    if endpoint is None and provider is None:
        return None
    require_tracing()
    from llmux.observability.spans import Tracing  # noqa: PLC0415 - an extra

    return Tracing(provider) if endpoint is None or provider is not None else Tracing.to(endpoint)


def require_tracing() -> None:
    """See to it that OpenTelemetry is there. Raises ConfigError."""
    try:
        import llmux.observability.spans  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            f"takes OpenTelemetry, which is not there ({error}): pip install 'llmux[otel]'", path="otlp"
        ) from error
