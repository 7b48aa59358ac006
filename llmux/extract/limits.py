"""How much of requests' bodies is taken, one by one and all together."""

from __future__ import annotations

from dataclasses import dataclass

from llmux.errors import UnavailableError

_MIB = 1024 * 1024
_RETRY_AFTER = 5.0


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits of bodies: ``max_body`` bytes each and ``max_buffered`` bytes for all together.

    ``idle_timeout`` is in seconds: how long a client may send nothing while its body is not complete.
    """

    max_body: int = 256 * _MIB
    max_buffered: int = 1024 * _MIB
    idle_timeout: float = 60.0


class BodyBudget:
    """The bytes that all bodies hold together, in memory or in files. One for all requests.

    Bytes count as they arrive, not as announced: a client that announces much and sends nothing takes
    nothing from the others.
    """

    def __init__(self, max_buffered: int) -> None:
        self.max_buffered = max_buffered
        self.held = 0

    def take(self, size: int) -> None:
        """Count ``size`` bytes more; when they are too many, UnavailableError ``bodies_full``."""
        if self.held + size > self.max_buffered:
            raise UnavailableError(
                f"the bodies of waiting requests already take {self.held} bytes of {self.max_buffered}",
                code="bodies_full",
                retry_after=_RETRY_AFTER,
            )
        self.held += size

    def give_back(self, size: int) -> None:
        """Count ``size`` bytes less."""
        self.held -= size
