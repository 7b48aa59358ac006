"""Adoption: what llmux finds when it starts, and what a reload brings."""

from __future__ import annotations

from playbook import ANY, Oldest, Playbook, at, given, models

from llmux.core import Core
from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.spec import HookKind, Rules


def unstarted(*specs, **rules):
    return Playbook(Core(specs, Rules(**rules), Oldest()))


def test_what_runs_is_adopted_and_requests_wait_until_all_have_answered() -> None:
    play = unstarted(*models("a", "b"))
    play(
        at(0.0, ev.RequestArrived(1, "a"), fx.RequestQueued(1, "a", 1)),
        at(0.1, ev.Started(), fx.RunHook(1, "a", HookKind.ALIVE, None), fx.RunHook(2, "b", HookKind.ALIVE, None)),
        at(0.2, ev.HookFinished(1, ok=True)),
        at(0.3, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 2)),
        at(
            0.4,
            ev.HookFinished(2, ok=False),
            fx.ModelActivated("a", 0, (), None),
            fx.RecordHolders(frozenset({"a"})),
            fx.Ready(("a",)),
            fx.Admit(1, "a", None, 1, False, 0.4),
            fx.Admit(2, "a", None, 1, False, 0.10000000000000003),
        ),
    )


def test_extras_are_put_to_sleep_at_once_and_the_most_recently_used_stays() -> None:
    play = unstarted(*models("a", "b", "c"))
    play(
        at(
            0.0,
            ev.Started(frozenset({"c"}), ("b", "a")),
            fx.RunHook(1, "a", HookKind.ALIVE, None),
            fx.RunHook(2, "b", HookKind.ALIVE, None),
            fx.RunHook(3, "c", HookKind.ALIVE, None),
        ),
        at(0.1, ev.RequestArrived(1, "a"), fx.RequestQueued(1, "a", 1)),
        at(0.1, ev.HookFinished(1, ok=True)),
        at(0.2, ev.HookFinished(2, ok=True)),
        at(
            0.3,
            ev.HookFinished(3, ok=False),
            fx.ModelActivated("b", 0, (), None),
            fx.ModelActivated("a", 0, (), None),
            fx.RecordHolders(frozenset({"a", "b", "c"})),
            fx.Ready(("b", "a")),
            fx.SwitchStarted(1, ("a", "c"), None, "not wanted"),
            fx.SwitchDrained(1, ("a", "c"), None, 0.0),
            fx.ModelDeactivated("a", 0.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a", "c")),
            fx.RunHook(5, "c", HookKind.SLEEP, None, switch=1, sources=("a", "c")),
        ),
        at(1.0, ev.RequestArrived(2, "b"), fx.Admit(2, "b", None, 1, False, 0.0)),
        at(2.0, ev.HookFinished(4, ok=True), fx.RecordHolders(frozenset({"b", "c"}))),
        at(
            3.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset({"b"})),
            fx.SwitchEnded(1, ("a", "c"), None, "success", 2.7, 0.0, 2.7, None),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(2, ("b",), "a", "policy"),
        ),
    )


def test_what_the_state_file_suspects_is_lost_and_woken_by_its_own_request() -> None:
    play = given(models("a", "b"), holders=["a", "gone"])
    play(
        at(
            1.0,
            ev.RequestArrived(1, "a"),
            fx.RequestQueued(1, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RunHook(3, "a", HookKind.WAKE, None, switch=1, target="a"),
        )
    )


def test_with_room_for_both_nobody_is_extra() -> None:
    play = given(models("a", "b", memory=4), awake=["a", "b"], capacity=8)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(1.0, ev.RequestArrived(2, "b"), fx.Admit(2, "b", None, 1, False, 0.0)),
    )


