"""The requests inside llmux: they enter, wait, are admitted, may be given back or withdrawn, and leave.

The core decides; this carries the decisions out, and wakes what awaits a request. Numbers of requests are never
reused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from llmux.config import Config
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.effects import Admit
from llmux.errors import CancelledRequestError, RequestError, UnavailableError
from llmux.runtime.request_handle import AdmissionThrottle, Left, Outcome, Riders, Ticket
from llmux.upstream import EngineActivity

if TYPE_CHECKING:
    from llmux.estimates.fair_order import FairOrder
    from llmux.runtime.switcher import Switcher

WITHDRAWN = "withdrawn"  # the code of a request that a gateway has taken back
BYTES_PER_TOKEN = 4.0  # of text, roughly


class Activities(dict[str, tuple[int, EngineActivity]]):
    """The epoch and the activity of each model's engine."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers = 0

    def of(self, admission: Admit) -> EngineActivity:
        """Return the activity of the engine that serves this admission."""
        known = self.get(admission.model)
        if known is None or known[0] != admission.epoch:
            known = (admission.epoch, EngineActivity(counting=self.counting))
            self[admission.model] = known
        return known[1]

    @property
    def counting(self) -> bool:
        """Whether streamed events are counted."""
        return self._watchers > 0

    def streamed(self, model: str) -> int:
        """Return how many events a model's engine has streamed, as far as they were counted."""
        known = self.get(model)
        if known is None:
            return 0
        known[1].look()
        return known[1].streamed

    def last_byte(self, model: str) -> float | None:
        """Return when a model's engine last delivered something, on the loop's clock."""
        known = self.get(model)
        if known is None:
            return None
        known[1].look()
        return known[1].last_byte

    def watch(self) -> Callable[[], None]:
        """Count streamed events until the returned function is called and there is no other watcher."""
        self._count(1)
        return lambda: self._count(-1)

    def _count(self, more: int) -> None:
        self._watchers += more
        for _, activity in self.values():
            activity.look()
            activity.counting = self.counting


class Answered(Protocol):
    """A request that has ended, as far as the accounts need it."""

    request_id: str
    asked: str | None
    model: str | None
    ticket: Ticket | None
    exchange: Any
    route: Any
    sent: int


class Accounts(Protocol):
    """What ``llmux.accounts`` implements; it gets each request that has ended, if it is configured."""

    def start(self) -> None:
        """Begin. Raises ConfigError when the ledger cannot be used."""

    def configure(self, config: Config) -> None:
        """Take over a configuration."""

    def returned(self, request: int) -> None:
        """Record that an admitted request is queued again."""

    @property
    def rates(self) -> Mapping[str, Any]:
        """Known prices of remote models for which the configuration has none."""

    def spent(self, key: str, period: tuple[int, int]) -> int:
        """Return what a key has spent from a Unix time until another, in millionths of the currency."""

    def reserve(self, ident: str, request_id: str, key: str, model: str, micros: int) -> None:
        """Keep a reservation."""

    def release(self, ident: str) -> None:
        """Forget a reservation."""

    def told(self, tail: list[bytes], /) -> tuple[int, int] | None:
        """Return the tokens that an answer reports, of the input and of the output.

        None if it reports more than that, or nothing. The result goes to ``ended``.
        """

    def ended(
        self, request: Answered, number: int, now: float, waited: float, status: int, failure: str | None,
        key: str | None, report: tuple[int, int] | None, /,
    ) -> float:  # fmt: skip
        """Record a request that has ended; return the seconds of the GPU that it took."""


