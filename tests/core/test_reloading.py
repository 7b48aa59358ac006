"""Reloading: nothing is dropped, and a switch under way keeps its plan."""

from __future__ import annotations

from playbook import ANY, Oldest, at, given, models

from llmux.core import effects as fx
from llmux.core import events as ev
from llmux.core.policy import WaitUntil
from llmux.core.spec import HookKind, Rules


class Later:
    def decide(self, now):
        return WaitUntil(now.time + 1e9)


def replaced(specs, **rules):
    return ev.ConfigReplaced(specs, Rules(**rules), ANY)


class Mute:
    def decide(self, _now):
        return None


def test_model_keeps_the_definition_under_which_it_was_woken_until_it_is_asleep() -> None:
    play = given(models("a", definition="old"), awake=["a"])
    play(
        at(1.0, replaced(models("a", definition="new"))),
        at(2.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", "old", 1, False, 0.0)),
        at(3.0, ev.RequestReturned(1), fx.RunHook(2, "a", HookKind.ALIVE, "old"), fx.RequestQueued(1, "a", 1)),
        # Lost, it is woken again as it was.
        at(
            4.0,
            ev.HookFinished(2, ok=False),
            fx.ModelDeactivated("a", 4.0),
            fx.ModelLost("a", "a connection failed, and alive failed"),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(1, (), "a", "policy"),
            fx.RunHook(3, "a", HookKind.WAKE, "old", switch=1, target="a"),
        ),
        at(
            5.0,
            ev.HookFinished(3, ok=True),
            fx.ModelActivated("a", 1, (), 1.0),
            fx.SwitchEnded(1, (), "a", "success", 1.0, 0.0, 1.0, 1.0),
            fx.Admit(1, "a", "old", 2, True, 3.0),
        ),
        at(6.0, ev.RequestFinished(1)),
        at(
            7.0,
            ev.SleepRequested("a", 1),
            fx.SwitchStarted(2, ("a",), None, "requested"),
            fx.SwitchDrained(2, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 2.0),
            fx.RunHook(4, "a", HookKind.SLEEP, "old", switch=2, sources=("a",)),
            fx.Answer(1, True, switch=2),
        ),
        at(
            8.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(2, ("a",), None, "success", 1.0, 0.0, 1.0, None),
        ),
        at(
            9.0,
            ev.RequestArrived(2, "a"),
            fx.RequestQueued(2, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(3, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(5, "a", HookKind.WAKE, "new", switch=3, target="a"),
        ),
    )


def test_switch_under_way_wakes_its_target_as_it_was_planned() -> None:
    play = given(models("a", "b", definition="old"), awake=["a"])
    play(
        at(
            1.0,
            ev.RequestArrived(1, "b"),
            fx.RequestQueued(1, "b", 1),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.SwitchDrained(1, ("a",), "b", 0.0),
            fx.ModelDeactivated("a", 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, "old", switch=1, sources=("a",), target="b"),
        ),
        at(2.0, replaced(models("a", "b", definition="new"))),
        at(
            3.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.RecordHolders(frozenset({"b"})),
            fx.RunHook(4, "b", HookKind.WAKE, "old", switch=1, sources=("a",), target="b"),
        ),
    )


def test_limits_apply_at_once() -> None:
    play = given(models("a", max_in_flight=1), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.RequestArrived(2, "a"), fx.RequestQueued(2, "a", 1)),
        at(3.0, ev.RequestArrived(3, "a"), fx.RequestQueued(3, "a", 2)),
        at(
            4.0, replaced(models("a", max_in_flight=2), request_timeout=3.0), fx.Admit(2, "a", None, 1, False, 2.0)
        ),
        at(
            6.0,
            ev.DeadlineReached(),
            fx.Reject(3, "a", fx.Refusal.WAITED_TOO_LONG, "waited 3 s for model 'a'", None, 3.0),
        ),
        at(7.0, ev.RequestFinished(1)),
        at(8.0, ev.RequestFinished(2)),
        at(
            9.0,
            replaced(models("a", idle_sleep=1.0)),
            fx.SwitchStarted(1, ("a",), None, "idle"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 9.0),
            fx.RunHook(2, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
        ),
        at(10.0, ev.DeadlineReached()),
    )


def test_shorter_request_timeout_calls_off_a_switch_whose_waiters_are_late() -> None:
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
            9.0,
            replaced(models("a", "b"), request_timeout=5.0),
            fx.Reject(2, "b", fx.Refusal.WAITED_TOO_LONG, "waited 7 s for model 'b'", None, 7.0),
            fx.SwitchEnded(1, ("a",), "b", "abandoned", 7.0, 7.0, None, None),
        ),
    )


def test_changed_definition_clears_the_backoff() -> None:
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
            ev.HookFinished(2, ok=False),
            fx.BackoffStarted("a", HookKind.WAKE, 1, 1.0, ""),
            fx.Reject(1, "a", fx.Refusal.WAKE_FAILED, "model 'a' failed to wake: ", 1.0, 1.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, target="a"),
        ),
        at(
            2.0,
            ev.HookFinished(3, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchFailed(1, (), "a", "wake "),
            fx.SwitchEnded(1, (), "a", "failure", 1.0, 0.0, None, None),
        ),
        at(2.1, replaced(models("a", definition="new"))),
        at(
            2.2,
            ev.RequestArrived(2, "a"),
            fx.RequestQueued(2, "a", 1),
            fx.PolicyDecided("switch", "a", ""),
            fx.SwitchStarted(2, (), "a", "policy"),
            fx.RecordHolders(frozenset({"a"})),
            fx.RunHook(4, "a", HookKind.WAKE, "new", switch=2, target="a"),
        ),
    )


