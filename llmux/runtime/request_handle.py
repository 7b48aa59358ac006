"""What a request holds while it is in llmux, how waiting requests go on, and ride-along requests.

When a model has been woken, hundreds of requests may be admitted in one step. If all went on at once, each with a
connection to open, the first would have to wait for the last before its bytes could move. So the loop gets to look
at its sockets in between (``AdmissionThrottle``).

A request that rides along (``Riders``) never causes a switch: the core keeps it beside its model's queue, where no
policy sees it, and serves it when its model is awake anyway and has room. It may cause a switch only in the
*window* of the day for that, and when it has waited as long as it may; from then on it waits like any other. The
core does not know the time of day: it is checked here, while a request rides along.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from llmux.core.effects import Admit, CutReason, Refusal, Reject
from llmux.core.events import Event, RidesEnded
from llmux.core.state import State
from llmux.errors import (
    QueueFullError,
    RequestError,
    UnavailableError,
    UnknownModelError,
    WaitedTooLongError,
)

if TYPE_CHECKING:
    from llmux.runtime.switcher import Switcher


UNCOUNTED = 0  # no request of the core has this number

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
        """The bytes sent to its client."""

    @property
    def first_byte_at(self) -> float | None:
        """When the answer began, on the loop's clock; None if it did not."""

    @property
    def broken(self) -> str | None:
        """The code of the error that broke it off, or None."""

    @property
    def events(self) -> int:
        """The number of streamed events, if they are counted."""

    @property
    def usage(self) -> tuple[int | None, int | None]:
        """The tokens that the answer reported: read and written; None: not reported."""


Left = Callable[["Ticket", int | None, Outcome | None, int], None]
"""Called for each request that has left; see ``Switcher.leave``."""


class Ticket:
    """One request, as the runtime sees it. Made by ``Switcher.enter``, ended by ``Switcher.leave``."""

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
        self.rode = 0.0  # seconds that it rode along
        self.waited = 0.0
        self.asked: str | None = None  # the name, if another host serves it: the core does not know it
        self.spilled = False  # it has left the queue for a remote
        self.keep: float | None = None  # idle seconds for which its client wants its model to stay awake
        self.request_id = ""  # as its client knows it; set when it waits

    def got_off(self, now: float, waited: float) -> None:
        """Record that it no longer rides along, and how long it has waited in the queue."""
        self.rides = False
        self.rode = max(0.0, now - self.arrived - waited)
        self.arrived += self.rode

    def rejected(self, effect: Reject) -> None:
        """Record the core's decision to reject it."""
        kind = _ERRORS.get(effect.refusal, UnavailableError)
        param = "model" if kind is UnknownModelError else None
        self.waited = effect.waited
        self.failed(kind(effect.message, code=effect.refusal.value, param=param, retry_after=effect.retry_after))

    def failed(self, error: RequestError) -> None:
        """End its wait with an error."""
        self.rejection = error
        self.admission = None

    def returned(self) -> None:
        """Forget the admission: it is queued again."""
        self.admission = None
        self.on_cut = None
        self.cut_off = None

    def cut(self, reason: CutReason, retry_after: float | None) -> None:
        """End its exchange; if there is none yet, the next one ends as it begins."""
        self.cut_off = (reason, retry_after)
        if self.on_cut is not None:
            self.on_cut(reason, retry_after)

    def is_called(self, request_id: str) -> bool:
        """Whether its client calls it by that ID."""
        return request_id in {self.request_id, getattr(self._exchange, "request_id", None)}

    @property
    def client_id(self) -> str:
        """Its client's ID for it, "" if it is not known."""
        return self.request_id or getattr(self._exchange, "request_id", "")

    @property
    def answering(self) -> bool:
        """Whether its answer has begun."""
        return getattr(self._exchange, "first_byte_at", None) is not None

    @property
    def _exchange(self) -> object:
        return getattr(self.on_cut, "__self__", None)  # under way, it knows these

    def attach(self, cut: Cut) -> None:
        """Set how its exchange is ended."""
        self.on_cut = cut
        if self.cut_off is not None:
            cut(*self.cut_off)


AT_ONCE = 4
"""How many go on in one turn of the loop; each takes some 0.1 ms to send its request."""


class AdmissionThrottle:
    """Admitted requests that may go on, in their order."""

    def __init__(self) -> None:
        self._due: deque[asyncio.Future[None]] = deque()
        self._room = AT_ONCE
        self._turning = False

    def __len__(self) -> int:
        """Return how many still wait for their turn."""
        return len(self._due)

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
    if ticket.cut_off is not None:  # it was cut before its task got its turn
        raise _ended(*ticket.cut_off)


def _ended(reason: CutReason, retry_after: float | None) -> UnavailableError:
    return UnavailableError("llmux had to end what was in flight.", code=reason.value, retry_after=retry_after)


TURN = 0.2  # seconds between two looks at the clock: it may be set

Window = tuple[int, int]
"""The minutes of the day at which it begins and ends; over midnight if it ends before it begins."""


class Riders:
    """The ride-along requests of a core. ``clock`` is the local time; ``post`` passes an event to the core."""

    def __init__(
        self, state: State, post: Callable[[Event], None], clock: Callable[[], datetime] = datetime.now
    ) -> None:
        self._state = state
        self._post = post
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self.window: Window | None = None
        self.max_wait = 86_400.0

    def configure(self, window: Window | None, max_wait: float) -> None:
        """Set the window, and the seconds after which a ride-along request may cause a switch."""
        self.window, self.max_wait = window, max_wait
        if self.waiting():
            self.watch()

    @property
    def seconds(self) -> float:
        """How many seconds a new request is to ride along."""
        return 0.0 if self._in_window() else self.max_wait

    def watch(self) -> None:
        """Watch for the window while a request rides along."""
        if self._timer is None and self.window is not None:
            self._timer = asyncio.get_running_loop().call_later(TURN, self._turn)

    def waiting(self) -> Counter[str]:
        """Return the number of ride-along requests for each model."""
        return Counter({name: len(model.riders) for name, model in self._state.models.items() if model.riders})

    def document(self) -> list[dict[str, Any]]:
        """Return the waiting requests, and until when, in words."""
        window = "" if self.window is None else f", from {_spell(self.window[0])} to {_spell(self.window[1])}"
        return [
            {
                "model": model,
                "requests": count,
                "reason": f"{count} ride along for {model}: they cause no switch, and are served when it is awake"
                f" anyway{window}, or when they have waited for {self.max_wait:g} s",
            }
            for model, count in sorted(self.waiting().items())
        ]

    def _in_window(self) -> bool:
        if self.window is None:
            return False
        begin, end = self.window
        clock = self._clock()
        minute = clock.hour * 60 + clock.minute
        return begin <= minute < end if begin < end else minute >= begin or minute < end

    def _turn(self) -> None:
        self._timer = None
        if self._in_window():
            self._post(RidesEnded())
        elif self.waiting():
            self.watch()


def _spell(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"
