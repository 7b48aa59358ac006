"""The ledger's file: SQLite in WAL mode, with a row for each request and its sums by the hour.

Only one thread uses it. A batch and its sums are written in one transaction, all or nothing, so the last row's id
tells whether a batch has been written already.

The sums by the hour and by the day make queries fast: ten million rows become some ten thousand. They stay when
rows are deleted for their age. The file is never compacted: freed pages are used again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmux.accounts.shares import native

APPLICATION = 0x6C6C6D78  # "llmx", in the header of the file
HOUR = 3_600_000  # milliseconds
BATCH = 2000  # rows of one transaction
FORGOTTEN = 500  # rows deleted in one transaction
PATIENCE = 0.1  # seconds to wait for another process that writes
# Rows of one statement. Preparing it takes as long as writing ten times as many rows.
_SIZES = (512, 128, 32)  # a prepared statement takes 2 KB of memory for each
_FEW = 32  # with fewer, equal columns make no difference; there is a statement for each number
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BESIDE = ("", "-wal", "-shm")


class Row(NamedTuple):
    """One request. It contains no prompt, no answer and no key."""

    time: int  # of its end: milliseconds since 1970
    request_id: str
    key: str  # the key's name, "" without one
    asked: str  # the model as the client named it, "" for none
    served: str  # the model, "" for one that is not configured
    target: str  # what served it: a model of this llmux
    input: int  # tokens, cached ones included
    cached: int
    output: int  # tokens, reasoning included
    reasoning: int
    estimated: int  # 1: the tokens are an estimate
    cost: int  # millionths of the currency
    currency: str  # "" without prices
    price: int | None  # the version of the prices
    waited: int  # milliseconds in the queue
    service: int  # milliseconds from its admission to its end
    gpu: int  # microseconds: its own share of the time that the GPU was held
    switch: int  # microseconds of switches that it is charged for
    prompt: int | None  # microseconds of reading, as the engine reports
    decode: int | None  # the same of writing
    status: int  # 499: its client left first
    reason: str  # the error's code, "" for none
    kind: int = 0
    """0: a request; 1: what a key owes for a switch beside its requests; 2: the house's; 3: reserved at a kill."""


Made = tuple[Any, ...]
"""The fields of a ``Row``, perhaps followed by others that are not written; a tuple is cheaper than a ``Row``."""
Place = tuple[int, str, str, str]
"""The key of a sum: the hour since 1970, the key, the model that served, the currency."""
SUMS = ("input", "cached", "output", "reasoning", "estimated", "cost", "waited", "service", "gpu", "switch")
"""The columns that are summed by the hour, besides the numbers of requests and of failures."""

_TEXTS = frozenset({"request_id", "key", "asked", "served", "target", "currency", "reason"})
_MAYBE = frozenset({"price", "prompt", "decode"})
_SUM_COLUMNS = ("hour", "key", "served", "currency", "requests", "failed", *SUMS)


def _column(name: str) -> str:
    return f'"{name}" {"TEXT" if name in _TEXTS else "INTEGER"}{"" if name in _MAYBE else " NOT NULL"}'


_HOURS = (
    "CREATE TABLE hours (hour INTEGER NOT NULL, key TEXT NOT NULL, served TEXT NOT NULL, currency TEXT NOT NULL,"
    f" requests INTEGER NOT NULL, failed INTEGER NOT NULL, {', '.join(map(_column, SUMS))},"
    " PRIMARY KEY (hour, key, served, currency)) WITHOUT ROWID"
)
_DAYS = _HOURS.replace("TABLE hours (hour", "TABLE days (day").replace("KEY (hour", "KEY (day")
_RESERVED = ("time", "request_id", "key", "served", "cost", "currency", "price")
_RESERVATIONS = f"CREATE TABLE reservations (id TEXT PRIMARY KEY, {', '.join(map(_column, _RESERVED))})"
_SUMMED = ", ".join(map('sum("{}")'.format, ("requests", "failed", *SUMS)))
_FILL_DAYS = f"INSERT INTO days SELECT hour / 24, key, served, currency, {_SUMMED} FROM hours GROUP BY 1, 2, 3, 4"  # noqa: S608
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        f"CREATE TABLE requests (id INTEGER PRIMARY KEY, {', '.join(map(_column, Row._fields))})",
        _HOURS,
        "CREATE TABLE losses (time INTEGER NOT NULL, rows INTEGER NOT NULL)",
    ),
    (
        "CREATE TABLE prices (version INTEGER PRIMARY KEY, since INTEGER NOT NULL, document TEXT NOT NULL)",
        _DAYS,
        _FILL_DAYS,
    ),
    (_RESERVATIONS,),
)
"""The statements that make each version of the schema from the one before."""

