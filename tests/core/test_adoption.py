"""Adoption: what llmux finds when it starts, and what a reload brings."""

from __future__ import annotations

from playbook import Oldest, Playbook, at, given, models
from steps import *

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind, Rules
from llmux.estimates import Estimates


def unstarted(*specs, **rules):
    return Playbook(Core(specs, Rules(**rules), Oldest(), Estimates()))


def test_what_runs_is_adopted_and_requests_wait_until_all_have_answered() -> None:
    play = unstarted(*models("a", "b"))
    play(
        at(0.0, asks(1, "a"), queued(1, "a")),
        at(0.1, ev.Started(), alone("alive a"), alone("alive b")),
        at(0.2, ok("alive a")),
        at(0.3, asks(2, "a"), queued(2, "a", 2)),
        at(
            0.4,
            failed("alive b"),
            adopted("a"),
            holders("a"),
            fx.Ready(("a",)),
            admitted(1, "a", 0.4),
            admitted(2, "a", 0.10000000000000003),
        ),
    )


def test_extras_are_put_to_sleep_at_once_and_the_most_recently_used_stays() -> None:
    play = unstarted(*models("a", "b", "c"))
    play(
        at(0.0, ev.Started(frozenset({"c"}), ("b", "a")), alone("alive a"), alone("alive b"), alone("alive c")),
        at(0.1, asks(1, "a"), queued(1, "a")),
        at(0.1, ok("alive a")),
        at(0.2, ok("alive b")),
        at(
            0.3,
            failed("alive c"),
            adopted("b"),
            adopted("a"),
            holders("a", "b", "c"),
            fx.Ready(("b", "a")),
            begins(None, "a", "c", why="not wanted"),
            leaves("a", 0.0),
            run("sleep c"),
        ),
        at(1.0, asks(2, "b"), admitted(2, "b")),
        at(2.0, ok("sleep a"), holders("b", "c")),
        at(3.0, ok("sleep c"), holders("b"), ends(2.7, 0.0, 2.7), begins("a", "b")),
    )


def test_what_the_state_file_suspects_is_lost_and_woken_by_its_own_request() -> None:
    play = given(models("a", "b"), holders=["a", "gone"])
    play(at(1.0, asks(1, "a"), queued(1, "a"), begins("a"), run("wake a")))


def test_with_room_for_both_nobody_is_extra() -> None:
    play = given(models("a", "b", memory=4), awake=["a", "b"], capacity=8)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "b"), admitted(2, "b")),
    )


def test_extra_that_will_not_sleep_is_served_and_tried_again_after_its_backoff() -> None:
    play = unstarted(*models("a", "b"))
    play(
        at(0.0, ev.Started(frozenset(), ("a",)), alone("alive a"), alone("alive b")),
        at(0.1, ok("alive a")),
        at(
            0.1,
            ok("alive b"),
            adopted("a"),
            adopted("b"),
            holders("a", "b"),
            fx.Ready(("a", "b")),
            begins(None, "b", why="not wanted"),
            leaves("b", 0.0),
        ),
        at(1.0, failed("sleep b"), unslept("b", "sleep failed"), run("alive b")),
        at(2.0, ok("alive b"), again("b"), backs_off("sleep b", "sleep failed"), fails("b: sleep failed", 1.9)),
        at(2.5, asks(1, "b"), admitted(1, "b")),
        at(2.6, ev.RequestFinished(1)),
        at(3.0, ev.DeadlineReached(), begins(None, "b", why="not wanted"), leaves("b", 1.0)),
        at(4.0, ok("sleep b"), holders("a"), ends(1.0, 0.0, 1.0)),
    )


