"""Runs under a configuration's own rules: the hooks of every switch have their own times."""

from pathlib import Path

import pytest

from llmux.config import Config, to_specs
from llmux.plugins import load_policy
from llmux.simulator import CostMatrix, Job, Trace, TraceError
from llmux.simulator.configured import HookSeconds, simulate_specs
from llmux.simulator.cost_matrix import read_costs
from llmux.simulator.engine_model import EngineModel, Engines
from llmux.simulator.statistics import statistics_of

ENGINES = Engines(EngineModel(slots=4, decode=1.0, prefill=1e9, slowdown=0.0))
HOOKS = {"wake": "true", "sleep": "true", "alive": "true"}
HALVES = CostMatrix(1.0, sleeps={"a": 2.0, "b": 3.0, "c": 1.0}, wakes={"a": 10.0, "b": 20.0, "c": 5.0})


def config(*, models=None, **settings):
    models = models or {"a": {"memory": "10GiB"}, "b": {"memory": "12GiB"}, "c": {"memory": "4GiB"}}
    made = {name: {**HOOKS, "port": 8001 + place, **more} for place, (name, more) in enumerate(models.items())}
    return Config.model_validate({"models": made, **settings})


def run(jobs, configured, costs=HALVES, policy="fifo", factor=1.0, **more):
    trace = Trace("test", [Job(float(at), model, 0, seconds) for at, model, seconds in jobs])
    times = HookSeconds.of(configured, costs, factor)
    return simulate_specs(trace, *to_specs(configured), load_policy(policy, {}, Path()), times, ENGINES, **more)


def spans(outcome, what="awake"):
    return sorted((visit.model, visit.start, visit.end) for visit in outcome.residency if visit.what == what)


def test_all_sleep_at_first_and_a_switch_takes_the_sleep_and_the_wake():
    outcome = run([(0, "a", 4), (20, "b", 4)], config())
    assert outcome.admitted == [10.0, 42.0]
    assert spans(outcome, "switch") == [("a", 0.0, 10.0), ("b", 22.0, 42.0)]


def test_what_fits_is_awake_together_and_nothing_sleeps_for_it():
    outcome = run([(0, "a", 4), (20, "c", 4), (40, "a", 4)], config(capacity="14GiB"))
    assert outcome.admitted == [10.0, 25.0, 40.0]
    assert spans(outcome) == [("a", 10.0, 44.0), ("c", 25.0, 44.0)]
    apart = run([(0, "a", 4), (20, "c", 4), (40, "a", 4)], config(capacity="13GiB"))
    assert apart.admitted == [10.0, 27.0, 51.0]


def test_the_set_that_leaves_sleeps_in_parallel():
    outcome = run([(0, "a", 1), (12, "c", 1), (30, "b", 1)], config(capacity="14GiB"))
    assert outcome.admitted[2] == 30.0 + 2.0 + 20.0


def test_several_gpus():
    models = {"a": {"memory": "10GiB", "gpus": [0]}, "b": {"memory": "10GiB", "gpus": [1]}}
    outcome = run([(0, "a", 4), (20, "b", 4), (45, "a", 4)], config(models=models, gpus={0: "12GiB", 1: "12GiB"}))
    assert outcome.admitted == [10.0, 40.0, 45.0]


def test_groups():
    groups = {"small": {"models": ["a", "c"], "together": True}}
    outcome = run([(0, "a", 4), (20, "c", 4), (40, "a", 4), (50, "b", 1)], config(groups=groups))
    assert outcome.admitted == [10.0, 25.0, 40.0, 72.0]


def test_a_model_is_woken_from_the_level_at_which_it_sleeps():
    models = {
        "a": {"levels": [{"ram": "10GiB"}, "disk"]},
        "b": {"levels": [{"ram": "12GiB"}, "disk"]},
    }
    levels = {
        ("wake", "a", "ram"): 1.0, ("wake", "a", "disk"): 30.0,
        ("wake", "b", "ram"): 2.0, ("wake", "b", "disk"): 40.0,
        ("sleep", "a", "ram"): 3.0, ("sleep", "a", "disk"): 0.5, ("sleep", "b", "ram"): 4.0,
    }  # fmt: skip
    costs = CostMatrix(10.0, wakes={"a": 10.0, "b": 10.0}, levels=levels)
    jobs = [(0, "a", 1), (20, "b", 1), (60, "a", 1), (100, "b", 1)]
    roomy = run(jobs, config(models=models, host_memory="30GiB"), costs)
    assert roomy.admitted == [10.0, 33.0, 65.0, 105.0]  # sleep to ram, wake out of it
    short = run(jobs, config(models=models, host_memory="4GiB"), costs)
    assert short.admitted[2] == 60.0 + 0.0 + 30.0  # out of disk


def test_a_prefetch_shortens_the_wake_by_what_it_has_read():
    models = {"a": {}, "b": {"prefetch": "true"}}
    jobs = [(0, "a", 8), (11, "b", 1)]  # a drains until 18
    plain = run(jobs, config(models=models))
    assert plain.admitted[1] == 18.0 + 2.0 + 20.0
    half = CostMatrix(1.0, sleeps={"a": 2.0, "b": 3.0}, wakes={"a": 10.0, "b": 20.0}, prefetches={"b": 15.0})
    begun = run(jobs, config(models=models), half)
    assert begun.admitted[1] == 18.0 + 2.0 + 20.0 - 9.0  # it ran beside the drain and the sleep
    short = CostMatrix(1.0, sleeps={"a": 2.0, "b": 3.0}, wakes={"a": 10.0, "b": 20.0}, prefetches={"b": 6.0})
    assert run(jobs, config(models=models), short).admitted[1] == 18.0 + 2.0 + 20.0 - 6.0


