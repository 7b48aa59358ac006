"""What the conftests of the folders that test a running llmux have in common."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import uvloop

from tests.harness.waiting import PATIENCE
from tests.server.house import House

ON_BOTH_LOOPS = (
    "gateway", "proxy", "test_aiohttp_internals", "test_connections", "test_fast_path", "test_library",
    "test_progress", "test_responses", "test_signs_of_life", "test_smuggling",
)  # fmt: skip
LIMIT = PATIENCE  # a test that hangs fails
one_loop = pytest.mark.asyncio(loop_factories=["uvloop"])  # of processes, and of what asks nothing of its loop


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with House(tmp_path) as house:
        yield house


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(
    config: pytest.Config,  # noqa: ARG001
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return both loops where connections, streams and cuts are the subject; elsewhere the one that serves."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if item.path.parent.name in ON_BOTH_LOOPS or item.path.stem in ON_BOTH_LOOPS:
        loops["asyncio"] = asyncio.new_event_loop
    return loops


def limit(items: list[pytest.Item], folder: Path, seconds: float = LIMIT) -> None:
    """Have a folder's tests fail when they hang."""
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and item.path.parent == folder
            and inspect.iscoroutinefunction(item.obj)
        ):
            item.obj = _limited(item.obj, seconds)


def _limited(test: Callable[..., Awaitable[None]], seconds: float) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: object, **kwargs: object) -> None:
        async with asyncio.timeout(seconds):
            await test(*args, **kwargs)

    return run
