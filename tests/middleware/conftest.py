from pathlib import Path

import pytest

from llmux.middleware.fast_path import FastPath
from tests.server.fixtures import house, limit, pytest_asyncio_loop_factories

__all__ = ["house", "pytest_asyncio_loop_factories"]


def pytest_collection_modifyitems(items):
    limit(items, Path(__file__).parent)


@pytest.fixture
def fast(monkeypatch):
    """Note of each request whether the fast path takes it, by its head or by what is known of that."""
    taken = []
    match, match_known = FastPath.match, FastPath.match_known

    def noted(path, data, seen):
        before = len(taken)
        matched = match(path, data, seen)
        if len(taken) == before:
            taken.append(False)
        return matched

    def known(path, data, *head):
        matched = match_known(path, data, *head)
        taken.append(matched is not None)
        return matched

    monkeypatch.setattr(FastPath, "match", noted)
    monkeypatch.setattr(FastPath, "match_known", known)
    return taken
