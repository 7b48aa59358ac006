"""Stopping: TERM at every stage."""

from __future__ import annotations

from playbook import Oldest, Playbook, at, given, models

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind, Rules


def test_nothing_under_way_stops_at_once() -> None:
    given(models("a"), awake=["a"])(at(1.0, ev.ShutdownRequested(), fx.Stopped()))


def test_everything_queued_is_turned_away_and_answers_may_finish_within_the_grace() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
        ),
        at(
            3.0,
            ev.ShutdownRequested(),
            fx.Reject(2, "b", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 1.0),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 1.0, 1.0, None, None),
        ),
        at(3.0, ev.ShutdownRequested()),
        at(4.0, ev.RequestArrived(3, "a"), fx.Reject(3, "a", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 0.0)),
        at(5.0, ev.EngineLost("a", refused=True)),
    )
    # No alive is asked meanwhile: the next thing due is the end of the grace.
    assert play.core.next_deadline() == 33.0
    play(
        at(33.0, ev.DeadlineReached(), fx.CancelRequests((1,), "a", fx.CutReason.STOPPING)),
        at(
            33.1,
            ev.RequestReturned(1),
            fx.Reject(1, "a", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 32.1),
            fx.Stopped(),
        ),
    )


def test_term_during_the_start() -> None:
    play = Playbook(Core(models("a", "b"), Rules(), Oldest()))
    play(
        at(0.0, ev.Started(), fx.RunHook(1, "a", HookKind.ALIVE, None), fx.RunHook(2, "b", HookKind.ALIVE, None)),
        at(0.1, ev.RequestArrived(1, "a"), fx.RequestQueued(1, "a", 1)),
        at(0.2, ev.HookFinished(1, ok=True)),
        at(
            0.3,
            ev.ShutdownRequested(),
            fx.Reject(1, "a", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 0.19999999999999998),
            fx.KillHook(2, "stopping"),
        ),
        at(0.4, ev.HookFinished(2, ok=True), fx.Stopped()),
    )


def test_term_before_the_start() -> None:
    play = Playbook(Core(models("a"), Rules(), Oldest()))
    play(
        at(0.0, ev.ShutdownRequested(), fx.Stopped()),
        at(0.1, ev.Started()),
    )


