from pathlib import Path

from tests.server.fixtures import house, limit

__all__ = ["house"]


def pytest_collection_modifyitems(items):
    limit(items, Path(__file__).parent)
