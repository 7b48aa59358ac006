"""`llmux simulate --spill`: what it would bring, and cost, to have a remote serve what would wait too long."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llmux.cli import app
from llmux.plugins import load_policy
from llmux.simulator import CostMatrix, EngineModel, Job, Trace, TraceError, simulate
from llmux.simulator.engine_model import Engines
from llmux.simulator.spilling import EVERY, Spill, parse_price
from llmux.simulator.statistics import statistics_of, waits_of
from llmux.simulator.synthetic import Closed, Poisson, generate, with_closed

ENGINE = EngineModel(slots=4)


def run(trace, spill=None, policy="fifo", cost=10.0, **more):
    made = load_policy(policy, {}, None)
    return simulate(trace, made, CostMatrix(cost), engine=ENGINE, spill=spill, **more)


def traffic(seed=1, rate=0.4, seconds=900.0):
    return generate(Poisson(3, rate), seconds, seed)


@settings(max_examples=12)
@given(st.integers(1, 1000), st.sampled_from([0.0, 1.0, 5.0, 20.0, 60.0]), st.sampled_from(["fifo", "adaptive"]))
def test_no_request_waits_much_longer_than_it_may(seed, over, policy):
    outcome = run(traffic(seed), Spill(over), policy)
    look = min(max(over / 20.0, EVERY[0]), EVERY[1])
    assert max(waits_of(outcome)) <= over + look + 1e-6
    assert all(finished is not None for finished in outcome.finished)
    assert len(set(outcome.spilled)) == len(outcome.spilled)


def test_what_never_spills_runs_as_without():
    plain, other = run(traffic()), run(traffic(), Spill(1e9))
    assert other.spilled == []
    assert (plain.arrived, plain.admitted, plain.finished, plain.switches) == (
        other.arrived, other.admitted, other.finished, other.switches,
    )  # fmt: skip


def test_with_no_patience_only_what_is_awake_serves():
    trace = traffic()
    outcome = run(trace, Spill(0.0))
    assert outcome.switches == 0
    first = trace.models[0]
    assert {trace.jobs[job].model for job in outcome.spilled} >= set(trace.models) - {first}
    assert max(waits_of(outcome)) == 0.0


def test_less_patience_spills_more():
    outcomes = [run(traffic(rate=0.3), Spill(over)) for over in (2.0, 15.0, 60.0)]
    spilled = [len(outcome.spilled) for outcome in outcomes]
    assert spilled == sorted(spilled, reverse=True)
    assert spilled[0] > spilled[-1] > 0
    assert outcomes[0].switches == 0 < outcomes[-1].switches  # each switch takes longer than that


def test_a_remote_answers_as_the_engine_would_alone_and_charges_by_the_token():
    last = Job(2.0, "b", 0, 0, alone=5.0, first=1.0, tokens=(7, 9))
    jobs = [Job(0.0, "a", 600, 60), Job(1.0, "b", 6000, 120), last]
    outcome = run(Trace("t", jobs), Spill(3.0, (2.0, 10.0)))
    assert outcome.spilled == [1, 2]
    assert outcome.first_token[1] == pytest.approx(1.0 + 6000 / 6000.0 + 1 / 60.0)
    assert outcome.finished[1] == pytest.approx(1.0 + 6000 / 6000.0 + 120 / 60.0)
    assert (outcome.first_token[2], outcome.finished[2]) == (3.0, 7.0)
    assert outcome.spill_cost == pytest.approx(((6000 + 7) * 2.0 + (120 + 9) * 10.0) / 1e6)
    result = statistics_of(outcome)
    assert (result.spilled, result.spill_cost) == (2, outcome.spill_cost)
    assert result.as_json()["spilled"] == 2
    assert not {"spilled", "spill_cost"} & statistics_of(run(Trace("t", jobs[:1]))).as_json().keys()


def test_users_that_were_answered_elsewhere_ask_on():
    users = Closed(4, 5.0, models=2)
    trace = with_closed(None, users, 600.0, 1, Engines(ENGINE), ["a", "b"])
    plain, spilling = (run(trace, spill, horizon=600.0) for spill in (None, Spill(5.0)))
    answered = [sum(finished is not None for finished in each.finished) for each in (plain, spilling)]
    assert answered[1] > answered[0]
    assert spilling.spilled


def test_what_arrives_after_the_end_counts_for_nothing():
    outcome = run(traffic(), Spill(5.0), horizon=300.0)
    assert all(token is None or token <= 300.0 for token in outcome.first_token)
    assert statistics_of(outcome).requests == sum(arrived is not None for arrived in outcome.arrived)


@pytest.mark.parametrize(
    ("text", "price"),
    [("input=0.25,output=2", (0.25, 2.0)), ("output=1e-1", (0.0, 0.1)), (" input = 3 ", (3.0, 0.0))],
)
def test_prices(text, price):
    assert parse_price(text) == price


@pytest.mark.parametrize("text", ["", "2", "input", "input=x", "input=-1", "input=inf", "input=nan", "tokens=1"])
def test_what_is_no_price(text):
    with pytest.raises(TraceError, match=r"write input=0\.25,output=2"):
        parse_price(text)


# ---- the command


def command(*words):
    return CliRunner().invoke(app, ["simulate", *map(str, words)])


LOAD = ("--poisson", "models=3,rate=0.3", "--horizon", "900s", "-p", "fifo")


def test_a_column_for_each_with_what_it_brings_and_costs():
    asked = (*LOAD, "--spill", "5s", "--spill", "1m", "--spill-price", "input=0.25,output=2")
    found = json.loads(command(*asked, "--json").stdout)
    plain, (short, long) = found["policies"]["fifo"], found["what_if"]
    assert (short["change"], long["change"]) == ("spill 5s", "spill 1m")
    assert short["max_wait"] < 6.0 < long["max_wait"] < plain["max_wait"]
    assert short["spilled"] > long["spilled"] > 0
    assert short["spill_cost"] > long["spill_cost"] > 0.0
    share = short["spilled"] / short["requests"]
    said = f"{short['spilled']} requests ({share:.0%}) go to the remote, for {short['spill_cost']:.4g} by"
    assert said in short["verdict"]
    assert short["verdict"].endswith("It helps.")
    table = " ".join(command(*asked).stdout.split())
    assert "spilled" in table
    assert "cost of spilling" in table
    assert "cost of spilling" not in command(*LOAD, "--spill", "5s").stdout
    assert "spilled" not in command(*LOAD).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--spill", "soon"), "soon"),
        (("--spill", "-1s"), "-1s"),
        (("--spill-price", "input=1"), "--spill-price goes with --spill"),
        (("--spill", "5s", "--spill-price", "1"), "write input=0.25,output=2"),
    ],
)
def test_options_that_make_no_sense(words, said):
    done = command(*LOAD, *words)
    assert done.exit_code == 2
    assert said in done.output


def test_a_configuration_and_a_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hooks = {"wake": "true", "sleep": "true", "alive": "true"}
    models = {name: {"port": 8000 + at, **hooks} for at, name in enumerate("abc")}
    (tmp_path / "config.json").write_text(json.dumps({"state": "s.json", "models": models}))
    done = command(*LOAD, "--config", "config.json", "--spill", "5s", "--json")
    (changed,) = json.loads(done.stdout)["what_if"]
    assert changed["spilled"] > 0
    assert changed["max_wait"] < 6.0
