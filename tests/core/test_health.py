"""The diagnosis behind /health: what is due and not done, and what takes long for a good reason."""

from __future__ import annotations

from playbook import Oldest, Playbook, given, models

from llmux.core import Core
from llmux.core import events as ev
from llmux.core.model import Pin
from llmux.core.policy import WaitUntil
from llmux.core.spec import HookKind, Rules
from llmux.core.timers import Timer
from llmux.estimates import Estimates
from llmux.runtime.status_document import notes, problems


def test_long_drains_backoffs_and_queues_are_no_problems() -> None:
    play = given(models("a", "b"), awake=["a"], alive_every=0.0)
    s = play.core.state
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.RequestArrived(2, "b"))
    assert problems(s, 500.0) == []
    assert notes(s, 500.0) == [
        "switch 1 to b: draining for 498 s",
        "1 in flight at 'a', the longest for 499 s",
        "1 wait for 'b'",
    ]


def test_hook_past_its_timeout() -> None:
    play = given(models("a", timeouts={HookKind.WAKE: 30.0}))
    s = play.core.state
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(31.0, ev.DeadlineReached())
    assert problems(s, 41.0) == []
    assert problems(s, 42.0) == ["the wake hook of 'a' runs 11 s past its timeout"]


def test_deadline_that_was_not_acted_on() -> None:
    s = given(models("a"), awake=["a"]).core.state
    assert problems(s, 20.0) == []
    assert problems(s, 21.0) == ["a deadline passed 6 s ago and was not acted on"]


def test_waiters_although_nothing_is_under_way() -> None:
    class Later:
        def decide(self, now):
            return WaitUntil(now.time + 10.0)

    play = given(models("a", "b"), awake=["a"], policy=Later(), alive_every=0.0, min_active=5.0)
    s = play.core.state
    play.feed(1.0, ev.RequestArrived(1, "b"))
    assert problems(s, 6.0) == []
    s.timers.cancel(Timer.ASK)  # as a fault of the core would
    assert problems(s, 4.0) == []
    assert problems(s, 6.0) == ["1 requests wait although nothing is under way"]
    s.models["a"].pin = Pin()
    assert problems(s, 6.0) == []


def test_notes_say_what_makes_requests_wait() -> None:
    starting = Playbook(Core(models("a"), Rules(), Oldest(), Estimates()))
    starting.feed(0.0, ev.Started())
    assert notes(starting.core.state, 1.0) == ["looking at what runs"]

    play = given(models("a"), awake=["a"])
    s = play.core.state
    play.feed(1.0, ev.PinChanged("a", 1))
    assert notes(s, 2.0) == ["'a' is pinned"]
    play.feed(2.0, ev.PinChanged("a", 2, pinned=False))
    play.feed(3.0, ev.SleepRequested("a", 3))
    play.feed(4.0, ev.HookFinished(2, ok=False, detail="exited with 1"))
    assert notes(s, 5.0) == ["switch 1 to sleep: sleeping for 2 s"]
    play.feed(5.0, ev.HookFinished(3, ok=False))
    assert notes(s, 5.0) == [
        "'a' is left alone for 1 s: sleep exited with 1",
        "'a' is faulted: sleep exited with 1",
    ]
    play.feed(7.0, ev.ResetRequested("a", 4))
    play.feed(8.0, ev.LeaseChanged(5))
    assert notes(s, 8.0) == ["the GPU is leased"]
    play.feed(8.0, ev.LeaseChanged(6, until=60.0, reason="training"))
    play.feed(8.0, ev.ManualChanged(7))
    assert notes(s, 9.0) == ["the GPU is leased for 51 s more: training", "manual mode: only an operator switches"]
    play.feed(9.0, ev.ShutdownRequested())
    assert "stopping" in notes(s, 9.0)