def test_extra_is_none_any_more_when_the_other_has_left() -> None:
    play = unstarted(*models("a", "b"))
    play(
        at(0.0, ev.Started(frozenset(), ("a",)), alone("alive a"), alone("alive b")),
        at(0.1, ok("alive a")),
        at(
            0.1,
            ok("alive b"),
            adopted("a"),
            adopted("b"),
            holders("a", "b"),
            fx.Ready(("a", "b")),
            begins(None, "b", why="not wanted"),
            leaves("b", 0.0),
        ),
        at(1.0, asks(1, "b"), queued(1, "b")),
        at(1.0, failed("sleep b"), unslept("b", "sleep failed"), run("alive b")),
        at(
            2.0,
            ok("alive b"),
            again("b"),
            backs_off("sleep b", "sleep failed"),
            fails("b: sleep failed", 1.9),
            admitted(1, "b", 1.0),
        ),
        at(2.5, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 2.4), accepted(1)),
        at(2.6, ev.RequestFinished(1)),
        at(2.7, ok("sleep a"), holders("b"), ends(0.20000000000000018, 0.0, 0.20000000000000018)),
        at(3.0, ev.DeadlineReached()),
    )


def test_preload_wakes_what_is_free_at_the_start_and_displaces_nobody() -> None:
    play = unstarted(*models("a"), *models("b", "c", preload=True))
    play(
        at(0.0, ev.Started(), alone("alive a"), alone("alive b"), alone("alive c")),
        at(0.1, failed("alive a")),
        at(0.1, failed("alive b")),
        at(0.1, failed("alive c"), fx.Ready(()), begins("b", why="preload"), wakes("b")),
        at(1.0, ok("wake b"), awake("b", 0.9), ends(0.9, 0.0, 0.9, 0.9)),
    )


def test_preload_of_a_model_that_was_lost_in_mid_wake() -> None:
    play = given(models("a", preload=True), holders=["a"])
    assert play.ledger.hooks[2].kind is HookKind.WAKE


def test_preload_that_fails_is_not_repeated_and_leaves_room_for_the_next() -> None:
    play = given(models("a", "b", preload=True))
    play(
        at(
            1.0,
            ev.HookFinished(3, ok=False, detail="exited with 1"),
            backs_off("wake a", "exited with 1"),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ok("sleep a"),
            holders(),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 2.0, 0.0, None, None),
            begins("b", why="preload"),
            wakes("b"),
        ),
        at(3.0, ok("wake b"), awake("b", 1.0), ends(1.0, 0.0, 1.0, 1.0)),
        at(9.0, ev.DeadlineReached()),
    )


def test_reload_before_the_first_answer_adopts_what_was_asked() -> None:
    play = unstarted(*models("a", definition="old"))
    play(
        at(0.0, ev.Started(), alone("alive a", "old")),
        at(0.1, replaced(models("a", definition="new"))),
        at(0.2, ok("alive a"), adopted("a"), holders("a"), fx.Ready(("a",))),
        at(1.0, asks(1, "a"), admitted(1, "a", of="old")),
    )


def test_model_that_a_reload_brings_during_a_switch_is_extra_beside_its_target() -> None:
    old = [*models("a", memory=5), *models("b", memory=8)]
    play = given(old, awake=["a"], capacity=10)
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(2.0, replaced([*old, *models("c", memory=5)], capacity=10), alone("alive c")),
        at(2.5, asks(3, "c"), queued(3, "c")),
        at(3.0, ok("alive c"), adopted("c"), holders("a", "c")),
        at(3.5, asks(4, "c"), queued(4, "c", 2)),
        at(
            4.0,
            ev.RequestAbandoned(2),
            ends(3.0, 3.0, result="abandoned"),
            admitted(3, "c", 1.5),
            admitted(4, "c", 0.5),
        ),
    )
    # The switch is called off: there is room for a and c.
    assert not play.core.state.models["c"].extra


