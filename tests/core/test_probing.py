"""Probing: engines that are asked, suspected, lost and woken again."""

from __future__ import annotations

from playbook import ANY, at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind, Rules


def test_periodic_alive_loses_an_engine_after_three_failures_in_a_row() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(15.0, ev.DeadlineReached(), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(16.0, ev.HookFinished(2, ok=False, detail="exited with 1")),
        at(31.0, ev.DeadlineReached(), fx.RunHook(3, "a", HookKind.ALIVE, None)),
        at(32.0, ev.HookFinished(3, ok=True)),
        at(47.0, ev.DeadlineReached(), fx.RunHook(4, "a", HookKind.ALIVE, None)),
        at(48.0, ev.HookFinished(4, ok=False, detail="exited with 1")),
        at(63.0, ev.DeadlineReached(), fx.RunHook(5, "a", HookKind.ALIVE, None)),
        at(64.0, ev.HookFinished(5, ok=False, detail="exited with 1")),
        at(79.0, ev.DeadlineReached(), fx.RunHook(6, "a", HookKind.ALIVE, None)),
        at(
            80.0,
            ev.HookFinished(6, ok=False, detail="exited with 1"),
            fx.ModelDeactivated("a", 80.0),
            fx.ModelLost("a", "alive failed 3 times in a row: exited with 1"),
        ),
    )
    assert play.core.next_deadline() is None


def test_periodic_alive_does_not_count_while_an_answer_delivers_bytes() -> None:
    play = given(models("a"), awake=["a"], alive_failures=1)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(15.0, ev.DeadlineReached(), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(16.0, ev.HookFinished(2, ok=False, detail="timeout", last_byte=1.0)),
        at(31.0, ev.DeadlineReached(), fx.RunHook(3, "a", HookKind.ALIVE, None)),
        at(
            32.0,
            ev.HookFinished(3, ok=False, detail="timeout", last_byte=16.9),
            fx.ModelDeactivated("a", 32.0),
            fx.ModelLost("a", "alive failed 1 times in a row: timeout"),
        ),
    )


def test_fewer_failures_allowed_by_a_reload_do_not_lose_an_engine_that_delivers() -> None:
    play = given(models("a"), awake=["a"], alive_failures=5)
    play(
        at(15.0, ev.DeadlineReached(), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(15.0, ev.HookFinished(2, ok=False)),
        at(30.0, ev.DeadlineReached(), fx.RunHook(3, "a", HookKind.ALIVE, None)),
        at(30.0, ev.HookFinished(3, ok=False)),
        at(31.0, ev.ConfigReplaced(models("a"), Rules(alive_failures=2), ANY)),
        at(46.0, ev.DeadlineReached(), fx.RunHook(4, "a", HookKind.ALIVE, None)),
        at(46.0, ev.HookFinished(4, ok=False, last_byte=45.0)),
    )


def test_alive_every_zero_asks_only_after_a_broken_connection() -> None:
    play = given(models("a"), awake=["a"], alive_every=0.0)
    assert play.core.next_deadline() is None
    play(
        at(1.0, ev.EngineLost("a"), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(2.0, ev.HookFinished(2, ok=False)),
        at(3.0, ev.EngineLost("a"), fx.RunHook(3, "a", HookKind.ALIVE, None)),
        at(3.0, ev.EngineLost("a")),
        at(4.0, ev.HookFinished(3, ok=True), fx.RunHook(4, "a", HookKind.ALIVE, None)),
        at(5.0, ev.HookFinished(4, ok=True)),
    )
    assert play.core.next_deadline() is None


def test_refused_connection_is_confirmed_and_its_request_wakes_the_engine_again() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(1.0, ev.RequestReturned(1), fx.RunHook(2, "a", HookKind.ALIVE, None), fx.RequestQueued(1, "a", 1)),
        at(1.5, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 2)),
        at(
            2.0,
            ev.HookFinished(2, ok=False, detail="exited with 1"),
            fx.ModelDeactivated("a", 2.0),
            fx.ModelLost("a", "a connection failed, and alive exited with 1"),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RunHook(3, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(
            9.0,
            ev.HookFinished(3, ok=True),
            fx.ModelActivated("a", 1, (), 7.0),
            fx.SwitchEnded(1, (), "a", "success", 7.0, 0.0, 7.0, 7.0),
            fx.Admit(1, "a", None, 2, True, 8.0),
            fx.Admit(2, "a", None, 2, False, 7.5),
        ),
    )


def test_refused_connection_of_an_engine_that_answers_is_tried_once_more() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(1.0, ev.RequestReturned(1), fx.RunHook(2, "a", HookKind.ALIVE, None), fx.RequestQueued(1, "a", 1)),
        at(1.5, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 2)),
        at(
            2.0,
            ev.HookFinished(2, ok=True),
            fx.Admit(1, "a", None, 1, True, 1.0),
            fx.Admit(2, "a", None, 1, False, 0.5),
        ),
    )


def test_suspicion_during_a_periodic_alive_has_it_asked_again() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(15.0, ev.DeadlineReached(), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(15.1, ev.EngineLost("a", refused=True)),
        at(15.2, ev.HookFinished(2, ok=True), fx.RunHook(3, "a", HookKind.ALIVE, None)),
        at(
            15.3,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.ModelDeactivated("a", 15.3),
            fx.ModelLost("a", "a connection failed, and alive exited with 1"),
        ),
    )


def test_suspicion_of_what_is_not_awake_is_ignored() -> None:
    play = given(models("a"))
    play(
        at(1.0, ev.EngineLost("a", refused=True)),
        at(1.0, ev.EngineLost("b", refused=True)),
    )


def test_periodic_alive_waits_for_the_one_that_runs() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(14.0, ev.EngineLost("a"), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(15.0, ev.DeadlineReached()),
        at(16.0, ev.HookFinished(2, ok=True)),
    )
    assert play.core.next_deadline() == 31.0


def test_failures_before_a_sleep_that_failed_do_not_count_after_it() -> None:
    play = given(models("a"), awake=["a"], alive_failures=2)
    play(
        at(15.0, ev.DeadlineReached(), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(15.0, ev.HookFinished(2, ok=False)),
        at(
            16.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 16.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(1, True, switch=1),
        ),
        at(
            17.0,
            ev.HookFinished(3, ok=False),
            fx.SleepHookFailed("a", None, "sleep failed"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, sources=("a",)),
        ),
        at(
            18.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(1, ("a",), None, "a: sleep failed"),
            fx.SwitchEnded(1, ("a",), None, "failure", 2.0, 0.0, None, None),
        ),
        at(33.0, ev.DeadlineReached(), fx.RunHook(5, "a", HookKind.ALIVE, None)),
        at(33.0, ev.HookFinished(5, ok=False)),
    )


def test_alive_that_ends_when_its_model_is_asleep_changes_nothing() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(15.0, ev.DeadlineReached(), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(
            16.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 16.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(1, True, switch=1),
        ),
        at(
            17.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 1.0, 0.0, 1.0, None),
        ),
        at(18.0, ev.HookFinished(2, ok=True)),
    )
    assert play.core.next_deadline() is None
