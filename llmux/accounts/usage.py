"""What each key used: sums over the ledger, by key, model, day and hour (UTC); and its single requests.

Rows are only ordered by when they ended, without another index: for a key or model with few of many rows, an
answer covers a part of the file, and says where the next one has to begin.
"""

from __future__ import annotations

import contextlib
import csv
import io
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from llmux.accounts.ledger_file import HOUR, SUMS, Row
from llmux.config.setting_types import parse_duration

DIMENSIONS: Mapping[str, str] = {"key": "key", "model": "served", "day": "hour / 24", "hour": "hour"}
"""What usage can be split by, and the SQL expression for its value in the hourly sums."""
LONG = 7 * 86400  # seconds; a longer time is answered from whole days
PATIENCE = 5.0  # seconds that a reader waits for a file held by another process
OTHERS = "(others)"
"""The name for all keys, or models, beyond those with the most use."""
_MOST = 1000  # rows that a query may name
_HOUR = HOUR // 1000
_DAY = 24 * _HOUR
_SECONDS: Mapping[str, float] = {"waited": 1e3, "service": 1e3, "gpu": 1e6, "switch": 1e6}
_FIGURES = ("requests", "failed", *SUMS)
_NAMED = frozenset({"key", "model"})
_BY_USE = 'ORDER BY sum(cost) DESC, sum("input") + sum("output") DESC, 1'


class Asked(NamedTuple):
    """A query. ``since`` and ``until`` are Unix times; ``key`` and ``model`` select only these.

    ``top``: only so many keys and models have rows of their own: those with the highest cost in all this time, or
    for equal costs with the most tokens. None: all have.
    """

    by: tuple[str, ...]
    since: int
    key: str | None = None
    model: str | None = None
    top: int | None = None
    until: int | None = None


def asked(given: Mapping[str, str], now: float) -> Asked:
    """Parse a query: the fields of ``Asked``. Raises ValueError with the parameter and what is wrong."""
    by = tuple(dict.fromkeys(part.strip() for part in given.get("by", "key,model").split(",") if part.strip()))
    for name in by:
        if name not in DIMENSIONS:
            raise ValueError("by", f"{name!r} is not one of {', '.join(DIMENSIONS)}")
    since = _since(given.get("since", "30d"), now)
    # The sums are by the hour.
    whole_days = "day" in by or ("hour" not in by and now - since > LONG)
    since -= since % (_DAY if whole_days else _HOUR)
    return Asked(by, since, given.get("key"), given.get("model"), _top(given.get("top")))


def _top(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_MOST)) and 1 <= int(text) <= _MOST):
        raise ValueError("top", f"{text[:40]!r} is not a whole number from 1 to {_MOST}")
    return int(text)


def _since(text: str, now: float) -> int:
    try:
        if "-" in text:
            return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())
        return max(0, int(now - parse_duration(text)))
    except ValueError:
        wrong = f"{text[:40]!r} is neither a duration, as 30d or 12h, nor a date, as 2026-11-01"
        raise ValueError("since", wrong) from None


