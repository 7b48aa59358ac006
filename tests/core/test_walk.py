"""Random walks: whatever happens in whatever order, the seven invariants hold."""

from __future__ import annotations

import os
import random

import pytest
from world import walk

STEPS = 250


@pytest.mark.no_cover  # what is covered by chance is not
def test_random_walk() -> None:
    seed = int(os.environ.get("LLMUX_WALK_SEED", random.SystemRandom().randrange(10**9)))
    events = int(os.environ.get("LLMUX_WALK_EVENTS", "20000"))
    print(f"walk: seed {seed}, {events} events")  # noqa: T201 - shown when it fails
    for number in range(events // STEPS):
        walk(seed + number, STEPS, classes=number % 3 == 0)