def test_settings_of_a_model_hold():
    models = {"a": {"max_in_flight": 1}, "b": {}}
    outcome = run([(0, "a", 4), (0, "a", 4)], config(models=models))
    assert outcome.admitted == [10.0, 14.0]
    asleep = run([(0, "a", 4), (40, "a", 4)], config(models={"a": {"idle_sleep": "5s"}, "b": {}}))
    assert asleep.admitted == [10.0, 50.0]
    ready = run([(60, "b", 4)], config(models={"a": {}, "b": {"preload": True}}))
    assert ready.admitted == [60.0]


def test_rules_of_the_policy_hold():
    outcome = run([(0, "a", 4), (11, "b", 4)], config(policy={"min_active": "30s"}))
    assert outcome.admitted[1] == 40.0 + 2.0 + 20.0


def test_answers_are_cut_by_the_drain_timeout_and_do_not_count_as_answered():
    outcome = run([(0, "a", 100), (12, "b", 4), (13, "b", 4)], config(policy={"drain_timeout": "5s"}))
    assert outcome.admitted == [10.0, 39.0, 39.0]
    assert outcome.finished == [None, 43.0, 43.0]
    assert outcome.cut == 1
    assert statistics_of(outcome).completed == 2


def test_what_waits_in_an_engine_is_cut_too_and_what_follows_comes():
    jobs = [Job(0.0, "a", 0, 100) for _ in range(5)]  # four slots
    jobs.append(Job(12.0, "b", 0, 4))
    jobs[0] = Job(0.0, "a", 0, 100, successor=6, think=1.0)
    jobs.append(Job(None, "a", 0, 1))
    specs, rules = to_specs(config(policy={"drain_before_switch": False}))
    fifo = load_policy("fifo", {}, Path())
    outcome = simulate_specs(Trace("t", jobs), specs, rules, fifo, HookSeconds(HALVES), ENGINES)
    assert outcome.cut == 6  # the user that was cut asks again, for which b's answer is cut in turn
    assert outcome.arrived[6] == 13.0
    assert outcome.finished[6] is not None


def test_a_wake_that_takes_longer_than_its_timeout_fails_and_its_requests_are_refused():
    models = {"a": {"timeouts": {"wake": "5s"}}, "b": {}}
    outcome = run([(0, "a", 4), (30, "b", 4)], config(models=models))
    assert outcome.refused == 1
    assert outcome.admitted[1] is not None


def test_costs_are_multiplied():
    assert run([(0, "a", 4)], config(), factor=0.5).admitted == [5.0]
    guessed = config(models={"a": {"cost": {"wake": "8s", "sleep": "3s"}}, "b": {"cost": {"wake": "6s"}}})
    outcome = run([(0, "a", 1), (20, "b", 1)], guessed, CostMatrix(1.0), factor=0.5)
    assert outcome.admitted == [4.0, 20.0 + 1.5 + 3.0]


def test_models_awake_on_average():
    outcome = run([(0, "a", 4), (20, "c", 4)], config(capacity="14GiB"), horizon=30.0)
    assert statistics_of(outcome).awake == pytest.approx((20.0 + 5.0) / 30.0)


def test_a_model_that_is_not_there():
    with pytest.raises(TraceError, match="asks for 'z', which is not one of the configuration's models"):
        run([(0, "z", 1)], config())


# ---- how long hooks take


def test_where_only_a_whole_switch_is_known_all_of_it_is_in_the_wake():
    times = HookSeconds(CostMatrix(10.0, {("a", "b"): 7.0}))
    assert (times.sleep("a", ""), times.wake("b", "", ("a",)), times.wake("b", "", ())) == (0.0, 7.0, 10.0)
    halves = HookSeconds(CostMatrix(10.0, {("a", "b"): 7.0}, sleeps={"a": 2.0}))
    assert (halves.sleep("a", ""), halves.wake("b", "", ("a",))) == (2.0, 5.0)
    with pytest.raises(TraceError, match="no cost is given for a wake of 'b'"):
        HookSeconds(CostMatrix()).wake("b", "", ())


def test_files_of_costs_by_level(tmp_path):
    path = tmp_path / "costs.yaml"
    path.write_text("{wake: {a: {ram: 1s, disk: 12s}, b: 5s}, sleep: {a: 2s}, prefetch: {a: 4s}, default: 9s}")
    costs = read_costs(path)
    assert costs.levels == {("wake", "a", "ram"): 1.0, ("wake", "a", "disk"): 12.0}
    assert (costs.wakes, costs.sleeps, costs.prefetches) == ({"a": 1.0, "b": 5.0}, {"a": 2.0}, {"a": 4.0})
    twice = costs.scaled(2.0)
    assert (twice.default, twice.wakes["b"], twice.levels["wake", "a", "disk"]) == (18.0, 10.0, 24.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{wake: {a: {}}}", "wake.a: must be a duration, or one for each level"),
        ("{wake: {a: {ram: soon}}}", "wake.a.ram: 'soon' is not a duration"),
        ("{wake: {a: 1s}, prefetch: {a: {ram: 1s}}}", "prefetch.a: must be a duration"),
        ("{prefetch: [a]}", "prefetch: must be a mapping of models to durations"),
    ],
)
def test_slips_in_files_of_costs(tmp_path, text, said):
    path = tmp_path / "costs.yaml"
    path.write_text(text)
    with pytest.raises(TraceError) as caught:
        read_costs(path)
    assert said in str(caught.value)
