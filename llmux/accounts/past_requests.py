"""Requests of the past, one by one: the ledger's rows, newest first.

There is no index but the rows' own order, which is that of their ends: for a key or a model that has few of many
rows, a part of the file is looked at in one go, and the answer says where the next has to begin.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from llmux.accounts.store import Row
from llmux.accounts.usage import PATIENCE

WINDOW = 20_000  # rows that one statement looks at
WINDOWS = 10  # of one answer
_COLUMNS = ", ".join(map('"{}"'.format, ("id", *Row._fields)))


class Wanted(NamedTuple):
    """Which ones: ``before`` an id, or such as had ended ``until`` a Unix time; of a key, of a model."""

    limit: int
    before: int | None = None
    until: float | None = None
    key: str | None = None
    model: str | None = None


def read(path: Path, wanted: Wanted) -> tuple[list[dict[str, Any]], int | None]:
    """Return requests as ``/llmux/activity`` tells them, and the ``before`` of the next ones, None for no more.

    Raises sqlite3.Error.
    """
    place = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(place, uri=True, timeout=PATIENCE)) as connection:
        # One by one: of both together SQLite makes a look at every row.
        ends = "SELECT (SELECT min(id) FROM requests), (SELECT max(id) FROM requests)"
        oldest, newest = connection.execute(ends).fetchone()
        if oldest is None:
            return [], None
        before = newest + 1 if wanted.before is None else min(wanted.before, newest + 1)
        if wanted.until is not None:
            before = min(before, _after(connection, round(wanted.until * 1000), oldest, newest + 1))
        conditions, values = ["kind = 0"], list[str]()
        for column, value in (("key", wanted.key), ("served", wanted.model)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        statement = (
            f"SELECT {_COLUMNS} FROM requests"  # noqa: S608
            f" WHERE id < ? AND id >= ? AND {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?"
        )
        found: list[dict[str, Any]] = []
        for _ in range(WINDOWS):
            if before <= oldest or len(found) >= wanted.limit:
                break
            begin = max(oldest, before - WINDOW)
            rows = connection.execute(statement, (before, begin, *values, wanted.limit - len(found))).fetchall()
            found += [_document(row[0], Row._make(row[1:])) for row in rows]
            before = rows[-1][0] if len(found) >= wanted.limit else begin
        return found, before if before > oldest else None


def _after(connection: sqlite3.Connection, moment: int, low: int, high: int) -> int:
    """Return the least id of a request that ended after a moment, in milliseconds; ``high`` where none did."""
    next_one = "SELECT id, time FROM requests WHERE id >= ? ORDER BY id LIMIT 1"
    while low < high:
        middle = (low + high) // 2
        row = connection.execute(next_one, (middle,)).fetchone()
        if row is None or row[1] > moment:
            high = middle
        else:
            low = row[0] + 1
    return low


def _document(ident: int, row: Row) -> dict[str, Any]:
    waited, service = row.waited / 1000, row.service / 1000
    writing = service if row.decode is None else row.decode / 1e6
    return {
        "id": ident,
        "time": row.time / 1000 - waited - service,
        "asked": row.asked or None,
        "model": row.served or None,
        "status": row.status,
        "waited": waited,
        "first_byte": None,
        "duration": waited + service,
        "input_tokens": None,
        "output_tokens": None,
        "tokens_per_second": row.output / writing if row.target and row.output and writing > 0 else None,
        "request_id": row.request_id,
        "error": row.reason or None,
        "key": row.key or None,
        **of_row(row),
    }


def of_row(row: Row) -> dict[str, Any]:
    """Return what a row knows of its request beyond the request's own record."""
    found: dict[str, Any] = {
        "gpu_seconds": row.gpu / 1e6,
        "switch_seconds": row.switch / 1e6,
        "cost": row.cost / 1e6 if row.currency else None,
        "currency": row.currency or None,
    }
    if row.target:  # what no engine was given has no tokens
        found |= {
            "input_tokens": row.input,
            "cached_tokens": row.cached,
            "output_tokens": row.output,
            "reasoning_tokens": row.reasoning,
            "estimated": bool(row.estimated),
            "prompt_seconds": None if row.prompt is None else row.prompt / 1e6,
            "decode_seconds": None if row.decode is None else row.decode / 1e6,
        }
    return found
