"""The accounts of one llmux: what is recorded of each request, and queries about it.

Theory of operation
===================

The event loop does the accounting at once: ``Shares`` divides the time, and a request that ends becomes a row. Its
data are at hand then; to keep them for another thread would cost more than to make the row. The ledger's thread
does the rest: work that one call does for many rows, and answers whose report is not in the usual form.
``tally.c`` is the compiled version, if there is one, of the usual case of ``told``, ``ended`` and ``Shares``; it
leaves every other case to the Python code here.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llmux.accounts import usage
from llmux.accounts.gate import Gate
from llmux.accounts.ledger import Charge, Elsewhere, Ended, Ledger, Message, Released, Reserved
from llmux.accounts.pricing import TokenPrice, prices_of
from llmux.accounts.shares import Shares, native
from llmux.accounts.tokens import told
from llmux.config import Config
from llmux.config.accounts import HOUSE
from llmux.core import effects as fx
from llmux.errors import UnavailableError
from llmux.runtime import Switcher, Ticket
from llmux.runtime.request_handle import Outcome
from llmux.runtime.requests import Answered

Told = Callable[[list[bytes]], tuple[int, int] | None]
Ends = Callable[
    [Answered, int, float, float, int, str | None, str | None, tuple[int, int] | None], float
]  # ``Accounting._ended``

EVERY = 60.0  # seconds between two rows for the house while nothing happens
STARTING = 1.0  # seconds that a start, or a reload with a new budget, waits for the ledger


class Accounting:
    """Records what a switcher does."""

    def __init__(self, switcher: Switcher) -> None:
        self._switcher = switcher
        self._config = switcher.config
        self._state = switcher.core.state
        self._timer: asyncio.TimerHandle | None = None
        self.gate: Gate | None = None
        self.ledger: Ledger | None = None
        self.shares = Shares(self._waiters, switcher.key_of)
        self.tally = self.shares.tally
        self.told: Told = told
        self.ended: Ends = self._ended
        self.configure(switcher.config)

    def configure(self, config: Config) -> None:
        """Apply a configuration. A new ledger path needs a restart."""
        self.prices = self.tally.prices = prices_of(config)
        if self.prices is not None and self.prices.elsewhere:
            self._put(Elsewhere(self.prices))
        self.shares.payers = config.charge.switch
        self.shares.everyone = tuple(entry.name for entry in config.api_keys if entry.name is not None)

    def start(self) -> None:
        """Begin. Raises ConfigError when the ledger cannot be used."""
        path = self._config.ledger_path
        assert path is not None
        if self._config.ledger is True:  # the state file's folder, which may not be there yet
            with contextlib.suppress(OSError):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        switcher, shares = self._switcher, self.shares
        self.ledger = Ledger(path, self._config.ledger_keep, switcher.log.emit, self.prices)
        switcher.metrics.registry.register(self.ledger.metrics)
        if (compiled := native()) is not None:
            self.ledger.feed(self.tally)
            self.tally.otherwise = self._ended
            self.told, self.ended = compiled.told, self.tally.ended
        on = switcher.timeline.on
        on(fx.Admit, self.tally.admitted)
        on(fx.PhaseChanged, shares.phase_changed)
        on(fx.ModelRemoved, shares.removed)
        on(fx.SwitchStarted, shares.switch_started)
        on(fx.SwitchEnded, self._switch_ended)
        switcher.on_left(self._request_left, without_outcome=True)
        self._look_at_clock()
        self._timer = asyncio.get_running_loop().call_later(EVERY, self._turn)
        if self.gate is not None:
            self.ledger.opened.wait(STARTING)
            self.gate.kept_by(self)

    def spent(self, key: str, period: tuple[int, int]) -> int:
        """Return what a key has spent in a period of Unix times, in millionths; 0 if that cannot be read."""
        ledger, currency = self.ledger, None if self.prices is None else self.prices.currency
        assert ledger is not None
        since, until = period
        self._look_at_clock()  # it has been set, perhaps: what is spent from now on is of that period
        try:
            rows = usage.read(ledger.path, usage.Asked((), since, key, until=until), patience=STARTING)
        except sqlite3.Error as error:
            self._switcher.log.emit("budget_unknown", key=key, error=str(error))
            return 0
        return sum(row["cost_micros"] for row in rows if row["currency"] == currency)

    @property
    def rates(self) -> Mapping[str, TokenPrice]:
        """Known prices of remote models for which the configuration has none."""
        return {} if self.ledger is None else self.ledger.rates

    def reserve(self, ident: str, request_id: str, key: str, model: str, micros: int) -> None:
        """Record a reservation; if llmux crashes, it counts as spent."""
        if self.prices is not None:
            self._put(Reserved(ident, time.time(), request_id, key, model, micros, self.prices))

    def release(self, ident: str) -> None:
        """Forget a reservation: its request has ended."""
        self._put(Released(ident))

    def close(self) -> None:
        """Write what is pending; waits for that, but not long."""
        if self._timer is not None:
            self._timer.cancel()
        if self.ledger is not None:
            self._settle()
            self.ledger.close()

    # ---- what happens

    def _put(self, message: Message) -> None:
        if self.ledger is not None:
            self.ledger.put(message)

    def _waiters(self, model: str) -> Iterable[int]:
        found = self._switcher.core.state.models.get(model)
        return () if found is None else tuple(found.queue)

    def returned(self, request: int) -> None:
        """Record that an admitted request is queued again."""
        self.shares.returned(self._switcher.now(), request)

    def _request_left(self, ticket: Ticket, _status: int | None, _outcome: Outcome | None, _sent: int) -> None:
        """Charge a request whose end is not reported: a guard's, or one that starts again elsewhere."""
        self._owe()
        self.tally.left = (ticket.id, ticket.key, *self.shares.ended(self._state.now, ticket.id, ticket.key))

    def _ended(
        self, request: Answered, number: int, now: float, waited: float, status: int, failure: str | None,
        key: str | None, report: tuple[int, int] | None,
    ) -> float:  # fmt: skip
        """Record a request that has ended; return the seconds of the GPU that it took, switches included.

        ``number`` is its number among the last requests, and ``report`` what ``told`` returned for its answer.
        """
        ledger, tally, ticket = self.ledger, self.tally, request.ticket
        if ledger is None:  # it ended before the start
            return 0.0
        if not ledger.awake:  # rare enough
            self._look_at_clock()
        if report is None or ticket is None or tally.left is not None:
            return self._ended_otherwise(ledger, request, number, now, waited, status, failure, key)
        own, switch = self.shares.ended(now, ticket.id, ticket.key)
        exact = own * 1e6 + tally.rest  # the part below a microsecond goes to the next request: sums are exact
        micros = int(exact)
        tally.rest = exact - micros
        charged = 0
        if switch:
            exact = switch * 1e6 + tally.rest
            charged = int(exact)
            tally.rest = exact - charged
        model = request.model or ""
        ledger.put((
            int((tally.epoch + now) * 1000), request.request_id, key or "", request.asked or "", model, model,
            report[0], 0, report[1], 0, 0, 0, "", None, int(waited * 1000) if waited else 0,
            int((now - ticket.arrived - ticket.waited) * 1000), micros, charged, None, None, status, failure or "",
            0, number, self.prices,
        ))  # fmt: skip
        return own + switch

    def _ended_otherwise(
        self, ledger: Ledger, request: Answered, number: int, now: float, waited: float, status: int,
        failure: str | None, key: str | None,
    ) -> float:  # fmt: skip
        """Record a request without an answer, with an answer still to be read, or unknown to the core."""
        ticket, exchange = request.ticket, request.exchange
        own = switch = service = 0.0
        if ticket is None:
            waited = 0.0
        else:
            if exchange is not None:
                service = now - ticket.arrived - ticket.waited
            own, switch = self._share_of(now, ticket)
        if key or request.model:  # a flood of requests without a key and model must not fill the disk
            ends: tuple[bytes, Sequence[bytes], int] = (b"", (), 0)
            if exchange is not None:
                ends = exchange.opening, exchange.tail, exchange.events
            begun = exchange is not None and ticket is not None
            ledger.put(Ended(
                self.tally.epoch + now, request.request_id, key or "", request.asked, request.model, waited,
                service, status, failure, request.route.path, request.sent, begun, own, switch, self.prices,
                *ends, number,
            ))  # fmt: skip
        return own + switch

    def _share_of(self, now: float, ticket: Ticket) -> tuple[float, float]:
        left: tuple[int, str, float, float] | None = self.tally.left
        if left is not None and left[0] == ticket.id:
            self.tally.left = None
            return left[2:]
        self._owe()
        return self.shares.ended(now, ticket.id, ticket.key)

    def _look_at_clock(self) -> None:
        self.tally.epoch = time.time() - time.monotonic()

    def _switch_ended(self, now: float, effect: fx.SwitchEnded) -> None:
        self.shares.switch_ended(now, effect)
        self._charge()

    def _settle(self) -> None:
        self._owe()
        self._charge()

    def _turn(self) -> None:
        self._look_at_clock()
        self._settle()
        self._timer = asyncio.get_running_loop().call_later(EVERY, self._turn)

    def _owe(self) -> None:
        """Charge what a request used whose end was not reported."""
        left, self.tally.left = self.tally.left, None
        if left is None:
            return
        _, key, own, switch = left
        if own or switch:
            self._put(Charge(time.time(), key, "", own, switch, self.prices))

    def _charge(self) -> None:
        house, due = self.shares.take(self._switcher.now())
        now = time.time()
        if house and self.prices is not None:
            self._put(Charge(now, HOUSE, "", house, 0.0, self.prices))
        for key, seconds, model in due:
            self._put(Charge(now, key, model, 0.0, seconds, self.prices))

    # ---- what is asked

    def complete(self, requests: Iterable[dict[str, Any]]) -> None:
        """Add to the last requests what the ledger knows of them, if it has processed them already.

        That is tokens (also estimated ones), seconds of the GPU, and cost.
        """
        assert self.ledger is not None
        recent = self.ledger.recent()
        for request in requests:
            row = recent.get(request["id"])
            if row is not None:
                request.update(usage.of_row(row))

    async def past(self, wanted: usage.Wanted) -> tuple[list[dict[str, Any]], int | None]:
        """Return past requests (see ``usage.past_requests``). Raises UnavailableError."""
        assert self.ledger is not None
        self._settle()
        await self.ledger.settled()
        try:
            return await asyncio.to_thread(usage.past_requests, self.ledger.path, wanted)
        except sqlite3.Error as error:
            raise _unreadable(error) from error

    async def usage(self, given: Mapping[str, str]) -> dict[str, Any]:
        """Answer a query (see ``usage.asked``). Raises ValueError and UnavailableError."""
        ledger = self.ledger
        assert ledger is not None
        question = usage.asked(given, time.time())
        self._settle()
        await ledger.settled()
        try:
            rows = await asyncio.to_thread(usage.read, ledger.path, question)
        except sqlite3.Error as error:
            raise _unreadable(error) from error
        return {
            "by": list(question.by),
            "since": question.since,
            "usage": rows,
            "total": usage.totals(rows),
            "lost": ledger.lost,
        }

    async def usage_as_csv(self, given: Mapping[str, str]) -> str:
        """Answer a query in CSV."""
        document = await self.usage(given)
        return usage.as_csv(document["by"], document["usage"])


def _unreadable(error: sqlite3.Error) -> UnavailableError:
    return UnavailableError(f"The ledger cannot be read: {error}.", code="ledger_unreadable")
