"""Prefetch: beside the drain and the sleep of those that leave. Nothing waits for it, nothing depends on it."""

from __future__ import annotations

from playbook import ANY, at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.effects import SWITCH_OVER
from llmux.core.spec import HookKind, ModelSpec


def _both(**more: bool) -> list[ModelSpec]:
    return [*models("a", **more), *models("b", prefetch=True, **more)]


def _a_drains_for_b(play) -> None:
    """An answer of a is in flight, and b is asked for: its prefetch runs."""
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a"), run("prefetch b")),
    )


def _a_sleeps(play) -> None:
    play(
        at(
            4.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a",), "b", 2.0),
            fx.ModelDeactivated("a", 4.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        )
    )


def _b_wakes(play) -> None:
    play(
        at(
            5.0,
            ev.HookFinished(4, ok=True),
            holders(),
            holders("b"),
            fx.RunHook(5, "b", HookKind.WAKE, None, switch=1, sources=("a",), target="b"),
        )
    )


def test_a_prefetch_runs_beside_the_drain() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    play(at(3.0, ev.HookFinished(3, ok=True)))
    _a_sleeps(play)
    _b_wakes(play)
    play(
        at(
            9.0,
            ev.HookFinished(5, ok=True),
            fx.ModelActivated("b", 1, ("a",), 7.0),
            fx.SwitchEnded(1, ("a",), "b", "success", 7.0, 2.0, 5.0, 5.0),
            admitted(2, "b", 7.0),
        )
    )


def test_a_prefetch_that_fails_changes_nothing() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    play(at(3.0, ev.HookFinished(3, ok=False, detail="exited with 1")))
    _a_sleeps(play)
    _b_wakes(play)
    b = play.core.state.models["b"]
    assert not b.last_error
    assert not b.wake_backoff.active(5.0)


def test_the_wake_does_not_wait_for_the_prefetch_and_its_success_ends_it() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    _a_sleeps(play)
    _b_wakes(play)
    play(
        at(
            9.0,
            ev.HookFinished(5, ok=True),
            fx.ModelActivated("b", 1, ("a",), 7.0),
            fx.KillHook(3, SWITCH_OVER),
            fx.SwitchEnded(1, ("a",), "b", "success", 7.0, 2.0, 5.0, 5.0),
            admitted(2, "b", 7.0),
        ),
        at(9.1, ev.HookFinished(3, ok=False)),
    )


def test_with_nothing_in_flight_it_runs_beside_the_sleep_hook() -> None:
    play = given(_both(), awake=["a"])
    play(at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), run("prefetch b"), leaves("a", 1.0)))


def test_where_nobody_leaves_the_wake_comes_at_once_and_there_is_no_prefetch() -> None:
    play = given(models("a", prefetch=True))
    play(at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")))


def test_a_switch_to_sleep_prefetches_nothing() -> None:
    play = given(models("a", "b", prefetch=True), awake=["a"])
    play(at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)))


def test_a_switch_that_is_called_off_ends_its_prefetch() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    play(
        at(
            3.0,
            ev.RequestAbandoned(2),
            fx.KillHook(3, SWITCH_OVER),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 1.0, 1.0, None, None),
        ),
    )


def test_as_long_as_one_is_being_ended_no_other_begins() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    play(
        at(
            3.0,
            ev.RequestAbandoned(2),
            fx.KillHook(3, SWITCH_OVER),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 1.0, 1.0, None, None),
        ),
        at(3.1, asks(3, "b"), queued(3, "b"), begins("b", "a")),
        at(3.2, ev.HookFinished(3, ok=False)),  # nor after it: once a switch, as it begins
        at(3.3, ev.RequestAbandoned(3), ends(ANY, ANY, result="abandoned")),
        at(3.4, asks(4, "b"), queued(4, "b"), begins("b", "a"), run("prefetch b")),
    )


def test_a_wake_that_is_not_wanted_any_more_after_the_sleep_ends_the_prefetch() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    _a_sleeps(play)
    play(
        at(4.5, ev.RequestAbandoned(2)),
        at(
            5.0,
            ev.HookFinished(4, ok=True),
            holders(),
            fx.KillHook(3, SWITCH_OVER),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 3.0, 2.0, None, None),
        ),
    )


def test_a_sleep_that_fails_ends_the_prefetch_with_the_switch() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    _a_sleeps(play)
    play(
        at(
            5.0,
            ev.HookFinished(4, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(5, "a", HookKind.ALIVE, None, switch=1, sources=("a",), target="b"),
        )
    )
    effects = play.feed(6.0, ev.HookFinished(5, ok=True))
    assert fx.KillHook(3, SWITCH_OVER) in effects
    assert [type(effect) for effect in effects].count(fx.SwitchEnded) == 1


def test_a_wake_that_fails_ends_the_prefetch_before_the_cleanup() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    _a_sleeps(play)
    _b_wakes(play)
    effects = play.feed(6.0, ev.HookFinished(5, ok=False, detail="exited with 1"))
    cleanup = fx.RunHook(6, "b", HookKind.SLEEP, None, switch=1, sources=("a",), target="b")
    assert effects.index(fx.KillHook(3, SWITCH_OVER)) < effects.index(cleanup)
    ended = play.feed(7.0, ev.HookFinished(6, ok=True))
    assert not any(isinstance(effect, fx.KillHook) for effect in ended), "once"


def test_a_prefetch_past_its_timeout_is_ended_and_the_switch_goes_on() -> None:
    timeouts = {HookKind.PREFETCH: 1.5}
    play = given([*models("a"), *models("b", prefetch=True, timeouts=timeouts)], awake=["a"])
    _a_drains_for_b(play)
    play(
        at(3.5, ev.DeadlineReached(), fx.KillHook(3, "timeout")),
        at(3.6, ev.HookFinished(3, ok=False, detail="ran past its timeout")),
    )
    _a_sleeps(play)
    _b_wakes(play)


def test_stopping_ends_a_prefetch() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    play(
        at(
            3.0,
            ev.ShutdownRequested(),
            refused(2, "b", "stopping", "llmux is stopping", 5.0, 1.0),
            fx.KillHook(3, "stopping"),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 1.0, 1.0, None, None),
        ),
        at(3.5, ev.RequestFinished(1)),
        at(4.0, ev.HookFinished(3, ok=False), fx.Stopped()),
    )


def test_what_may_hold_the_gpu_is_not_prefetched() -> None:
    play = given(models("a", prefetch=True), awake=["a"])
    play.feed(1.0, ev.SleepRequested("a", 1))
    play.feed(2.0, ev.HookFinished(2, ok=False, detail="exited with 1"))
    play.feed(3.0, ev.HookFinished(3, ok=False, detail="exited with 1"))
    play(
        at(
            5.0,  # faulted, and its backoff is over: it has to be slept before it can be woken
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(2, (), "a", "policy"),
            fx.SwitchDrained(2, (), "a", 0.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=2, target="a"),
        )
    )


def test_a_removed_model_is_forgotten_when_its_prefetch_has_ended() -> None:
    play = given(_both(), awake=["a"])
    _a_drains_for_b(play)
    play(
        at(
            3.0,
            replaced(models("a")),
            refused(
                2, "b", "model_not_found", "model 'b' not found: it was removed from the configuration", None, 1.0
            ),
            fx.KillHook(3, SWITCH_OVER),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 1.0, 1.0, None, None),
        ),
        at(4.0, ev.HookFinished(3, ok=False), fx.ModelRemoved("b")),
    )
