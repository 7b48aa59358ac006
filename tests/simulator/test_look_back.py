"""Which policy would have been better; and ``use: auto`` in virtual time."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmux.cli import app
from llmux.config import Config, to_specs
from llmux.estimates.costs import SwitchCosts
from llmux.observability.state_file import dump_costs
from llmux.plugins import load_policy
from llmux.simulator import CostMatrix, EngineModel, Job, Trace, simulate
from llmux.simulator.choosing import KEPT, PIECES, Memory, choose, measure_of
from llmux.simulator.configured import HookSeconds, simulate_specs
from llmux.simulator.engine_model import Engines
from llmux.simulator.look_back import answer
from llmux.simulator.run import Outcome
from llmux.simulator.synthetic import OnOff, Poisson, generate

SOME = 600.0  # seconds that stand for the hour, as in production
COST = CostMatrix(10.0)
AMONG = ("adaptive", "idle", "fifo")


def makers(*names):
    return {name: lambda name=name: load_policy(name, {}, Path()) for name in names or AMONG}


def runner(trace, engine=None, horizon=None):
    return lambda policy: simulate(trace, policy, COST, engine=engine, horizon=horizon)


def auto(**options):
    return load_policy("auto", {"among": list(AMONG), "every": "5m", "past": SOME, **options}, Path())


def mean_after(outcome, start, end=float("inf")):
    waits = [
        (outcome.end if admitted is None else admitted) - arrived
        for arrived, admitted in zip(outcome.arrived, outcome.admitted, strict=True)
        if arrived is not None and start <= arrived < end
    ]
    return sum(waits) / len(waits)


# ---- one choice


def test_what_is_better_by_more_than_chance_is_chosen():
    choice = choose(makers(), "fifo", runner(generate(Poisson(4, 0.5), SOME, 1)))
    assert choice.before == "fifo"
    assert choice.name in {"adaptive", "idle"}
    scores = {score.name: score for score in choice.scores}
    assert scores[choice.name].value < 0.95 * scores["fifo"].value
    assert scores[choice.name].sure > 0.95
    assert choice.reason.startswith(f"on the last {choice.requests} requests {choice.name} has a mean wait of ")


def test_what_is_as_good_stays():
    trace = generate(Poisson(1, 0.5), SOME, 1)  # one model: all are alike
    choice = choose(makers(), "idle", runner(trace))
    assert choice.name == choice.before == "idle"
    assert "of 3 candidates none is better than idle by more than chance" in choice.reason


def test_too_few_requests_say_nothing():
    trace = generate(Poisson(4, 0.5), 60.0, 1)
    assert len(trace.jobs) < 40
    assert choose(makers(), "fifo", runner(trace)).name == "fifo"


@pytest.mark.parametrize(
    ("objective", "limit", "value"),
    [
        ("mean", None, 50.5),
        ("p95", None, 95.0),
        ("p99", None, 99.0),
        ("p99.5", None, 100.0),
        ("slo:20s", 20.0, 0.8),
    ],
)
def test_objectives(objective, limit, value):
    assert measure_of(objective, limit)([float(n) for n in range(1, 101)], [1.0] * 100) == pytest.approx(value)


# ---- what earlier looks have found


def outcome(arrived, waits):
    """Return a run in which requests came and waited so long; the last one still does."""
    trace = Trace("", [Job(arrival, "a", 1, 1) for arrival in arrived])
    admitted = [arrival + wait for arrival, wait in zip(arrived, waits, strict=True)]
    return Outcome(trace, 9e9, list(arrived), admitted, [None] * len(waits), [None] * len(waits))


def remembered(*looks, past=PIECES * 10.0):
    """Return what looks have found of "a" and "b": when each began, and what each request waited with either."""
    memory = Memory("ab", past)
    for since, pairs in looks:
        arrived = [10.0 * number for number in range(len(pairs))]
        memory.add(
            since, {name: outcome(arrived, [pair[at] for pair in pairs]) for at, name in enumerate("ab")}, float
        )
    return memory


def test_looks_at_the_same_time_are_averaged_and_later_ones_added():
    memory = remembered((0.0, [(10.0, 4.0)]), (0.0, [(10.0, 12.0)]))
    verdict = memory.compare("a", "b")
    assert (verdict.before, verdict.after) == pytest.approx((10.0, 8.0))
    memory = remembered((0.0, [(10.0, 4.0)]), (PIECES * 10.0, [(10.0, 10.0)]))
    assert memory.compare("a", "b").after == pytest.approx((4.0 / 2.0 + 10.0) / 1.5)  # an hour before counts half


def test_what_is_found_again_and_again_is_sure_and_once_is_not():
    dice = random.Random(1)
    pairs = [(dice.expovariate(0.1), dice.expovariate(0.1)) for _ in range(20)]
    once = [(10.0, 10.0)] * 19 + [(100.0, 10.0)]
    always = [(a + 3.0, b) for a, b in pairs]
    assert remembered((0.0, once)).compare("a", "b").sure < 0.9
    steady = remembered((0.0, [(a + 3.0, a) for a, _ in pairs])).compare("a", "b")
    assert steady.sure == 1.0
    sure = [remembered(*((240.0 * n, always) for n in range(count))).compare("a", "b").sure for count in (1, 4)]
    assert sure[0] < sure[1] < 1.0
    alike = remembered((0.0, [(2.0, 2.0)] * 9)).compare("a", "b")
    assert (alike.sure, alike.gain) == (0.5, 0.0)


def test_waits_that_are_alike_for_long_say_less_than_as_many_that_are_not():
    dice = random.Random(2)
    found = [[], []]
    for _ in range(40):
        gains = [dice.gauss(1.0, 3.0) for _ in range(20)]
        found[0].append([(10.0 + gain, 10.0) for gain in gains])
        found[1].append([(10.0 + gains[number // 4 * 4], 10.0) for number in range(20)])
    alone, together = (
        sum(abs(remembered((0.0, pairs)).compare("a", "b").sure - 0.5) for pairs in each) for each in found
    )
    assert together < alone


def test_it_is_written_and_read_and_bounded():
    looks = [(240.0 * n, [(3.0, 1.0 + n % 2)] * PIECES) for n in range(9)]
    memory = remembered(*looks)
    data = json.loads(json.dumps(memory.as_json()))
    assert KEPT * PIECES <= len(data["seen"]) <= KEPT * PIECES + 1
    again = Memory.of(data, "ab", PIECES * 10.0)
    assert again.as_json() == data
    assert again.compare("a", "b") == memory.compare("a", "b")


@pytest.mark.parametrize(
    "data",
    [
        None, 7, [], {}, {"names": ["a", "b"], "past": 240.0}, {"names": ["a"], "past": 240.0, "seen": {}},
        {"names": ["a", "b"], "past": 60.0, "seen": {"1": [1, 1, 1, 1]}},
        {"names": ["a", "b"], "past": 240.0, "seen": {"1": [1, 1, 1]}},
        {"names": ["a", "b"], "past": 240.0, "seen": {"1": [0, 1, 1, 1]}},
        {"names": ["a", "b"], "past": 240.0, "seen": {"one": [1, 1, 1, 1]}},
        {"names": ["a", "b"], "past": 240.0, "seen": {"1": [1, 1, None, 1]}},
        {"names": ["a", "b"], "past": 240.0, "seen": 1},
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_nothing(data):
    assert Memory.of(data, "ab", 240.0).as_json()["seen"] == {}


def test_one_look_that_is_better_by_chance_does_not_undo_what_many_have_found():
    trace = generate(Poisson(4, 0.5), SOME, 1)
    names = ("adaptive", "fifo")
    memory = Memory(names, SOME)
    contrary = {
        name: outcome([60.0 * n for n in range(60)], [wait] * 60)
        for name, wait in zip(names, (500, 1), strict=True)
    }
    for look in range(3):
        memory.add(look * SOME, contrary, float)
    choice = choose(makers(*names), "fifo", runner(trace), memory=memory, since=3 * SOME)
    assert choice.name == "fifo"
    assert choose(makers(*names), "fifo", runner(trace)).name == "adaptive"
    assert "earlier looks included" in choose(makers(*names), "fifo", runner(trace)).reason


def test_a_percentile_goes_by_the_last_hour():
    trace = generate(Poisson(4, 0.5), SOME, 1)
    choice = choose(makers("adaptive", "fifo"), "fifo", runner(trace), "p95")
    assert choice.name == "adaptive"
    assert "of the draws" in choice.reason
    assert choice.memory == {}


def test_an_objective_is_said_in_the_reason():
    choice = choose(makers("fifo", "idle"), "fifo", runner(generate(Poisson(4, 0.5), SOME, 1)), "slo:60s", 60.0)
    assert "% admitted within 60 s" in choice.reason
    assert all(0.0 <= score.value <= 1.0 for score in choice.scores)


def test_what_came_lately_counts_for_more():
    busy = [Job(j.arrival, "ab"[n % 2], 100, 600) for n, j in enumerate(generate(Poisson(1, 0.1), 2400.0, 2).jobs)]
    lately = [
        Job(2400.0 + j.arrival, "ab"[n % 2], 100, 5)
        for n, j in enumerate(generate(Poisson(1, 0.1), 1200.0, 3).jobs)
    ]
    both = choose(makers("fifo", "idle"), "fifo", runner(Trace("", [*busy, *lately])))
    only = choose(makers("fifo", "idle"), "fifo", runner(Trace("", busy)))
    gain = [
        1 - {s.name: s.value for s in c.scores}["idle"] / {s.name: s.value for s in c.scores}["fifo"]
        for c in (both, only)
    ]
    assert gain[0] < gain[1]


# ---- in virtual time


def test_before_an_hour_has_passed_the_first_candidate_decides():
    trace = generate(Poisson(4, 0.5), SOME - 1.0, 1)
    first = simulate(trace, load_policy("fifo", {}, Path()), COST)
    chosen = simulate(trace, auto(among=["fifo", "idle"]), COST, horizon=SOME)
    assert chosen.adopted == []
    assert chosen.admitted[:250] == first.admitted[:250]


def test_then_what_was_better_does():
    trace = generate(Poisson(4, 0.5), 2.0 * SOME, 1)
    found = simulate(trace, auto(among=["fifo", "adaptive"]), COST, horizon=2.0 * SOME)
    assert found.adopted == [(SOME, "adaptive")]
    fixed = mean_after(simulate(trace, load_policy("adaptive", {}, Path()), COST, horizon=2.0 * SOME), SOME)
    assert mean_after(found, SOME) <= 1.05 * fixed
    again = simulate(trace, auto(among=["fifo", "adaptive"]), COST, horizon=2.0 * SOME)
    assert (again.adopted, again.admitted) == (found.adopted, found.admitted)


def half_and_half(half, seed):
    """Return traffic that changes its nature: four models alike, then one that is always busy and rare others."""
    before = generate(Poisson(4, 0.5), half, seed).jobs
    busy = [Job(half + job.arrival, "m0", 100, 60) for job in generate(Poisson(1, 1.5), half, seed + 1).jobs]
    rare = [
        Job(half + job.arrival, f"m{1 + number % 3}", 200, 60)
        for number, job in enumerate(generate(Poisson(1, 0.05), half, seed + 2).jobs)
    ]
    return Trace("half and half", [*before, *busy, *rare])


def test_on_traffic_that_changes_its_nature_it_notices():
    half, engine, names = 1200.0, EngineModel(slots=64, decode=40.0, slowdown=0.1), ("adaptive", "idle")
    trace = half_and_half(half, 303)
    policies = [auto(among=names, past="10m", every="5m"), *(load_policy(name, {}, Path()) for name in names)]
    runs = [simulate(trace, policy, COST, engine=engine, horizon=2 * half) for policy in policies]
    # Before, idle was better, or looked so; now adaptive is.
    assert runs[0].adopted[-1][1] == "adaptive"
    assert runs[0].adopted[-1][0] > half
    chosen, adaptive, idle = (mean_after(run, 0.0) for run in runs)
    # Ten minutes are little evidence, of which it takes some to be sure.
    assert chosen < min(1.12 * adaptive, idle)


def test_it_works_under_the_rules_of_a_configuration_and_on_records():
    hooks = {"wake": "true", "sleep": "true", "alive": "true"}
    models = {f"m{n}": {**hooks, "port": 8001 + n, "memory": "8GiB"} for n in range(3)}
    config = Config.model_validate({"models": models, "capacity": "16GiB"})
    trace = generate(Poisson(3, 0.6), 2.0 * SOME, 1)
    policy = auto(among=["fifo", "adaptive"])
    outcome = simulate_specs(trace, *to_specs(config), policy, HookSeconds(COST), Engines())
    assert outcome.adopted[0][1] == "adaptive"
    record = Trace(
        "", [replace(job, prompt_tokens=0, output_tokens=0, alone=2.0, first=0.5) for job in trace.jobs]
    )
    record.jobs.append(Job(5.0, "m0", 0, 0, service=1.0))
    assert simulate(record, auto(among=["fifo", "adaptive"]), COST).adopted


def test_closed_loops_and_the_command():
    words = ["simulate", "--closed", "users=12,think=10s,models=3", "--horizon", "1500s", "--json"]
    done = CliRunner().invoke(app, [*words, "-p", "auto:past=10m", "-p", "fifo"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["policies"]
    assert found["auto"]["mean_wait"] < found["fifo"]["mean_wait"]


def test_the_command_says_what_was_adopted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        "policy: {use: auto, options: {among: [k_limited, idle], past: 10m}}\n"
        'models: {a: {port: 8001, wake: "true", sleep: "true", alive: "true"},'
        ' b: {port: 8002, wake: "true", sleep: "true", alive: "true"}}\n'
    )
    words = ["simulate", "--poisson", "models=2,rate=1", "--horizon", "20m", "--config", "config.yaml"]
    done = CliRunner().invoke(app, [*words, "--what-if", "cost=*2"])
    assert done.exit_code == 0, done.stderr
    assert "adopted: idle from 10 min on" in " ".join(done.stdout.split())


# ---- in a process beside


def question(**changes):
    trace = generate(Poisson(2, 0.3), SOME, 1)
    costs = SwitchCosts()
    costs.record(["m0"], "m1", 8.0)
    costs.record(["m1"], "m0", 9.0)
    model = {
        "phase": "asleep", "hooks": ["alive", "sleep", "wake"], "max_in_flight": 16, "max_queued": 1000,
        "memory": None, "companions": None, "shared_address": None, "idle_sleep": None, "preload": False,
        "keep_awake": False, "levels": [], "level": None,
    }  # fmt: skip
    rules = {"request_timeout": None, "max_wait": 600.0, "min_active": 0.0, "capacity": None}
    requests = [
        {
            "model": job.model, "arrival_s": job.arrival, "wait_s": 1.0, "service_s": job.output_tokens / 60.0,
            "first_byte_s": 1.1, "prompt_bytes": job.prompt_tokens, "answer_bytes": job.output_tokens,
            "outcome": "answered",
        }
        for job in trace.jobs
    ]  # fmt: skip
    asked = {
        "use": "auto", "options": {"among": ["fifo", "idle"]}, "folder": "/", "chosen": "fifo",
        "anticipate": False, "rules": rules, "models": [{"name": name, **model} for name in ("m0", "m1")],
        "costs": dump_costs(costs), "guesses": {"m0": [1.0, None]}, "requests": requests,
    }  # fmt: skip
    return {**asked, **changes}


def asked_beside(asked):
    return subprocess.run(
        [sys.executable, "-P", "-m", "llmux.simulator.look_back"],
        input=json.dumps(asked), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_process_answers():
    done = asked_beside(question())
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["name"], said["before"]) == ("idle", "fifo")
    assert {score["name"] for score in said["scores"]} == {"fifo", "idle"}


def test_without_enough_there_is_no_answer():
    assert answer(question(requests=question()["requests"][:20])) is None
    assert answer(question(costs=dump_costs(SwitchCosts()))) is None


def test_it_lowers_its_priority_first_and_says_what_is_wrong():
    code = """import os, runpy
