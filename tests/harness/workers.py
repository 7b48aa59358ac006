"""``--workers=8``: so many processes run the tests, each forked after all tests have been collected.

Each process of pytest-xdist imports and collects everything again: as much work as a tenth of the tests. Here a
process inherits that from its parent. It gets whole files, so that fixtures shared in a file are made once, those
that take longest first, so that none of them is left for the end.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import traceback
from collections.abc import Iterator
from itertools import groupby, pairwise
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import pytest

from tests.harness import launcher

WORKER = "LLMUX_TEST_WORKER"  # set in a worker: its number, from 0
TESTS = Path(__file__).resolve().parents[1]
LONGEST_FIRST = (
    "ui",
    "acceptance/test_demo.py",
    "acceptance/test_real_engines.py",
    "hooks/test_sleeping_engines.py",
    "cli/test_hooks_test.py",
    "gateway/test_store.py",
    "server/test_connections.py",
    "hooks/test_process_hooks.py",
    "hooks/test_server_hooks.py",
    "acceptance/test_contract_fleet.py",
    "acceptance/test_contract_hooks.py",
    "middleware/test_fast_path.py",
    "gateway/test_requests.py",
    "proxy/test_native_relay.py",
    "cli/test_command_line.py",
    "simulator/test_flood.py",
    "simulator/test_look_back.py",
    "simulator/test_what_if.py",
    "targets/test_codec_properties.py",
    "targets/test_translating.py",
    "targets/test_field_scanner.py",
    "cli/test_starting.py",
    "policies/test_under_load.py",
    "acceptance/test_contract_limits.py",
    "middleware/test_progress.py",
    "acceptance/test_contract_attacks.py",
    "hooks/test_container_hooks.py",
    "acceptance/test_contract_streams.py",
    "acceptance/test_contract_restart.py",
    "middleware/test_refusing.py",
    "middleware/test_paths.py",
    "server/test_auto.py",
    "acceptance/test_accounts.py",
    "server/test_responses.py",
    "targets/test_remotes.py",
    "targets/test_failover.py",
    "fleet/test_fleet_simulation.py",
    "proxy/test_proxy_faults.py",
    "fleet/test_store_embedded.py",
    "hooks/test_gpu_free.py",
    "server/test_library.py",
    "shell/hookrunner/test_hookrunner_run.py",
    "accounts/test_ledger.py",
    "proxy/test_proxy_units.py",
    "cli/test_operating.py",
    "acceptance/test_contract_start.py",
    "acceptance/test_contract_chaos.py",
    "acceptance/test_contract_edges.py",
    "server/test_memory.py",
    "targets/test_spilling.py",
    "targets/test_real_targets.py",
    "server/test_smuggling.py",
)
"""The files and folders that take longest, waiting included."""
TOGETHER = frozenset({TESTS / "ui"})
"""The folders that one process runs whole: these files share a browser, whose start is more work than theirs."""


class Worker:
    """A process that runs files, as its parent sees it."""

    def __init__(self, number: int, pid: int, connection: Connection[Any, Any]) -> None:
        self.number, self.pid, self.connection = number, pid, connection
        self.left: list[int] = []  # the indexes of what it was given and has not reported


class Workers:
    """Runs a session's tests in several processes."""

    def __init__(self, session: pytest.Session, number: int) -> None:
        self.session, self.hook = session, session.config.hook
        self.waiting = files(session.items)
        self.working: dict[Connection[Any, Any], Worker] = {}
        self.base = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        self.number = min(number, len(self.waiting))

    def fork(self, number: int) -> None:
        """Start a worker, and give it a file."""
        launching = launcher.share()
        ours, theirs = Pipe()
        pid = os.fork()
        if not pid:
            try:
                atexit._clear()  # that is the parent's to do
                launcher.use(launching)
                for connection in (*self.working, ours):
                    connection.close()
                child = Child(self.session, theirs)
                child.become(self.base / f"worker{number}", number)
                child.run()
            except KeyboardInterrupt:
                os._exit(1)
            except BaseException:  # noqa: BLE001, what has called this function is the parent's
                traceback.print_exc()
                os._exit(1)
            finally:
                atexit._run_exitfuncs()
                os._exit(0)
        theirs.close()
        launching.close()
        worker = self.working[ours] = Worker(number, pid, ours)
        self.give(worker)

    def give(self, worker: Worker) -> None:
        """Give a worker the next file, or let it end."""
        worker.left = self.waiting.pop(0) if self.waiting else []
        worker.connection.send(worker.left)

    def run(self) -> None:
        """Run all tests, and report what the workers report."""
        try:
            for number in range(self.number):
                self.fork(number)
            while self.working:
                for connection in wait([*self.working]):
                    assert isinstance(connection, Connection)
                    self.hear(self.working[connection])
                if stop := self.session.shouldfail or self.session.shouldstop:
                    kind = self.session.Failed if self.session.shouldfail else self.session.Interrupted
                    raise kind(stop)
        finally:
            for worker in self.working.values():
                os.kill(worker.pid, signal.SIGINT)
            for worker in self.working.values():
                os.waitpid(worker.pid, 0)

    def hear(self, worker: Worker) -> None:
        """Report a test that a worker has run, or that the worker has ended."""
        reports: list[dict[str, Any]] | None = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            reports = worker.connection.recv()
        if reports is None:
            self.ended(worker)
            return
        item = self.session.items[worker.left.pop(0)]
        config = self.session.config
        self.report(
            item, [self.hook.pytest_report_from_serializable(config=config, data=data) for data in reports]
        )
        if not worker.left:
            self.give(worker)

    def report(self, item: pytest.Item, reports: list[pytest.TestReport]) -> None:
        self.hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            self.hook.pytest_runtest_logreport(report=report)
        self.hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def ended(self, worker: Worker) -> None:
        """Go on in a new worker, where one has ended that was in the middle of a file."""
        del self.working[worker.connection]
        worker.connection.close()
        code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        if not worker.left:
            return
        item = self.session.items[worker.left.pop(0)]
        said = f"the process that ran this test has ended, with {code}"
        self.report(item, [pytest.TestReport(item.nodeid, item.location, {}, "failed", said, "call")])
        if worker.left:
            self.waiting.insert(0, worker.left)
        if self.waiting:
            self.fork(worker.number)


