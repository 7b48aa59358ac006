"""OpenTelemetry traces of requests and switches. Nothing of it is imported unless it is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmux.errors import ConfigError

if TYPE_CHECKING:
    from llmux.tracing.spans import RequestTrace, Tracing

__all__ = ["RequestTrace", "Tracing", "open_tracing", "require"]


def open_tracing(endpoint: str | None, provider: Any = None) -> Tracing | None:
    """Return what traces, into ``provider`` or to an OTLP/HTTP ``endpoint``; None without either.

    Raises ConfigError when OpenTelemetry is not installed.
    """
    if endpoint is None and provider is None:
        return None
    require()
    from llmux.tracing.spans import Tracing  # noqa: PLC0415 - an extra

    return Tracing(provider) if endpoint is None or provider is not None else Tracing.to(endpoint)


def require() -> None:
    """See to it that OpenTelemetry is there. Raises ConfigError."""
    try:
        import llmux.tracing.spans  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            f"takes OpenTelemetry, which is not there ({error}): pip install 'llmux[otel]'", path="otlp"
        ) from error
