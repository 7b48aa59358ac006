"""Leases: the whole GPU is lent."""

from __future__ import annotations

from playbook import Oldest, Playbook, at, given, models
from steps import *

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.model import Lease, Reason
from llmux.core.spec import Rules
from llmux.estimates import Estimates


def test_lease_drains_and_sleeps_everything_and_keeps_everybody_out() -> None:
    play = given(models("a", "b", memory=4), awake=["a", "b"], capacity=8)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(
            2.0,
            ev.LeaseChanged(1, until=60.0),
            fx.LeaseSet(True, 60.0),
            begins(None, "a", "b", why="lease"),
            accepted(1),
        ),
        at(3.0, asks(2, "b"), refused(2, "b", "leased", "the GPU is leased to another job", 57.0)),
        at(3.5, ev.ActivationRequested("a", 2), fx.Answer(2, False, reason="the GPU is leased to another job")),
        at(4.0, ev.RequestFinished(1), drained(2.0), sleeps("a", 4.0), sleeps("b", 4.0)),
        at(5.0, ok("sleep a"), holders("b")),
        at(6.0, ok("sleep b"), holders(), ends(4.0, 2.0, 2.0), fx.LeaseHeld(4.0)),
        at(60.0, ev.DeadlineReached(), fx.LeaseSet(False, None)),
        at(61.0, asks(3, "b"), queued(3, "b"), begins("b"), wakes("b")),
    )


def test_lease_that_ends_during_its_drain_reopens() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.LeaseChanged(1), fx.LeaseSet(True, None), begins(None, "a", why="lease"), accepted(1)),
        at(
            3.0,
            ev.LeaseChanged(2, leased=False),
            fx.LeaseSet(False, None),
            ends(1.0, 1.0, result="abandoned"),
            fx.Answer(2, True),
        ),
        at(4.0, asks(2, "a"), admitted(2, "a")),
    )


def test_lease_turns_away_who_waits_and_calls_their_switch_off() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(
            3.0,
            ev.LeaseChanged(1, until=9.0),
            fx.LeaseSet(True, 9.0),
            refused(2, "b", "leased", "the GPU is leased to another job", 6.0, 1.0),
            ends(1.0, 1.0, result="abandoned"),
            begins(None, "a", why="lease"),
            accepted(1),
        ),
        at(
            4.0,
            ev.RequestReturned(1),
            run("alive a"),
            refused(1, "a", "leased", "the GPU is leased to another job", 5.0, 3.0),
        ),
    )


def test_lease_during_a_wake_sleeps_what_was_woken() -> None:
    play = given(models("a"))
    play(
        at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), wakes("a")),
        at(
            2.0,
            ev.LeaseChanged(1),
            fx.LeaseSet(True, None),
            refused(1, "a", "leased", "the GPU is leased to another job", 60.0, 1.0),
            accepted(1),
        ),
        at(
            3.0,
            ok("wake a"),
            awake("a", 2.0),
            ends(2.0, 0.0, 2.0, 2.0),
            begins(None, "a", why="lease"),
            leaves("a", 0.0),
        ),
        at(4.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(5.0, ok("alive a"), again("a"), backs_off("sleep a", "sleep failed"), fails("a: sleep failed", 2.0)),
        # What would not sleep is tried again after its backoff.
        at(6.0, ev.DeadlineReached(), begins(None, "a", why="lease"), leaves("a", 1.0)),
    )


def test_lease_before_the_start_is_over_sleeps_what_is_found() -> None:
    play = Playbook(Core(models("a"), Rules(), Oldest(), Estimates()))
    play(
        at(0.0, ev.Started(), alone("alive a")),
        at(0.1, ev.LeaseChanged(1), fx.LeaseSet(True, None), fx.Answer(1, True)),
        at(
            0.2,
            ok("alive a"),
            adopted("a"),
            holders("a"),
            fx.Ready(("a",)),
            begins(None, "a", why="lease"),
            leaves("a", 0.0),
        ),
    )


def test_lease_during_a_reload_sleeps_what_that_finds() -> None:
    play = given(models("a"))
    play(
        at(1.0, replaced(models("a", "b")), alone("alive b")),
        at(2.0, ev.LeaseChanged(1), fx.LeaseSet(True, None), fx.Answer(1, True)),
        at(3.0, ok("alive b"), adopted("b"), holders("b"), begins(None, "b", why="lease"), leaves("b", 0.0)),
    )


def test_lease_that_was_held_is_held_anew_when_a_reload_has_found_a_holder() -> None:
    play = given(models("a"))
    play(
        at(1.0, ev.LeaseChanged(1), fx.LeaseSet(True, None), fx.Answer(1, True), fx.LeaseHeld(0.0)),
        at(2.0, replaced(models("a", "b")), alone("alive b")),
        at(3.0, ok("alive b"), adopted("b"), holders("b"), begins(None, "b", why="lease"), leaves("b", 0.0)),
        at(5.0, ok("sleep b"), holders(), ends(2.0, 0.0, 2.0), fx.LeaseHeld(4.0)),
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
            begins("a", why="pinned"),
            wakes("a"),
        ),
    )


