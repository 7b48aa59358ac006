"""A bench for hooks: real shells, and ways to wait for what they do instead of sleeping."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvloop

from llmux.core.spec import HookKind
from llmux.hookrunner import HookJob, HookResult, HookRunner
from tests.harness.waiting import PATIENCE

GRACE = 0.15


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories():
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Bench:
    def __init__(self, folder: Path, **options) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.orphans: list[HookJob] = []
        self.results: list[HookResult] = []
        self._changed = asyncio.Event()
        self._ids = itertools.count(1)
        options = {"kill_grace": GRACE, **options}
        self.runner = HookRunner(on_line=self._line, on_orphan_pipe=self._orphan, **options)

    def _line(self, _job: HookJob, line: str) -> None:
        self.lines.append(line)
        self._changed.set()

    def _orphan(self, job: HookJob) -> None:
        self.orphans.append(job)
        self._changed.set()

    def job(self, script: str, **fields) -> HookJob:
        defaults = {"id": next(self._ids), "model": "m", "kind": HookKind.WAKE, "cwd": self.folder}
        return HookJob(script=script, **{**defaults, **fields})

    def start(self, script: str, **fields) -> tuple[HookJob, asyncio.Future[HookResult]]:
        job = self.job(script, **fields)
        future = asyncio.get_running_loop().create_future()

        def finished(result: HookResult) -> None:
            self.results.append(result)
            future.set_result(result)  # raises when it is called twice

        self.runner.start(job, finished)
        assert not future.done()
        return job, future

    async def run(self, script: str, **fields) -> HookResult:
        _, future = self.start(script, **fields)
        async with asyncio.timeout(PATIENCE):
            return await future

    async def until(self, condition) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def said(self, word: str) -> list[str]:
        """Wait for a line that begins with ``word``; return the words after it."""
        await self.until(lambda: any(line.split()[:1] == [word] for line in self.lines))
        return next(line.split()[1:] for line in self.lines if line.split()[:1] == [word])

    async def pid(self, word: str) -> int:
        return int((await self.said(word))[0])


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    await made.runner.close()
    assert not made.runner.running


@pytest.fixture
def strays() -> Iterator[list[int]]:
    """Pids of processes that a test leaves behind on purpose."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a dead one that waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pid: int) -> None:
    """Wait until the process has exited."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        async with asyncio.timeout(PATIENCE):
            await exited.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


@pytest.fixture(name="is_alive")
def _is_alive():
    return is_alive


@pytest.fixture(name="gone")
def _gone():
    return gone


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture(name="open_files")
def _open_files():
    return open_files


async def turns_until(condition) -> None:
    """Let the loop turn until ``condition()`` holds: for what no event tells."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.fixture(name="turns_until")
def _turns_until():
    return turns_until
