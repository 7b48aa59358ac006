"""The ledger: a row for each request, written by its own thread.

Theory of operation
===================

Most rows are made by ``Accounting`` in the event loop, where their data are at hand. The thread wakes once for
everything ``put`` within ``GATHER`` seconds, reads the tokens from the ends of answers that do not report them in
the usual form, adds the costs, and writes the rows in batches. Their sums are kept beside them, for the file and
for the metrics. Nothing waits for the thread. It handles many rows with each call: it shares the interpreter's
lock with the loop, and each change of hands costs as much as some rows.

When the file cannot be written (a full disk, another process that holds it), the thread tries again after a pause,
and keeps up to ``KEPT`` new rows meanwhile. Rows beyond that are lost: they are counted, logged, and recorded with
the next batch. A damaged file is renamed and a new one begun. A file that was removed or replaced is made anew.

No row is written twice: a batch is one transaction, and when its outcome is unknown, the last row's id tells. A
killed llmux loses the rows that it had not written yet: requests which ended within the last moments.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import math
import operator
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmux.accounts.aging import Calendar
from llmux.accounts.key_metrics import KeyMetrics
from llmux.accounts.ledger_file import (
    BATCH,
    PATIENCE,
    ForeignFileError,
    Place,
    Row,
    Store,
    add_sums,
    check,
    damaged,
    set_aside,
    sums_of,
)
from llmux.accounts.pricing import CURRENCY, Catalogue, Prices, TokenPrice, of_gpu, of_tokens, version_of
from llmux.accounts.tokens import Answer, tokens_of
from llmux.config.accounts import HOUSE
from llmux.errors import ConfigError

GATHER = 0.05  # seconds: what kill -9 may lose; waking the thread costs as much as a hundred rows
WAITING = 10_000  # requests that the thread has not processed
WITH_ANSWERS = 1000  # how many of these keep the ends of their answers
KEPT = 50_000  # rows not written yet
RECENT = 1200  # rows of the last requests: as many as are shown, and some more
YIELD = 0.0002  # seconds: lets the event loop run
SLICE = 2000  # rows that are summed in one go
SLICE_TO_READ = 128  # requests processed in one go if answers of some have to be read
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds after so many failures in a row
CLEAN_EVERY = 600.0  # seconds between two deletions of old rows
LAST_TRIES = 2.0  # seconds for the last rows
CLOSE_WAITS = 5.0  # seconds that a stop waits for them
SETTLE_WAITS = 2.0  # seconds that a reader waits for earlier rows


class Ended(NamedTuple):
    """A request that has ended, whose answer has still to be read. Times are seconds."""

    time: float  # since 1970
    request_id: str
    key: str
    asked: str | None
    served: str | None
    waited: float
    service: float
    status: int
    reason: str | None
    path: str
    sent: int
    begun: bool
    own: float  # its own share of the time that the GPU was held
    switch: float  # its share of switches
    prices: Prices | None
    opening: bytes
    tail: Sequence[bytes]  # the last blocks of the answer
    events: int
    number: int = 0  # among the last requests, 0 if it is not one of them


class Charge(NamedTuple):
    """Seconds that no request carries: switches that a key owes, and what falls to the house."""

    time: float
    key: str
    model: str
    own: float
    switch: float
    prices: Prices | None


class Reserved(NamedTuple):
    """The part of a budget that is reserved for a request in progress."""

    ident: str  # unique
    time: float
    request_id: str
    key: str
    model: str
    micros: int
    prices: Prices


class Released(NamedTuple):
    """The request of a reservation has ended; its row was put before."""

    ident: str


class Elsewhere(NamedTuple):
    """Prices of remote models that will be needed."""

    prices: Prices


Tell = Callable[..., None]
Finished = tuple[Any, ...]
"""A finished row: the fields of a ``Row``; the request's number, as in ``Ended``; and the prices for the cost,
which is still to be computed, or None for none."""
Message = Finished | Ended | Charge | Reserved | Released | Elsewhere


class Ledger:
    """Writes the ledger of one llmux.

    ``keep`` is how long rows stay, in seconds; None: for ever. The thread calls ``tell(event, **fields)`` when
    something goes wrong.
    """

    def __init__(self, path: Path, keep: float | None, tell: Tell, prices: Prices | None = None) -> None:
        """Lock the file, and start with these ``prices``. Raises ConfigError if it cannot be the ledger."""
        self.path = path
        self.keep = keep
        self.lost = 0  # rows, since the start
        self.rates: Mapping[str, TokenPrice] = {}
        """Known prices of remote models for which the configuration has none."""
        self.metrics = KeyMetrics(lambda: self.lost)
        self._recent: Sequence[Finished] = ()  # in order; replaced, never changed, as the loop may be reading it
        self.awake = False  # the thread has been woken for what is waiting
        self._tell = tell
        self._lock = _locked(path)
        self._waiting: list[Message] = []
        self._put = self._done = 0  # messages put and processed, since the start
        self._tally: Any = None  # puts rows without a call of ``put``
        self._dropped = 0  # messages for which there was no room, not counted by the thread yet
        self._wake = threading.Event()
        self._hurry = threading.Event()  # set: do not gather
        self._ending = False
        self.opened = threading.Event()  # or cannot be opened
        # Used by the thread only:
        self._rows: deque[Finished] = deque()
        self._sums: dict[Place, list[int]] = {}  # sums of all these rows
        self._reserved: dict[str, Reserved] = {}  # of requests in progress, not in the file yet
        self._stored: set[str] = set()  # of requests in progress, in the file
        self._released: set[str] = set()  # in the file, though their requests have ended
        self._unsaid = 0  # lost rows that the file does not mention yet
        self._store: Store | None = None
        self._last: int | None = None  # id of the last row that is known to be written
        self._doubtful = 0  # rows of a batch that may have been written
        self._failures = 0
        self._not_before = 0.0
        self._cleaned = 0.0
        self._calendar = Calendar()
        self._rest = 0.0  # of a microsecond
        self._gpu_rest = self._token_rest = 0  # of a millionth of the currency
        self._prices: Prices | None = None
        self._version = 0
        self._catalogue = Catalogue(tell)
        self._unsaid_prices: dict[int, str] = {}
        if prices is not None and prices.elsewhere:
            self.put(Elsewhere(prices))
        self._thread = threading.Thread(target=self._run, name="llmux-ledger", daemon=True)
        self._thread.start()

    # ---- the event loop's side

    def recent(self) -> Mapping[int, Row]:
        """Return the rows of the last requests, by their numbers there, as far as they have been made."""
        return {row[_NUMBER]: Row._make(row[:_NUMBER]) for row in self._recent if row[_NUMBER]}

    def put(self, message: Message) -> None:
        """Queue what has happened for the thread."""
        waiting = self._waiting
        self._put += 1
        if len(waiting) >= WITH_ANSWERS:
            if len(waiting) >= WAITING:
                self._dropped += 1
                return
            if message.__class__ is Ended:
                message = message._replace(opening=b"", tail=())
        waiting.append(message)
        if not self.awake:
            self.wake()

    def feed(self, tally: Any) -> None:
        """Let a compiled ``Tally`` put rows by itself while the thread is awake and there is room."""
        tally.ledger, tally.waiting, tally.room = self, self._waiting, WAITING
        self._tally = tally

    @property
    def _all(self) -> int:
        return self._put if self._tally is None else self._put + int(self._tally.made)

    def wake(self) -> None:
        """Make the thread process what is waiting, soon."""
        self.awake = True
        self._wake.set()

    async def settled(self) -> None:
        """Wait until what has ended so far is written, but not for long."""
        target, until = self._all, time.monotonic() + SETTLE_WAITS
        self._hurry.set()
        while (self._done < target or not self.opened.is_set()) and time.monotonic() < until:  # noqa: ASYNC110 - a thread counts, for few readers
            await asyncio.sleep(0.005)

    def close(self) -> None:
        """Write what is pending, and close the file; waits for that, but not long."""
        self._ending = True
        self._hurry.set()
        self._wake.set()
        self._thread.join(CLOSE_WAITS)
        os.close(self._lock)

    # ---- the thread

    def _run(self) -> None:
        self._try(self._open)
        self._look()  # at the prices that the first requests may need
        self.opened.set()
        while True:
            self._wake.wait(self._pause())
            self._wake.clear()
            if not self._ending:
                self._hurry.wait(GATHER)
            self._hurry.clear()
            self.awake = False
            self._look()
            if self._ending and not self._waiting:
                break
            if self._due and time.monotonic() >= self._not_before:
                self._write()
            self._clean()
        self._end()

    def _end(self) -> None:
        until = time.monotonic() + LAST_TRIES
        while self._due:
            self._write()
            if self._due:
                if time.monotonic() >= until:
                    self._lose(len(self._rows))
                    break
                time.sleep(PATIENCE)
        if self._store is not None:
            self._store.close()

    @property
    def _due(self) -> bool:
        return bool(self._rows or self._reserved or self._released)

    def _pause(self) -> float:
        if self._due:
            return max(0.0, self._not_before - time.monotonic())
        return CLEAN_EVERY

    def _look(self) -> None:
        """Make rows of what is waiting."""
        waiting = self._waiting
        while waiting:
            rows: list[Any] = waiting[:SLICE]
            if {*map(type, rows)} == _ALL_MADE:
                del waiting[: len(rows)]
            else:
                some = rows[:SLICE_TO_READ]
                del waiting[: len(some)]
                rows = [row for message in some if (row := self._made(message)) is not None]
            if rows:
                rows = self._add_costs(rows)
                self._recent = [*self._recent, *rows][-RECENT:]
                sums = sums_of(rows)
                self.metrics.add(sums)
                add_sums(self._sums, sums)
                self._rows += rows
            if waiting:
                time.sleep(YIELD)
        dropped, self._dropped = self._dropped, 0
        over = max(0, len(self._rows) - KEPT)
        if over:
            add_sums(self._sums, sums_of(self._rows.pop() for _ in range(over)), -1)
        self._lose(dropped + over)

    def _made(self, message: Message) -> Finished | None:
        if message.__class__ is tuple:
            return message
        try:
            if message.__class__ is Ended:
                return self._row(message)
            if message.__class__ is Charge:
                return self._charge(*message)
            self._hold(message)
        except Exception as error:  # noqa: BLE001 - one odd answer must not end the thread
            self._tell("internal_error", error=str(error), exc_info=error)
            self._lose(1)
        return None

    def _row(self, ended: Ended) -> Finished:
        status, reason, served = ended.status, ended.reason, ended.served or ""
        whole = reason is None and status != 499  # noqa: PLR2004 - nginx's for a client that left
        read, cached, wrote, thought, estimated, prompt, decode = tokens_of(
            Answer(ended.path, status, whole, ended.sent, ended.begun, ended.opening, ended.tail, ended.events)
        )
        return (
            int(ended.time * 1000), ended.request_id, ended.key, ended.asked or "", served,
            served if ended.begun else "", read, cached, wrote, thought, 1 if estimated else 0, 0, "", None,
            int(ended.waited * 1000), int(ended.service * 1000), self._microseconds(ended.own),
            self._microseconds(ended.switch), None if prompt is None else int(prompt * 1e6),
            None if decode is None else int(decode * 1e6), status, reason or "", 0, ended.number, ended.prices,
        )  # fmt: skip

    def _add_costs(self, rows: list[Finished]) -> list[Finished]:
        """Return the rows with their costs."""
        if not any(map(_PRICES, rows)):
            return rows
        found = []
        for row in rows:
            prices = row[_NUMBER + 1]
            if prices is None:
                found.append(row)
                continue
            try:
                served = "" if row[_KIND] else row[4]  # a switch costs GPU time, whatever the model costs
                cost = self._cost(prices, served, row[16] + row[17], (row[6], row[7], row[8]))
            except Exception as error:  # noqa: BLE001 - an error in a package must not end the thread
                self._tell("internal_error", error=str(error), exc_info=error)
                self._lose(1)
                continue
            found.append((*row[:_COST], *cost, *row[_COST + 3 :]))
        return found

    def _hold(self, message: tuple[Any, ...]) -> None:
        self._done += 1
        if isinstance(message, Elsewhere):
            self._look_up(message.prices)
            return
        if isinstance(message, Reserved):
            self._reserved[message.ident] = message
            return
        (ident,) = message
        if self._reserved.pop(ident, None) is None and ident in self._stored:
            self._stored.remove(ident)
            self._released.add(ident)

    def _charge(
        self, now: float, key: str, model: str, own: float, switch: float, prices: Prices | None
    ) -> Finished:
        kind = 1 if key != HOUSE else 2
        return (
            int(now * 1000), "", key, "", model, "", 0, 0, 0, 0, 0, 0, "", None, 0, 0, self._microseconds(own),
            self._microseconds(switch), None, None, 0, "", kind, 0, prices,
        )  # fmt: skip

    def _microseconds(self, seconds: float) -> int:
        # The fraction goes to the next: sums are exact for any number of rows.
        exact = seconds * 1e6 + self._rest
        whole = math.floor(exact)
        self._rest = exact - whole
        return whole

    def _cost(
        self, prices: Prices, served: str | None, microseconds: int, tokens: tuple[int, int, int]
    ) -> tuple[int, str, int | None]:
        version = self._version_of(prices)
        price = prices.models.get(served or "")
        if price is None and served is not None and served in prices.elsewhere:
            return self._listed(prices, served, tokens)
        if price is None:
            cost, self._gpu_rest = of_gpu(prices, microseconds, self._gpu_rest)
        else:
            cost, self._token_rest = of_tokens(price, tokens, self._token_rest)
        return cost, prices.currency, version

    def _look_up(self, prices: Prices) -> None:
        """Find the prices of remote models. An error in a package must not end the thread."""
        if prices.currency != CURRENCY:
            return
        try:
            self._catalogue.look_up(prices.elsewhere.items())
        except Exception as error:  # noqa: BLE001
            self._tell("internal_error", error=str(error), exc_info=error)
        self.rates = dict(self._catalogue.rates)

    def _listed(self, prices: Prices, served: str, tokens: tuple[int, int, int]) -> tuple[int, str, int | None]:
        """Return the cost of a request that a remote served; if it is unknown, 0 without a version."""
        catalogue = self._catalogue
        cost = None
        if prices.currency == CURRENCY:
            cost = catalogue.price_of(served, prices.elsewhere[served], tokens)
        if cost is None:
            return 0, prices.currency, None
        version = version_of(catalogue.document)
        self._unsaid_prices.setdefault(version, catalogue.document)
        return cost, prices.currency, version

    def _version_of(self, prices: Prices) -> int:
        if prices is not self._prices:
            self._prices, self._version = prices, version_of(prices.document)
            self._unsaid_prices[self._version] = prices.document
        return self._version

    def _lose(self, count: int) -> None:
        if not count:
            return
        if not self._unsaid:
            self._tell("ledger_rows_lost", path=str(self.path), count=count)
        self.lost += count
        self._unsaid += count
        self._done += count

    def _write(self) -> None:
        while self._due:
            batch = list(itertools.islice(self._rows, BATCH))
            # A reservation is removed after the row of its request is in the file.
            holds = len(batch) == len(self._rows)
            if not self._try(self._write_batch, batch, holds):
                return

    def _try(self, work: Callable[..., object], *arguments: object) -> bool:
        """Do something with the file; if that fails, log it and return False."""
        try:
            work(*arguments)
        except (sqlite3.OperationalError, sqlite3.DatabaseError, OSError, ForeignFileError) as error:
            self._failed(error)
            return False
        return True

    def _write_batch(self, batch: list[Finished], holds: bool) -> None:
        store = self._open()
        if batch and (not self._rows or self._rows[0] is not batch[0]):
            return  # it had been written
        reserved = [(one, self._version_of(one.prices)) for one in self._reserved.values()] if holds else []
        rows = [_reservation(*each) for each in reserved]
        self._doubtful = len(batch)
        sums = self._sums if holds else None
        try:
            store.write(batch, self._unsaid, self._unsaid_prices, rows, self._released if holds else (), sums)
        except (ValueError, OverflowError, sqlite3.ProgrammingError) as error:
            # A row that cannot be written must not block or take along the others.
            self._tell("internal_error", error=str(error), exc_info=error)
            self._take(len(batch))
            rest = [row for row in batch if _can_be_written(row)]
            if len(rest) < len(batch):
                self._rows.extendleft(reversed(rest))
                add_sums(self._sums, sums_of(rest))
            self._lose(len(batch) - len(rest) or len(batch))
        else:
            self._written(len(batch))
            if holds:
                self._stored.update(self._reserved)
                self._reserved.clear()
                self._released.clear()

    def _written(self, count: int) -> None:
        self._take(count)
        self._last = None if self._last is None else self._last + count
        self._done += count
        self._doubtful = self._unsaid = self._failures = 0
        self._unsaid_prices.clear()

    def _take(self, count: int) -> None:
        if count == len(self._rows):
            self._rows.clear()
            self._sums.clear()
        else:
            add_sums(self._sums, sums_of(self._rows.popleft() for _ in range(count)), -1)

    def _open(self) -> Store:
        store = self._store
        if store is not None and store.in_place:
            return store
        if store is not None:
            store.close()
            self._store = self._last = self._prices = None
        store = self._store = Store(self.path)
        self._settle_killed(store)
        last = store.last()
        if self._doubtful and self._last is not None and last >= self._last + self._doubtful:
            self._written(self._doubtful)
        self._last, self._doubtful = last, 0
        return store

    def _settle_killed(self, store: Store) -> None:
        """Count as spent what was reserved for requests in progress when llmux was killed."""
        left = [one for one in store.reservations() if one[0] not in self._stored | self._released]
        if not left:
            return
        rows = [
            Row(
                now, request_id, key, "", model, "", 0, 0, 0, 0, 1, micros, currency, price, 0, 0, 0, 0,
                None, None, 0, "killed", 3,
            )
            for _, now, request_id, key, model, micros, currency, price in left
        ]  # fmt: skip
        store.write(rows, released=[one[0] for one in left])
        self._tell("reservations_settled", count=len(left))

    def _failed(self, error: Exception) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
        if isinstance(error, sqlite3.Error) and damaged(error):
            with contextlib.suppress(OSError):
                aside = set_aside(self.path)
                self._tell("ledger_set_aside", path=str(self.path), renamed=str(aside), error=str(error))
                self._last = self._prices = None  # the new file needs the prices again
                self._not_before = time.monotonic() + (PAUSES[0] if self._failures else 0.0)
                self._failures += 1
                return
        if not self._failures:
            self._tell("ledger_unwritable", path=str(self.path), error=str(error))
        self._not_before = time.monotonic() + PAUSES[min(self._failures, len(PAUSES) - 1)]
        self._failures += 1

    def _clean(self) -> None:
        """Delete old rows, a batch at a time; pending rows are written in between."""
        now = time.monotonic()
        if self.keep is None or self._store is None or now < self._cleaned:
            return
        try:
            today = self._calendar.now()
            more = self._store.forget(round((today - self.keep) * 1000), round(today * 1000))
        except sqlite3.Error as error:
            self._failed(error)
            more = False
        if more:
            self._wake.set()
        else:
            self._cleaned = now + CLEAN_EVERY


_NUMBER = len(Row._fields)  # the index of the number in a finished row
_ALL_MADE = {tuple}
_PRICES = operator.itemgetter(_NUMBER + 1)
_KIND = Row._fields.index("kind")
_COST = Row._fields.index("cost")  # followed by the currency and the version of the prices


def _can_be_written(row: Finished) -> bool:
    try:
        for value in row[:_NUMBER]:
            if isinstance(value, str):
                value.encode()
            elif value is not None:
                int(value).to_bytes(8, signed=True)
    except (ValueError, OverflowError):
        return False
    return True


def _reservation(one: Reserved, version: int) -> tuple[Any, ...]:
    ident, now, request_id, key, model, micros, prices = one
    return ident, int(now * 1000), request_id, key, model, micros, prices.currency, version


def _locked(path: Path) -> int:
    """Return the lock of a ledger, which only one llmux can hold. Raises ConfigError."""
    beside = path.with_name(f"{path.name}.lock")
    try:
        check(path)
        lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except ForeignFileError as error:
        raise ConfigError(f"{path} {error}; give another file, or null", path="ledger") from error
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{path} cannot be written: {why}; give another file, or null", path="ledger") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        why = f"cannot be locked: {error.strerror or error}; give one on a local disk, or null"
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            why = "is written by another llmux; give each its own"
        raise ConfigError(f"{path} {why}", path="ledger") from error
    return lock
