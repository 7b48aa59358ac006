"""Leases: the whole GPU is lent."""

from __future__ import annotations

from playbook import ANY, Oldest, Playbook, at, given, models

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.model import Lease
from llmux.core.spec import HookKind, Rules


def test_lease_drains_and_sleeps_everything_and_keeps_everybody_out() -> None:
    play = given(models("a", "b", memory=4), awake=["a", "b"], capacity=8)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.LeaseChanged(1, until=60.0),
            fx.LeaseSet(True, 60.0),
            fx.SwitchStarted(1, ("a", "b"), None, "lease"),
            fx.Answer(1, True, switch=1),
        ),
        at(
            3.0,
            ev.RequestArrived(2, "b"),
            fx.Reject(2, "b", fx.Refusal.LEASED, "the GPU is leased to another job", 57.0, 0.0),
        ),
        at(3.5, ev.ActivationRequested("a", 2), fx.Answer(2, False, reason="the GPU is leased to another job")),
        at(
            4.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(1, ("a", "b"), None, 2.0),
            fx.ModelDeactivated("a", 4.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a", "b")),
            fx.ModelDeactivated("b", 4.0),
            fx.RunHook(4, "b", HookKind.SLEEP, None, switch=1, sources=("a", "b")),
        ),
        at(5.0, ev.HookFinished(3, ok=True), fx.RecordHolders(frozenset({"b"}))),
        at(
            6.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a", "b"), None, "success", 4.0, 2.0, 2.0, None),
            fx.LeaseHeld(4.0),
        ),
        at(60.0, ev.DeadlineReached(), fx.LeaseSet(False, None)),
        at(
            61.0,
            ev.RequestArrived(3, "b"),
            fx.RequestQueued(3, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(2, (), "b", "policy"),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(5, "b", HookKind.WAKE, None, switch=2, target="b"),
        ),
    )


def test_lease_that_ends_during_its_drain_reopens() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.LeaseChanged(1),
            fx.LeaseSet(True, None),
            fx.SwitchStarted(1, ("a",), None, "lease"),
            fx.Answer(1, True, switch=1),
        ),
        at(
            3.0,
            ev.LeaseChanged(2, leased=False),
            fx.LeaseSet(False, None),
            fx.SwitchEnded(1, ("a",), None, "abandoned", 1.0, 1.0, None, None),
            fx.Answer(2, True),
        ),
        at(4.0, ev.RequestArrived(2, "a"), fx.Admit(2, "a", None, 1, False, 0.0)),
    )


def test_lease_turns_away_who_waits_and_calls_their_switch_off() -> None:
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
            ev.LeaseChanged(1, until=9.0),
            fx.LeaseSet(True, 9.0),
            fx.Reject(2, "b", fx.Refusal.LEASED, "the GPU is leased to another job", 6.0, 1.0),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 1.0, 1.0, None, None),
            fx.SwitchStarted(2, ("a",), None, "lease"),
            fx.Answer(1, True, switch=2),
        ),
        at(
            4.0,
            ev.RequestReturned(1),
            fx.RunHook(3, "a", HookKind.ALIVE, None, switch=2, sources=("a",)),
            fx.Reject(1, "a", fx.Refusal.LEASED, "the GPU is leased to another job", 5.0, 3.0),
        ),
    )


