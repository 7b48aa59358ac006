"""Work that is no HTTP request, counted as one."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING

from llmux.core.effects import Admit, CutReason
from llmux.errors import RequestError, UnavailableError

if TYPE_CHECKING:
    from llmux.runtime.switcher import Switcher
    from llmux.runtime.ticket import Ticket


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
            self._leave(ticket)
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
            self._leave(self._ticket)
        if self._cut is None or self._task is None:
            return
        # As asyncio.timeout does it: the cancellation was ours, unless somebody else asked for one too.
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._cut from error

    def _leave(self, ticket: Ticket) -> None:
        self._switcher.leave(ticket)
        if self._switcher.recorder is not None:
            self._switcher.recorder.request(ticket, None)

    def _end(self, reason: CutReason, retry_after: float | None) -> None:
        if self._cut is None and self._task is not None:
            self._cut = _ended(reason, retry_after)
            self._task.cancel()


def _refuse_if_cut(ticket: Ticket) -> None:
    if ticket.cut_off is not None:  # before the task that waited got its turn
        raise _ended(*ticket.cut_off)


def _ended(reason: CutReason, retry_after: float | None) -> UnavailableError:
    return UnavailableError("llmux had to end what was in flight.", code=reason.value, retry_after=retry_after)