_ROW_COLUMNS = ", ".join(map('"{}"'.format, Row._fields))
_INSERT = f"INSERT INTO requests ({_ROW_COLUMNS}) VALUES "  # noqa: S608
_WIDTH = len(Row._fields)
_OFTEN_ALIKE = tuple(
    tuple(map(Row._fields.index, names))
    for names in (
        ("key",),
        ("asked", "served", "target"),
        ("cached", "prompt", "decode"),
        ("reasoning", "estimated", "currency", "price", "waited", "switch", "status", "reason", "kind"),
    )
)
"""Groups of columns which often have one value in all rows of a statement, so that it is bound once."""
_NOTHING_ALIKE = (False,) * len(_OFTEN_ALIKE)


@functools.lru_cache(maxsize=128)
def _insert_many(size: int, alike: tuple[bool, ...]) -> str:
    """Return the statement for so many rows: first come the values that are bound once, by their columns."""
    once = [at for places, same in zip(_OFTEN_ALIKE, alike, strict=True) if same for at in places]
    each = [at for at in range(_WIDTH) if at not in once]
    first = ",".join(f"?{[*once, *each].index(at) + 1}" for at in range(_WIDTH))
    # Other values have no numbers: SQLite would search all for each.
    other = ",".join(f"?{once.index(at) + 1}" if at in once else "?" for at in range(_WIDTH))
    return _INSERT + ",".join([f"({first})", *[f"({other})"] * (size - 1)])


def bound(
    rows: Sequence[Made], begin: int, size: int, width: int, groups: Sequence[Sequence[int]]
) -> tuple[tuple[bool, ...], list[Any]]:
    """Return which groups of columns are equal in all these rows, and the values for their statement.

    The values of these groups come first, once, then the other columns of each row.
    """
    piece = rows[begin : begin + size]
    columns = list(zip(*piece, strict=False))[:width]
    alike = tuple(all(columns[at].count(columns[at][0]) == size for at in group) for group in groups)
    once = [at for group, same in zip(groups, alike, strict=True) if same for at in group]
    values = [columns[at][0] for at in once]
    values += itertools.chain.from_iterable(
        zip(*(column for at, column in enumerate(columns) if at not in once), strict=True)
    )
    return alike, values


_Parts = tuple[str, int, str]
"""A statement for several rows: the text before them, the number of values in each, and the text after them."""


def _add(table: str, place: str) -> _Parts:
    columns = (place, *_SUM_COLUMNS[1:])
    update = ", ".join(map('"{0}" = "{0}" + excluded."{0}"'.format, columns[4:]))
    before = f"INSERT INTO {table} ({', '.join(columns)}) VALUES "  # noqa: S608
    return before, len(columns), f" ON CONFLICT DO UPDATE SET {update}"


_ADD_HOURS, _ADD_DAYS = _add("hours", "hour"), _add("days", "day")
_RESERVE: _Parts = ("INSERT OR REPLACE INTO reservations VALUES ", 1 + len(_RESERVED), "")
_RELEASE: _Parts = ("DELETE FROM reservations WHERE id IN (VALUES ", 1, ")")


@functools.lru_cache(maxsize=128)
def _for_many(parts: _Parts, size: int) -> str:
    before, width, after = parts
    row = f"({', '.join('?' * width)})"
    return before + ", ".join([row] * size) + after


def _sizes(count: int) -> Iterator[int]:
    """Yield the size of each statement for so many rows: each releases the interpreter's lock."""
    while count:
        size = next((size for size in _SIZES if size <= count), count)
        yield size
        count -= size