try:
    runpy.run_module("llmux.simulator.look_back", run_name="__main__")
finally:
    print(os.nice(0))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(question(use="autp")),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    said, priority = done.stdout.splitlines()
    assert "autp: no such policy" in said
    assert int(priority) == min(19, os.nice(0) + 19)


def test_quiet_and_busy_traffic_by_turns_is_no_worse_than_the_best():
    trace = generate(OnOff(4, 0.5, 60, 180), 2.0 * SOME, 2)
    found = simulate(trace, auto(), COST, horizon=2.0 * SOME)
    fixed = [
        mean_after(simulate(trace, load_policy(name, {}, Path()), COST, horizon=2.0 * SOME), SOME)
        for name in AMONG
    ]
    assert mean_after(found, SOME) <= 1.05 * min(fixed)


def test_what_takes_over_knows_when_each_model_was_left():
    """A candidate of ``adaptive`` that has not decided for long once stayed far too long, or left far too soon."""
    trace = generate(OnOff(4, 0.4, 60.0, 180.0), SOME, 102)
    policy = load_policy("auto", {"among": ["idle", "adaptive"], "past": SOME}, Path())
    seen = policy._policies["adaptive"]._seen
    simulate(trace, policy, COST, horizon=SOME / 2.0)
    assert policy.chosen == "idle"
    assert set(seen._left) == set(trace.models)
    assert max(seen._left.values()) > SOME / 4.0
