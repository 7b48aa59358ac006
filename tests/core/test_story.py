"""The story: what an error of the core tells, and that it runs as a test."""

from __future__ import annotations

import re
from unittest.mock import ANY

import playbook
import pytest
from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.phases import CoreError, InvalidEventError, Phase
from llmux.core.spec import HookKind, ModelSpec, Rules
from llmux.observability.timeline import LENGTH, as_python


def test_story_of_a_walk_runs_as_a_playbook() -> None:
    events = [
        (1.0, ev.RequestArrived(1, "a")),
        (2.0, ev.RequestArrived(2, "b")),
        (2.5, ev.PinChanged("a", 1, until=4.0)),
        (4.0, ev.DeadlineReached()),
        (5.0, ev.RequestReturned(1, connected=False)),
        (6.0, ev.HookFinished(3, ok=False, detail='said "no"', last_byte=5.5)),
        (
            7.0,
            ev.ConfigReplaced(
                models("a", "c", verify=True), Rules(max_wait=float("inf")), ANY, {"c": (1.0, None)}
            ),
        ),
        (8.0, ev.HookFinished(5, ok=True)),
        (9.0, ev.LeaseChanged(2)),
        (9.0, ev.ShutdownRequested()),
    ]
    first = given(models("a", "b", definition="old"), awake=["a"])
    for time, event in events:
        first.feed(time, event)
    pasted = first.ledger.timeline.story()
    second = given(models("a", "b", definition="old"), awake=["a"])
    steps = eval(f"[{pasted}]", {**vars(playbook), "fx": fx, "ev": ev, "ANY": ANY})
    second(*steps[3:])  # the start is told by ``given``
    assert second.ledger.timeline.story() == pasted


def test_error_tells_the_story_that_the_driver_knows() -> None:
    play = given(models("a"), awake=["a"])
    with pytest.raises(InvalidEventError) as failure:
        play.core.handle(ev.RequestFinished(7), 1.0)
    assert str(failure.value) == "no request 7"
    play.ledger.timeline.add(1.0, ev.RequestFinished(7), [])
    failure.value.story = play.ledger.timeline.story()
    assert str(failure.value).splitlines()[0] == "no request 7"
    assert str(failure.value).splitlines()[-1] == "        at(1.0, ev.RequestFinished(7)),"
    assert str(CoreError("no story")) == "no story"


def test_story_is_bounded() -> None:
    play = given(models("a"), awake=["a"])
    for _ in range(LENGTH + 50):
        play.feed(1.0, ev.DeadlineReached())
    assert len(re.findall(r"^        at\(", play.ledger.timeline.story(), re.MULTILINE)) == LENGTH


def test_values_are_written_as_the_expressions_that_make_them() -> None:
    assert as_python(HookKind.WAKE) == "HookKind.WAKE"
    assert as_python(fx.Refusal.PINNED) == "fx.Refusal.PINNED"
    assert as_python((1,)) == "(1,)"
    assert as_python((1, 2.5, True, None)) == "(1, 2.5, True, None)"
    assert as_python(frozenset({"b", "a"})) == "frozenset({'a', 'b'})"
    assert as_python(frozenset()) == "frozenset()"
    assert as_python({HookKind.WAKE: float("inf")}) == '{HookKind.WAKE: float("inf")}'
    assert as_python([Phase.LOST]) == "[Phase.LOST]"
    assert as_python(ModelSpec("a", definition=object(), memory=4)) == "ModelSpec('a', definition=ANY, memory=4)"
    assert as_python(ev.HookFinished(3, ok=True, detail="x")) == "ev.HookFinished(3, True, detail='x')"


@pytest.mark.parametrize(
    ("event", "complaint"),
    [
        (ev.RequestArrived(1, "a"), "request 1 arrived twice"),
        (ev.RequestFinished(9), "no request 9"),
        (ev.RequestAbandoned(9), "no request 9"),
        (ev.RequestReturned(9), "no request 9"),
        (ev.RequestFinished(2), "request 2 was not admitted"),
        (ev.RequestReturned(2), "request 2 cannot be returned"),
        (ev.HookFinished(99, ok=True), "no hook 99"),
    ],
)
def test_event_about_what_is_not_there_is_an_error_and_changes_nothing(event, complaint) -> None:
    play = given(models("a", max_in_flight=1), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "a"), queued(2, "a")),
    )
    with pytest.raises(InvalidEventError, match=complaint):
        play.core.handle(event, 1.0)
    play(
        at(2.0, ev.RequestFinished(1), admitted(2, "a", 1.0)),
        at(3.0, ev.RequestFinished(2)),
    )


def test_request_is_returned_at_most_once() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, ev.RequestReturned(1), alone("alive a"), queued(1, "a")),
        at(2.0, ok("alive a"), fx.Admit(1, "a", None, 1, True, 1.0)),
    )
    with pytest.raises(InvalidEventError, match="cannot be returned"):
        play.core.handle(ev.RequestReturned(1), 3.0)


def test_time_never_runs_backwards() -> None:
    core = given(models("a"), awake=["a"]).core
    core.handle(ev.RequestArrived(1, "a"), 5.0)
    core.handle(ev.RequestArrived(2, "a"), 4.0)
    assert core.state.requests[2].arrived == 5.0
