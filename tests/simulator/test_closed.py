import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmux.cli import app
from llmux.plugins import load_policy
from llmux.simulator import CostMatrix, EngineModel, Job, Trace, TraceError, simulate, synthetic
from llmux.simulator.engine_model import Engines
from llmux.simulator.statistics import statistics_of
from llmux.simulator.synthetic import Closed, Poisson, generate, parse_closed, with_closed
from tests.simulator.traces import lines

HORIZON = 2000.0
ENGINES = Engines()
COST = CostMatrix(default=8.0)


def run(trace, policy="fifo", cost=COST, horizon=HORIZON):
    return simulate(trace, load_policy(policy, {}, Path()), cost, engine=ENGINES, horizon=horizon)


def loops(trace):
    """Return the indices of each user's requests, in order."""
    followers = {job.successor for job in trace.jobs}
    chains = []
    for index, job in enumerate(trace.jobs):
        if index not in followers and job.successor is not None:
            chain = [index]
            while (following := trace.jobs[chain[-1]].successor) is not None:
                chain.append(following)
            chains.append(chain)
    return chains


def test_a_user_thinks_after_each_answer_for_as_long_under_every_policy():
    trace = with_closed(None, Closed(users=6, think=10.0), HORIZON, 3, ENGINES)
    gaps = {}
    for policy in ("fifo", "idle", "adaptive"):
        outcome = run(trace, policy)
        for chain in loops(trace):
            for one, following in itertools.pairwise(chain):
                if outcome.arrived[following] is None:
                    continue
                thought = outcome.arrived[following] - outcome.finished[one]
                assert thought == pytest.approx(trace.jobs[one].think)
                gaps.setdefault(policy, []).append(thought)
    assert all(len(each) > 300 for each in gaps.values())
    assert 8.0 < sum(gaps["fifo"]) / len(gaps["fifo"]) < 12.0


def test_no_more_are_there_at_once_than_there_are_users():
    trace = with_closed(None, Closed(users=5, think=1.0), HORIZON, 1, ENGINES)
    outcome = run(trace)
    changes = [(time, 1) for time in outcome.arrived if time is not None]
    changes += [(time, -1) for time in outcome.finished if time is not None]
    count = most = 0
    for _, change in sorted(changes):
        count += change
        most = max(most, count)
    assert most == 5


def test_throughput_obeys_littles_law():
    load = Closed(users=8, think=20.0)
    trace = with_closed(None, load, 20_000.0, 1, ENGINES)
    outcome = run(trace, horizon=20_000.0)
    found = statistics_of(outcome)
    spent = [
        finished - arrived + job.think
        for arrived, finished, job in zip(outcome.arrived, outcome.finished, trace.jobs, strict=True)
        if arrived is not None and finished is not None
    ]
    assert found.per_hour / 3600.0 * sum(spent) / len(spent) == pytest.approx(8.0, rel=0.02)


@pytest.mark.parametrize("think", [0.0, 30.0])
def test_users_ask_until_the_end_even_if_none_ever_waits(think):
    trace = with_closed(None, Closed(users=3, think=think, models=1), HORIZON, 1, ENGINES)
    outcome = simulate(
        trace, load_policy("fifo", {}, Path()), CostMatrix(0.0), engine=EngineModel(slowdown=0.0), horizon=HORIZON
    )
    for chain in loops(trace):
        last = chain[-1]
        assert outcome.finished[last] is None or outcome.finished[last] + trace.jobs[last].think >= HORIZON


def test_the_same_seed_gives_the_same_requests_and_one_more_user_changes_no_other():
    def made(users, seed):
        return with_closed(None, Closed(users=users), HORIZON, seed, ENGINES).jobs

    assert made(4, 1) == made(4, 1)
    assert made(4, 1) != made(4, 2)
    assert made(5, 1)[: len(made(4, 1))] == made(4, 1)


def test_agents_alternate_between_models():
    def kept(stay):
        trace = with_closed(None, Closed(users=4, models=3, stay=stay), HORIZON, 1, ENGINES)
        pairs = [
            (trace.jobs[a].model, trace.jobs[b].model)
            for chain in loops(trace)
            for a, b in itertools.pairwise(chain)
        ]
        return sum(one == other for one, other in pairs) / len(pairs)

    assert kept(0.0) == 0.0
    assert 0.6 < kept(0.7) < 0.8
    assert kept(1.0) == 1.0


def test_beside_a_trace_they_ask_its_models_with_its_sizes():
    jobs = [Job(float(at), "ab"[at % 2], 100 + at % 2, 10 + at % 2) for at in range(40)]
    jobs.append(Job(40.0, "c", 7, 7))
    trace = with_closed(Trace("mine", jobs), Closed(users=2, models=2), 300.0, 1, ENGINES)
    assert trace.jobs[: len(jobs)] == jobs
    added = trace.jobs[len(jobs) :]
    assert {(job.model, job.prompt_tokens, job.output_tokens) for job in added} == {("a", 100, 10), ("b", 101, 11)}
    assert {job.model for job in with_closed(Trace("mine", jobs), Closed(), 900.0, 1, ENGINES).jobs} == set("abc")