def test_lease_during_a_wake_sleeps_what_was_woken() -> None:
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
            ev.LeaseChanged(1),
            fx.LeaseSet(True, None),
            fx.Reject(1, "a", fx.Refusal.LEASED, "the GPU is leased to another job", 60.0, 1.0),
            fx.Answer(1, True, switch=1),
        ),
        at(
            3.0,
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("a", 1, (), 2.0),
            fx.SwitchEnded(1, (), "a", "success", 2.0, 0.0, 2.0, 2.0),
            fx.SwitchStarted(2, ("a",), None, "lease"),
            fx.SwitchDrained(2, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 0.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=2, sources=("a",)),
        ),
        at(
            4.0,
            ev.HookFinished(3, ok=False),
            fx.SleepHookFailed("a", None, "sleep failed"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=2, sources=("a",)),
        ),
        at(
            5.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("a", 2, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(2, ("a",), None, "a: sleep failed"),
            fx.SwitchEnded(2, ("a",), None, "failure", 2.0, 0.0, None, None),
        ),
        # What would not sleep is tried again after its backoff.
        at(
            6.0,
            ev.DeadlineReached(),
            fx.SwitchStarted(3, ("a",), None, "lease"),
            fx.SwitchDrained(3, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=3, sources=("a",)),
        ),
    )


def test_lease_before_the_start_is_over_sleeps_what_is_found() -> None:
    play = Playbook(Core(models("a"), Rules(), Oldest()))
    play(
        at(0.0, ev.Started(), fx.RunHook(1, "a", HookKind.ALIVE, None)),
        at(0.1, ev.LeaseChanged(1), fx.LeaseSet(True, None), fx.Answer(1, True)),
        at(
            0.2,
            ev.HookFinished(1, ok=True),
            fx.ModelActivated("a", 0, (), None),
            fx.RecordHolders(frozenset({"a"})),
            fx.Ready(("a",)),
            fx.SwitchStarted(1, ("a",), None, "lease"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 0.0),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
        ),
    )


def test_lease_during_a_reload_sleeps_what_that_finds() -> None:
    play = given(models("a"))
    play(
        at(1.0, ev.ConfigReplaced(models("a", "b"), Rules(), ANY), fx.RunHook(2, "b", HookKind.ALIVE, None)),
        at(2.0, ev.LeaseChanged(1), fx.LeaseSet(True, None), fx.Answer(1, True)),
        at(
            3.0,
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("b", 0, (), None),
            fx.RecordHolders(frozenset({"b"})),
            fx.SwitchStarted(1, ("b",), None, "lease"),
            fx.SwitchDrained(1, ("b",), None, 0.0),
            fx.ModelDeactivated("b", 0.0),
            fx.RunHook(3, "b", HookKind.SLEEP, None, switch=1, sources=("b",)),
        ),
    )


def test_pin_during_a_lease_wakes_when_it_is_over() -> None:
    play = given(models("a"))
    play(
        at(1.0, ev.LeaseChanged(1), fx.LeaseSet(True, None), fx.Answer(1, True), fx.LeaseHeld(0.0)),
        at(2.0, ev.PinChanged("a", 2), fx.PinSet("a", True, None), fx.Answer(2, True)),
        at(
            3.0,
            ev.LeaseChanged(3, leased=False),
            fx.LeaseSet(False, None),
            fx.Answer(3, True),
            fx.SwitchStarted(1, (), "a", "pinned"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
    )


def test_lease_while_something_is_put_to_sleep() -> None:
    play = given(models("a", "b", memory=4), awake=["a", "b"], capacity=8)
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
        at(2.0, ev.LeaseChanged(2), fx.LeaseSet(True, None), fx.Answer(2, True, switch=1)),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset({"b"})),
            fx.SwitchEnded(1, ("a",), None, "success", 2.0, 0.0, 2.0, None),
            fx.SwitchStarted(2, ("b",), None, "lease"),
            fx.SwitchDrained(2, ("b",), None, 0.0),
            fx.ModelDeactivated("b", 3.0),
            fx.RunHook(4, "b", HookKind.SLEEP, None, switch=2, sources=("b",)),
        ),
    )


def test_end_of_a_lease_leaves_a_switch_alone() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(1, ("a",), None, "requested"),
            fx.Answer(1, True, switch=1),
        ),
        at(3.0, ev.LeaseChanged(2), fx.LeaseSet(True, None), fx.Answer(2, True, switch=1)),
        at(4.0, ev.LeaseChanged(3, leased=False), fx.LeaseSet(False, None), fx.Answer(3, True, switch=1)),
        at(5.0, ev.LeaseChanged(4, leased=False), fx.Answer(4, False, reason="the GPU is not leased")),
    )


