"""Sleep levels: how deeply models sleep, as far as the host memory lets them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st
from playbook import at, given, models
from steps import *

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core import residency
from llmux.core.levels import Sleeper, plan
from llmux.core.phases import Phase
from llmux.core.policy import Stay, SwitchTo
from llmux.core.spec import HookKind, Level
from llmux.estimates.costs import Average, SwitchCosts
from llmux.observability.state_file import dump_costs, load_costs

WAKE, SLEEP, ALIVE, STOP, PREFETCH = (HookKind[name] for name in ("WAKE", "SLEEP", "ALIVE", "STOP", "PREFETCH"))
RAM_OR_DISK = (Level("ram", 20), Level("disk"))


def three(**fields):
    return models("a", "b", "c", levels=RAM_OR_DISK, **fields)


def hooks(effects):
    return [(it.model, it.kind, it.level) for it in effects if isinstance(it, fx.RunHook)]


def end(play, time, model, *, ok=True):
    """End the one hook of a model that runs; return the hooks that start then."""
    (hook,) = [run.hook for run in play.ledger.hooks.values() if run.model == model]
    return hooks(play.feed(time, ev.HookFinished(hook, ok, "" if ok else "exited with 1")))


def level_of(play, model):
    level = play.core.state.models[model].level
    return level.name if level else None


def asleep_at_ram(*names, **rules):
    """All of a, b and c: ``names`` sleep at ram, the rest is unknown."""
    play = given(three(), **rules)
    for name in names:
        play.core.state.models[name].level = RAM_OR_DISK[0]
        play.ledger.levels[name] = "ram"
    return play


# ---- the plan

sleepers = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(
        lambda needs: sorted(needs, reverse=True)
    ),
    max_size=6,
).map(lambda all_needs: [Sleeper(f"m{number}", tuple(needs)) for number, needs in enumerate(all_needs)])


def total(given_sleepers, steps):
    return sum(needs[steps[name]] for name, needs in given_sleepers)


@pytest.mark.no_cover
@settings(max_examples=60)
@given_by(sleepers, st.integers(-3, 30))
def test_the_plan_fits_or_all_are_at_their_deepest_and_nobody_is_deeper_than_needed(those, room) -> None:
    steps = plan(those, room)
    if total(those, steps) > room:
        assert all(steps[name] == len(needs) - 1 for name, needs in those)
        return
    for name, _ in those:
        if steps[name]:
            assert total(those, steps | {name: steps[name] - 1}) > room
    assert plan(those, room) == steps


def test_the_least_likely_go_deeper_first() -> None:
    those = [Sleeper("rare", (9, 4, 0)), Sleeper("usual", (9, 4, 0)), Sleeper("often", (9, 0))]
    assert plan(those, 27) == {"rare": 0, "usual": 0, "often": 0}
    assert plan(those, 22) == {"rare": 1, "usual": 0, "often": 0}
    assert plan(those, 18) == {"rare": 2, "usual": 0, "often": 0}
    assert plan(those, 13) == {"rare": 2, "usual": 1, "often": 0}
    assert plan(those, -1) == {"rare": 2, "usual": 2, "often": 1}


def test_a_small_one_is_left_alone_where_a_large_one_has_to_go_anyway() -> None:
    assert plan([Sleeper("small", (1, 0)), Sleeper("large", (20, 0))], 10) == {"small": 0, "large": 1}


# ---- switches


def test_room_that_is_left_is_for_the_likeliest_that_it_is_enough_for() -> None:
    sleepers = [Sleeper("a", (4, 0)), Sleeper("b", (4, 0)), Sleeper("c", (9, 0))]
    assert plan(sleepers, 4) == {"a": 1, "b": 0, "c": 1}


def taken(play):
    """Return the bytes of host memory that sleeping models take; a model that goes deeper counts as before."""
    return sum(model.level.host_memory for model in play.core.state.models.values() if model.level is not None)


def test_sleep_and_wake_hooks_are_told_the_level() -> None:
    play = given(three(), awake=["a"])
    play(
        at(
            1.0,
            asks(1, "b"),
            queued(1, "b"),
            begins("b", "a"),
            drained(),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(4, "a", SLEEP, None, 1, ("a",), "b", "ram"),
        ),
        at(
            2.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(5, "b", WAKE, None, 1, ("a",), "b"),  # nothing is known of where it comes from
        ),
    )
    assert end(play, 3.0, "b") == []
    assert hooks(play.feed(4.0, ev.RequestFinished(1))) == []
    assert hooks(play.feed(5.0, ev.RequestArrived(2, "a"))) == [("b", SLEEP, "ram")]
    assert end(play, 6.0, "b") == [("a", WAKE, "ram")]
    assert level_of(play, "a") == "ram"  # until it is awake
    assert taken(play) == 40  # until it is awake
    assert end(play, 7.0, "a") == []
    assert level_of(play, "a") is None
    assert taken(play) == 20


def test_who_sleeps_already_goes_deeper_during_the_drain_when_host_memory_is_short() -> None:
    play = given(three(), awake=["a"], host_memory=20)
    play.core.state.models["c"].level = RAM_OR_DISK[0]
    play.ledger.levels["c"] = "ram"
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play(
        at(
            2.0,
            ev.RequestArrived(2, "b"),
            fx.RequestQueued(2, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.RunHook(4, "c", SLEEP, None, level="disk"),  # outside the switch
        ),
        at(3.0, ev.RequestFinished(1)),  # drained; the room is not there yet
        at(
            4.0,
            ev.HookFinished(4, ok=True),
            fx.ModelDeepened("c", "ram", "disk", 2.0),
            drained(2.0),
            fx.ModelDeactivated("a", 4.0),
            fx.RunHook(5, "a", SLEEP, None, 1, ("a",), "b", "ram"),
        ),
    )
    assert end(play, 5.0, "a") == [("b", WAKE, "")]
    assert level_of(play, "c") == "disk"


def test_if_going_deeper_fails_the_one_that_leaves_sleeps_deeper_instead() -> None:
    play = asleep_at_ram("c", host_memory=20)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    end(play, 2.0, "a")
    play.feed(3.0, ev.RequestFinished(1))
    assert hooks(play.feed(4.0, ev.RequestArrived(2, "b"))) == [("c", SLEEP, "disk")]
    assert end(play, 5.0, "c", ok=False) == [("a", SLEEP, "disk")]
    assert level_of(play, "c") == "ram"
    assert play.core.state.models["c"].phase is Phase.ASLEEP
    assert end(play, 6.0, "a") == [("b", WAKE, "")]
    assert end(play, 7.0, "b") == []
    # There is nothing to be mended any more: nobody else needs the room.
    assert hooks(play.feed(8.0, ev.DeadlineReached())) == []
    # Its failure is in nobody's way once it is awake.
    play.feed(8.0, ev.RequestFinished(2))
    assert hooks(play.feed(8.1, ev.RequestArrived(3, "c"))) == [("b", SLEEP, "disk")]
    assert end(play, 8.2, "b") == [("c", WAKE, "ram")]
    assert not play.core.state.models["c"].sleep_backoff.failures


def test_a_try_that_failed_is_made_again_after_the_backoff() -> None:
    play = asleep_at_ram("b", "c", host_memory=40)
    started = hooks(play.feed(1.0, replaced(three(), host_memory=20)))
    assert started == [("c", SLEEP, "disk")]  # at equal likelihood the later in the configuration
    assert end(play, 2.0, "c", ok=False) == [("b", SLEEP, "disk")]
    assert end(play, 2.5, "b", ok=False) == []
    (again,) = hooks(play.feed(4.0, ev.DeadlineReached()))
    assert again in [("b", SLEEP, "disk"), ("c", SLEEP, "disk")]


def test_a_model_that_is_asked_for_while_it_goes_deeper_is_woken_after_that() -> None:
    play = asleep_at_ram("b", "c", host_memory=40)
    assert hooks(play.feed(1.0, replaced(three(), host_memory=20))) == [("c", SLEEP, "disk")]
    assert play.core.state.models["c"].phase is Phase.DEEPENING
    assert hooks(play.feed(2.0, ev.RequestArrived(1, "c"))) == []
    assert play.core.state.switch.target.name == "c"
    assert end(play, 3.0, "c") == [("c", WAKE, "disk")]


def test_others_are_switched_meanwhile() -> None:
    play = given([*models("a"), *three()[1:]], host_memory=40)
    for name in "bc":
        play.core.state.models[name].level = RAM_OR_DISK[0]
        play.ledger.levels[name] = "ram"
    specs = [*models("a"), *three()[1:]]
    assert hooks(play.feed(1.0, replaced(specs, host_memory=20))) == [("c", SLEEP, "disk")]
    assert hooks(play.feed(2.0, ev.RequestArrived(1, "a"))) == [("a", WAKE, "")]
    end(play, 3.0, "a")
    play.feed(4.0, ev.RequestFinished(1))
    # What leaves has no levels and needs no room: it does not wait for c, nor does b.
    assert hooks(play.feed(5.0, ev.RequestArrived(2, "b"))) == [("a", SLEEP, "")]
    assert end(play, 6.0, "a") == [("b", WAKE, "ram")]


class BothWait:
    """Switches as soon as two models have waiters."""

    def decide(self, now):
        return SwitchTo(now.waiting[0]) if len(now.waiting) > 1 else Stay()


def test_nobody_is_put_deeper_for_whom_somebody_waits() -> None:
    play = asleep_at_ram("b", "c", host_memory=60, policy=BothWait())
    play.feed(0.0, ev.ActivationRequested("a", 1))
    end(play, 0.5, "a")
    play.feed(1.0, ev.RequestArrived(1, "a"))
    play.feed(3.0, replaced(three(), host_memory=40))
    play.feed(4.0, ev.RequestArrived(2, "b"))
    assert hooks(play.feed(4.0, ev.RequestArrived(3, "c"))) == []
    assert play.core.state.switch.target.name == "b"
    assert hooks(play.feed(5.0, ev.RequestFinished(1))) == [("a", SLEEP, "disk")]


def test_the_target_is_not_put_deeper_to_make_room_for_whom_it_displaces() -> None:
    play = asleep_at_ram("b", host_memory=20)
    play.feed(1.0, ev.RequestArrived(1, "a"))
    end(play, 2.0, "a")
    play.feed(3.0, ev.RequestFinished(1))
    play.feed(4.0, ev.ActivationRequested("b", 1))
    assert level_of(play, "b") == "ram"
    assert [run[2] for run in hooks_running(play)] == ["disk"]
    assert end(play, 5.0, "a") == [("b", WAKE, "ram")]


def hooks_running(play):
    return [(run.model, run.kind, run.level) for run in play.ledger.hooks.values()]


def test_sleep_and_wake_commands_find_it_asleep() -> None:
    play = asleep_at_ram("b", "c", host_memory=40)
    play.feed(1.0, replaced(three(), host_memory=20))
    play(at(2.0, ev.SleepRequested("c", 1), fx.Answer(1, accepted=True)))
    effects = play.feed(3.0, ev.PinChanged("c", 2))
    assert fx.Answer(2, accepted=True, switch=1) in effects
    assert hooks(effects) == []
    assert end(play, 4.0, "c") == [("c", WAKE, "disk")]


# ---- what is known of a level


def test_after_a_stop_nothing_is_known() -> None:
    play = given(three(), awake=["a"])
    play.feed(1.0, replaced(models("a", "b", "c", levels=RAM_OR_DISK, stop=True)))
    # It keeps the definition under which it was found: without a stop hook the failed sleep asks alive.
    play.feed(2.0, ev.SleepRequested("a", 1))
    assert end(play, 3.0, "a", ok=False) == [("a", ALIVE, "")]
    end(play, 4.0, "a", ok=False)
    assert play.core.state.models["a"].phase is Phase.FAULTED
    assert level_of(play, "a") == "ram"  # it may hold that much
    play.feed(5.0, ev.ResetRequested("a", 2))
    assert level_of(play, "a") is None
    play.feed(6.0, ev.RequestArrived(1, "a"))
    end(play, 7.0, "a")
    play.feed(8.0, ev.RequestFinished(1))
    assert hooks(play.feed(9.0, ev.SleepRequested("a", 3))) == [("a", SLEEP, "ram")]
    assert end(play, 10.0, "a", ok=False) == [("a", STOP, "ram")]
    end(play, 11.0, "a")
    assert level_of(play, "a") is None


def test_a_model_that_would_not_sleep_has_no_level() -> None:
    play = given(three(), awake=["a"])
    play.feed(2.0, ev.SleepRequested("a", 1))
    end(play, 3.0, "a", ok=False)
    end(play, 4.0, "a")
    assert play.core.state.models["a"].phase is Phase.AWAKE
    assert level_of(play, "a") is None


def test_a_cleanup_takes_the_deepest_level() -> None:
    play = asleep_at_ram("a")
    play.feed(1.0, ev.RequestArrived(1, "a"))
    assert end(play, 2.0, "a", ok=False) == [("a", SLEEP, "disk")]
    end(play, 3.0, "a")
    assert level_of(play, "a") == "disk"


def test_room_is_made_for_a_cleanup_too() -> None:
    both = (Level("ram", 20), Level("disk", 5))
    play = given([*models("a", "c", levels=both), *models("b")], holders=["a"], host_memory=24)
    play.core.state.models["c"].level = both[0]
    play.ledger.levels["c"] = "ram"
    assert hooks(play.feed(1.0, ev.RequestArrived(1, "b"))) == [("c", SLEEP, "disk")]
    assert end(play, 2.0, "c") == [("a", SLEEP, "disk")]
    assert end(play, 3.0, "a") == [("b", WAKE, "")]


def test_a_prefetch_that_is_being_ended_is_waited_for() -> None:
    specs = [*models("a"), *models("b", levels=RAM_OR_DISK, prefetch=True)]
    play = given(specs, awake=["a"], host_memory=20)
    play.core.state.models["b"].level = RAM_OR_DISK[0]
    play.ledger.levels["b"] = "ram"
    play.feed(1.0, ev.RequestArrived(1, "a"))
    assert hooks(play.feed(2.0, ev.RequestArrived(2, "b"))) == [("b", PREFETCH, "ram")]
    play.feed(3.0, ev.RequestAbandoned(2))  # the switch is called off
    assert hooks(play.feed(4.0, replaced(specs, host_memory=10))) == []
    assert end(play, 5.0, "b", ok=False) == [("b", SLEEP, "disk")]


def test_a_removed_model_sleeps_at_its_deepest_level() -> None:
    play = given(three(), awake=["a"])
    assert hooks(play.feed(1.0, replaced(three()[1:]))) == [("a", SLEEP, "disk")]


def test_what_a_model_takes_that_would_not_sleep_is_counted_once() -> None:
    both = models("a", "b", levels=(Level("ram", 20), Level("disk", 10)))
    play = given(both, awake=["b"], host_memory=30)
    play.core.state.models["a"].level = both[0].levels[0]
    play.ledger.levels["a"] = "ram"
    play.feed(1.0, replaced(both[:1], host_memory=30))  # b sleeps as deeply as it can, and goes
    assert end(play, 2.0, "b", ok=False) == [("b", ALIVE, "")]
    end(play, 3.0, "b", ok=False)
    assert play.core.state.models["b"].phase is Phase.FAULTED
    assert level_of(play, "b") == "disk"
    # At the next try both fit as they are: a is not put deeper.
    assert hooks(play.feed(5.0, ev.DeadlineReached())) == [("b", SLEEP, "disk")]


def test_a_removed_model_that_sleeps_goes_as_deep_as_it_can_before_it_is_forgotten() -> None:
    play = asleep_at_ram("a", "b")
    assert hooks(play.feed(1.0, replaced(three()[1:]))) == [("a", SLEEP, "disk")]
    assert "a" in play.core.state.models
    (hook,) = play.ledger.hooks
    play(
        at(
            2.0,
            ev.HookFinished(hook, ok=True),
            fx.ModelDeepened("a", "ram", "disk", 1.0),
            fx.ModelRemoved("a"),
        )
    )
    # One try: its hooks are not kept for ever.
    assert hooks(play.feed(3.0, replaced(three()[2:]))) == [("b", SLEEP, "disk")]
    assert end(play, 4.0, "b", ok=False) == []
    assert list(play.core.state.models) == ["c"]


def test_a_reload_says_anew_what_a_level_takes() -> None:
    play = asleep_at_ram("b", "c", host_memory=40)
    more = models("a", "b", "c", levels=(Level("ram", 21), Level("disk")))
    assert hooks(play.feed(1.0, replaced(more, host_memory=40))) == [("c", SLEEP, "disk")]
    assert end(play, 2.0, "c") == []
    # A level that is gone stays what it was.
    other = models("a", "b", "c", levels=(Level("nap", 30),))
    assert hooks(play.feed(3.0, replaced(other, host_memory=40))) == []
    assert (level_of(play, "b"), play.core.state.models["b"].level.host_memory) == ("ram", 21)


def test_levels_are_remembered_over_a_restart() -> None:
    play = given(three())
    fresh = given(three(), awake=["a"], levels={"a": "ram", "b": "ram", "c": "gone"})
    assert [level_of(play, name) for name in "abc"] == [None, None, None]
    assert [level_of(fresh, name) for name in "abc"] == [None, "ram", None]
    # What a reload brings later is not what was written down.
    fresh.feed(1.0, replaced([*three()[:1], *models("d")]))
    end(fresh, 1.5, "b")
    fresh.feed(2.0, replaced(three()))
    for hook in list(fresh.ledger.hooks.values()):
        fresh.feed(3.0, ev.HookFinished(hook.hook, ok=False))
    assert level_of(fresh, "b") is None


def test_stopping_starts_nothing_and_waits_for_what_runs() -> None:
    play = asleep_at_ram("b", "c", host_memory=40)
    play.feed(1.0, replaced(three(), host_memory=20))
    assert fx.Stopped() not in play.feed(2.0, ev.ShutdownRequested())
    (hook,) = play.ledger.hooks
    play(
        at(
            3.0,
            ev.HookFinished(hook, ok=False, detail="exited with 1"),
            fx.SleepHookFailed("c", None, "sleep exited with 1"),
            fx.Stopped(),
        )
    )


def test_on_exit_they_sleep_as_deeply_as_they_have_to() -> None:
    specs = [*models("a", levels=RAM_OR_DISK, memory=4), *models("b", levels=RAM_OR_DISK, memory=4)]
    play = given(specs, awake=["a", "b"], capacity=8, host_memory=20, sleep_on_exit=True)
    started = hooks(play.feed(1.0, ev.ShutdownRequested()))
    assert started == [("a", SLEEP, "ram"), ("b", SLEEP, "disk")]


# ---- costs


def test_costs_are_kept_per_level() -> None:
    costs = SwitchCosts()
    costs.record_wake("a", 3.0, "ram")
    costs.record_wake("a", 90.0, "disk")
    costs.record_sleep("a", 1.0, "ram")
    assert costs.wake_of("a", "ram") == 3.0
    assert costs.wake_of("a", "disk") == 90.0
    assert costs.sleep_of("a", "ram") == 1.0
    assert costs.wake_of("a") == 10.0
    assert costs.wake_of("b", "ram") == 3.0  # as the others at that level
    costs.record_wake("b", 7.0)
    assert costs.wake_of("b", "elsewhere") == 7.0
    costs.guesses = {"b": (5.0, None)}
    assert costs.wake_of("b", "ram") == 5.0
    assert costs.sleep_of("b", "ram") == 1.0
    assert costs.estimate(["a"], "b", {"a": "ram", "b": "disk"}) == 6.0
    assert costs.levels == {
        ("wake", "a", "ram"): Average(3.0, 1),
        ("wake", "a", "disk"): Average(90.0, 1),
        ("sleep", "a", "ram"): Average(1.0, 1),
    }
    after = SwitchCosts()
    load_costs(after, json.loads(json.dumps(dump_costs(costs))))
    assert dump_costs(after) == dump_costs(costs)
    assert after.wake_of("a", "disk") == 90.0


def test_an_estimate_goes_by_the_level_and_is_measured_by_it() -> None:
    play = asleep_at_ram("b")
    s = play.core.state
    play.feed(1.0, ev.RequestArrived(1, "b"))
    end(play, 4.0, "b")
    assert s.costs.wake_of("b", "ram") == 3.0
    assert s.costs.pairs == {}  # directions say nothing here
    play.feed(5.0, ev.RequestFinished(1))
    play.feed(5.0, ev.RequestArrived(2, "a"))
    end(play, 6.0, "b")
    end(play, 16.0, "a")
    assert s.costs.sleep_of("b", "ram") == 1.0
    assert residency.switch_cost(s, [s.models["a"]], s.models["b"]) == pytest.approx(1.0 + 3.0)


class Looks:
    """Stays, and keeps what a switch to b would cost."""

    def decide(self, now):
        self.cost = now.models["b"].switch_cost
        return Stay()


def test_a_policy_sees_what_a_switch_costs_at_the_level_that_it_leaves() -> None:
    policy = Looks()
    play = asleep_at_ram("b", policy=policy)
    costs = play.core.state.costs
    costs.record_wake("b", 4.0, "ram")
    costs.record_wake("b", 90.0, "disk")
    play.feed(1.0, ev.RequestArrived(1, "b"))
    assert policy.cost == 4.0
