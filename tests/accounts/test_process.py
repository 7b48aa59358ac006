"""llmux as a process: what it imports without a ledger, and what a killed one leaves."""

import asyncio
import contextlib
import errno
import json
import os
import resource
import signal
import sqlite3

import pytest

from llmux.accounts import ledger
from llmux.errors import ConfigError
from tests.harness.launcher import launch
from tests.harness.ports import free_port
from tests.server.house import until

POLICY = """
import json, sys
from pathlib import Path
from llmux.core.policy import SwitchTo
class Policy:
    def decide(self, now):
        wanted = ("llmux.accounts", "sqlite3", "llmux.observability.audit")
        names = [name for name in sys.modules if name.startswith(wanted)]
        Path(__file__).with_name("modules.json").write_text(json.dumps(names))
        return SwitchTo(now.waiting[0], "it waits")
"""


class Process:
    """llmux in a process of its own, with the house's engine; ``cold`` with a Python that has imported nothing."""

    def __init__(self, house, *, cold=False, **settings):
        self.folder, self.port, self.cold = house.folder, free_port(), cold
        house.port = self.port
        (self.folder / "mine.py").write_text(POLICY)
        house.config(port=self.port, policy={"use": "./mine.py:Policy"}, **settings)
        self.process = None

    def start(self):
        with (self.folder / "log").open("ab") as log:
            self.process = launch(
                ["-c", self.folder / "config.json"],
                log=log.fileno(),
                env={**os.environ, "XDG_RUNTIME_DIR": str(self.folder), "XDG_STATE_HOME": str(self.folder)},
                cold=self.cold,
            )

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def run(house):
    begun = []

    async def run(**settings):
        process = Process(house, **settings)
        begun.append(process)
        process.start()
        await ready(house, process)
        return process

    yield run
    for process in begun:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()


async def ready(house, process):
    while True:
        assert process.process.poll() is None, (house.folder / "log").read_text()
        try:
            if (await house.ask("GET", "/ready")).status == 200:
                assert process.process.poll() is None, "another one answers on its port"
                return
        except OSError:
            await asyncio.sleep(0.02)


def rows(folder):
    with contextlib.closing(sqlite3.connect(folder / "ledger.db")) as connection, connection:
        return [
            name for (name,) in connection.execute("SELECT request_id FROM requests WHERE kind = 0 ORDER BY id")
        ]


async def send(house, *names):
    for name in names:
        reply = await house.ask("POST", "/v1/chat/completions", {"model": "a"}, X_Request_ID=name)
        assert reply.status == 200


def imported(house):
    return json.loads((house.folder / "modules.json").read_text())


async def test_without_a_ledger_nothing_of_the_accounts_is_imported(house, run):
    """Nor of captures and of the audit, without these."""
    process = await run(cold=True)
    await send(house, "one")
    assert imported(house) == []
    assert process.end() == 0


async def test_captures_of_one_key_and_an_audit_import_no_more_than_that(house, run):
    keys = [{"name": "alice", "key": "key-of-alice"}]
    captures = {"keys": ["alice"], "folder": "kept"}
    process = await run(cold=True, captures=captures, api_keys=keys, audit="audit.jsonl")
    await house.ask("POST", "/v1/chat/completions", {"model": "a"}, Authorization="Bearer key-of-alice")
    rooms = {"llmux.accounts", "llmux.accounts.aging", "llmux.accounts.captures", "llmux.observability.audit"}
    assert set(imported(house)) == rooms
    assert process.end() == 0
    assert len(list((house.folder / "kept").glob("*/*.json"))) == 1


async def test_the_audit_from_start_to_stop(house, run):
    """A reload is in it, and what it did to keys; also one that was refused."""
    file, config = house.folder / "audit.jsonl", house.folder / "config.json"
    process = await run(audit="audit.jsonl", watch=False, api_keys=[{"name": "alice", "key": "key-of-alice"}])

    def events():
        return [json.loads(line) for line in file.read_text().splitlines()]

    given = json.loads(config.read_text())
    config.write_text(json.dumps(given | {"api_keys": [{"name": "bob", "key": "key-of-bob"}]}))
    process.process.send_signal(signal.SIGHUP)
    await until(lambda: "key_added" in file.read_text())
    config.write_text(json.dumps(given | {"no such setting": 1}))
    process.process.send_signal(signal.SIGHUP)
    await until(lambda: "reload_rejected" in file.read_text())
    await house.ask("POST", "/v1/chat/completions", {"model": "a"}, Authorization="Bearer key-of-bob")
    assert process.end() == 0
    started, reloaded, removed, added, rejected, stopped = events()
    assert (started["event"], started["models"], started["pid"]) == ("started", ["a", "b"], process.process.pid)
    assert (reloaded["because"], reloaded["changed"]) == ("signal", ["api_keys"])
    assert [(line["event"], line["key"]) for line in (removed, added)] == [
        ("key_removed", "alice"),
        ("key_added", "bob"),
    ]
    assert (rejected["event"], stopped["event"]) == ("reload_rejected", "stopped")
    assert "no such setting" in rejected["error"]
    assert "key-of" not in file.read_text()