def test_extra_that_will_not_sleep_is_served_and_tried_again_after_its_backoff() -> None:
    play = unstarted(*models("a", "b"))
    play(
        at(
            0.0,
            ev.Started(frozenset(), ("a",)),
            fx.RunHook(1, "a", HookKind.ALIVE, None),
            fx.RunHook(2, "b", HookKind.ALIVE, None),
        ),
        at(0.1, ev.HookFinished(1, ok=True)),
        at(
            0.1,
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("a", 0, (), None),
            fx.ModelActivated("b", 0, (), None),
            fx.RecordHolders(frozenset({"a", "b"})),
            fx.Ready(("a", "b")),
            fx.SwitchStarted(1, ("b",), None, "not wanted"),
            fx.SwitchDrained(1, ("b",), None, 0.0),
            fx.ModelDeactivated("b", 0.0),
            fx.RunHook(3, "b", HookKind.SLEEP, None, switch=1, sources=("b",)),
        ),
        at(
            1.0,
            ev.HookFinished(3, ok=False),
            fx.SleepHookFailed("b", None, "sleep failed"),
            fx.RunHook(4, "b", HookKind.ALIVE, None, switch=1, sources=("b",)),
        ),
        at(
            2.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("b", 1, (), None),
            fx.BackoffStarted("b", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(1, ("b",), None, "b: sleep failed"),
            fx.SwitchEnded(1, ("b",), None, "failure", 1.9, 0.0, None, None),
        ),
        at(2.5, ev.RequestArrived(1, "b"), fx.Admit(1, "b", None, 1, False, 0.0)),
        at(2.6, ev.RequestFinished(1)),
        at(
            3.0,
            ev.DeadlineReached(),
            fx.SwitchStarted(2, ("b",), None, "not wanted"),
            fx.SwitchDrained(2, ("b",), None, 0.0),
            fx.ModelDeactivated("b", 1.0),
            fx.RunHook(5, "b", HookKind.SLEEP, None, switch=2, sources=("b",)),
        ),
        at(
            4.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset({"a"})),
            fx.SwitchEnded(2, ("b",), None, "success", 1.0, 0.0, 1.0, None),
        ),
    )


def test_extra_is_none_any_more_when_the_other_has_left() -> None:
    play = unstarted(*models("a", "b"))
    play(
        at(
            0.0,
            ev.Started(frozenset(), ("a",)),
            fx.RunHook(1, "a", HookKind.ALIVE, None),
            fx.RunHook(2, "b", HookKind.ALIVE, None),
        ),
        at(0.1, ev.HookFinished(1, ok=True)),
        at(
            0.1,
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("a", 0, (), None),
            fx.ModelActivated("b", 0, (), None),
            fx.RecordHolders(frozenset({"a", "b"})),
            fx.Ready(("a", "b")),
            fx.SwitchStarted(1, ("b",), None, "not wanted"),
            fx.SwitchDrained(1, ("b",), None, 0.0),
            fx.ModelDeactivated("b", 0.0),
            fx.RunHook(3, "b", HookKind.SLEEP, None, switch=1, sources=("b",)),
        ),
        at(1.0, ev.RequestArrived(1, "b"), fx.RequestQueued(1, "b", 1)),
        at(
            1.0,
            ev.HookFinished(3, ok=False),
            fx.SleepHookFailed("b", None, "sleep failed"),
            fx.RunHook(4, "b", HookKind.ALIVE, None, switch=1, sources=("b",)),
        ),
        at(
            2.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("b", 1, (), None),
            fx.BackoffStarted("b", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(1, ("b",), None, "b: sleep failed"),
            fx.SwitchEnded(1, ("b",), None, "failure", 1.9, 0.0, None, None),
            fx.Admit(1, "b", None, 1, False, 1.0),
        ),
        at(
            2.5,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(2, ("a",), None, "requested"),
            fx.SwitchDrained(2, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 2.4),
            fx.RunHook(5, "a", HookKind.SLEEP, None, switch=2, sources=("a",)),
            fx.Answer(1, True, switch=2),
        ),
        at(2.6, ev.RequestFinished(1)),
        at(
            2.7,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset({"b"})),
            fx.SwitchEnded(2, ("a",), None, "success", 0.20000000000000018, 0.0, 0.20000000000000018, None),
        ),
        at(3.0, ev.DeadlineReached()),
    )