def read(path: Path, question: Asked, patience: float = PATIENCE) -> list[dict[str, Any]]:
    """Return the rows of the answer, in the order of what they are split by. Raises sqlite3.Error."""
    whole_days = question.since % _DAY == 0 and "hour" not in question.by
    table, unit, seconds = ("days", "day", _DAY) if whole_days else ("hours", "hour", _HOUR)
    conditions = [f"{unit} >= ?"]
    wanted: list[int | str] = [question.since // seconds]
    if question.until is not None:
        conditions.append(f"{unit} < ?")
        wanted.append(question.until // seconds)
    for column, value in (("key", question.key), ("served", question.model)):
        if value is not None:
            conditions.append(f"{column} = ?")
            wanted.append(value)
    source = f"{table} WHERE {' AND '.join(conditions)}"
    sums = ", ".join(map('sum("{}")'.format, _FIGURES))
    place = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(place, uri=True, timeout=patience)) as connection:
        named: list[str] = []  # the conditions on dimensions of which only some have rows
        dimensions = []
        for name in question.by:
            dimension = "day" if whole_days and name == "day" else DIMENSIONS[name]
            if question.top is not None and name in _NAMED:
                top = f"SELECT {dimension} FROM {source} GROUP BY 1 {_BY_USE} LIMIT {question.top}"  # noqa: S608
                found = [value for (value,) in connection.execute(top, wanted)]
                among = ", ".join("?" * len(found))
                dimension = f"CASE WHEN {dimension} IN ({among}) THEN {dimension} ELSE '{OTHERS}' END"
                named += found
            dimensions.append(dimension)
        columns = ", ".join([*dimensions, "currency"])
        groups = ", ".join(str(number) for number in range(1, len(dimensions) + 2))
        statement = f"SELECT {columns}, {sums} FROM {source} GROUP BY {groups} ORDER BY {groups}"  # noqa: S608
        rows = connection.execute(statement, [*named, *wanted]).fetchall()
    return [_row(question.by, row) for row in rows]


def _row(by: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    row = {name: _label(name, value) for name, value in zip(by, values, strict=False)}
    return row | figures(values[len(by)], dict(zip(_FIGURES, values[len(by) + 1 :], strict=True)))


def _label(name: str, value: Any) -> Any:
    if name == "day":
        return datetime.fromtimestamp(value * _DAY, UTC).strftime("%Y-%m-%d")
    if name == "hour":
        return datetime.fromtimestamp(value * _HOUR, UTC).strftime("%Y-%m-%dT%H:00Z")
    return value or None


def figures(currency: str, sums: Mapping[str, int]) -> dict[str, Any]:
    """Return sums as clients read them: seconds, and money in the currency."""
    return {
        "requests": sums["requests"],
        "failed": sums["failed"],
        "estimated": sums["estimated"],
        **{f"{kind}_tokens": sums[kind] for kind in ("input", "cached", "output", "reasoning")},
        **{f"{name}_seconds": sums[name] / unit for name, unit in _SECONDS.items()},
        "cost": sums["cost"] / 1e6 if currency else None,
        "cost_micros": sums["cost"] if currency else None,
        "currency": currency or None,
    }


def totals(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the sums of rows, one for each currency."""
    found: dict[str | None, dict[str, Any]] = {}
    for row in rows:
        total = found.get(row["currency"])
        if total is None:
            total = found[row["currency"]] = figures(row["currency"] or "", dict.fromkeys(_FIGURES, 0))
        for name in total:
            if name not in {"currency", "cost"} and total[name] is not None:
                total[name] += row[name]
    for total in found.values():
        if total["cost_micros"] is not None:
            total["cost"] = total["cost_micros"] / 1e6
    return list(found.values())


def as_csv(by: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a line of names; money to six decimals."""
    names = [*by, *(name for name in figures("", dict.fromkeys(_FIGURES, 0)) if name != "cost_micros")]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for row in rows:
        cost = "" if row["cost"] is None else f"{row['cost']:.6f}"
        writer.writerow([cost if name == "cost" else _cell(row[name]) for name in names])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    # A spreadsheet would read a value that begins like this as a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@" and value else value


WINDOW = 20_000  # rows that one statement reads
WINDOWS = 10  # statements for one answer
_COLUMNS = ", ".join(map('"{}"'.format, ("id", *Row._fields)))


class Wanted(NamedTuple):
    """Which requests: ``before`` an id, or ended ``until`` a Unix time; of a key, of a model."""

    limit: int
    before: int | None = None
    until: float | None = None
    key: str | None = None
    model: str | None = None


def past_requests(path: Path, wanted: Wanted) -> tuple[list[dict[str, Any]], int | None]:
    """Return requests as ``/llmux/activity`` does, and the ``before`` of the next ones, None if there are no more.

    Raises sqlite3.Error.
    """
    place = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(place, uri=True, timeout=PATIENCE)) as connection:
        # Separately: for both at once SQLite would read every row.
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
    """Return the least id of a request that ended after a time, in milliseconds; ``high`` if none did."""
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
    if row.target:  # without an engine there are no tokens
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
