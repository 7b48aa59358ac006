"""What a request holds while it is in llmux: its place in the queue, then its count in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmux.core.effects import Admit, CutReason, Refusal, Reject
from llmux.errors import (
    QueueFullError,
    RequestError,
    UnavailableError,
    UnknownModelError,
    WaitedTooLongError,
)

Cut = Callable[[CutReason, float | None], None]

_ERRORS: dict[Refusal, type[RequestError]] = {
    Refusal.UNKNOWN_MODEL: UnknownModelError,
    Refusal.QUEUE_FULL: QueueFullError,
    Refusal.WAITED_TOO_LONG: WaitedTooLongError,
}


class Ticket:
    """One request in the eyes of the runtime. Made by ``Switcher.enter``, ended by ``Switcher.leave``."""

    __slots__ = (
        "admission",
        "arrived",
        "cut_off",
        "id",
        "model",
        "on_cut",
        "rejection",
        "request_id",
        "waited",
        "waiter",
    )

    def __init__(self, ticket: int, model: str, arrived: float) -> None:
        self.id = ticket
        self.model = model
        self.arrived = arrived
        self.admission: Admit | None = None
        self.rejection: RequestError | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.on_cut: Cut | None = None
        self.cut_off: tuple[CutReason, float | None] | None = None
        self.waited = 0.0
        self.request_id = ""  # as its client knows it; set when it waits

    def admitted(self, effect: Admit) -> None:
        """Take in the core's decision to let it through."""
        self.admission = effect
        self.waited = effect.waited

    def rejected(self, effect: Reject) -> None:
        """Take in the core's decision to turn it away."""
        kind = _ERRORS.get(effect.refusal, UnavailableError)
        param = "model" if kind is UnknownModelError else None
        self.waited = effect.waited
        self.failed(kind(effect.message, code=effect.refusal.value, param=param, retry_after=effect.retry_after))

    def failed(self, error: RequestError) -> None:
        """End its wait with an error."""
        self.rejection = error
        self.admission = None

    def returned(self) -> None:
        """Forget the admission: it waits again."""
        self.admission = None
        self.on_cut = None
        self.cut_off = None

    def cut(self, reason: CutReason, retry_after: float | None) -> None:
        """End its exchange; if there is none yet, the next one is ended as it begins."""
        self.cut_off = (reason, retry_after)
        if self.on_cut is not None:
            self.on_cut(reason, retry_after)

    def attach(self, cut: Cut) -> None:
        """Say how its exchange is ended."""
        self.on_cut = cut
        if self.cut_off is not None:
            cut(*self.cut_off)
