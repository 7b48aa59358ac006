"""The accounts of one llmux: what is told of each request, and what is asked about them.

Theory of operation
===================

The event loop does as little as it can: that a request was admitted, left, and how it ended are three tuples in a
journal. The ledger's thread *catches up*: it takes them out, has ``Shares`` divide the time among them, and makes
rows of what ended. What is seldom, and depends on what is so at that moment (a switch, a model that comes or goes,
the cost of a request that a budget waits for), is dealt with at once in the loop, which catches up first. A lock
lets one of them do so at a time; the thread holds it for a few requests only. When the thread falls behind, as on
a disk that hangs, the loop catches up by itself, so that the journal is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmux.accounts import usage
from llmux.accounts.gate import Gate
from llmux.accounts.ledger import Charge, Elsewhere, Ledger, Released, Reserved
from llmux.accounts.pricing import TokenPrice, prices_of
from llmux.accounts.shares import Shares
from llmux.accounts.tokens import Tokens, told
from llmux.config import Config
from llmux.config.accounts import HOUSE
from llmux.core import effects as fx
from llmux.errors import UnavailableError
from llmux.runtime import Switcher, Ticket
from llmux.runtime.request_handle import Outcome

EVERY = 60.0  # seconds between two rows of what is the house's while nothing happens
STARTING = 1.0  # seconds that a start, or a reload with a new budget, waits for the ledger
LATER = 300  # entries of the journal that are no reason to wake the thread: each time is a switch of threads
SOON = 1500  # entries of the journal, three for a request, with which the thread is told to hurry
FULL = 4000  # with which the loop catches up by itself
_NO_ANSWER: tuple[Any, ...] = (b"", (), 0, None)


class Accounting:
    """Follows a switcher."""

    def __init__(self, switcher: Switcher) -> None:
        self._switcher = switcher
        self._config = switcher.config
        self._state = switcher.core.state
        self._journal: deque[tuple[Any, ...]] = deque()
        self._note = self._journal.append
        self._catching_up = threading.Lock()
        # While that is held:
        self._put: Callable[[tuple[Any, ...]], None] = _forget
        self._left: tuple[int, str, float, float] | None = None  # the last that left without an answer
        self._last = 0.0  # seconds that the last one took which has ended
        self._epoch = 0.0  # seconds since 1970 where the core's clock begins
        self._timer: asyncio.TimerHandle | None = None
        self.gate: Gate | None = None
        self.ledger: Ledger | None = None
        self.shares = Shares(self._waiters, switcher.key_of)
        self._admit, self._take_end = self.shares.admitted, self._end
        self.configure(switcher.config)

    def configure(self, config: Config) -> None:
        """Take over a configuration. Another ledger takes a restart."""
        with self._catching_up:
            self._catch_up()
            self.prices = prices_of(config)
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
        self.ledger = Ledger(path, self._config.ledger_keep, switcher.log.emit, self.prices, self._feed)
        self._put = self.ledger.put
        switcher.metrics.registry.register(self.ledger.metrics)
        on = switcher.timeline.on
        on(fx.Admit, self._admitted)
        on(fx.PhaseChanged, self._at_once(shares.phase_changed))
        on(fx.ModelRemoved, self._at_once(shares.removed))
        on(fx.SwitchStarted, self._at_once(shares.switch_started))
        on(fx.SwitchEnded, self._at_once(self._switch_ended))
        switcher.on_left(self._request_left)
        self._timer = asyncio.get_running_loop().call_later(EVERY, self._turn)
        if self.gate is not None:
            self.ledger.opened.wait(STARTING)
            self.gate.kept_by(self)

    def spent(self, key: str, since: int) -> int:
        """Return what a key has spent since a Unix time, in millionths; 0 where that cannot be read."""
        ledger, currency = self.ledger, None if self.prices is None else self.prices.currency
        assert ledger is not None
        try:
            rows = usage.read(ledger.path, usage.Asked((), since, key), patience=STARTING)
        except sqlite3.Error as error:
            self._switcher.log.emit("budget_unknown", key=key, error=str(error))
            return 0
        return sum(row["cost_micros"] for row in rows if row["currency"] == currency)

    @property
    def rates(self) -> Mapping[str, TokenPrice]:
        """What is known of the prices of models elsewhere that the configuration has none for."""
        return {} if self.ledger is None else self.ledger.rates

    def reserve(self, ident: str, request_id: str, key: str, model: str, micros: int) -> None:
        """Keep a reservation: a crash would have it spent."""
        if self.prices is not None:
            self._put_later(Reserved(ident, time.time(), request_id, key, model, micros, self.prices))

    def release(self, ident: str) -> None:
        """Forget a reservation: its request has ended."""
        self._put_later(Released(ident))

    def close(self) -> None:
        """Write what there is; waits for that, but not long."""
        if self._timer is not None:
            self._timer.cancel()
        if self.ledger is not None:
            self._settle()
            self.ledger.close()

    # ---- what happens, in the loop

    def _waiters(self, model: str) -> Iterable[int]:
        found = self._switcher.core.state.models.get(model)
        return () if found is None else tuple(found.queue)

    def _admitted(self, now: float, effect: fx.Admit) -> None:
        self._note((self._admit, now, effect.request))

    def _request_left(self, ticket: Ticket, _status: int | None, outcome: Outcome | None, _sent: int) -> None:
        """Charge a request of which no end will be told: a guard's, or one that begins anew elsewhere."""
        if outcome is None:
            self._note((self._leave, self._state.now, ticket.id, ticket.key))

    told = staticmethod(told)

    def ended(self, ended: tuple[Any, ...]) -> None:
        """Take a request that has ended: see ``_end`` for its fields."""
        ledger = self.ledger
        if ledger is not None:
            self._note((self._take_end, ended))
            if not ledger.awake:
                ledger.wake()
            if len(self._journal) > SOON:
                self._hurry(ledger)

    def later(self, call: tuple[Any, ...]) -> None:
        """Have something called when the journal is caught up with: in order, and mostly beside the loop."""
        if len(self._journal) > LATER:
            self._soon(call)
        elif self.ledger is not None:
            self._note(call)

    def _soon(self, call: tuple[Any, ...]) -> None:
        ledger = self.ledger
        if ledger is None:
            return
        self._note(call)
        if not ledger.awake:
            ledger.wake()
        if len(self._journal) > SOON:
            self._hurry(ledger)

    def _put_later(self, message: tuple[Any, ...]) -> None:
        self._soon((self._put_message, message))

    def _hurry(self, ledger: Ledger) -> None:
        ledger.hurry()
        waiting = len(self._journal)
        if waiting > FULL:
            self.catch_up(waiting)

    def took(self, ended: tuple[Any, ...]) -> float:
        """Take a request that has ended; return the seconds of the GPU that it took, those of switches, too.

        A budget has to know them at once.
        """
        self.ended(ended)
        with self._catching_up:
            self._catch_up()
            return self._last

    def returned(self, request: int) -> None:
        """Take note that an admitted request waits again."""
        with self._catching_up:
            self._catch_up()
            self.shares.returned(self._switcher.now(), request)

    def _at_once(self, take: Callable[[float, Any], None]) -> Callable[[float, Any], None]:
        def taken(now: float, effect: Any) -> None:
            with self._catching_up:
                self._catch_up()
                take(now, effect)

        return taken

    def _switch_ended(self, now: float, effect: fx.SwitchEnded) -> None:
        self.shares.switch_ended(now, effect)
        self._charge()

    def _settle(self) -> None:
        with self._catching_up:
            self._catch_up()
            self._owe()
            self._charge()

    def _turn(self) -> None:
        self._settle()
        self._timer = asyncio.get_running_loop().call_later(EVERY, self._turn)

    # ---- what is made of it, in the loop or in the ledger's thread

    def catch_up(self, most: int) -> bool:
        """Deal with so many entries of the journal at most; return whether there was one."""
        if not self._journal:
            return False
        with self._catching_up:
            self._catch_up(most)
        return True

    def _feed(self, most: int) -> bool:
        """As ``catch_up``, in the ledger's thread, which makes rows of it at once."""
        if not self._journal:
            return False
        assert self.ledger is not None
        with self._catching_up:
            self._put = self.ledger.take
            try:
                self._catch_up(most)
            finally:
                self._put = self.ledger.put
        return True

    def _catch_up(self, most: float = math.inf) -> None:
        journal = self._journal
        self._epoch = time.time() - time.monotonic()
        while journal and most > 0:
            most -= 1
            entry = journal.popleft()
            try:
                if len(entry) == 2:  # noqa: PLR2004 - what has ended, and what is put
                    entry[0](entry[1])
                elif len(entry) == 3:  # noqa: PLR2004 - what was admitted
                    entry[0](entry[1], entry[2])
                else:
                    entry[0](*entry[1:])
            except Exception as error:  # noqa: BLE001 - one odd entry must not hold up those behind it
                self._switcher.log.emit("internal_error", error=str(error), exc_info=error)

    def _put_message(self, message: tuple[Any, ...]) -> None:
        self._put(message)

    def _leave(self, now: float, ticket: int, key: str) -> None:
        self._owe()
        self._left = (ticket, key, *self.shares.ended(now, ticket, key))

    def _end(self, entry: tuple[Any, ...]) -> None:
        """Put what becomes a row."""
        (
            now, number, request_id, key, asked, model, waited, ticket, payer, admitted, status, failure, path,
            sent, answer,
        ) = entry  # fmt: skip
        own = switch = service = 0.0
        begun = answer is not None and ticket is not None
        if ticket is None:
            waited = 0.0
        else:
            if begun:
                service = now - admitted
            left = self._left
            if left is None:
                own, switch = self.shares.ended(now, ticket, payer)
            elif left[0] == ticket:
                _, _, own, switch = left
                self._left = None
            else:
                self._owe()
                own, switch = self.shares.ended(now, ticket, payer)
        self._last = own + switch
        if answer.__class__ is Tokens:
            opening, tail, events = b"", answer, 0
        else:
            opening, tail, events, uncounted = answer or _NO_ANSWER
            if uncounted is not None:
                events += uncounted.total()
        if key or model:  # a flood of requests without a key, or for no model, fills no disk
            self._put((
                self._epoch + now, request_id, key, asked, model, waited, service, status, failure, path, sent,
                begun, own, switch, self.prices, opening, tail, events, number,
            ))  # fmt: skip

    def _owe(self) -> None:
        """Charge what a request got of which no end was told."""
        left, self._left = self._left, None
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
        """Add to the last requests what the ledger knows of them, where it has looked at them already.

        That is tokens (also estimated ones), seconds of the GPU, and cost.
        """
        assert self.ledger is not None
        for request in requests:
            row = self.ledger.recent(request["id"])
            if row is not None:
                request.update(usage.of_row(row))

    async def past(self, wanted: usage.Wanted) -> tuple[list[dict[str, Any]], int | None]:
        """Return requests of the past (see ``past_requests.read``). Raises UnavailableError."""
        assert self.ledger is not None
        self._settle()
        await self.ledger.settled()
        try:
            return await asyncio.to_thread(usage.past_requests, self.ledger.path, wanted)
        except sqlite3.Error as error:
            raise _unreadable(error) from error

    async def usage(self, given: Mapping[str, str]) -> dict[str, Any]:
        """Answer a question (see ``usage.asked``). Raises ValueError and UnavailableError."""
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
        """Answer a question in CSV."""
        document = await self.usage(given)
        return usage.as_csv(document["by"], document["usage"])


def _unreadable(error: sqlite3.Error) -> UnavailableError:
    return UnavailableError(f"The ledger cannot be read: {error}.", code="ledger_unreadable")


def _forget(_request: tuple[Any, ...]) -> None:
    """Forget a request that ends before the start."""