def test_preload_wakes_what_is_free_at_the_start_and_displaces_nobody() -> None:
    play = unstarted(*models("a"), *models("b", "c", preload=True))
    play(
        at(
            0.0,
            ev.Started(),
            fx.RunHook(1, "a", HookKind.ALIVE, None),
            fx.RunHook(2, "b", HookKind.ALIVE, None),
            fx.RunHook(3, "c", HookKind.ALIVE, None),
        ),
        at(0.1, ev.HookFinished(1, ok=False)),
        at(0.1, ev.HookFinished(2, ok=False)),
        at(
            0.1,
            ev.HookFinished(3, ok=False),
            fx.Ready(()),
            fx.SwitchStarted(1, (), "b", "preload"),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(4, "b", HookKind.WAKE, None, switch=1, target="b"),
        ),
        at(
            1.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("b", 1, (), 0.9),
            fx.SwitchEnded(1, (), "b", "success", 0.9, 0.0, 0.9, 0.9),
        ),
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
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "exited with 1"),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchFailed(1, (), "a", "wake exited with 1"),
            fx.SwitchEnded(1, (), "a", "failure", 2.0, 0.0, None, None),
            fx.SwitchStarted(2, (), "b", "preload"),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(5, "b", HookKind.WAKE, None, switch=2, target="b"),
        ),
        at(
            3.0,
            ev.HookFinished(5, ok=True),
            fx.ModelActivated("b", 2, (), 1.0),
            fx.SwitchEnded(2, (), "b", "success", 1.0, 0.0, 1.0, 1.0),
        ),
        at(9.0, ev.DeadlineReached()),
    )


def test_reload_before_the_first_answer_adopts_what_was_asked() -> None:
    play = unstarted(*models("a", definition="old"))
    play(
        at(0.0, ev.Started(), fx.RunHook(1, "a", HookKind.ALIVE, "old")),
        at(0.1, ev.ConfigReplaced(models("a", definition="new"), Rules(), ANY)),
        at(
            0.2,
            ev.HookFinished(1, ok=True),
            fx.ModelActivated("a", 0, (), None),
            fx.RecordHolders(frozenset({"a"})),
            fx.Ready(("a",)),
        ),
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", "old", 1, False, 0.0)),
    )


def test_model_that_a_reload_brings_during_a_switch_is_extra_beside_its_target() -> None:
    old = [*models("a", memory=5), *models("b", memory=8)]
    play = given(old, awake=["a"], capacity=10)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            1.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
        ),
        at(
            2.0,
            ev.ConfigReplaced([*old, *models("c", memory=5)], Rules(capacity=10), ANY),
            fx.RunHook(3, "c", HookKind.ALIVE, None),
        ),
        at(2.5, ev.RequestArrived(3, "c"), fx.RequestQueued(3, "c", 1)),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.ModelActivated("c", 0, (), None),
            fx.RecordHolders(frozenset({"a", "c"})),
        ),
        at(3.5, ev.RequestArrived(4, "c"), fx.RequestQueued(4, "c", 2)),
        at(
            4.0,
            ev.RequestAbandoned(2),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 3.0, 3.0, None, None),
            fx.Admit(3, "c", None, 1, False, 1.5),
            fx.Admit(4, "c", None, 1, False, 0.5),
        ),
    )
    # The switch is called off: there is room for a and c.
    assert not play.core.state.models["c"].extra


def test_what_a_reload_makes_room_for_admits_what_waited_for_it() -> None:
    specs = [*models("a", memory=5), *models("b", memory=8)]
    play = given(specs, awake=["a"], capacity=10)
    specs.extend(models("c", memory=5))
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(
            1.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
        ),
        at(2.0, ev.ConfigReplaced(specs, Rules(capacity=10), ANY), fx.RunHook(3, "c", HookKind.ALIVE, None)),
        at(2.5, ev.RequestArrived(3, "c"), fx.RequestQueued(3, "c", 1)),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.ModelActivated("c", 0, (), None),
            fx.RecordHolders(frozenset({"a", "c"})),
        ),
        at(3.5, ev.ConfigReplaced(specs, Rules(capacity=18), ANY), fx.Admit(3, "c", None, 1, False, 1.0)),
    )
    assert not play.core.state.models["c"].extra