def test_less_room_puts_to_sleep_what_was_used_longest_ago() -> None:
    specs = models("a", "b", "c", memory=4)
    play = given(specs, awake=["a", "b", "c"], capacity=12)
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.RequestFinished(1)),
        at(3.0, ev.RequestArrived(2, "c"), fx.Admit(2, "c", None, 1, False, 0.0)),
        at(4.0, ev.RequestFinished(2)),
        at(5.0, ev.PinChanged("b", 1), fx.PinSet("b", True, None), fx.Answer(1, True)),
        at(
            6.0,
            replaced(specs, capacity=8),
            fx.SwitchStarted(1, ("a",), None, "not wanted"),
            fx.SwitchDrained(1, ("a",), None, 0.0),
            fx.ModelDeactivated("a", 6.0),
            fx.RunHook(4, "a", HookKind.SLEEP, None, switch=1, sources=("a",)),
        ),
        at(
            7.0,
            ev.HookFinished(4, ok=True),
            fx.RecordHolders(frozenset({"b", "c"})),
            fx.SwitchEnded(1, ("a",), None, "success", 1.0, 0.0, 1.0, None),
        ),
        at(
            8.0,
            replaced(specs),
            fx.SwitchStarted(2, ("c",), None, "not wanted"),
            fx.SwitchDrained(2, ("c",), None, 0.0),
            fx.ModelDeactivated("c", 8.0),
            fx.RunHook(5, "c", HookKind.SLEEP, None, switch=2, sources=("c",)),
        ),
        at(
            9.0,
            ev.HookFinished(5, ok=True),
            fx.RecordHolders(frozenset({"b"})),
            fx.SwitchEnded(2, ("c",), None, "success", 1.0, 0.0, 1.0, None),
        ),
    )


def test_new_policy_is_asked_from_now_on_and_may_be_complained_about_anew() -> None:
    play = given(models("a", "b"), awake=["a"], policy=Mute(), min_active=1e6)
    play(
        at(
            1.0,
            ev.RequestArrived(1, "b"),
            fx.RequestQueued(1, "b", 1),
            fx.PolicyOverruled("answered None, which is not a decision"),
            fx.PolicyDecided("switch", "b", "first come, first served: the policy was overruled"),
        ),
        at(
            2.0,
            ev.ConfigReplaced(models("a", "b"), Rules(min_active=1e6), Mute()),
            fx.PolicyOverruled("answered None, which is not a decision"),
            fx.PolicyDecided("switch", "b", "first come, first served: the policy was overruled"),
        ),
        at(
            3.0,
            ev.ConfigReplaced(models("a", "b"), Rules(), Oldest(), {"b": (4.0, None)}),
            fx.PolicyDecided("switch", "b", ""),
            fx.SwitchStarted(1, ("a",), "b", "policy"),
            fx.SwitchDrained(1, ("a",), "b", 0.0),
            fx.ModelDeactivated("a", 3.0),
            fx.RunHook(3, "a", HookKind.SLEEP, None, switch=1, sources=("a",), target="b"),
        ),
    )
    assert play.core.state.costs.wake_of("b") == 4.0


def test_reload_while_stopping_begins_nothing() -> None:
    play = given(models("a"), awake=["a"])
    play(
        at(1.0, ev.RequestArrived(1, "a"), fx.Admit(1, "a", None, 1, False, 0.0)),
        at(2.0, ev.ShutdownRequested()),
        at(3.0, replaced(models("a", "b"))),
        at(18.0, ev.DeadlineReached()),
        at(19.0, ev.RequestFinished(1), fx.Stopped()),
    )


def test_order_of_the_models_is_that_of_the_new_configuration() -> None:
    play = given(models("a", "b"))
    play.feed(1.0, replaced(models("b", "c", "a")))
    assert list(play.core.state.models) == ["b", "c", "a"]


def test_clocks_of_an_awake_model_follow_a_reload() -> None:
    play = given(models("a"), awake=["a"], alive_every=0.0)
    play(at(10.0, replaced(models("a"), alive_every=7.0)))
    assert play.core.next_deadline() == 17.0
    play(at(11.0, replaced(models("a", idle_sleep=20.0), alive_every=0.0)))
    assert play.core.next_deadline() == 31.0


def test_reload_while_something_is_put_to_sleep() -> None:
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
        at(2.0, replaced(models("a", definition="new"))),
        at(
            3.0,
            ev.HookFinished(2, ok=True),
            fx.RecordHolders(frozenset()),
            fx.SwitchEnded(1, ("a",), None, "success", 2.0, 0.0, 2.0, None),
        ),
    )
