"""Phases: the table is complete, and the diagram is made from it."""

from __future__ import annotations

import pytest
from playbook import given, models

from llmux.core import events as ev
from llmux.core.errors import InvalidTransitionError
from llmux.core.phases import HOLDING, KEPT, TRANSITIONS, Phase, mermaid


def test_every_phase_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS) == set(Phase)
    assert {to for targets in TRANSITIONS.values() for to in targets} == set(Phase) - {Phase.UNKNOWN}


def test_everything_but_sleep_may_hold_the_gpu() -> None:
    assert set(Phase) - {Phase.ASLEEP, Phase.DEEPENING} == HOLDING


def test_diagram_shows_every_transition() -> None:
    lines = mermaid().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert "    ASLEEP --> WAKING: wake hook starts" in lines
    assert len(lines) == 2 + sum(len(targets) for targets in TRANSITIONS.values())


def test_transition_that_the_table_does_not_have_is_an_error() -> None:
    s = given(models("a"), awake=["a"]).core.state
    with pytest.raises(InvalidTransitionError, match="a: AWAKE → ASLEEP"):
        s.move(s.models["a"], Phase.ASLEEP)


def test_moves_are_remembered_in_order_and_bounded() -> None:
    play = given(models("a", "b"), awake=["a"])
    play.feed(3.0, ev.SleepRequested("a", 1))
    s = play.core.state
    assert list(s.moves) == [
        (1, 0.0, "a", Phase.UNKNOWN, Phase.AWAKE),
        (2, 0.0, "b", Phase.UNKNOWN, Phase.ASLEEP),
        (3, 3.0, "a", Phase.AWAKE, Phase.DRAINING),
        (4, 3.0, "a", Phase.DRAINING, Phase.SLEEPING),
    ]
    for _ in range(KEPT):
        s.move(s.models["a"], Phase.AWAKE)
        s.move(s.models["a"], Phase.DRAINING)
        s.move(s.models["a"], Phase.SLEEPING)
    assert (len(s.moves), s.moves[-1].id) == (KEPT, 4 + 3 * KEPT)
