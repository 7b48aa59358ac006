"""What a request holds while it is in llmux, and how those that have waited go on.

When a model has been woken, hundreds of requests may be admitted in one step. Were they all to go on at once, each
with a connection to open, the first would have to wait for the last before its bytes could move. So the loop gets
to look at its sockets in between (``AdmissionThrottle``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from llmux.core.effects import Admit, CutReason, Refusal, Reject
from llmux.errors import (
    QueueFullError,
    RequestError,
    UnavailableError,
    UnknownModelError,
    WaitedTooLongError,
)

if TYPE_CHECKING:
    from llmux.runtime.switcher import Switcher


Cut = Callable[[CutReason, float | None], None]

_ERRORS: dict[Refusal, type[RequestError]] = {
    Refusal.UNKNOWN_MODEL: UnknownModelError,
    Refusal.QUEUE_FULL: QueueFullError,
    Refusal.WAITED_TOO_LONG: WaitedTooLongError,
}


class Outcome(Protocol):
    """What became of an exchange with an engine."""

    @property
    def bytes_out(self) -> int:
        """The bytes that its client was sent."""

    @property
    def first_byte_at(self) -> float | None:
        """When the answer began, on the loop's clock; None if it did not."""

    @property
    def broken(self) -> str | None:
        """The code of the error that broke it off, or None."""

    @property
    def events(self) -> int:
        """The events that were streamed, where they are counted."""

    @property
    def usage(self) -> tuple[int | None, int | None]:
        """The tokens that the answer told of: read and written; None: not told."""


Left = Callable[["Ticket", int | None, Outcome | None, int], None]
"""What is told of each request that has left; see ``Switcher.leave``."""


class Ticket:
    """One request in the eyes of the runtime. Made by ``Switcher.enter``, ended by ``Switcher.leave``."""

    __slots__ = (
        "admission",
        "arrived",
        "asked",
        "cut_off",
        "id",
        "keep",
        "key",
        "model",
        "on_cut",
        "rejection",
        "request_id",
        "rides",
        "rode",
        "spilled",
        "waited",
        "waiter",
    )

    def __init__(self, ticket: int, model: str, arrived: float, key: str = "") -> None:
        self.id = ticket
        self.key = key
        self.model = model
        self.arrived = arrived
        self.admission: Admit | None = None
        self.rejection: RequestError | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.on_cut: Cut | None = None
        self.cut_off: tuple[CutReason, float | None] | None = None
        self.rides = False  # it rides along, and causes no switch
        self.rode = 0.0  # seconds that it did
        self.waited = 0.0
        self.asked: str | None = None  # for what name, where another host serves it: the core knows nothing of it
        self.spilled = False  # it has left the queue for a remote
        self.keep: float | None = None  # idle seconds that its client wants its model to stay awake for
        self.request_id = ""  # as its client knows it; set when it waits

    def got_off(self, now: float, waited: float) -> None:
        """Take note that it rides along no longer, and has waited in the queue for so long."""
        self.rides = False
        self.rode = max(0.0, now - self.arrived - waited)
        self.arrived += self.rode

    def rejected(self, effect: Reject) -> None:
        """Take in the core's decision to reject it."""
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

    def is_called(self, request_id: str) -> bool:
        """Whether its client knows it by that id."""
        exchange = getattr(self.on_cut, "__self__", None)  # what is on its way knows its id
        return request_id in {self.request_id, getattr(exchange, "request_id", None)}

    def attach(self, cut: Cut) -> None:
        """Say how its exchange is ended."""
        self.on_cut = cut
        if self.cut_off is not None:
            cut(*self.cut_off)


AT_ONCE = 4
"""How many go on in one turn of the loop; each takes it some 0.1 ms to send its request."""


class AdmissionThrottle:
    """Waiters that may go on, in their order."""

    def __init__(self) -> None:
        self._due: deque[asyncio.Future[None]] = deque()
        self._room = AT_ONCE
        self._turning = False

    def add(self, waiter: asyncio.Future[None]) -> None:
        """Let a waiter go on, in this turn of the loop or in one of the next."""
        self._due.append(waiter)
        self._go_on()

    def _go_on(self) -> None:
        while self._due and self._room:
            waiter = self._due.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._room -= 1
        if self._room < AT_ONCE and not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = False
        self._room = AT_ONCE
        self._go_on()


class InFlightGuard:
    """Counts as one request in flight for as long as it is held: ``async with switcher.hold("llama"): …``.

    When llmux has to end what is in flight (the drain's deadline, the end of the grace at a stop), the block is
    cancelled and ends with UnavailableError.
    """

    def __init__(self, switcher: Switcher, model: str) -> None:
        self._switcher = switcher
        self._model = model
        self._ticket: Ticket | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._cut: RequestError | None = None

    async def __aenter__(self) -> Admit:
        """Wait for the model. Raises a RequestError when it cannot be had."""
        ticket = self._ticket = self._switcher.enter(self._model)
        try:
            admission = await self._switcher.admission(ticket)
            _refuse_if_cut(ticket)
        except BaseException:
            self._switcher.leave(ticket)
            raise
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task is not None else 0
        ticket.attach(self._end)
        return admission

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let it go."""
        if self._ticket is not None:
            self._ticket.on_cut = None
            self._switcher.leave(self._ticket)
        if self._cut is None or self._task is None:
            return
        # As asyncio.timeout does it: the cancellation was ours, unless another was requested too.
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._cut from error

    def _end(self, reason: CutReason, retry_after: float | None) -> None:
        if self._cut is None and self._task is not None:
            self._cut = _ended(reason, retry_after)
            self._task.cancel()


def _refuse_if_cut(ticket: Ticket) -> None:
    if ticket.cut_off is not None:  # before the task that waited got its turn
        raise _ended(*ticket.cut_off)


def _ended(reason: CutReason, retry_after: float | None) -> UnavailableError:
    return UnavailableError("llmux had to end what was in flight.", code=reason.value, retry_after=retry_after)
