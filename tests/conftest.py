"""For all tests: what a test's policies add to the import path is gone after it."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _import_path():
    before = sys.path[:]
    yield
    sys.path[:] = before