def test_lease_calls_off_a_wake_that_was_asked_for() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            2.0,
            ev.ActivationRequested("b", 1),
            fx.SwitchStarted(1, ("a",), "b", "requested"),
            fx.Answer(1, True, switch=1),
        ),
        at(
            3.0,
            ev.LeaseChanged(2),
            fx.LeaseSet(True, None),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 1.0, 1.0, None, None),
            fx.SwitchStarted(2, ("a",), None, "lease"),
            fx.Answer(2, True, switch=2),
        ),
    )


def test_requests_that_wait_for_the_end_of_a_lease() -> None:
    play = given(models("a", "b"), awake=["a"], request_timeout=40.0)
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
            ev.LeaseChanged(1, until=50.0, reason="training", waits=True),
            fx.LeaseSet(True, 50.0, "training", True),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 1.0, 1.0, None, None),
            fx.SwitchStarted(2, ("a",), None, "lease"),
            fx.Answer(1, True, switch=2),
        ),
        at(4.0, ev.RequestArrived(3, "a"), fx.RequestQueued(3, "a", 1)),
        at(
            5.0,
            ev.RequestFinished(1),
            fx.SwitchDrained(2, ("a",), None, 2.0),
            fx.ModelDeactivated("a", 5.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=2, sources=("a",)),
        ),
        at(
            6.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(2, ("a",), None, "success", 3.0, 2.0, 1.0, None),
            fx.LeaseHeld(3.0),
        ),
        at(20.0, ev.RequestArrived(4, "b"), fx.RequestQueued(4, "b", 2)),
        # request_timeout holds under a lease too.
        at(
            42.0,
            ev.DeadlineReached(),
            fx.Reject(2, "b", fx.Refusal.WAITED_TOO_LONG, "waited 40 s for model 'b'", None, 40.0),
        ),
        at(
            44.0,
            ev.DeadlineReached(),
            fx.Reject(3, "a", fx.Refusal.WAITED_TOO_LONG, "waited 40 s for model 'a'", None, 40.0),
        ),
        at(
            50.0,
            ev.DeadlineReached(),
            fx.LeaseSet(False, None),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(3, (), "b", "policy"),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(4, "b", HookKind.WAKE, None, switch=3, target="b"),
        ),
    )


def test_queue_that_is_full_under_a_lease_is_worth_asking_again_at_its_end() -> None:
    play = given(models("a", max_queued=1), lease_waits=True)
    play.feed(1.0, ev.LeaseChanged(1, until=101.0))
    play.feed(2.0, ev.RequestArrived(1, "a"))
    full = "1 requests already wait for 'a'"
    play(at(11.0, ev.RequestArrived(2, "a"), fx.Reject(2, "a", fx.Refusal.QUEUE_FULL, full, 90.0, 0.0)))


def test_lease_during_a_sleep_hook_wakes_nobody_though_they_wait() -> None:
    play = given(models("a", "b"), awake=["a"], lease_waits=True)
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
        at(2.0, ev.LeaseChanged(1), fx.LeaseSet(True, None, "", True), fx.Answer(1, True, switch=1)),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 2.0, 0.0, None, None),
            fx.LeaseHeld(1.0),
        ),
    )
    (stay,) = [record for record in play.ledger.decisions.records if record.kind == "stay"]
    assert stay.reason.startswith("no model is woken yet: the GPU is lent to another job; 1 waiting for b")


