"""Fixtures of the contract tests: ``lab`` is a fresh laboratory, checked for violations when the test ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from lease.lab import Lab


@pytest.fixture
def lab(tmp_path: Path):
    found = Lab(tmp_path)
    yield found
    found.finish()


@pytest.fixture
def labs(tmp_path: Path):
    """Return a maker of laboratories."""
    made: list[Lab] = []

    def make(name: str) -> Lab:
        made.append(Lab(tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        one.finish()