def test_llmux_without_models_starts_when_a_reload_brings_one() -> None:
    play = unstarted()
    play(
        at(0.0, ev.Started()),
        at(1.0, ev.ConfigReplaced(models("a"), Rules(), ANY), fx.RunHook(1, "a", HookKind.ALIVE, None)),
        at(2.0, ev.HookFinished(1, ok=False), fx.Ready(())),
    )


def test_reload_before_the_start_asks_nobody_yet() -> None:
    play = unstarted(*models("a"))
    play(
        at(0.0, ev.ConfigReplaced(models("b"), Rules(), ANY)),
        at(0.1, ev.Started(), fx.RunHook(1, "b", HookKind.ALIVE, None), fx.RunHook(2, "a", HookKind.ALIVE, None)),
        at(0.2, ev.HookFinished(1, ok=False)),
        at(0.3, ev.HookFinished(2, ok=False), fx.Ready(()), fx.ModelRemoved("a")),
    )


def test_model_that_is_not_found_wakes_under_what_a_reload_brought_meanwhile() -> None:
    play = unstarted(*models("a", definition="old"))
    play(
        at(0.0, ev.Started(), fx.RunHook(1, "a", HookKind.ALIVE, "old")),
        at(0.1, ev.ConfigReplaced(models("a", definition="new"), Rules(), ANY)),
        at(0.2, ev.HookFinished(1, ok=False), fx.Ready(())),
    )
    assert play.core.state.models["a"].running.definition == "new"


def test_model_that_a_reload_brings_while_another_sleeps_is_extra_beside_it() -> None:
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
        at(2.0, ev.ConfigReplaced(models("a", "b"), Rules(), ANY), fx.RunHook(3, "b", HookKind.ALIVE, None)),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.ModelActivated("b", 0, (), None),
            fx.RecordHolders(frozenset({"a", "b"})),
        ),
        at(
            4.0,
            ev.HookFinished(2, ok=False),
            fx.SleepHookFailed("a", None, "sleep failed"),
            fx.RunHook(4, "a", HookKind.ALIVE, None, switch=1, sources=("a",)),
        ),
        at(
            5.0,
            ev.HookFinished(4, ok=True),
            fx.ModelActivated("a", 1, (), None),
            fx.BackoffStarted("a", HookKind.SLEEP, 1, 1.0, "sleep failed"),
            fx.SwitchFailed(1, ("a",), None, "a: sleep failed"),
            fx.SwitchEnded(1, ("a",), None, "failure", 4.0, 0.0, None, None),
        ),
    )


def test_what_was_removed_meanwhile_and_runs_is_put_to_sleep() -> None:
    play = unstarted(*models("a"))
    (gone,) = models("x")
    play(
        at(
            0.0,
            ev.Started(frozenset({"x"}), (), (gone,)),
            fx.RunHook(1, "a", HookKind.ALIVE, None),
            fx.RunHook(2, "x", HookKind.ALIVE, None),
        ),
        at(0.1, ev.RequestArrived(1, "a"), fx.RequestQueued(1, "a", 1)),
        at(0.1, ev.HookFinished(1, ok=False)),
        at(
            0.2,
            ev.HookFinished(2, ok=True),
            fx.ModelActivated("x", 0, (), None),
            fx.Ready(("x",)),
            fx.SwitchStarted(1, ("x",), None, "not wanted"),
            fx.SwitchDrained(1, ("x",), None, 0.0),
            fx.ModelDeactivated("x", 0.0),
            fx.RunHook(3, "x", HookKind.SLEEP, None, switch=1, sources=("x",)),
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