NO_PRICES: Mapping[int, str] = {}
_ERROR = 400  # statuses from here on are failures


class ForeignFileError(Exception):
    """The file belongs to another program, or to a newer llmux; it is left as it is."""


def damaged(error: sqlite3.Error) -> bool:
    """Whether an error means that the file cannot be used any more."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _DAMAGED


def check(path: Path) -> None:
    """Check that the file can be the ledger's. Raises ForeignFileError; other faults show later."""
    if not path.exists():
        return
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_connect(path)) as connection:
        _own(connection)


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be used, together with SQLite's files beside it. Raises OSError."""
    stamp = time.strftime("%Y%m%dT%H%M%S")
    name, number = f"{path.name}.damaged-{stamp}", 1
    while path.with_name(name).exists():
        number += 1
        name = f"{path.name}.damaged-{stamp}-{number}"
    for end in _BESIDE:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(path.with_name(name + end))
    return path.with_name(name)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)


def _own(connection: sqlite3.Connection) -> int:
    """Return the version of the schema, 0 for an empty file. Raises ForeignFileError."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == APPLICATION and version > len(MIGRATIONS):
        raise ForeignFileError(f"is of a newer llmux (version {version}; this one knows {len(MIGRATIONS)})")
    if application != APPLICATION and (tables or application):
        raise ForeignFileError("is a database of another program")
    return int(version)


class Store:
    """The open file. Every method raises sqlite3.Error when the file cannot be read or written."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, and migrate it to this version. Raises OSError and ForeignFileError, too."""
        self.path = path
        self._name = os.fspath(path)
        # SQLite's files beside it get the same mode.
        if path.exists():
            with contextlib.suppress(OSError):
                path.chmod(0o600)
        else:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._connection = _connect(path)
        try:
            version = _own(self._connection)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing
            self._connection.execute(f"PRAGMA journal_size_limit = {64 * 2**20}")
            for number in range(version, len(MIGRATIONS)):
                self._transaction(functools.partial(self._migrate, number))
            self._inode = path.stat().st_ino
        except BaseException:
            self._connection.close()
            raise

    def _migrate(self, version: int) -> None:
        for statement in MIGRATIONS[version]:
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
        self._connection.execute(f"PRAGMA user_version = {version + 1}")

    def _transaction(self, work: Callable[[], None]) -> None:
        # Each of these releases the interpreter's lock once, ``execute`` three times.
        self._connection.executescript("BEGIN IMMEDIATE")
        try:
            work()
            self._connection.commit()
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    @property
    def in_place(self) -> bool:
        """Whether the path still names this file."""
        try:
            return os.stat(self._name).st_ino == self._inode  # noqa: PTH116 - with each batch
        except OSError:
            return False

    def last(self) -> int:
        """Return the id of the last row, 0 for none."""
        (found,) = self._connection.execute("SELECT max(id) FROM requests").fetchone()
        return found or 0

    def write(
        self,
        rows: Sequence[Made],
        lost: int = 0,
        prices: Mapping[int, str] = NO_PRICES,
        reserved: Sequence[tuple[Any, ...]] = (),
        released: Iterable[str] = (),
        sums: Mapping[Place, Sequence[int]] | None = None,
    ) -> None:
        """Write a batch.

        ``lost`` is the number of rows lost before it; ``prices``, by version, are new in it; ``reserved`` and
        ``released`` are changes of the reservations. ``sums`` are those of its rows, if they are known.
        """

        def work() -> None:
            self._insert(rows)
            added = (sums_of(rows) if sums is None else sums).items()
            self._change(_ADD_HOURS, [(*place, *each) for place, each in added])
            self._change(_ADD_DAYS, [(hour // 24, *place, *each) for (hour, *place), each in added])
            now = round(time.time() * 1000)
            if lost:
                self._connection.execute("INSERT INTO losses VALUES (?, ?)", (now, lost))
            for version, document in prices.items():
                self._connection.execute("INSERT OR IGNORE INTO prices VALUES (?, ?, ?)", (version, now, document))
            self._change(_RESERVE, reserved)
            self._change(_RELEASE, [(ident,) for ident in released])

        self._transaction(work)

    def _change(self, parts: _Parts, rows: Sequence[Sequence[Any]]) -> None:
        at = 0
        for size in _sizes(len(rows)):
            values = list(itertools.chain.from_iterable(rows[at : at + size]))
            self._connection.executemany(_for_many(parts, size), (values,))
            at += size

    def _insert(self, rows: Sequence[Made]) -> None:
        at = 0
        rows = list(rows)
        for size in _sizes(len(rows)):
            alike, values = _bound(rows, at, size, _WIDTH, _OFTEN_ALIKE if size >= _FEW else ())
            # ``executemany`` releases the lock less often than ``execute``.
            self._connection.executemany(_insert_many(size, alike or _NOTHING_ALIKE), (values,))
            at += size

    def reservations(self) -> list[tuple[Any, ...]]:
        """Return the reservations: their ids, and the columns of the rows that they become."""
        return self._connection.execute("SELECT * FROM reservations").fetchall()

    def forget(self, before: int, now: int) -> bool:
        """Delete the oldest rows that ended before a time, a batch of them; return whether there may be more.

        Rows of a time that is still to come (the clock was wrong) are as old as the next one that is not.
        """
        execute = self._connection.execute
        oldest = execute("SELECT id, time FROM requests WHERE time <= ? ORDER BY id LIMIT 1", (now,)).fetchone()
        if oldest is None or oldest[1] >= before:
            return False
        which = f"id IN (SELECT id FROM requests ORDER BY id LIMIT {FORGOTTEN})"  # noqa: S608
        delete = f"DELETE FROM requests WHERE {which} AND (time < ? OR id < ?)"  # noqa: S608
        deleted = execute(delete, (before, oldest[0])).rowcount
        return deleted == FORGOTTEN

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()


def sums_of(rows: Iterable[Made]) -> dict[Place, list[int]]:
    """Return the sums of rows: their number, how many failed, and ``SUMS``."""
    rows = list(rows)
    found: dict[Place, list[int]] | None = None if _compiled is None else _compiled.sums_of(rows)
    return sums_by_python(rows) if found is None else found


def sums_by_python(rows: list[Made]) -> dict[Place, list[int]]:
    """The same in Python: for rows of many places, or if nothing is compiled."""
    if not rows:
        return {}
    columns = list(zip(*rows, strict=False))
    times = columns[0]
    hour = min(times) // HOUR
    places = set(zip(*(columns[at] for at in _PLACED_BY), strict=True))
    if len(places) == 1 and max(times) // HOUR == hour:  # the usual case, without a look at each row
        return {(hour, *places.pop()): _sums(columns)}
    key, served, currency = _PLACED_BY
    placed: dict[Place, list[Made]] = {}
    for row in rows:
        place = row[0] // HOUR, row[key], row[served], row[currency]
        if place in placed:
            placed[place].append(row)
        else:
            placed[place] = [row]
    return {place: _sums(list(zip(*of_it, strict=False))) for place, of_it in placed.items()}


def _sums(columns: Sequence[Sequence[Any]]) -> list[int]:
    kinds, statuses = columns[_KIND], columns[_STATUS]
    failed = 0
    if max(statuses) >= _ERROR:
        failed = sum(not kind and status >= _ERROR for kind, status in zip(kinds, statuses, strict=True))
    return [kinds.count(0), failed, *[sum(columns[at]) for at in _SUMMED_BY]]


_KIND, _STATUS = map(Row._fields.index, ("kind", "status"))
_PLACED_BY = tuple(map(Row._fields.index, ("key", "served", "currency")))
_SUMMED_BY = tuple(map(Row._fields.index, SUMS))


def add_sums(found: dict[Place, list[int]], more: Mapping[Place, Sequence[int]], sign: int = 1) -> None:
    """Add sums to others, or subtract them (-1); places that become 0 are removed."""
    for place, sums in more.items():
        old = found.get(place, _NO_SUMS)
        new = found[place] = [each + sign * one for each, one in zip(old, sums, strict=True)]
        if not any(new):
            del found[place]


_NO_SUMS = (0,) * (2 + len(SUMS))
_compiled = native()
_bound = bound if _compiled is None else _compiled.bound