def test_what_a_reload_makes_room_for_admits_what_waited_for_it() -> None:
    specs = [*models("a", memory=5), *models("b", memory=8)]
    play = given(specs, awake=["a"], capacity=10)
    specs.extend(models("c", memory=5))
    play(
        at(1.0, asks(1, "a"), admitted(1, "a")),
        at(1.0, asks(2, "b"), queued(2, "b"), begins("b", "a")),
        at(2.0, replaced(specs, capacity=10), alone("alive c")),
        at(2.5, asks(3, "c"), queued(3, "c")),
        at(3.0, ok("alive c"), adopted("c"), holders("a", "c")),
        at(3.5, replaced(specs, capacity=18), admitted(3, "c", 1.0)),
    )
    assert not play.core.state.models["c"].extra


def test_without_models_there_is_nothing_to_look_at_until_a_reload_brings_one() -> None:
    play = unstarted()
    play(
        at(0.0, ev.Started(), fx.Ready(())),
        at(1.0, replaced(models("a")), alone("alive a")),
        at(2.0, failed("alive a")),
    )


def test_reload_before_the_start_asks_nobody_yet() -> None:
    play = unstarted(*models("a"))
    play(
        at(0.0, replaced(models("b"))),
        at(0.1, ev.Started(), alone("alive b"), alone("alive a")),
        at(0.2, failed("alive b")),
        at(0.3, failed("alive a"), fx.Ready(()), fx.ModelRemoved("a")),
    )


def test_model_that_is_not_found_wakes_under_what_a_reload_brought_meanwhile() -> None:
    play = unstarted(*models("a", definition="old"))
    play(
        at(0.0, ev.Started(), alone("alive a", "old")),
        at(0.1, replaced(models("a", definition="new"))),
        at(0.2, failed("alive a"), fx.Ready(())),
    )
    assert play.core.state.models["a"].running.definition == "new"


def test_model_that_a_reload_brings_while_another_sleeps_is_extra_beside_it() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.SleepRequested("a", 1), begins(None, "a", why="requested"), leaves("a", 1.0), accepted(1)),
        at(2.0, replaced(models("a", "b")), alone("alive b")),
        at(3.0, ok("alive b"), adopted("b"), holders("a", "b")),
        at(4.0, failed("sleep a"), unslept("a", "sleep failed"), run("alive a")),
        at(5.0, ok("alive a"), again("a"), backs_off("sleep a", "sleep failed"), fails("a: sleep failed", 4.0)),
    )


def test_what_was_removed_meanwhile_and_runs_is_put_to_sleep() -> None:
    play = unstarted(*models("a"))
    (gone,) = models("x")
    play(
        at(0.0, ev.Started(frozenset({"x"}), (), (gone,)), alone("alive a"), alone("alive x")),
        at(0.1, asks(1, "a"), queued(1, "a")),
        at(0.1, failed("alive a")),
        at(
            0.2,
            ok("alive x"),
            adopted("x"),
            fx.Ready(("x",)),
            begins(None, "x", why="not wanted"),
            leaves("x", 0.0),
        ),
    )


def test_what_was_removed_meanwhile_and_does_not_answer_is_cleaned_up_before_another_wakes() -> None:
    play = unstarted(*models("a"))
    (gone,) = models("x")
    play.feed(0.0, ev.Started(frozenset({"x"}), (), (gone,)))
    play.feed(0.1, ev.RequestArrived(1, "a"))
    play.feed(0.1, ev.HookFinished(1, ok=False))
    found = play.feed(0.2, ev.HookFinished(2, ok=False))
    assert [e.model for e in found if isinstance(e, fx.RunHook)] == ["x"]
    found = play.feed(0.3, ev.HookFinished(3, ok=True))
    assert [(e.model, e.kind) for e in found if isinstance(e, fx.RunHook)] == [("a", HookKind.WAKE)]
    assert fx.ModelRemoved("x") in found


def test_what_is_configured_is_not_taken_over() -> None:
    (old,) = models("a")
    play = unstarted(*models("a"))
    play.feed(0.0, ev.Started(frozenset({"a"}), (), (old,)))
    assert not play.core.state.models["a"].removed
