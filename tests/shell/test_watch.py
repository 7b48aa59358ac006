"""Files are watched with the kernel's help, and without it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from llmux.process import changes
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
