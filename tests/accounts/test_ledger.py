"""The ledger's file and its thread: what is written, what is not, and what is lost."""

import contextlib
import sqlite3
import stat
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmux.accounts import aging, usage
from llmux.accounts import ledger as module
from llmux.accounts import ledger_file as files
from llmux.accounts.ledger import Charge, Ended, Ledger, Released, Reserved
from llmux.accounts.ledger_file import FORGOTTEN, HOUR, MIGRATIONS, Row, Store
from llmux.accounts.pricing import Prices, price_of
from llmux.config.accounts import HOUSE
from llmux.errors import ConfigError
from tests.harness.waiting import PATIENCE

BODY = b'{"usage":{"prompt_tokens":12,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}}'


class Told(list):
    def __call__(self, event, **fields):
        self.append((event, fields))

    @property
    def events(self):
        return [event for event, _ in self]


def ended(number=0, *, key="alice", when=None, status=200, own=0.0, switch=0.0, prices=None):
    now = time.time() if when is None else when
    path, shares = "/v1/chat/completions", (own, switch, prices)
    return Ended(
        now, f"id-{number}", key, "alias", "a", 0.5, 2.0, status, None, path, 40, True, *shares, b"", (BODY,), 0
    )


def finished(number, *, key="alice", prices=None):
    row = Row(
        round(time.time() * 1000), f"id-{number}", key, "alias", "a", "a", 12, 0, 3, 0, 0, 0, "", None, 500, 2000,
        4_000_000, 0, None, None, 200, "",
    )  # fmt: skip
    return (*row, number, prices)


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def rows(path):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM requests ORDER BY id")]


def ids(path):
    return [row["request_id"] for row in rows(path)]


def requests_by_the_hour(path):
    return sum(row["requests"] for row in usage.read(path, usage.Asked((), 0)))


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def begin(tmp_path, told):
    begun = []

    def begin(path=tmp_path / "ledger.db", keep=None):
        ledger = Ledger(path, keep, told)
        begun.append(ledger)
        ledger.opened.wait(PATIENCE)
        return ledger

    yield begin
    for ledger in begun:
        if ledger._thread.is_alive():
            ledger.close()


def test_a_row_says_what_is_known_and_sums_are_kept(begin, tmp_path):
    ledger = begin()
    ledger.put(ended())
    ledger.put(ended(1, status=503))
    ledger.close()
    first, second = rows(ledger.path)
    assert abs(first.pop("time") / 1000 - time.time()) < 60
    assert {name: first[name] for name in ("request_id", "key", "asked", "served", "target", "status")} == {
        "request_id": "id-0", "key": "alice", "asked": "alias", "served": "a", "target": "a", "status": 200,
    }  # fmt: skip
    assert (first["input"], first["cached"], first["output"], first["estimated"]) == (12, 2, 3, 0)
    assert (first["waited"], first["service"]) == (500, 2000)
    assert second["status"] == 503
    (seen,) = usage.read(ledger.path, usage.Asked(("key", "model"), 0))
    assert (seen["requests"], seen["failed"], seen["input_tokens"], seen["waited_seconds"]) == (2, 1, 24, 1.0)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_rows_of_the_last_requests_are_kept_and_no_more(begin, monkeypatch):
    monkeypatch.setattr(module, "RECENT", 100)
    ledger = begin()
    ledger.put(ended())
    for number in range(1, 251):
        ledger.put(ended(number)._replace(number=number) if number % 2 else finished(number))
    ledger.put(Charge(time.time(), "alice", "a", 0.0, 4.0, None))
    until(lambda: ledger._done == 252)
    recent = ledger.recent()
    assert list(recent) == list(range(152, 251))  # the charge is among the last rows
    assert all(row.request_id == f"id-{number}" for number, row in recent.items())


def test_rows_stand_in_the_order_in_which_their_requests_have_ended(begin):
    """Whether the loop has made them, or the thread had to read an answer."""
    ledger = begin()
    for number in range(300):
        ledger.put(finished(number) if number % 3 else ended(number))
    ledger.close()
    assert ids(ledger.path) == [f"id-{number}" for number in range(300)]
    assert {row["cached"] for row in rows(ledger.path)} == {0, 2}
    assert {row["output"] for row in rows(ledger.path)} == {3}


