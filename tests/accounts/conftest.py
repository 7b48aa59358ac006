from pathlib import Path

from tests.server.fixtures import house, limit, pytest_asyncio_loop_factories

__all__ = ["house", "pytest_asyncio_loop_factories"]


def pytest_collection_modifyitems(items):
    limit(items, Path(__file__).parent)