class Requests:
    """The requests of one switcher. ``used(model)`` is called when a model has served one."""

    def __init__(self, switcher: Switcher, used: Callable[[str], None]) -> None:
        self._switcher = switcher
        self._used = used
        self.tickets: dict[int, Ticket] = {}
        self.elsewhere: set[Ticket] = set()  # requests served by other hosts; the core does not know them
        self.riders = Riders(switcher.core.state, self._post)
        self._on_left: list[tuple[Left, ...]] = [(), ()]  # with an outcome, and without one
        self.throttle = AdmissionThrottle()
        self._serial = 0

    def _post(self, event: ev.Event) -> None:  # the switcher has its own only later
        self._switcher.post(event)

    def number(self) -> int:
        """Return a number that is not used for anything else."""
        self._serial += 1
        return self._serial

    def acts(self) -> dict[type, Callable[[Any], None]]:
        """Return the functions that carry out effects on requests."""
        return {
            fx.Admit: self._admit,
            fx.Reject: self._reject,
            fx.RequestQueued: self._queued,
            fx.CancelRequests: self._cut,
        }

    def make_good(self, request: int, error: RequestError) -> None:
        """Answer a queued request with an error: the core failed to handle it."""
        ticket = self.tickets.get(request)
        if ticket is not None and ticket.admission is None and ticket.rejection is None:
            ticket.failed(error)
            self._go_on(ticket)

    def enter(self, model: str, key: str = "", *, rides: bool = False, deadline: float | None = None) -> Ticket:
        """Report a request for ``model``, a configured name, to the core. The ticket must be given to ``leave``.

        ``key`` is the name of its key. If it ``rides`` along, ``ride`` has to be awaited. It is rejected if it
        cannot be answered within ``deadline`` seconds.
        """
        switcher = self._switcher
        self._serial += 1
        ticket = Ticket(self._serial, model, switcher.now(), key)
        self.tickets[ticket.id] = ticket
        ticket.rides = rides
        switcher.post(ev.RequestArrived(ticket.id, model, self.riders.seconds if rides else None, deadline, key))
        return ticket

    async def ride(self, ticket: Ticket) -> None:
        """Wait until a request no longer rides along: it is admitted, rejected, or queued like any other."""
        if ticket.rides and ticket.rejection is None:
            self.riders.watch()
            await self._news(ticket)

    async def admission(self, ticket: Ticket) -> fx.Admit:
        """Wait until the request is admitted. Raises the RequestError with which it is rejected."""
        if ticket.admission is None and ticket.rejection is None:
            await self._news(ticket)
        if ticket.rejection is not None:
            raise ticket.rejection
        assert ticket.admission is not None
        return ticket.admission

    @staticmethod
    async def _news(ticket: Ticket) -> None:
        ticket.waiter = asyncio.get_running_loop().create_future()
        try:
            await ticket.waiter
        finally:
            ticket.waiter = None

    def give_back(self, ticket: Ticket, activity: EngineActivity) -> None:
        """Queue an admitted request again: its engine was dead before anything was sent."""
        ticket.returned()
        self._switcher.post(ev.RequestReturned(ticket.id, connected=activity.connected))
        if self._switcher.accounts is not None:
            self._switcher.accounts.returned(ticket.id)

    def leave(
        self, ticket: Ticket, status: int | None = None, outcome: Outcome | None = None, sent: int = 0
    ) -> None:
        """End a request, whatever its stage: answered, failed, or abandoned by its client.

        For the records: ``status`` is the client's, None for a guard that was held, ``outcome`` is what became of
        its exchange, and ``sent`` the bytes of its body.
        """
        switcher = self._switcher
        if self.tickets.pop(ticket.id, None) is None:
            if ticket.asked is not None and switcher.recorder is not None:
                switcher.recorder.served_elsewhere(ticket, status, outcome, sent)
            return
        if ticket.admission is not None:
            self._used(ticket.model)
            if switcher.order is not None:
                switcher.order.served(ticket.id, tokens_of(outcome, sent))
            switcher.post(ev.RequestFinished(ticket.id, ticket.keep))
        elif ticket.rejection is None:
            ticket.waited = switcher.now() - ticket.arrived
            switcher.post(ev.RequestAbandoned(ticket.id))
        elif ticket.rides or ticket.id in switcher.core.state.requests:  # cancelled, or by an error in llmux
            switcher.post(ev.RequestAbandoned(ticket.id))
        if ticket.rides:  # without a result: as if it had not been there
            return
        for tell in self._on_left[outcome is None]:
            tell(ticket, status, outcome, sent)

    def spill(self, request: int, why: RequestError) -> bool:
        """End a queued request, in one step, with ``why`` for what awaits it. False if it is not queued.

        The core forgets it, so it cannot be admitted, too.
        """
        ticket = self.tickets.get(request)
        if ticket is None or ticket.admission is not None or ticket.rejection is not None:
            return False
        ticket.spilled = True
        self.leave(ticket)
        ticket.failed(why)
        self._go_on(ticket)
        return True

    def on_left(self, tell: Left, *, without_outcome: bool = False) -> None:
        """Call ``tell`` with each ticket that has left, or only with those without an outcome."""
        for which in (True,) if without_outcome else (False, True):
            self._on_left[which] = (*self._on_left[which], tell)

    def off_left(self, tell: Left) -> None:
        """Stop calling ``tell``."""
        self._on_left = [tuple(one for one in these if one != tell) for these in self._on_left]

    def cancel(self, request_id: str) -> tuple[str, ...]:
        """End the requests with this ID of their clients, queued or in flight; return the models they named."""
        known = (*self.tickets.values(), *self.elsewhere)
        found = [ticket for ticket in known if ticket.is_called(request_id)]
        for ticket in found:
            if ticket.admission is None and ticket not in self.elsewhere:
                ticket.failed(CancelledRequestError("An operator has cancelled this request."))
                self._go_on(ticket)
            else:
                ticket.cut(fx.CutReason.CANCELLED, None)
                self._switcher.metrics.request_cut(ticket.model, fx.CutReason.CANCELLED)
            self._switcher.log.emit("request_cancelled", model=ticket.model, request_id=request_id)
        return tuple(ticket.model for ticket in found)

    def withdraw(self, request_id: str) -> tuple[str, ...]:
        """Reject the queued requests with this ID: a gateway has a better host for them.

        Return the models they named. Requests that are admitted, or served elsewhere, are not touched.
        """
        found = [
            ticket
            for ticket in self.tickets.values()
            if ticket.admission is None and ticket.rejection is None and ticket not in self.elsewhere
            if ticket.is_called(request_id)
        ]
        for ticket in found:
            ticket.failed(
                UnavailableError("The gateway has taken the request back.", code=WITHDRAWN, retry_after=1.0)
            )
            self._go_on(ticket)
        return tuple(ticket.model for ticket in found)

    def key_of(self, request: int) -> str:
        """Return the name of the key of a request that has not left; "" where there is none."""
        ticket = self.tickets.get(request)
        return "" if ticket is None else ticket.key

    def request_id(self, request: int) -> str:
        """Return the client's ID of a request that has not left; "" if it is not known."""
        ticket = self.tickets.get(request)
        return "" if ticket is None else ticket.client_id

    def answering(self, request: int) -> bool:
        """Whether the answer of a request has begun."""
        ticket = self.tickets.get(request)
        return ticket is not None and ticket.answering

    def _admit(self, effect: fx.Admit) -> None:
        # If a request has left already, the core learns it from an event that is still to come.
        if (ticket := self.tickets.get(effect.request)) is not None:
            ticket.admission, ticket.waited = effect, effect.waited
            if ticket.rides:
                ticket.got_off(self._switcher.now(), effect.waited)
            self._go_on(ticket)

    def _queued(self, effect: fx.RequestQueued) -> None:
        ticket = self.tickets.get(effect.request)
        if ticket is not None and ticket.rides:
            ticket.got_off(self._switcher.now(), 0.0)
            self._go_on(ticket)

    def _reject(self, effect: fx.Reject) -> None:
        if (ticket := self.tickets.get(effect.request)) is not None:
            if ticket.rides:
                ticket.got_off(self._switcher.now(), effect.waited)
            ticket.rejected(effect)
            self._go_on(ticket)

    def _go_on(self, ticket: Ticket) -> None:
        if ticket.waiter is not None:
            self.throttle.add(ticket.waiter)

    def _cut(self, effect: fx.CancelRequests) -> None:
        for request in effect.requests:
            if (ticket := self.tickets.get(request)) is not None:
                ticket.cut(effect.reason, effect.retry_after)


def order_of(config: Config, before: FairOrder | None) -> FairOrder | None:
    """Return the order of the keys for a configuration, with the counters of ``before``; None without ``fair``."""
    fair = config.policy.fair
    if fair is None:
        return None
    from llmux.estimates.fair_order import FairOrder  # noqa: PLC0415 - few have a use for it
    from llmux.estimates.fairness import Fairness, Prices  # noqa: PLC0415

    prices = Prices(fair.input, fair.output, fair.switch_second)
    weights = {entry.name: entry.weight for entry in config.api_keys if entry.name is not None}
    if before is None:
        return FairOrder(Fairness(prices, weights), config.policy.max_wait)
    before.fairness.configure(prices, weights)
    before.max_wait = config.policy.max_wait
    return before


def tokens_of(outcome: Outcome | None, sent: int) -> tuple[int, int]:
    """Return the tokens of a request of ``sent`` bytes and its answer: as reported, else estimated."""
    if outcome is None:
        return 0, 0
    read, written = outcome.usage
    if read is None:
        read = round(sent / BYTES_PER_TOKEN)
    if written is None:
        written = outcome.events or round(outcome.bytes_out / BYTES_PER_TOKEN)
    return read, written