@pytest.mark.parametrize("count", [1, 31, 32, 33, 255, 300, 1000])
def test_any_number_of_rows_is_written(tmp_path, count):
    given_rows = [Row(*finished(number)[:-2]) for number in range(count)]
    store = Store(tmp_path / "ledger.db")
    store.write([(*row, "more", "that is not written") for row in given_rows])
    store.close()
    assert [tuple(row.values())[1:] for row in rows(store.path)] == given_rows


@given(st.lists(st.integers(0, 3), max_size=120), st.sets(st.sampled_from(Row._fields[2:])))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_what_is_alike_in_many_rows_is_written_as_it_is(tmp_path_factory, values, differ):
    """Such columns are bound once for a whole statement, whichever they are."""
    alike = {name: "" if name in files._TEXTS else 7 for name in Row._fields[2:]}
    given_rows = [
        Row(number, f"id-{number}", **alike | {name: type(alike[name])(value) for name in differ})
        for number, value in enumerate(values)
    ]
    store = Store(tmp_path_factory.mktemp("ledger") / "ledger.db")
    store.write(given_rows)
    store.close()
    assert [tuple(row.values())[1:] for row in rows(store.path)] == [tuple(row) for row in given_rows]


@pytest.mark.parametrize("kept", [10_000, 1300])
def test_the_sums_are_those_of_the_rows(begin, monkeypatch, kept):
    """Also where the file cannot be written for a while, batches are in doubt, and rows are lost."""
    monkeypatch.setattr(module, "KEPT", kept)
    monkeypatch.setattr(module, "BATCH", 500)
    write, tries = Store.write, []

    def fail(*arguments):
        tries.append(arguments)
        if len(tries) < 3:
            raise sqlite3.OperationalError("disk I/O error")
        write(*arguments)
        if len(tries) == 4:
            raise sqlite3.OperationalError("it was written after all")

    monkeypatch.setattr(Store, "write", fail)
    ledger = begin()
    for number in range(2200):
        ledger.put(ended(number, key=f"key-{number % 3}", when=3600.0 * (number // 1000)))
        if number == 1000:
            until(lambda: tries)
    until(lambda: not ledger._waiting and not ledger._rows and len(tries) > 4)
    ledger.close()
    written = rows(ledger.path)
    assert len(written) == 2200 - ledger.lost
    assert (ledger.lost > 0) == (kept < 2200)
    assert not ledger._sums
    with contextlib.closing(sqlite3.connect(ledger.path)) as connection, connection:
        for table, hours in (("hours", 1), ("days", 24)):
            found = connection.execute(f"SELECT * FROM {table}").fetchall()
            exact = files.sums_of(Row(row["time"] // hours, *list(row.values())[2:]) for row in written)
            assert sorted(found) == sorted((*place, *each) for place, each in exact.items())
    requests, *_ = ledger.metrics.collect()
    assert sum(sample.value for sample in requests.samples) == 2200


def test_it_goes_on_where_it_ended(begin):
    for start in (0, 700, 1400):
        ledger = begin()
        for number in range(start, start + 700):
            ledger.put(ended(number))
        ledger.close()
    assert ids(ledger.path) == [f"id-{number}" for number in range(2100)]
    assert requests_by_the_hour(ledger.path) == 2100


async def test_a_reader_sees_what_ended_before_it_asked(begin):
    ledger = begin()
    for number in range(50):
        ledger.put(ended(number))
        if number % 10 == 9:
            await ledger.settled()
            assert requests_by_the_hour(ledger.path) == number + 1


def test_another_process_that_holds_the_file_is_waited_for(begin, told):
    ledger = begin()
    ledger.put(ended(0))
    until(lambda: ledger._done == 1)
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for number in range(1, 1500):
        ledger.put(ended(number))
    until(lambda: told)
    other.execute("COMMIT")
    other.close()
    until(lambda: ledger._done == 1500)
    assert ids(ledger.path) == [f"id-{number}" for number in range(1500)]
    assert told.events == ["ledger_unwritable"]  # once
    assert ledger.lost == 0


def test_a_file_that_is_held_at_the_start_is_waited_for(begin, tmp_path):
    Store(tmp_path / "ledger.db").close()
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    ledger = begin()
    ledger.put(ended())
    until(lambda: ledger._failures)
    other.close()
    until(lambda: ledger._done == 1)
    assert ids(ledger.path) == ["id-0"]


@pytest.mark.parametrize("damage", [b"no database at all, " * 500, b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_damaged_file_is_set_aside(begin, told, tmp_path, damage):
    path = tmp_path / "ledger.db"
    path.write_bytes(damage)
    ledger = begin()
    ledger.put(ended())
    until(lambda: ledger._done == 1)
    assert ids(path) == ["id-0"]
    assert told.events == ["ledger_set_aside"]
    (aside,) = tmp_path.glob("ledger.db.damaged-*")
    assert aside.read_bytes() == damage


def test_a_file_that_breaks_while_it_is_written_is_set_aside(begin, told):
    ledger = begin()
    ledger.put(ended(0))
    until(lambda: ledger._done == 1)
    with contextlib.closing(sqlite3.connect(ledger.path)) as other, other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with ledger.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 40_000)
    for number in range(1, 20):
        ledger.put(ended(number))
        until(lambda number=number: ledger._done == number + 1)
    assert "ledger_set_aside" in told.events
    assert ids(ledger.path)[-1] == "id-19"
    assert ledger.lost == 0


def test_a_file_that_is_removed_is_made_anew(begin, tmp_path):
    ledger = begin()
    ledger.put(ended(0))
    until(lambda: ledger._done == 1)
    for file in tmp_path.glob("ledger.db*"):
        file.unlink()
    ledger.put(ended(1))
    until(lambda: ledger._done == 2)
    assert ids(ledger.path) == ["id-1"]


FULL = """
import resource, sys, time
from pathlib import Path
from llmux.accounts.pricing import Prices, price_of
from llmux.accounts.ledger import Charge, Ended, Ledger, Released, Reserved
sys.path.insert(0, "tests/accounts")
from test_ledger import ended, until
told = []
ledger = Ledger(Path(sys.argv[1]), None, lambda event, **fields: told.append(event))
ledger.put(ended(0)); until(lambda: ledger._done == 1)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
for number in range(1, 3000): ledger.put(ended(number))
until(lambda: told)
for number in range(3000, 4000): ledger.put(ended(number))
assert 0 < ledger._done < 4000
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
until(lambda: ledger._done == 4000)
assert ledger.lost == 0 and set(told) == {"ledger_unwritable"}, told
ledger.close()
"""


def test_a_full_disk_loses_nothing_and_writes_nothing_twice(tmp_path):
    subprocess.run([sys.executable, "-c", FULL, tmp_path / "ledger.db"], check=True, timeout=PATIENCE)
    assert ids(tmp_path / "ledger.db") == [f"id-{number}" for number in range(4000)]
    assert requests_by_the_hour(tmp_path / "ledger.db") == 4000


def test_what_is_more_than_is_kept_is_counted_and_written_down(begin, told, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 100)
    ledger = begin()
    ledger.put(ended(0))
    until(lambda: ledger._done == 1)
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for number in range(1, 301):
        ledger.put(ended(number))
    until(lambda: ledger.lost == 200)
    other.execute("COMMIT")
    other.close()
    until(lambda: ledger._done == 301)
    assert ids(ledger.path) == [f"id-{number}" for number in range(101)]
    with contextlib.closing(sqlite3.connect(ledger.path)) as connection:
        assert connection.execute("SELECT sum(rows) FROM losses").fetchone() == (200,)
    assert told.events.count("ledger_rows_lost") == 1


def test_a_thread_that_hangs_holds_little_memory(begin, monkeypatch):
    ledger = begin()
    going, reached = threading.Event(), threading.Event()

    def hang(*_):
        reached.set()
        going.wait()

    monkeypatch.setattr(ledger, "_look", hang)
    ledger.put(ended(0))
    reached.wait(PATIENCE)
    for number in range(1, 20_000):
        ledger.put(ended(number))
    assert len(ledger._waiting) == module.WAITING
    assert ledger._dropped == 20_000 - module.WAITING
    assert sum(bool(one.tail) for one in ledger._waiting) == module.WITH_ANSWERS
    monkeypatch.undo()
    going.set()
    until(lambda: ledger._done == 20_000)
    assert ledger.lost == 20_000 - module.WAITING


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_batch_of_which_it_is_not_known_whether_it_was_written_is_written_once(begin, monkeypatch, carried_out):
    ledger = begin()
    ledger.put(ended(0))
    until(lambda: ledger._done == 1)
    write = Store.write
    failures = []

    def fail(self, rows, *rest):
        if not failures:
            failures.append(None)
            if carried_out:
                write(self, rows, *rest)
            raise sqlite3.OperationalError("disk I/O error")
        write(self, rows, *rest)

    monkeypatch.setattr(Store, "write", fail)
    for number in range(1, 40):
        ledger.put(ended(number))
    until(lambda: ledger._done == 40)
    assert failures
    assert ids(ledger.path) == [f"id-{number}" for number in range(40)]
    assert requests_by_the_hour(ledger.path) == 40


def test_what_cannot_be_written_does_not_stop_the_rest(begin, told):
    ledger = begin()
    for number in range(5):
        ledger.put(ended(number, key="\ud800" if number % 2 else "alice", when=2.0**62 if number == 4 else 1.0))
    until(lambda: ledger.lost == 3)
    ledger.put(ended(5, when=1.0))
    until(lambda: ledger._done == 6)
    assert ids(ledger.path) == ["id-0", "id-2", "id-5"]
    assert requests_by_the_hour(ledger.path) == 3
    assert told.events == ["internal_error", "ledger_rows_lost"]


def test_old_rows_go_a_batch_at_a_time_and_their_sums_stay(begin, monkeypatch):
    old, now = time.time() - 1000, time.time()
    monkeypatch.setattr(module, "CLEAN_EVERY", 0.0)
    forget = Store.forget
    deleted = []

    def watched(self, *times):
        deleted.append(forget(self, *times))
        return deleted[-1]

    monkeypatch.setattr(Store, "forget", watched)
    ledger = begin(keep=500.0)
    for number in range(1200):
        ledger.put(ended(number, when=old))
    ledger.put(ended(1200, when=now))
    until(lambda: ledger._done == 1201)
    until(lambda: ids(ledger.path) == ["id-1200"])
    assert deleted.count(True) >= 2  # 500 and 500 of 1200
    assert requests_by_the_hour(ledger.path) == 1201
    assert FORGOTTEN == 500


def test_rows_of_a_clock_that_was_ahead_go_with_those_that_came_next(begin, monkeypatch):
    now = time.time()
    monkeypatch.setattr(module, "CLEAN_EVERY", 0.0)
    ledger = begin(keep=500.0)
    for number, when in enumerate([now + 1e8, now - 300, now + 1e8, now - 200, now + 1e8, now]):
        ledger.put(ended(number, when=when))
    until(lambda: len(ids(ledger.path)) == 6)
    for keep, left in ((250.0, 4), (100.0, 2)):
        ledger.keep = keep
        ledger.wake()
        until(lambda left=left: len(ids(ledger.path)) == left)
    assert ids(ledger.path) == ["id-4", "id-5"]


def test_a_clock_that_is_set_ahead_deletes_nothing_at_once(begin, monkeypatch):
    now, steady = time.time(), time.monotonic()
    monkeypatch.setattr(module, "CLEAN_EVERY", 0.0)
    looks, forget = [], Store.forget

    def watched(self, before, today):
        looks.append(today / 1000 - now)
        return forget(self, before, today)

    ledger = begin(keep=86_400.0)
    ledger.put(ended(1, when=now))
    until(lambda: ids(ledger.path) == ["id-1"])
    monkeypatch.setattr(Store, "forget", watched)
    monkeypatch.setattr(time, "time", lambda: now + 40 * 86_400)
    for minutes in (0, 59):
        monkeypatch.setattr(aging, "monotonic", lambda minutes=minutes: steady + 60 * minutes)
        looks.clear()
        ledger.wake()
        until(lambda: len(looks) >= 2)
        assert max(looks) == pytest.approx(60 * minutes, abs=30)
    assert ids(ledger.path) == ["id-1"]
    monkeypatch.setattr(aging, "monotonic", lambda: steady + 3660)
    ledger.wake()
    until(lambda: not ids(ledger.path))


def test_one_llmux_a_file(begin):
    ledger = begin()
    with pytest.raises(ConfigError, match=r"ledger: .*another llmux"):
        begin()
    ledger.close()
    begin()


def test_the_file_of_another_program_is_left_alone(begin, tmp_path):
    path = tmp_path / "ledger.db"
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another program"):
        begin()
    assert path.read_bytes() == before


def test_the_file_of_a_newer_llmux_is_left_alone(begin, tmp_path):
    path = tmp_path / "ledger.db"
    Store(path).close()
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(ConfigError, match="newer llmux"):
        begin()


def test_a_folder_that_is_not_there(begin, tmp_path):
    with pytest.raises(ConfigError, match=r"ledger: .*cannot be written"):
        begin(tmp_path / "nowhere" / "ledger.db")


@pytest.mark.parametrize("version", range(len(MIGRATIONS)))
def test_every_older_version_is_brought_to_this_one(monkeypatch, tmp_path, version):
    path = tmp_path / "ledger.db"
    monkeypatch.setattr(files, "MIGRATIONS", MIGRATIONS[:version])
    with contextlib.closing(sqlite3.connect(path)) as old, old:
        for number, statements in enumerate(MIGRATIONS[:version], 1):
            for statement in statements:
                old.execute(statement)
            old.execute(f"PRAGMA application_id = {files.APPLICATION}")
            old.execute(f"PRAGMA user_version = {number}")
        for table, place in (("hours", 24), ("days", 1))[:version]:
            old.execute(
                f"INSERT INTO {table} VALUES (?, 'k', 'm', '', 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)", (place,)
            )
    monkeypatch.undo()
    store = Store(path)
    fields = dict.fromkeys(Row._fields, 0) | {"time": 5 * HOUR, "key": "k", "served": "m", "currency": ""}
    store.write([Row(**fields)])
    store.close()
    old_ones = 7 if version else 0
    assert requests_by_the_hour(path) == 1 + old_ones
    (by_hours,) = usage.read(path, usage.Asked((), 3600))
    assert by_hours["requests"] == 1 + old_ones
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        columns = {row[1] for row in connection.execute("PRAGMA table_info(requests)")}
    assert columns == {"id", *Row._fields}


def test_what_it_costs_is_in_the_row_with_the_version_of_the_prices(begin):
    ledger = begin()
    by_time = Prices("usd", 900_000, {})
    by_tokens = Prices("usd", 900_000, {"a": price_of(1.0, 0.5, 2.0)})
    ledger.put(ended(0, own=3000.0, switch=600.0, prices=by_time))
    ledger.put(ended(1, own=3000.0, prices=by_tokens))
    ledger.put(ended(2, own=4.0000005))
    for _ in range(3):
        ledger.put(Charge(time.time(), "bob", "a", 0.0, 4.0, by_time))
    ledger.put(Charge(time.time(), HOUSE, "", 10.0, 0.0, by_time))
    ledger.close()
    first, second, third, *owed, house = rows(ledger.path)
    assert (first["gpu"], first["switch"], first["cost"]) == (3_000_000_000, 600_000_000, 900_000)
    assert (second["cost"], second["currency"]) == (10 * 1 + 2 * 0.5 + 3 * 2, "usd")
    assert (third["cost"], third["currency"], third["price"], third["gpu"]) == (0, "", None, 4_000_000)
    assert [(row["kind"], row["key"], row["switch"], row["cost"]) for row in owed] == [
        (1, "bob", 4_000_000, 1000)
    ] * 3
    assert (house["kind"], house["key"], house["gpu"], house["cost"]) == (2, HOUSE, 10_000_000, 2500)
    with contextlib.closing(sqlite3.connect(ledger.path)) as connection, connection:
        found = dict(connection.execute("SELECT version, document FROM prices").fetchall())
    assert found == {first["price"]: by_time.document, second["price"]: by_tokens.document}
    (none, usd) = usage.read(ledger.path, usage.Asked((), 0))
    assert (none["cost"], usd["cost_micros"], usd["requests"]) == (None, 900_017 + 3000 + 2500, 2)
    assert [row["key"] for row in usage.read(ledger.path, usage.Asked(("key",), 0))] == [
        HOUSE,
        "alice",
        "alice",
        "bob",
    ]


def test_those_with_little_use_are_summed_up_as_others(begin):
    prices = Prices("usd", 3_600_000_000, {})
    ledger = begin()
    costs = {"alice": 1.0, "bob": 5.0, "": 3.0, "carol": 2.0}
    for number, (key, seconds) in enumerate(costs.items()):
        ledger.put(ended(number, key=key, own=seconds, prices=prices))
    ledger.close()

    def told(by, top, key=None):
        answer = usage.read(ledger.path, usage.Asked(by, 0, key, top=top))
        return [(*(row[name] for name in by), row["cost"], row["requests"]) for row in answer]

    assert told(("key",), 2) == [(None, 3.0, 1), (usage.OTHERS, 3.0, 2), ("bob", 5.0, 1)]
    assert told(("key",), 4) == told(("key",), None)
    assert told(("model", "key"), 1) == [("a", usage.OTHERS, 6.0, 3), ("a", "bob", 5.0, 1)]
    assert told(("key",), 1, "carol") == [("carol", 2.0, 1)]
    assert told((), 1) == [(11.0, 4)]
    (day, *_) = told(("day", "key"), 1)
    assert day[1:] == (usage.OTHERS, 6.0, 3)
    assert usage.read(ledger.path, usage.Asked(("key",), 2**40, top=1)) == []


def test_the_past_is_looked_at_a_part_at_a_time(begin, monkeypatch):
    monkeypatch.setattr(usage, "WINDOW", 10)
    monkeypatch.setattr(usage, "WINDOWS", 3)
    ledger = begin()
    assert usage.past_requests(ledger.path, usage.Wanted(5)) == ([], None)
    for number in range(100):
        ledger.put(ended(number, key="rare" if number % 40 == 0 else "often", when=1000.0 + number))
    ledger.put(Charge(1200.0, "rare", "a", 1.0, 1.0, None))
    ledger.close()

    def told(**wanted):
        found, more = usage.past_requests(ledger.path, usage.Wanted(**wanted))
        return [int(one["request_id"][3:]) for one in found], more

    assert told(limit=3) == ([99, 98, 97], 98)  # ids begin with 1
    assert told(limit=3, before=98) == ([96, 95, 94], 95)
    seen, more, asked = [], None, 0
    while True:
        found, more = told(limit=2, before=more, key="rare")
        seen += found
        asked += 1
        if more is None:
            break
    assert seen == [80, 40, 0]
    assert asked == 4  # of 30 rows each at most
    assert told(limit=2, until=1050.0) == ([50, 49], 50)
    assert told(limit=2, until=1050.0, before=20) == ([18, 17], 18)
    assert told(limit=2, until=999.0) == ([], None)


@pytest.mark.parametrize("count", [1, 40, 700])
def test_sums_of_many_keys_and_reservations_go_with_a_batch(begin, count):
    """In statements for many of them; two hours of one day fall into one row of the days."""
    store = Store(begin().path)
    given_rows = [
        Row(*finished(number, key=f"key-{number}")[:-2])._replace(time=hour * HOUR)
        for number in range(count)
        for hour in (48, 49)
    ]
    reservations = [(f"id-{number}", 1, f"request-{number}", "alice", "a", 1, "usd", 1) for number in range(count)]
    for _ in range(2):
        store.write(given_rows, reserved=reservations)
    assert len(store.reservations()) == count
    store.write([], released=[f"id-{number}" for number in range(1, count)])
    assert [one[0] for one in store.reservations()] == ["id-0"]
    store.close()
    with contextlib.closing(sqlite3.connect(store.path)) as connection, connection:
        for table, rows_of_each, requests in (("hours", 2, 2), ("days", 1, 4)):
            found = connection.execute(f"SELECT key, requests FROM {table}").fetchall()
            assert sorted(found) == sorted([(f"key-{n}", requests) for n in range(count)] * rows_of_each)


def test_days_are_summed_too(begin):
    ledger = begin()
    day = 20_000 * 86_400
    for number, when in enumerate((day, day + 86_399, day + 86_400)):
        ledger.put(ended(number, when=float(when)))
    ledger.close()
    assert usage.asked({"since": "30d"}, day).since % 86_400 == 0
    by_days, by_hours = usage.Asked(("day",), day), usage.Asked(("day",), day + 3600)
    assert [row["requests"] for row in usage.read(ledger.path, by_days)] == [2, 1]
    assert [row["requests"] for row in usage.read(ledger.path, by_hours)] == [1, 1]


def test_at_the_end_a_file_that_is_held_for_a_moment_is_waited_for(begin):
    ledger = begin()
    ledger.put(ended(0))
    until(lambda: ledger._done == 1)
    other = sqlite3.connect(ledger.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    ledger.put(ended(1))
    threading.Timer(0.5, lambda: (other.execute("COMMIT"), other.close())).start()
    ledger.close()
    assert ids(ledger.path) == ["id-0", "id-1"]


def reserved(ident, micros=1000):
    return Reserved(ident, time.time(), f"id-of-{ident}", "alice", "a", micros, Prices("usd", 900_000, {}))


def kept(path):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return [ident for (ident,) in connection.execute("SELECT id FROM reservations ORDER BY id")]


def test_a_reservation_is_in_the_file_as_long_as_its_request_is_under_way(begin):
    ledger = begin()
    ledger.put(reserved("one"))
    ledger.put(reserved("two"))
    until(lambda: kept(ledger.path) == ["one", "two"])
    ledger.put(ended(0))
    ledger.put(Released("one"))
    until(lambda: kept(ledger.path) == ["two"])
    assert ids(ledger.path) == ["id-0"]
    ledger.put(Released("two"))
    ledger.put(reserved("short"))
    ledger.put(Released("short"))
    until(lambda: kept(ledger.path) == [])
    ledger.close()
    assert requests_by_the_hour(ledger.path) == 1


def test_what_was_reserved_when_llmux_was_killed_counts_as_spent_once(begin, told):
    ledger = begin()
    ledger.put(reserved("one"))
    ledger.put(reserved("two", 500))
    until(lambda: len(kept(ledger.path)) == 2)
    ledger.close()  # the requests' ends were never told
    for _ in range(2):
        again = begin()
        again.opened.wait(PATIENCE)
        found = rows(again.path)
        assert [(row["request_id"], row["cost"], row["reason"], row["kind"]) for row in found] == [
            ("id-of-one", 1000, "killed", 3),
            ("id-of-two", 500, "killed", 3),
        ]
        assert kept(again.path) == []
        again.close()
    (seen,) = usage.read(ledger.path, usage.Asked(("key",), 0))
    assert (seen["key"], seen["cost_micros"], seen["requests"]) == ("alice", 1500, 0)
    assert told.events == ["reservations_settled"]


def test_reservations_wait_for_a_file_that_is_held(begin):
    ledger = begin()
    ledger.opened.wait(PATIENCE)
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    ledger.put(reserved("one"))
    until(lambda: ledger._failures)
    ledger.put(reserved("two"))
    ledger.put(Released("one"))
    other.execute("COMMIT")
    other.close()
    until(lambda: kept(ledger.path) == ["two"])