def test_lease_while_something_is_put_to_sleep() -> None:
    play = given(models("a", "b", memory=4), awake=["a", "b"], capacity=8)
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, ev.LeaseChanged(2), fx.LeaseSet(True, None), accepted(2)),
        at(
            3.0, ok("sleep a"), holders("b"), ends(2.0, 0.0, 2.0), begins(None, "b", why="lease"), leaves("b", 3.0)
        ),
    )


def test_end_of_a_lease_leaves_a_switch_alone() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), accepted(1)),
        at(3.0, ev.LeaseChanged(2), fx.LeaseSet(True, None), accepted(2)),
        at(4.0, ev.LeaseChanged(3, leased=False), fx.LeaseSet(False, None), accepted(3)),
        at(5.0, ev.LeaseChanged(4, leased=False), fx.Answer(4, False, reason="the GPU is not leased")),
    )


def test_lease_calls_off_a_wake_that_was_asked_for() -> None:
    play = given(models("a", "b"), awake=["a"])
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, ev.ActivationRequested("b", 1), begins("b", "a", why="requested"), accepted(1)),
        at(
            3.0,
            ev.LeaseChanged(2),
            fx.LeaseSet(True, None),
            ends(1.0, 1.0, result="abandoned"),
            begins(None, "a", why="lease"),
            accepted(2),
        ),
    )


def test_requests_that_wait_for_the_end_of_a_lease() -> None:
    play = given(models("a", "b"), awake=["a"], request_timeout=40.0)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(
            3.0,
            ev.LeaseChanged(1, until=50.0, reason="training", waits=True),
            fx.LeaseSet(True, 50.0, "training", True),
            ends(1.0, 1.0, result="abandoned"),
            begins(None, "a", why="lease"),
            accepted(1),
        ),
        at(4.0, asks(3, "a"), queued(3, "a")),
        at(5.0, ev.RequestFinished(1), drained(2.0), sleeps("a", 5.0)),
        at(6.0, ok("sleep a"), holders(), ends(3.0, 2.0, 1.0), fx.LeaseHeld(3.0)),
        at(20.0, asks(4, "b"), queued(4, "b", 2)),
        # request_timeout holds under a lease too.
        at(
            42.0, ev.DeadlineReached(), refused(2, "b", "request_timeout", "waited 40 s for model 'b'", None, 40.0)
        ),
        at(
            44.0, ev.DeadlineReached(), refused(3, "a", "request_timeout", "waited 40 s for model 'a'", None, 40.0)
        ),
        at(50.0, ev.DeadlineReached(), fx.LeaseSet(False, None), begins("b"), wakes("b")),
    )


def test_queue_that_is_full_under_a_lease_is_worth_asking_again_at_its_end() -> None:
    play = given(models("a", max_queued=1), lease_waits=True)
    play.feed(1.0, ev.LeaseChanged(1, until=101.0))
    play.feed(2.0, ev.RequestArrived(1, "a"))
    full = "1 requests already wait for 'a'"
    play(at(11.0, asks(2, "a"), refused(2, "a", "queue_full", full, 90.0)))


def test_lease_during_a_sleep_hook_wakes_nobody_though_they_wait() -> None:
    play = given(models("a", "b"), awake=["a"], lease_waits=True)
    play(
        at(1.0, asks(1, "b"), queued(1, "b"), begins("b", "a"), leaves("a", 1.0)),
        at(2.0, ev.LeaseChanged(1), fx.LeaseSet(True, None, "", True), accepted(1)),
        at(3.0, ok("sleep a"), holders(), ends(2.0, result="abandoned"), fx.LeaseHeld(1.0)),
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
    play(at(3.5, ev.ResetRequested("a", 2), holders(), fx.ModelReset("a"), fx.Answer(2, True), fx.LeaseHeld(2.5)))


def test_lease_outlives_llmux_until_its_expiry() -> None:
    play = Playbook(Core(models("a", preload=True), Rules(), Oldest(), Estimates()))
    lease = Lease(10.0, "training", id="x", since=-20.0, told=True)
    play(
        at(0.0, ev.LeaseChanged(1), fx.Answer(1, False, reason="llmux is still looking at what runs")),
        at(0.0, asks(1, "a"), queued(1, "a")),
        at(
            0.0,
            ev.Started(frozenset(), lease=lease),
            fx.LeaseSet(True, 10.0, "training"),
            refused(1, "a", "leased", "the GPU is leased to another job: training", 10.0),
            alone("alive a"),
        ),
        at(0.1, failed("alive a"), fx.Ready(()), fx.LeaseHeld(20.1)),
        at(10.0, ev.DeadlineReached(), fx.LeaseSet(False, None), begins("a", why="preload"), wakes("a")),
    )
    assert lease.told, "what was handed over is not changed"


def test_lease_that_has_expired_meanwhile_is_over() -> None:
    play = Playbook(Core(models("a"), Rules(), Oldest(), Estimates()))
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


def test_lease_during_another_models_wake_admits_nothing_more_to_what_is_awake_still() -> None:
    play = given(models("a", "b", memory=4, max_in_flight=1), awake=["a"], capacity=8, lease_waits=True)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(2.0, asks(2, "a"), queued(2, "a")),
        at(3.0, asks(3, "b"), queued(3, "b"), begins("b", why=Reason.ROOM.value), wakes("b", "a")),
        at(4.0, ev.LeaseChanged(1), fx.LeaseSet(True, None, "", True), accepted(1)),
        at(5.0, ev.RequestFinished(1)),
    )
