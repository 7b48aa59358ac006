"""Files are watched with the kernel's help, and without it."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmux.config import Config
from llmux.errors import ConfigError
from llmux.process import CHANGED, Process, changes
from tests.harness.waiting import PATIENCE


async def none_left(*_folders: Path, **_options: object):
    """Fail as watchfiles does where the kernel watches for as many programs as it may."""
    raise RuntimeError("Error creating recommended watcher: Too many open files (os error 24)")
    yield


@pytest.fixture(params=["watchfiles", "by looking", "none left"])
def way(request, monkeypatch):
    if request.param == "by looking":
        monkeypatch.setitem(sys.modules, "watchfiles", None)
    if request.param == "none left":
        monkeypatch.setattr("watchfiles.awatch", none_left)


async def first(files: list[Path], began: asyncio.Event) -> None:
    def named() -> list[Path]:
        began.set()
        return files

    async for _ in changes(named, look=0.05):
        return


async def seen(file: Path, act) -> None:
    began = asyncio.Event()
    watching = asyncio.create_task(first([file], began))
    await began.wait()
    act()
    await asyncio.wait_for(watching, PATIENCE)


@pytest.mark.usefixtures("way")
async def test_a_file_that_is_written(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a")
    await seen(file, lambda: file.write_text("ab"))


@pytest.mark.usefixtures("way")
async def test_a_file_that_is_replaced(tmp_path):
    file, draft = tmp_path / "config.yaml", tmp_path / "draft"
    file.write_text("a")
    draft.write_text("b")
    await seen(file, lambda: draft.replace(file))


@pytest.mark.usefixtures("way")
async def test_one_that_vanishes_is_waited_for(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a")
    began = asyncio.Event()
    watching = asyncio.create_task(first([file], began))
    await began.wait()
    file.unlink()
    done, _ = await asyncio.wait({watching}, timeout=0.3)
    assert not done
    file.write_text("ab")
    await asyncio.wait_for(watching, PATIENCE)


async def test_a_configuration_is_read_beside_the_loop():
    """The file of hundreds of models takes a while, and answers are under way; a mistake ends nothing."""
    read, told = threading.Event(), asyncio.Queue()
    config = Config.model_validate({"models": {"a": {"port": 9, "wake": ":", "sleep": ":", "alive": ":"}}})
    loop = asyncio.get_running_loop()

    def slow() -> Config:
        loop.call_soon_threadsafe(told.put_nowait, None)
        assert read.wait(PATIENCE), "the loop stands still"
        raise ConfigError("has a mistake")

    process = Process(config, slow, lambda _url, _config: None)
    switcher = SimpleNamespace(audit=None, last_reload_error=None)
    chore = asyncio.create_task(process._reload(switcher, None))
    for _ in range(2):
        read.clear()
        switcher.last_reload_error = None
        process._reloads.put_nowait("signal")
        await told.get()
        assert switcher.last_reload_error is None
        read.set()
        async with asyncio.timeout(PATIENCE):
            while switcher.last_reload_error is None:  # noqa: ASYNC110 - nobody tells it
                await asyncio.sleep(0.002)
        assert "has a mistake" in switcher.last_reload_error
    chore.cancel()


async def test_after_a_reload_that_fails_in_any_way_the_next_one_is_followed(monkeypatch):
    """A limit on processes lets no thread start, for example."""
    config = Config.model_validate({"models": {"a": {"port": 9, "wake": ":", "sleep": ":", "alive": ":"}}})
    told = asyncio.Queue()

    async def refused(read):
        told.put_nowait(read)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("asyncio.to_thread", refused)
    process = Process(config, lambda: config, lambda _url, _config: None)
    process._systemd = SimpleNamespace(reloading=lambda: None, ready=told.put_nowait)
    switcher = SimpleNamespace(audit=None, last_reload_error=None)
    chore = asyncio.create_task(process._reload(switcher, None))
    async with asyncio.timeout(PATIENCE):
        for _ in range(2):
            process._reloads.put_nowait("signal")
            assert await told.get() == process._found
            assert await told.get() == "a reload failed, see the log"
            assert switcher.last_reload_error == "can't start new thread"
    chore.cancel()


async def test_what_a_signal_has_told_of_is_not_read_again(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("models: {a: {port: 9, wake: ':', sleep: ':', alive: ':'}}")
    reads: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> Config:
        loop.call_soon_threadsafe(reads.put_nowait, None)
        raise ConfigError("has a mistake")

    process = Process(Config.from_file(file), read, lambda _url, _config: None)
    chore = asyncio.create_task(process._reload(SimpleNamespace(audit=None, last_reload_error=None), None))
    async with asyncio.timeout(PATIENCE):
        process._reloads.put_nowait("signal")
        await reads.get()
        process._reloads.put_nowait(CHANGED)  # the kernel tells of it later
        while not process._reloads.empty():  # noqa: ASYNC110 - nobody tells it
            await asyncio.sleep(0.002)
        process._reloads.put_nowait("signal")
        await reads.get()
        file.write_text("models: {}")
        process._reloads.put_nowait(CHANGED)
        await reads.get()
    assert reads.empty()
    chore.cancel()


async def test_a_burst_of_signals_is_one_reading_and_one_more_if_they_came_while_it_read(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("models: {a: {port: 9, wake: ':', sleep: ':', alive: ':'}}")
    go_on, reads, read_texts = threading.Event(), asyncio.Queue(), []
    loop = asyncio.get_running_loop()

    def read() -> Config:
        read_texts.append(file.read_text())
        loop.call_soon_threadsafe(reads.put_nowait, None)
        assert go_on.wait(PATIENCE)
        raise ConfigError(f"has mistake {len(read_texts)}")

    process = Process(Config.from_file(file), read, lambda _url, _config: None)
    switcher = SimpleNamespace(audit=None, last_reload_error=None)
    chore = asyncio.create_task(process._reload(switcher, None))
    for because in ("signal", CHANGED, *["signal"] * 50):
        process._reloads.put_nowait(because)
    await asyncio.wait_for(reads.get(), PATIENCE)
    file.write_text("models: {}")
    for because in (CHANGED, *["signal"] * 50):
        process._reloads.put_nowait(because)
    go_on.set()
    async with asyncio.timeout(PATIENCE):
        while switcher.last_reload_error != "has mistake 2" or not process._reloads.empty():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    assert [text == "models: {}" for text in read_texts] == [False, True]
    chore.cancel()