def test_beside_a_record_they_take_as_long_as_its_answers():
    served = Job(0.0, "a", 0, 0, alone=2.0, first=0.5, patience=9.0)
    held = Job(1.0, "held", 0, 0, service=3.0)
    trace = with_closed(Trace("record", [served, held]), Closed(users=1, think=5.0), 100.0, 1, ENGINES)
    for job in trace.jobs[2:]:
        assert replace(job, successor=None, think=0.0, arrival=None) == replace(
            served, arrival=None, patience=None
        )


def test_a_mix_has_both():
    mix = with_closed(generate(Poisson(3, 0.2), HORIZON, 1), Closed(users=4), HORIZON, 1, ENGINES)
    outcome = run(mix)
    arrived = [time for time in outcome.arrived if time is not None]
    opened = sum(job.arrival is not None for job in mix.jobs)
    assert len(arrived) > opened > 350


def test_a_follower_of_what_lasts_as_long_as_it_did_comes_too():
    first = Job(0.0, "a", 0, 0, successor=1, think=5.0, service=2.0)
    outcome = run(Trace("", [first, Job(None, "a", 0, 0, service=2.0)]), horizon=None)
    assert outcome.arrived == [0.0, 7.0]
    assert outcome.finished == [2.0, 9.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user=3", "'user=3' is unknown; write users=8,think=20s,models=3,stay=0"),
        ("users=0", "users: must be a whole number > 0, not '0'"),
        ("users=1.5", "users: must be a whole number > 0"),
        ("think=soon", "think: 'soon' is not a duration"),
        ("think=-3", "think: "),
        ("models=x", "models: must be a whole number > 0, not 'x'"),
        ("stay=2", "stay: must be from 0 to 1, not '2'"),
        ("stay=nan", "stay: must be from 0 to 1"),
        ("8", "'8' is unknown"),
    ],
)
def test_slips(text, said):
    with pytest.raises(TraceError) as caught:
        parse_closed(text)
    assert f"--closed {text}: " in str(caught.value)
    assert said in str(caught.value)


def test_what_is_read():
    assert parse_closed("") == Closed()
    assert parse_closed("users=3,think=1m,models=2,stay=0.5") == Closed(3, 60.0, 2, 0.5)


def test_more_models_than_there_are():
    with pytest.raises(TraceError, match="models=3, but mine has only 1"):
        with_closed(Trace("mine", [Job(0.0, "a", 1, 1)]), Closed(models=3), 10.0, 1, ENGINES)


def test_endless_requests_are_refused(monkeypatch):
    monkeypatch.setattr(synthetic, "MOST", 10_000)
    trace = Trace("mine", [Job(0.0, "a", 0, 0, alone=0.0)])
    with pytest.raises(TraceError, match="more than 10,000 requests in 10 s"):
        with_closed(trace, Closed(think=0.0), 10.0, 1, ENGINES)


# ---- the command


def command(*words):
    return CliRunner().invoke(app, ["simulate", *map(str, words)])


def test_the_command_tells_answers_per_hour():
    words = ("--closed", "users=6,think=5s,models=3", "--horizon", "1200s", "--seed", 3)
    words = (*words, "-p", "fifo", "-p", "adaptive")
    found = json.loads(command(*words, "--json").stdout)["policies"]
    for each in found.values():
        assert each["per_hour"] == pytest.approx(each["completed"] * 3.0)
    assert found["adaptive"]["per_hour"] > 1.03 * found["fifo"]["per_hour"]
    table = command(*words).stdout
    assert "answered per hour" in table
    assert "answers per hour +" in " ".join(table.split())
    assert command(*words, "--json").stdout == command(*words, "--json").stdout


def test_the_command_mixes_them_with_any_traffic(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines(generate(Poisson(3, 0.5), 300.0, 1).jobs)))
    for words in (["--poisson", "models=2,rate=0.2", "--horizon", "300s"], [path], ["--closed", "users=2"]):
        done = command(*words, "--closed", "users=2,think=3s", "-p", "fifo", "--json")
        assert done.exit_code == 0, done.stderr
    alone = json.loads(command(path, "-p", "fifo", "--json").stdout)["policies"]["fifo"]["requests"]
    more = json.loads(command(path, "--closed", "users=2,think=3s", "-p", "fifo", "--json").stdout)
    assert more["policies"]["fifo"]["requests"] > alone


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--closed", "users=none"], "--closed users=none: users: must be a whole number > 0, not 'none'"),
        (["--poisson", "", "--onoff", "", "--closed", ""], "give a trace, or one of"),
        (["--poisson", "models=2", "--closed", "models=5"], "models=5, but poisson, seed 1 has only 2"),
    ],
)
def test_slips_on_the_command_line(words, said):
    done = command(*words)
    assert done.exit_code == 2
    assert said in done.stderr
