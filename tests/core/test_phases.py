"""The tables drive: each row of the machines is taken, one that is missing breaks, an invented one shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
from playbook import given, models
from world import walk

from llmux.core import events as ev
from llmux.core import state, switching, teardown
from llmux.core.phases import (
    HOLDING,
    PHASES,
    STAGES,
    STEPS,
    Finding,
    InvalidTransitionError,
    Phase,
    Stage,
    Step,
    Trigger,
    Turn,
    following,
)
from llmux.observability.timeline import MOVES, Timeline
from tests.docs.generated import diagram

STEPS_OF_A_WALK = 250
TABLES = {"PHASES": (state, PHASES), "STAGES": (switching, STAGES), "STEPS": (teardown, STEPS)}

# The walk that takes a row, by its seed. Run this file to find them anew.
WALKS = {
    ("PHASES", "UNKNOWN", "ADOPT"): 0,
    ("PHASES", "UNKNOWN", "NOT_ALIVE"): 1,
    ("PHASES", "UNKNOWN", "MISSING"): 1,
    ("PHASES", "ASLEEP", "WAKE"): 0,
    ("PHASES", "ASLEEP", "DEEPEN"): 5,
    ("PHASES", "DEEPENING", "DEEPENED"): 5,
    ("PHASES", "WAKING", "WOKEN"): 0,
    ("PHASES", "WAKING", "SLEEP"): 0,
    ("PHASES", "WAKING", "ABANDON"): 0,
    ("PHASES", "AWAKE", "DRAIN"): 0,
    ("PHASES", "AWAKE", "LOSE"): 0,
    ("PHASES", "DRAINING", "SLEEP"): 0,
    ("PHASES", "DRAINING", "REOPEN"): 3,
    ("PHASES", "DRAINING", "LOSE"): 12,
    ("PHASES", "SLEEPING", "SLEPT"): 0,
    ("PHASES", "SLEEPING", "STILL_RUNS"): 6,
    ("PHASES", "SLEEPING", "ANSWERS"): 2,
    ("PHASES", "SLEEPING", "UNCLEAR"): 1,
    ("PHASES", "LOST", "WAKE"): 0,
    ("PHASES", "LOST", "SLEEP"): 1,
    ("PHASES", "LOST", "RESET"): 14,
    ("PHASES", "FAULTED", "SLEEP"): 1,
    ("PHASES", "FAULTED", "RESET"): 14,
    ("STAGES", "DRAINING", "DRAINED"): 0,
    ("STAGES", "DRAINING", "FREE"): 0,
    ("STAGES", "DRAINING", "CALLED_OFF"): 3,
    ("STAGES", "SLEEPING", "SLEPT"): 1,
    ("STAGES", "SLEEPING", "PUT_AWAY"): 0,
    ("STAGES", "SLEEPING", "NOT_WANTED"): 3,
    ("STAGES", "SLEEPING", "WOULD_NOT_SLEEP"): 1,
    ("STAGES", "SLEEPING", "STOPPING"): 3,
    ("STAGES", "WAKING", "WOKEN"): 0,
    ("STAGES", "WAKING", "WOULD_NOT_WAKE"): 0,
    ("STAGES", "WAKING", "STOPPING"): 3,
    ("STAGES", "CLEANUP", "CLEANED_UP"): 0,
    ("STAGES", "CLEANUP", "STOPPING"): 52,
    ("STEPS", "SLEEP", "OK"): 1,
    ("STEPS", "SLEEP", "OK_UNVERIFIED"): 0,
    ("STEPS", "SLEEP", "FAILED_STOPPABLE"): 1,
    ("STEPS", "SLEEP", "FAILED"): 1,
    ("STEPS", "VERIFY", "OK"): 0,
    ("STEPS", "VERIFY", "NOT_YET"): 1,
    ("STEPS", "VERIFY", "FAILED_STOPPABLE"): 61,
    ("STEPS", "VERIFY", "FAILED"): 1,
    ("STEPS", "STOP", "OK"): 5,
    ("STEPS", "STOP", "OK_UNVERIFIED"): 2,
    ("STEPS", "STOP", "FAILED"): 1,
    ("STEPS", "ALIVE", "OK"): 2,
    ("STEPS", "ALIVE", "DEAD"): 1,
    ("STEPS", "ALIVE", "DEAD_UNVERIFIED"): 1,
    ("STEPS", "ALIVE", "DEAD_ASSUMED"): 86,
}


class Watched(dict):
    """A table that remembers which rows were taken."""

    def __init__(self, rows) -> None:
        super().__init__(rows)
        self.taken = set()

    def get(self, key, default=None):
        if key in self:
            self.taken.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.taken.add(key)
        return super().__getitem__(key)


@contextmanager
def watched(**instead) -> Iterator[dict[str, Watched]]:
    """Put watched tables in the place of the three, or others ``instead``."""
    tables = {name: Watched(instead.get(name, rows)) for name, (_, rows) in TABLES.items()}
    for name, (module, _) in TABLES.items():
        setattr(module, name, tables[name])
    try:
        yield tables
    finally:
        for name, (module, rows) in TABLES.items():
            setattr(module, name, rows)


def taken_by(seeds: Iterable[int], **instead) -> set[tuple[str, str, str]]:
    """Return the rows that these walks take, as (table, state, trigger)."""
    with watched(**instead) as tables:
        for seed in seeds:
            walk(seed, STEPS_OF_A_WALK)
        return {(name, *(part.name for part in row)) for name, table in tables.items() for row in table.taken}


def every_row() -> list[tuple[str, str, str]]:
    return [(name, *(part.name for part in row)) for name, (_, table) in TABLES.items() for row in table]


def test_each_row_has_its_walk() -> None:
    assert set(WALKS) == set(every_row()), "a row of the tables that no walk is known to take"


@cache
def taken_by_walk(seed: int) -> set[tuple[str, str, str]]:
    return taken_by([seed])


@pytest.mark.no_cover  # what is covered by chance is not
@pytest.mark.parametrize("row", every_row(), ids="-".join)
def test_the_walk_takes_the_row_and_breaks_without_it(row) -> None:
    name = row[0]
    assert row in taken_by_walk(WALKS[row])
    rows = {key: value for key, value in TABLES[name][1].items() if (key[0].name, key[1].name) != row[1:]}
    with pytest.raises(AssertionError, match="InvalidTransitionError"):
        taken_by([WALKS[row]], **{name: rows})


@pytest.mark.no_cover
def test_an_invented_row_is_taken_by_no_walk() -> None:
    invented = {**PHASES, (Phase.ASLEEP, Trigger.DRAIN): (Phase.DRAINING, "invented")}
    assert ("PHASES", "ASLEEP", "DRAIN") not in taken_by(set(WALKS.values()), PHASES=invented)


def test_every_state_can_be_reached_and_left() -> None:
    for table, first, ends in (
        (PHASES, Phase.UNKNOWN, set()),
        (STAGES, Stage.DRAINING, {Stage.SUCCESS, Stage.ABANDONED, Stage.FAILURE}),
        (STEPS, Step.SLEEP, {Step.ASLEEP, Step.RUNNING, Step.FAULTED}),
    ):
        states = set(type(first))
        assert {source for source, _ in table} == states - ends
        assert {target for target, _ in table.values()} >= states - {first}


def test_everything_but_sleep_may_hold_the_gpu() -> None:
    assert set(Phase) - {Phase.ASLEEP, Phase.DEEPENING} == HOLDING


def test_diagrams_show_every_row() -> None:
    lines = diagram(PHASES, Phase.UNKNOWN).splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert "    ASLEEP --> WAKING: wake hook starts" in lines
    assert len(lines) == 2 + len(PHASES)
    lines = diagram(STAGES, Stage.DRAINING).splitlines()
    assert "    SUCCESS --> [*]" in lines
    assert len(lines) == 2 + len(STAGES) + 3


def test_what_the_tables_do_not_have_is_an_error() -> None:
    play = given(models("a"), awake=["a"])
    s = play.core.state
    with pytest.raises(InvalidTransitionError, match="a: AWAKE knows no WAKE"):
        s.move(s.models["a"], Trigger.WAKE)
    play.feed(1.0, ev.SleepRequested("a", 1))
    with pytest.raises(InvalidTransitionError, match="switch 1: SLEEPING knows no DRAINED"):
        switching.move(s, s.switch, Turn.DRAINED)
    with pytest.raises(InvalidTransitionError, match="a: SLEEP knows no DEAD"):
        following(STEPS, "a", Step.SLEEP, Finding.DEAD)


def test_moves_are_remembered_in_order_and_bounded() -> None:
    play = given(models("a", "b"), awake=["a"])
    play.feed(3.0, ev.SleepRequested("a", 1))
    timeline = play.ledger.timeline
    assert list(timeline.moves) == [
        (1, 0.0, "a", Phase.UNKNOWN, Phase.AWAKE),
        (2, 0.0, "b", Phase.UNKNOWN, Phase.ASLEEP),
        (3, 3.0, "a", Phase.AWAKE, Phase.DRAINING),
        (4, 3.0, "a", Phase.DRAINING, Phase.SLEEPING),
    ]
    assert [move.id for move in timeline.moves_since(2)] == [3, 4]
    (event, effects) = timeline.steps[-1][1:]
    full = Timeline()
    for _ in range(MOVES):
        full.add(3.0, event, effects)
    assert (len(full.moves), full.moves[-1].id) == (MOVES, 2 * MOVES)


if __name__ == "__main__":
    found: dict[tuple[str, str, str], int] = {}
    for seed in range(10_000):
        for row in taken_by([seed]):
            found.setdefault(row, seed)
        if len(found) == len(every_row()):
            break
    for row in every_row():
        print(f"    {row}: {found.get(row)},")  # noqa: T201
