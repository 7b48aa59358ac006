"""Costs: what switches cost, measured and estimated."""

from __future__ import annotations

import json

import pytest
from playbook import given, models

from llmux.core import events as ev
from llmux.core.phases import Phase
from llmux.estimates.costs import PAIRS, Average, SwitchCosts
from llmux.observability.state_file import dump_costs, load_costs


def test_first_sample_counts_whole_and_the_next_three_tenths() -> None:
    costs = SwitchCosts()
    assert costs.measured("a", "b") is None
    assert costs.record(["a"], "b", 10.0) == 10.0
    assert costs.record(["a"], "b", 20.0) == pytest.approx(13.0)
    assert costs.measured("a", "b") == costs.estimate(["a"], "b") == pytest.approx(13.0)
    assert costs.pairs == {("a", "b"): Average(pytest.approx(13.0), 2)}


def test_cold_start_is_a_direction_of_its_own_and_several_sources_are_none() -> None:
    costs = SwitchCosts()
    costs.record([], "b", 5.0)
    assert costs.record(["a", "c"], "b", 50.0) is None
    assert costs.pairs == {(None, "b"): Average(5.0, 1)}
    assert costs.estimate([], "b") == 5.0


def test_unseen_direction_is_the_slowest_sleep_and_the_wake() -> None:
    costs = SwitchCosts()
    costs.record_sleep("a", 3.0)
    costs.record_sleep("c", 4.0)
    costs.record_wake("b", 7.0)
    assert costs.estimate(["a"], "b") == 10.0
    assert costs.estimate(["a", "c"], "b") == 11.0
    assert costs.estimate([], "b") == 7.0


def test_what_was_never_seen_is_the_first_guess_or_the_mean_of_its_kind_or_a_default() -> None:
    costs = SwitchCosts()
    assert costs.wake_of("a") == 10.0
    assert costs.sleep_of("a") == 2.0
    costs.record_wake("b", 4.0)
    costs.record_wake("c", 8.0)
    assert costs.wake_of("a") == 6.0
    costs.guesses = {"a": (1.0, None), "b": (99.0, 99.0)}
    assert costs.wake_of("a") == 1.0
    assert costs.sleep_of("a") == 2.0
    assert costs.sleep_of("b") == 99.0
    assert costs.wake_of("b") == 4.0  # measured counts more than guessed


def test_estimates_survive_a_restart() -> None:
    costs, after = SwitchCosts(), SwitchCosts()
    costs.record(["a"], "b", 10.0)
    costs.record([], "b", 5.0)
    costs.record_sleep("a", 3.0)
    costs.record_wake("b", 7.0)
    load_costs(after, json.loads(json.dumps(dump_costs(costs))))
    assert dump_costs(after) == dump_costs(costs)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"pairs": [["a", "b", -1.0, 1]], "wakes": {}, "sleeps": {}},
        {"pairs": [["a", "b", float("nan"), 1]], "wakes": {}, "sleeps": {}},
        {"pairs": [], "wakes": {"a": [float("inf"), 1]}, "sleeps": {}},
        {"pairs": [["a"]], "wakes": {}, "sleeps": {}},
        {"pairs": 7, "wakes": {}, "sleeps": {}},
    ],
)
def test_what_is_no_dump_changes_nothing(data) -> None:
    costs = SwitchCosts()
    costs.record(["a"], "b", 10.0)
    before = dump_costs(costs)
    with pytest.raises((ValueError, TypeError, KeyError)):
        load_costs(costs, data)
    assert dump_costs(costs) == before


def test_switch_cost_leaves_the_drain_out_and_sleep_has_its_verify() -> None:
    play = given(models("a", "b", verify=True), awake=["a"])
    play.feed(0.0, ev.RequestArrived(1, "a"))
    play.feed(1.0, ev.RequestArrived(2, "b"))
    play.feed(50.0, ev.RequestFinished(1))
    play.feed(52.0, ev.HookFinished(3, ok=True))
    play.feed(55.0, ev.HookFinished(4, ok=True))
    play.feed(65.0, ev.HookFinished(5, ok=True))
    costs = play.core.state.costs
    assert costs.measured("a", "b") == 15.0
    assert costs.sleep_of("a") == 5.0
    assert costs.wake_of("b") == 10.0


def test_several_that_leave_are_measured_one_by_one() -> None:
    play = given([*models("a", "b", memory=4), *models("c", memory=8)], awake=["a", "b"], capacity=8)
    play.feed(0.0, ev.RequestArrived(1, "c"))
    play.feed(2.0, ev.HookFinished(4, ok=True))
    play.feed(3.0, ev.HookFinished(5, ok=True))
    play.feed(9.0, ev.HookFinished(6, ok=True))
    costs = play.core.state.costs
    assert costs.pairs == {}
    assert costs.estimate(["a", "b"], "c") == 9.0


def test_a_cleanup_is_not_measured_as_a_sleep() -> None:
    play = given(models("a"))
    play.feed(0.0, ev.RequestArrived(1, "a"))
    play.feed(2.0, ev.HookFinished(2, ok=False, detail="exited with 1"))  # its wake
    assert play.core.state.models["a"].teardown.cleanup
    play.feed(32.0, ev.HookFinished(3, ok=True))  # its sleep
    assert play.core.state.models["a"].phase is Phase.ASLEEP
    assert play.core.state.costs.sleeps == {}


def test_the_directions_that_were_measured_last_are_kept() -> None:
    costs = SwitchCosts()
    for number in range(PAIRS + 100):
        costs.record(["a"], "b", 7.0)
        costs.record([f"m{number}"], "b", 1.0)
    assert len(costs.pairs) == PAIRS
    assert costs.measured("a", "b") == 7.0
    assert costs.measured("m0", "b") is None
    assert costs.measured(f"m{PAIRS + 99}", "b") == 1.0
    kept = dump_costs(costs)
    kept["pairs"] = [["old", str(number), 1.0, 1] for number in range(99)] + kept["pairs"]  # of an earlier llmux
    found = SwitchCosts()
    load_costs(found, json.loads(json.dumps(kept)))
    assert list(found.pairs.items()) == list(costs.pairs.items())
