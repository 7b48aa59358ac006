"""Retirement: sleep, verify, stop, alive, and what they mean together."""

from __future__ import annotations

from playbook import at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind


def test_verify_is_polled_until_it_passes() -> None:
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
        at(3.0, ev.HookFinished(3, ok=False, detail="exited with 1")),
    )
    assert play.core.next_deadline() == 3.5
    play(
        at(3.5, ev.DeadlineReached(), fx.RunHook(4, "a", HookKind.VERIFY, None, switch=1, sources=("a",))),
        at(
            3.6,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 2.6, 0.0, 2.6, None),
        ),
    )


def test_verify_that_never_passes_is_tried_until_its_time_is_over() -> None:
    play = given(models("a", verify=True, timeouts={HookKind.VERIFY: 1.5}), awake=["a"])
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
        at(2.0, ev.HookFinished(3, ok=False, detail="exited with 1")),
        at(2.5, ev.DeadlineReached(), fx.RunHook(4, "a", HookKind.VERIFY, None, switch=1, sources=("a",))),
        at(2.9, ev.HookFinished(4, ok=False, detail="exited with 1")),
        at(3.4, ev.DeadlineReached(), fx.RunHook(5, "a", HookKind.VERIFY, None, switch=1, sources=("a",))),
        # A poll at 3.5 would have no time left.
        at(
            3.45,
            ev.HookFinished(5, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", None, "verify exited with 1"),
            fx.RunHook(6, "a", HookKind.ALIVE, None, switch=1, sources=("a",)),
        ),
        at(
            3.5,
            ev.HookFinished(6, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "verify exited with 1"),
            fx.SwitchFailed(1, ("a",), None, "a: verify exited with 1"),
            fx.SwitchEnded(1, ("a",), None, "failure", 2.5, 0.0, None, None),
        ),
    )


def test_verify_that_hangs_is_ended_when_its_time_is_over() -> None:
    play = given(models("a", verify=True, stop=True, timeouts={HookKind.VERIFY: 2.0}), awake=["a"])
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
        at(2.1, ev.HookFinished(3, ok=False, detail="exited with 1")),
        at(2.6, ev.DeadlineReached(), fx.RunHook(4, "a", HookKind.VERIFY, None, switch=1, sources=("a",))),
        at(4.0, ev.DeadlineReached(), fx.KillHook(4, "timeout")),
        at(
            4.1,
            ev.HookFinished(4, ok=False, detail="ended by SIGTERM"),
            fx.SleepHookFailed("a", None, "verify ended by SIGTERM"),
            fx.RunHook(5, "a", HookKind.STOP, None, switch=1, sources=("a",)),
        ),
        # After stop, verify has all its time again.
        at(5.0, ev.HookFinished(5, ok=True), fx.RunHook(6, "a", HookKind.VERIFY, None, switch=1, sources=("a",))),
        at(
            6.0,
            ev.HookFinished(6, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 5.0, 0.0, 5.0, None),
        ),
    )


def test_failed_sleep_is_followed_by_stop() -> None:
    play = given(models("a", stop=True), awake=["a"])
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
            fx.RunHook(3, "a", HookKind.STOP, None, switch=1, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 2.0, 0.0, 2.0, None),
        ),
    )


