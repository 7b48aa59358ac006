"""Every test of the streaming path runs on both event loops, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from proxy_harness import Proxy

from tests.server.fixtures import limit, pytest_asyncio_loop_factories

__all__ = ["pytest_asyncio_loop_factories"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limit(items, Path(__file__).parent)


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async with Proxy() as proxy:
        yield proxy
