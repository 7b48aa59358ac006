"""Many hosts in virtual time: small fleets worked out by hand, and what holds of any."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmux.cli import app
from llmux.fleet.routes import SHIPPED, LeastWait, RoundRobin
from llmux.fleet.simulation import Deaths, FleetOutcome, Setting, simulate_fleet, statistics_of_fleet
from llmux.plugins import load_policy
from llmux.simulator import CostMatrix, EngineModel, Job, Trace, simulate
from llmux.simulator.engine_model import Engines
from llmux.simulator.run import Outcome, Scene
from llmux.simulator.synthetic import Agents, OnOff, Poisson, generate

# One token a second: a job of n output tokens takes n seconds alone.
SLOW = Engines(EngineModel(slots=2, decode=1.0, prefill=1e9, slowdown=0.0))
QUICK = Engines(EngineModel(slots=4))
HALVES = CostMatrix(sleeps={"a": 1.0, "b": 2.0, "c": 1.0}, wakes={"a": 3.0, "b": 4.0, "c": 5.0})


def adaptive():
    return load_policy("adaptive", {}, Path())


def fifo():
    return load_policy("fifo", {}, Path())


def setting(jobs, hosts=2, costs=HALVES, engines=SLOW, **more):
    return Setting(Trace("t", jobs), hosts, costs, engines, more.pop("policy", fifo), **more)


def run(jobs, route="least_wait", **more):
    return simulate_fleet(setting(jobs, **more), None if route == "clairvoyant" else SHIPPED[route])


@pytest.mark.parametrize("policy", [fifo, adaptive])
@pytest.mark.parametrize("stale", [0.0, 1.0])
def test_a_fleet_of_one_is_that_host(policy, stale):
    trace = generate(OnOff(3, 1.0, 20, 40), 300.0, 5)
    costs = CostMatrix(sleeps=dict.fromkeys(trace.models, 1.0), wakes=dict.fromkeys(trace.models, 4.0))
    fleet = simulate_fleet(Setting(trace, 1, costs, QUICK, policy, stale), LeastWait)
    specs = Scene.of(trace, QUICK).specs
    alone = simulate(trace, policy(), costs, engine=QUICK, scene=Scene(specs, frozenset()))
    if policy is fifo:  # adaptive learns from costs that it was told, which differ here
        assert fleet.requests.admitted == alone.admitted
        assert fleet.requests.finished == alone.finished
    assert len(fleet.requests.finished) == len(alone.finished)
    assert None not in fleet.requests.finished


def test_two_models_get_a_host_each():
    outcome = run([Job(0.0, "a", 0, 5), Job(1.0, "b", 0, 5), Job(10.0, "a", 0, 5), Job(11.0, "b", 0, 5)])
    assert outcome.requests.admitted == [3.0, 5.0, 10.0, 11.0]
    assert (outcome.wakes, outcome.cold, outcome.sent) == (2, 2, 4)
    assert outcome.work == [2, 2]


def test_round_robin_switches_all_the_time():
    jobs = [Job(20.0 * n, "ab"[n // 2 % 2], 0, 1) for n in range(8)]
    outcome = run(jobs, "round_robin")
    assert outcome.wakes == 8
    assert outcome.cold == 8


def test_a_report_of_half_a_minute_ago_misleads_but_what_was_placed_since_is_known():
    jobs = [Job(40.0 + n, "a", 0, 4) for n in range(6)]
    for stale in (0.0, 60.0):
        outcome = run(jobs, stale=stale)
        assert outcome.wakes <= 2


def test_wakes_are_doubled_where_gateways_do_not_know_of_each_other():
    class Deaf(LeastWait):
        """Does not hear of claims."""

        def place(self, model, fleet):
            fleet.claims.clear()
            return super().place(model, fleet)

    names = [f"m{n}" for n in range(12)]
    jobs = [Job(5.0 * n + 0.2 * k, name, 0, 2) for n, name in enumerate(names) for k in range(4)]
    costs = CostMatrix(default=20.0)
    kind = {"hosts": 16, "costs": costs, "gateways": 4, "stale": 4.0}
    heard = simulate_fleet(setting(jobs, **kind), LeastWait)
    deaf = simulate_fleet(setting(jobs, **kind), Deaf)
    assert heard.duplicates == heard.crossed == 0
    assert heard.wakes == 12
    assert deaf.wakes >= heard.wakes


def test_a_host_dies_and_comes_back():
    jobs = [Job(0.5 * n, "ab"[n % 2], 0, 4) for n in range(200)]
    outcome = run(jobs, hosts=4, deaths=Deaths(2, 30.0, 20.0))
    figures = statistics_of_fleet(outcome)
    assert outcome.lost > 0  # what it was serving, and what waited there
    assert outcome.retried > 0  # what found it dead
    assert outcome.rejected == 0
    assert figures.completed == 200 - outcome.lost
    assert all(outcome.work)


def test_the_whole_fleet_dies_and_what_comes_waits_in_the_gateway():
    jobs = [Job(5.0 * n, "a", 0, 1) for n in range(10)]
    outcome = run(jobs, deaths=Deaths(2, 12.0, 10.0))
    assert outcome.rejected == outcome.lost == 0
    admitted = outcome.requests.admitted
    assert 22.0 <= admitted[3] < 30.0  # it came at 15, and a probe found a host after 22
    assert None not in outcome.requests.finished


@pytest.mark.parametrize("route", [*SHIPPED, "clairvoyant"])
def test_every_request_is_accounted_for(route):
    trace = generate(Poisson(6, 4.0), 15.0, 3)
    for more in ({}, {"gateways": 3}, {"deaths": Deaths(1, 7.0, 5.0)}, {"misjudge": 3.0}, {"stale": 0.0}):
        kind = Setting(trace, 3, CostMatrix(default=2.0), QUICK, adaptive, **more)
        outcome = simulate_fleet(kind, None if route == "clairvoyant" else SHIPPED[route])
        done = sum(finished is not None for finished in outcome.requests.finished)
        assert done + outcome.lost + outcome.rejected == len(trace.jobs)
        assert sum(outcome.work) == done
        assert not outcome.overruled


def test_the_same_seed_is_the_same_run():
    trace = generate(Poisson(6, 4.0), 40.0, 3)
    kind = Setting(trace, 3, CostMatrix(default=2.0), QUICK, adaptive, gateways=2)
    assert simulate_fleet(kind, LeastWait).requests.admitted == simulate_fleet(kind, LeastWait).requests.admitted


def test_users_that_wait_for_their_answers():
    trace = generate(Agents(3, 1.0), 200.0, 2)
    kind = Setting(trace, 2, CostMatrix(default=1.0), QUICK, adaptive, horizon=200.0)
    outcome = simulate_fleet(kind, LeastWait)
    assert sum(arrived is not None for arrived in outcome.requests.arrived) > 3


def test_least_wait_waits_less_than_what_is_practised():
    trace = generate(Poisson(8, 2.0), 100.0, 8)
    kind = Setting(trace, 4, CostMatrix(default=8.0), QUICK, adaptive)
    mean = {
        name: statistics_of_fleet(simulate_fleet(kind, SHIPPED[name])).mean_wait
        for name in ("least_wait", "affinity", "least_in_flight", "random")
    }
    assert mean["least_wait"] < mean["affinity"] < mean["least_in_flight"]


def test_what_comes_of_a_run_as_figures():
    trace = Trace("t", [Job(0.0, "a", 0, 1)] * 4)
    requests = Outcome(trace, 3600.0, [0.0] * 4, [0.0, 1.0, 3.0, None], [1.0, 2.0, 4.0, None], [None] * 4)
    outcome = FleetOutcome(requests, wakes=4, duplicates=2, crossed=1, cold=1, sent=4, work=[3, 1, 0, 0])
    figures = statistics_of_fleet(outcome)
    assert figures.mean_wait == (0 + 1 + 3 + 3600) / 4
    assert figures.completed == 3
    assert figures.switches_per_hour == 1.0
    assert (figures.cold, figures.duplicates, figures.crossed) == (0.25, 0.5, 0.25)
    assert figures.jain == 16 / (4 * 10)
    assert statistics_of_fleet(FleetOutcome(Outcome(trace, 0.0, [], [], [], []), work=[0])).jain == 1.0


def test_a_round_robin_of_two_gateways_takes_its_own_turns():
    jobs = [Job(1.0 * n, "a", 0, 1) for n in range(4)]
    assert simulate_fleet(setting(jobs, gateways=2, costs=CostMatrix(default=0.0)), RoundRobin).work == [2, 2]


# ---- the command


def command(*words):
    return CliRunner().invoke(app, ["simulate", "--poisson", "models=4,rate=2", "--horizon", "60s", *words])


def test_the_command_prints_a_table_of_routes_and_a_verdict():
    found = command("--hosts", "3", "--route", "least_wait", "--route", "affinity", "--die", "1@20s:10s")
    assert found.exit_code == 0, found.output
    for word in (
        "least_wait",
        "affinity",
        "mean wait",
        "switches per host and hour",
        "Jain",
        "lost with their host",
    ):
        assert word in found.output
    assert "3 hosts with policy adaptive" in found.output.replace("\n", " ").replace("  ", " ")
    assert "times as long with" in found.output.replace("\n", " ")


def test_the_command_prints_json():
    found = command("--hosts", "3", "-r", "static", "--stale", "2s", "--gateways", "2", "--json", "-p", "fifo")
    document = json.loads(found.stdout)
    assert (document["hosts"], document["gateways"], document["stale"], document["policy"]) == (3, 2, 2.0, "fifo")
    assert set(document["routes"]["static"]) >= {"mean_wait", "p99_wait", "duplicates", "jain", "cold"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-r", "affinity"], "--route is about a fleet; add --hosts"),
        (["--stale", "1s"], "--stale is about a fleet"),
        (["--hosts", "2", "-r", "afinity"], "did you mean affinity?"),
        (["--hosts", "2", "-r", "nowhere:Class"], "cannot be loaded"),
        (["--hosts", "2", "-r", "json:loads"], "has no class 'loads'"),
        (["--hosts", "2", "-r", "json:JSONEncoder"], "has no method `place(model, fleet)`"),
        (["--hosts", "2", "-r", "./no_such_file.py:Route"], "cannot be loaded"),
        (["--hosts", "2", "--stale", "soon"], "--stale"),
        (["--hosts", "2", "--die", "some"], "write HOSTS@TIME[:BACK]"),
        (["--hosts", "2", "--die", "0@1m"], "write HOSTS@TIME[:BACK]"),
        (["--hosts", "2", "-p", "fifo", "-p", "idle"], "give --policy once"),
        (["--hosts", "2", "-p", "auto"], "--policy auto chooses among policies for one host"),
        (["--hosts", "2", "--what-if", "cost=÷2"], "--what-if cannot be combined with --hosts"),
    ],
)
def test_what_makes_no_sense_is_said(words, message):
    found = command(*words)
    assert found.exit_code == 2
    assert message in found.output.replace("\n", " ")


def test_the_guides_own_route_runs(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "llmux" / "FLEET.md").read_text()
    _, _, rest = guide.partition("```python\n")
    code, _, _ = rest.partition("```")
    (tmp_path / "spread.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    found = command("--hosts", "3", "-r", "./spread.py:Spread", "-r", "least_wait")
    assert found.exit_code == 0, found.output
    assert "warning" not in found.output
    kind = Setting(generate(Poisson(4, 2.0), 60.0, 1), 3, CostMatrix(default=1.0), QUICK, adaptive)
    assert replace(kind, hosts=2).hosts == 2