def test_failed_sleep_and_stop_of_an_engine_that_answers_leave_it_awake() -> None:
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
        at(
            2.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(4, "a", HookKind.STOP, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            3.0,
            ev.HookFinished(4, ok=False, detail="exited with 2"),
            fx.RunHook(5, "a", HookKind.ALIVE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            4.0,
            ev.HookFinished(5, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "stop exited with 2"),
            fx.SwitchFailed(1, ("a",), "b", "a: stop exited with 2"),
            fx.SwitchEnded(1, ("a",), "b", "failure", 3.0, 0.0, None, None),
            fx.Reject(
                1, "b", fx.Refusal.SLEEP_FAILED, "model 'b' cannot be woken: a: stop exited with 2", 1.0, 3.0
            ),
        ),
        at(4.5, ev.RequestArrived(2, "a"), fx.Admit(2, "a", None, 1, False, 0.0)),
        at(
            4.5,
            ev.RequestArrived(3, "b"),
            fx.Reject(
                3,
                "b",
                fx.Refusal.SLEEP_FAILED,
                "model 'a' could not be put to sleep: stop exited with 2",
                0.5,
                0.0,
            ),
        ),
        at(4.6, ev.RequestFinished(2)),
        at(5.0, ev.DeadlineReached()),
        # The backoff is over: the next request is the next try, and the backoff after it is twice as long.
        at(
            6.0,
            ev.RequestArrived(4, "b"),
            fx.RequestQueued(4, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(2, ("a",), "b", "policy"),
            fx.SwitchDrained(2, ("a",), "b", 0.0),
            fx.ModelDeactivated("a", 2.0),
            fx.RunHook(6, "a", HookKind.SLEEP, None, switch=2, sources=("a",), target="b"),
        ),
        at(
            7.0,
            ev.HookFinished(6, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(7, "a", HookKind.STOP, None, switch=2, sources=("a",), target="b"),
        ),
        at(
            8.0,
            ev.HookFinished(7, ok=False, detail="exited with 2"),
            fx.RunHook(8, "a", HookKind.ALIVE, None, switch=2, sources=("a",), target="b"),
        ),
        at(
            9.0,
            ev.HookFinished(8, ok=True),
            fx.ModelActivated("a", 2, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 2, 2.0, "stop exited with 2"),
            fx.SwitchFailed(2, ("a",), "b", "a: stop exited with 2"),
            fx.SwitchEnded(2, ("a",), "b", "failure", 3.0, 0.0, None, None),
            fx.Reject(
                4, "b", fx.Refusal.SLEEP_FAILED, "model 'b' cannot be woken: a: stop exited with 2", 2.0, 3.0
            ),
        ),
    )


def test_faulted_model_is_tried_again_by_its_own_request_after_the_backoff() -> None:
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
        at(
            2.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "b", "sleep exited with 1"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, sources=("a",), target="b"),
        ),
        at(
            3.0,
            ev.HookFinished(4, ok=False, detail="exited with 1"),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
            fx.SwitchFailed(1, ("a",), "b", "a: sleep exited with 1"),
            fx.SwitchEnded(1, ("a",), "b", "failure", 2.0, 0.0, None, None),
            fx.Reject(
                1, "b", fx.Refusal.SLEEP_FAILED, "model 'b' cannot be woken: a: sleep exited with 1", 1.0, 2.0
            ),
        ),
        at(
            3.5,
            ev.RequestArrived(2, "a"),
            fx.Reject(
                2, "a", fx.Refusal.FAULTED, "model 'a' could not be put to sleep: sleep exited with 1", 0.5, 0.0
            ),
        ),
        at(
            3.5,
            ev.RequestArrived(3, "b"),
            fx.Reject(
                3, "b", fx.Refusal.FAULTED, "model 'a' could not be put to sleep: sleep exited with 1", 0.5, 0.0
            ),
        ),
        at(4.0, ev.DeadlineReached()),
        at(
            5.0,
            ev.RequestArrived(4, "a"),
            fx.RequestQueued(4, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(2, (), "a", "policy"),
            fx.SwitchDrained(2, (), "a", 0.0),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=2, target="a"),
        ),
        at(
            6.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(6, "a", HookKind.WAKE, None, switch=2, target="a"),
        ),
        at(
            7.0,
            ev.HookFinished(6, ok=True),
            fx.ModelActivated("a", 2, (), 2.0),
            fx.SwitchEnded(2, (), "a", "success", 2.0, 0.0, 2.0, None),
            fx.Admit(4, "a", None, 2, False, 2.0),
        ),
    )


def test_faulted_model_is_tried_again_by_a_conflicting_request_after_the_backoff() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(
            1.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
            fx.Answer(1, True, switch=1),
        ),
        at(
            2.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", None, "sleep exited with 1"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(4, ok=False, detail="exited with 1"),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
            fx.SwitchFailed(1, ("a",), None, "a: sleep exited with 1"),
            fx.SwitchEnded(1, ("a",), None, "failure", 2.0, 0.0, None, None),
        ),
        at(
            5.0,
            ev.RequestArrived(1, "b"),
            fx.RequestQueued(1, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(2, ("a",), "b", "policy"),
            fx.SwitchDrained(2, ("a",), "b", 0.0),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=2, sources=("a",), target="b"),
        ),
        at(
            6.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(6, "b", HookKind.WAKE, None, switch=2, sources=("a",), target="b"),
        ),
    )


def test_faulted_model_that_turns_out_to_run_serves_the_request_that_tried_again() -> None:
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
            ev.HookFinished(2, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", None, "sleep exited with 1"),
            fx.RunHook(3, "a", HookKind.ALIVE, None, switch=1, sources=("a",)),
        ),
        at(
            3.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            fx.ModelFaulted("a", "sleep exited with 1"),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep exited with 1"),
            fx.SwitchFailed(1, ("a",), None, "a: sleep exited with 1"),
            fx.SwitchEnded(1, ("a",), None, "failure", 2.0, 0.0, None, None),
        ),
        at(
            5.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(2, (), "a", "policy"),
            fx.SwitchDrained(2, (), "a", 0.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=2, target="a"),
        ),
        at(
            6.0,
            ev.HookFinished(4, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("a", "a", "sleep exited with 1"),
            fx.RunHook(5, "a", HookKind.ALIVE, None, switch=2, target="a"),
        ),
        at(
            7.0,
            ev.HookFinished(5, ok=True),
            fx.ModelActivated("a", 2, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 2, 2.0, "sleep exited with 1"),
            fx.SwitchFailed(2, (), "a", "a: sleep exited with 1"),
            fx.SwitchEnded(2, (), "a", "failure", 2.0, 0.0, None, None),
            fx.Admit(1, "a", None, 1, False, 2.0),
        ),
    )
