"""Fixtures of the contract tests: ``lab`` is a fresh laboratory, checked for violations when the test ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import close_all


@pytest.fixture(autouse=True)
async def _no_open_wires():
    yield
    await close_all()


@pytest.fixture
async def lab(tmp_path: Path):
    found = Lab(tmp_path)
    yield found
    await close_all()
    found.finish()


@pytest.fixture
async def labs(tmp_path: Path):
    """Return a maker of laboratories."""
    made: list[Lab] = []

    def make(name: str) -> Lab:
        made.append(Lab(tmp_path / name))
        return made[-1]

    yield make
    await close_all()
    for one in made:
        one.finish()
