"""For all tests: Ctrl-C is heard, and what a test's policies add to the import path is gone after it."""

from __future__ import annotations

import gc
import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

from tests.harness.workers import pytest_addoption, pytest_collection, pytest_runtestloop

__all__ = ["pytest_addoption", "pytest_collection", "pytest_runtestloop"]

# What a shell starts in the background ignores Ctrl-C and Ctrl-\, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# Else every Python that tests start compiles llmux and the SDKs anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes, and how long it takes to make one, is the machine's business.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Thousands of collected tests are no garbage: looking through them took a fifth of the time of collecting them.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(autouse=True)
def _import_path():
    before = sys.path[:]
    yield
    sys.path[:] = before