async def test_a_killed_llmux_leaves_what_it_had_told_and_nothing_twice(house, run):
    process = await run(ledger="ledger.db")
    told = 0
    for turn in range(2):
        names = [f"{turn}-{number}" for number in range(30)]
        await send(house, *names)
        (row,) = (await house.ask("GET", "/llmux/usage?by=")).json()["usage"]
        assert row["requests"] == (told := told + 30)
        pending = [asyncio.create_task(send(house, f"{turn}-late-{number}")) for number in range(20)]
        await asyncio.sleep(0)
        process.end(signal.SIGKILL)
        await asyncio.gather(*pending, return_exceptions=True)
        process.start()
        await ready(house, process)
        found = rows(house.folder)
        assert {name for name in found if "late" not in name} == {
            f"{each}-{number}" for each in range(turn + 1) for number in range(30)
        }
        assert len(found) == len(set(found))
        (row,) = (await house.ask("GET", "/llmux/usage?by=")).json()["usage"]
        told = row["requests"]
        assert told == len(found)


async def test_requests_are_served_while_the_disk_is_full(house, run):
    process = await run(ledger="ledger.db")
    await send(house, "first")
    pid = process.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    await until(lambda: rows(house.folder) == ["first"])
    written = (house.folder / "ledger.db-wal").stat().st_size
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (written + 1000, hard))  # no room for a page more
    names = [f"id-{number}" for number in range(300)]
    await send(house, *names)
    await until(lambda: "ledger_unwritable" in (house.folder / "log").read_text())
    await send(house, "last")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    await until(lambda: len(rows(house.folder)) == 302)
    assert rows(house.folder) == ["first", *names, "last"]
    assert process.end() == 0


async def test_a_ledger_that_another_llmux_writes_is_an_error_at_the_start(house, run):
    await run(ledger="ledger.db")
    second = Process(house, ledger="ledger.db")
    second.start()
    assert await asyncio.to_thread(second.process.wait, 60) == 2
    log = (house.folder / "log").read_text()
    assert "config.json:1: ledger: " in log
    assert "another llmux" in log
    assert "Traceback" not in log


def test_a_file_system_without_locks_is_not_another_llmux(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("llmux.accounts.ledger.fcntl.flock", refused)
    with pytest.raises(
        ConfigError, match="cannot be locked: No locks available; give one on a local disk, or null"
    ):
        ledger._locked(tmp_path / "ledger.db")


async def test_what_was_reserved_when_llmux_was_killed_is_spent(house, run):
    budget = {"usd": 50, "per": "month"}
    key = {"name": "alice", "key": "key-of-alice", "budget": budget}
    process = await run(ledger="ledger.db", prices={"gpu_hour": 3600}, api_keys=[key])
    line = await house.begin("POST", "/v1/hold", {"model": "a"}, Authorization="Bearer key-of-alice")

    def reserved():
        with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
            return connection.execute("SELECT cost FROM reservations").fetchall()

    await until(reserved)
    process.end(signal.SIGKILL)
    line.abort()
    process.start()
    await ready(house, process)
    reply = await house.ask("GET", "/llmux/usage?by=key&key=alice", Authorization="Bearer key-of-alice")
    (row,) = reply.json()["usage"]
    assert (row["cost"], row["requests"]) == (5.0, 0)
    assert not reserved()
    assert "reservations_settled" in (house.folder / "log").read_text()
    assert process.end() == 0


async def test_a_ledger_beside_the_state_file(house):
    """The folder is made, as it is for the state file."""
    process = Process(house)
    file = house.folder / "config.json"
    given = json.loads(file.read_text()) | {"ledger": True}
    del given["state"]  # by default it stands in a folder that is not there yet
    file.write_text(json.dumps(given))
    process.start()
    try:
        await ready(house, process)
        await send(house, "one")
        (row,) = (await house.ask("GET", "/llmux/usage?by=")).json()["usage"]
        assert row["requests"] == 1
        (ledger,) = (house.folder / "llmux").glob("config-*-ledger.db")
        assert ledger.stat().st_mode & 0o777 == 0o600
        assert process.end() == 0
    finally:
        process.process.kill()
