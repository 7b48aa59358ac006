"""Backoff: 1 s, doubling, ±20 %, at most 20 s."""

from __future__ import annotations

import pytest
from playbook import given, models

from llmux.core import events as ev
from llmux.core.model import Backoff


def pauses(jitter, count=7):
    backoff = Backoff()
    return [backoff.fail(0.0, 1.0, 20.0, lambda: jitter) for _ in range(count)]


def test_doubles_up_to_the_cap() -> None:
    assert pauses(0.5) == [1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0]


def test_jitter_is_a_fifth_and_never_exceeds_the_cap() -> None:
    assert pauses(0.0) == pytest.approx([0.8, 1.6, 3.2, 6.4, 12.8, 16.0, 16.0])
    assert pauses(0.999999) == pytest.approx([1.2, 2.4, 4.8, 9.6, 19.2, 20.0, 20.0], rel=1e-5)


def test_is_active_until_its_end_and_forgotten_when_cleared() -> None:
    backoff = Backoff()
    assert not backoff.active(0.0)
    backoff.fail(10.0, 1.0, 20.0, lambda: 0.5)
    assert backoff.active(10.9)
    assert backoff.remaining(10.25) == 0.75
    assert not backoff.active(11.0)
    assert backoff.remaining(12.0) == 0.0
    backoff.clear()
    assert backoff.fail(20.0, 1.0, 20.0, lambda: 0.5) == 1.0


def test_a_thousand_failures_do_not_overflow() -> None:
    assert pauses(0.5, 2000)[-1] == 20.0


def test_a_wake_that_succeeds_clears_it() -> None:
    play = given(models("a"))
    backoff, wakes = play.core.state.models["a"].wake_backoff, []
    for number, ok in enumerate((False, True), 1):
        now = 100.0 * number
        play.feed(now, ev.RequestArrived(number, "a"))
        for hook in list(play.ledger.hooks.values()):  # the wake
            play.feed(now, ev.HookFinished(hook.hook, ok=ok))
        for hook in list(play.ledger.hooks.values()):  # what cleans up after it
            play.feed(now, ev.HookFinished(hook.hook, ok=True))
        wakes.append(backoff.failures)
    assert wakes == [1, 0]