class Child:
    """A worker, as it sees itself."""

    def __init__(self, session: pytest.Session, connection: Connection[Any, Any]) -> None:
        self.session, self.config, self.connection = session, session.config, connection
        self.reports: list[dict[str, Any]] = []

    def become(self, folder: Path, number: int) -> None:
        """Share nothing with the parent that both would write to."""
        os.environ[WORKER] = str(number)
        folder.mkdir(mode=0o700, exist_ok=True)
        self.config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]
        capture = self.config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        self.config.pluginmanager.unregister(name="terminalreporter")
        self.config.pluginmanager.register(self)

    def run(self) -> None:
        """Run what the parent gives, until it gives nothing more."""
        try:
            while given := self.connection.recv():
                self.run_file([self.session.items[index] for index in given])
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self.session._setupstate.teardown_exact(None)  # what an interrupted test has set up

    def run_file(self, items: list[pytest.Item]) -> None:
        for item, following in pairwise([*items, None]):
            assert item is not None
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.connection.send(self.reports)
            self.reports = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what the parent is to hear."""
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def files(items: list[pytest.Item]) -> list[list[int]]:
    """Return the indexes of the tests of each file, or folder of ``TOGETHER``: first those that take longest."""
    longest = {TESTS / name: place for place, name in enumerate(LONGEST_FIRST)}

    def whole(index: int) -> Path:
        path = items[index].path
        return path.parent if path.parent in TOGETHER else path

    def by_file() -> Iterator[tuple[int, list[int]]]:
        for path, group in groupby(range(len(items)), whole):
            yield longest.get(path, len(longest)), list(group)

    return [indexes for _, indexes in sorted(by_file(), key=lambda file: file[0])]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers", type=int, default=0, metavar="N", help="run the tests in N processes")


def pytest_collection(session: pytest.Session) -> None:
    """Start what forks llmuxes: it imports them while this process collects the tests."""
    if session.config.getoption("workers") and not session.config.option.collectonly:
        launcher.engines()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    number: int = session.config.getoption("workers")
    if not number or session.config.option.collectonly or session.testsfailed:
        return None
    gc.collect()
    gc.freeze()
    Workers(session, number).run()
    return True