def test_lease_is_renewed_and_ended_by_who_knows_its_id() -> None:
    play = given(models("a"))
    lent = "the GPU is leased to another job: training"
    play(
        at(
            0.5,
            ev.LeaseChanged(1, until=9.0, id="x", renew=True),
            fx.Answer(1, False, reason="the GPU is not leased"),
        ),
        at(
            1.0,
            ev.LeaseChanged(2, until=9.0, reason="training", waits=True, id="x"),
            fx.LeaseSet(True, 9.0, "training", True),
            fx.Answer(2, True),
            fx.LeaseHeld(0.0),
        ),
        at(2.0, ev.LeaseChanged(3, until=5.0, id="y"), fx.Answer(3, False, reason=lent)),
        at(3.0, ev.LeaseChanged(4, until=5.0, id="y", renew=True), fx.Answer(4, False, reason=lent)),
        at(4.0, ev.LeaseChanged(5, leased=False, id="y"), fx.Answer(5, False, reason=lent)),
        at(4.5, ev.ActivationRequested("a", 6), fx.Answer(6, False, reason=lent)),
        # What is not said stays as it was, and the job is not told twice that it may begin.
        at(
            8.0,
            ev.LeaseChanged(7, until=20.0, id="x", renew=True),
            fx.LeaseSet(True, 20.0, "training", True),
            fx.Answer(7, True),
        ),
        at(9.0, ev.DeadlineReached()),
        at(19.0, ev.LeaseChanged(8, leased=False, id="x"), fx.LeaseSet(False, None), fx.Answer(8, True)),
        at(20.0, ev.DeadlineReached()),
    )
    assert play.core.next_deadline() is None


def test_lease_is_not_held_while_nobody_knows_who_has_the_gpu() -> None:
    play = given(models("a"), awake=["a"])
    play.feed(1.0, ev.LeaseChanged(1, until=100.0))
    play.feed(2.0, ev.HookFinished(2, ok=False))
    effects = play.feed(3.0, ev.HookFinished(3, ok=False))
    assert fx.ModelFaulted("a", "sleep failed") in effects
    assert not any(isinstance(effect, fx.LeaseHeld) for effect in effects)
    play(
        at(
            3.5,
            ev.ResetRequested("a", 2),
            fx.RecordHolders(frozenset()),
            fx.ModelReset("a"),
            fx.Answer(2, True),
            fx.LeaseHeld(2.5),
        )
    )


def test_lease_outlives_llmux_until_its_expiry() -> None:
    play = Playbook(Core(models("a", preload=True), Rules(), Oldest()))
    lease = Lease(10.0, "training", id="x", since=-20.0, told=True)
    play(
        at(0.0, ev.LeaseChanged(1), fx.Answer(1, False, reason="llmux is still looking at what runs")),
        at(0.0, ev.RequestArrived(1, "a"), fx.RequestQueued(1, "a", 1)),
        at(
            0.0,
            ev.Started(frozenset(), lease=lease),
            fx.LeaseSet(True, 10.0, "training"),
            fx.Reject(1, "a", fx.Refusal.LEASED, "the GPU is leased to another job: training", 10.0, 0.0),
            fx.RunHook(1, "a", HookKind.ALIVE, None),
        ),
        at(0.1, ev.HookFinished(1, ok=False), fx.Ready(()), fx.LeaseHeld(20.1)),
        at(
            10.0,
            ev.DeadlineReached(),
            fx.LeaseSet(False, None),
            fx.SwitchStarted(1, (), "a", "preload"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(2, "a", HookKind.WAKE, None, switch=1, target="a"),
        ),
    )
    assert lease.told, "what was handed over is not changed"


def test_lease_that_has_expired_meanwhile_is_over() -> None:
    play = Playbook(Core(models("a"), Rules(), Oldest()))
    play.feed(5.0, ev.Started(lease=Lease(5.0)))
    assert play.core.state.lease is None


def test_lease_after_the_stop_began_is_refused() -> None:
    play = given(models("a"), awake=["a"])
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.ShutdownRequested())
    play(
        at(3.0, ev.LeaseChanged(1), fx.Answer(1, False, reason="llmux is stopping")),
        at(3.0, ev.ManualChanged(2), fx.Answer(2, False, reason="llmux is stopping")),
    )