def test_term_during_a_sleep_lets_it_finish_and_wakes_nobody() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(
            1.0,
            ev.RequestArrived(1, "b"),
            fx.RequestQueued(1, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.SwitchDrained(1, ("a",), "b", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
        at(2.0, ev.ShutdownRequested(), fx.Reject(1, "b", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 1.0)),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 2.0, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_term_during_a_sleep_that_fails_begins_nothing_further() -> None:
    play = given(models("a", "b", stop=True), awake=["a"])
    play(
        at(
            1.0,
            ev.RequestArrived(1, "b"),
            fx.RequestQueued(1, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.SwitchDrained(1, ("a",), "b", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
        at(2.0, ev.ShutdownRequested(), fx.Reject(1, "b", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 1.0)),
        at(
            3.0,
            ev.HookFinished(3, ok=False),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 2.0, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_term_during_verify_ends_it_and_the_state_file_keeps_the_model() -> None:
    play = given(models("a", verify=True), awake=["a"])
    play(
        at(
            1.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(1, True, switch=1),
        ),
        at(2.0, ev.HookFinished(2, ok=True), fx.RunHook(3, "a", HookKind.VERIFY, None, switch=1, sources=("a",))),
        at(3.0, ev.ShutdownRequested(), fx.KillHook(3, "stopping")),
        at(
            3.1,
            ev.HookFinished(3, ok=False),
            fx.SwitchEnded(1, ("a",), None, "abandoned", 2.1, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_term_during_a_sleep_that_verify_was_to_prove() -> None:
    play = given(models("a", verify=True), awake=["a"])
    play(
        at(
            1.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(1, True, switch=1),
        ),
        at(2.0, ev.ShutdownRequested()),
        at(
            3.0,
            ev.HookFinished(2, ok=True),
            fx.SwitchEnded(1, ("a",), None, "abandoned", 2.0, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_term_between_two_polls_of_verify() -> None:
    play = given(models("a", verify=True), awake=["a"])
    play(
        at(
            1.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(1, True, switch=1),
        ),
        at(2.0, ev.HookFinished(2, ok=True), fx.RunHook(3, "a", HookKind.VERIFY, None, switch=1, sources=("a",))),
        at(3.0, ev.HookFinished(3, ok=False)),
        at(
            3.1,
            ev.ShutdownRequested(),
            fx.SwitchEnded(1, ("a",), None, "abandoned", 2.1, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_term_while_one_of_two_is_asleep_and_the_other_is_verified() -> None:
    specs = [*models("a", memory=4), *models("b", memory=4, verify=True), *models("c", memory=8)]
    play = given(specs, awake=["a", "b"], capacity=8)
    play(
        at(
            1.0,
            ev.RequestArrived(1, "c"),
            fx.RequestQueued(1, "c", 1),
            fx.PolicyDecided("switch", "c", ""),
            fx.SwitchStarted(1, ("a", "b"), "c", "policy"),
            fx.SwitchDrained(1, ("a", "b"), "c", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
            fx.ModelDeactivated("b", 1.0),
            fx.RunHook(5, "b", HookKind.SLEEP, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(
            2.0,
            ev.HookFinished(5, ok=True),
            fx.RunHook(6, "b", HookKind.VERIFY, None, switch=1, sources=("a", "b"), target="c"),
        ),
        at(
            3.0,
            ev.ShutdownRequested(),
            fx.Reject(1, "c", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 2.0),
            fx.KillHook(6, "stopping"),
        ),
        at(3.1, ev.HookFinished(6, ok=False)),
        at(
            4.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset({"b"})),
            fx.SwitchEnded(1, ("a", "b"), "c", "abandoned", 3.0, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_term_during_a_wake_ends_it_and_leaves_the_engine() -> None:
    play = given(models("a"))
    play(
        at(
            1.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ev.ShutdownRequested(),
            fx.Reject(1, "a", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 1.0),
            fx.KillHook(2, "stopping"),
        ),
        at(
            3.0,
            ev.HookFinished(2, ok=False),
            fx.SwitchEnded(1, (), "a", "abandoned", 2.0, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_term_during_a_wake_that_succeeds_all_the_same() -> None:
    play = given(models("a"))
    play(
        at(
            1.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ev.ShutdownRequested(),
            fx.Reject(1, "a", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 1.0),
            fx.KillHook(2, "stopping"),
        ),
        at(
            3.0,
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("a", 1, (), 2.0),
            fx.SwitchEnded(1, (), "a", "success", 2.0, 0.0, 2.0, 2.0),
            fx.Stopped(),
        ),
    )


def test_term_during_the_cleanup_of_a_failed_wake() -> None:
    play = given(models("a"))
    play(
        at(
            1.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False, detail="exited with 1"),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "exited with 1"),
            fx.Reject(1, "a", fx.Refusal.WAKE_FAILED, "model 'a' failed to wake: exited with 1", 1.0, 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        at(2.5, ev.ShutdownRequested()),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 2.0, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_alive_that_is_ended_but_succeeds_says_that_the_engine_runs() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(
            1.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(1, True, switch=1),
        ),
        at(
            2.0,
            ev.HookFinished(2, ok=False),
            fx.SleepHookFailed("a", None, "sleep failed"),
            fx.RunHook(3, "a", HookKind.ALIVE, None, switch=1, sources=("a",)),
        ),
        at(3.0, ev.ShutdownRequested(), fx.KillHook(3, "stopping")),
        at(
            3.1,
            ev.HookFinished(3, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(1, ("a",), None, "a: sleep failed"),
            fx.SwitchEnded(1, ("a",), None, "failure", 2.1, 0.0, None, None),
            fx.Stopped(),
        ),
    )


def test_lease_that_would_end_while_stopping_is_forgotten() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.LeaseChanged(1, until=5.0),
            fx.LeaseSet(True, 5.0),
            fx.SwitchStarted(1, ("a",), None, "lease"),
            fx.Answer(1, True, switch=1),
        ),
        at(3.0, ev.ShutdownRequested(), fx.SwitchEnded(1, ("a",), None, "abandoned", 1.0, 1.0, None, None)),
    )
    assert play.core.next_deadline() == 33.0
    play(at(6.0, ev.RequestFinished(1), fx.Stopped()))


def test_hook_that_is_being_ended_is_not_ended_twice() -> None:
    play = given(models("a", timeouts={HookKind.WAKE: 30.0}))
    play(
        at(
            1.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
        at(31.0, ev.DeadlineReached(), fx.KillHook(2, "timeout")),
        at(32.0, ev.ShutdownRequested(), fx.Reject(1, "a", fx.Refusal.STOPPING, "llmux is stopping", 5.0, 31.0)),
        at(
            33.0,
            ev.HookFinished(2, ok=False),
            fx.SwitchEnded(1, (), "a", "abandoned", 32.0, 0.0, None, None),
            fx.Stopped(),
        ),
    )
