"""``llmux simulate --budget --fair``: waits, switches and money of each key, before that is set and after."""

import json
import random
import re

import pytest
from typer.testing import CliRunner

from llmux.cli import app
from llmux.simulator.trace import read_trace

CONFIG = """
state: null
ledger: l.db
prices: {currency: eur, gpu_hour: 3600, models: {b: {input: 1000, output: 2000}}}
api_keys:
  - {name: ci, key: k1, budget: {eur: 9, per: day}}
  - {name: alice, key: k2}
models:
  a: {port: 8001, wake: "true", sleep: "true", alive: "true"}
  b: {port: 8002, wake: "true", sleep: "true", alive: "true"}
"""
MODELS = "ab"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A trace of three keys, one of which asks three times as often."""
    monkeypatch.chdir(tmp_path)
    roll, time, lines = random.Random(1), 0.0, ["arrival_s,model,prompt_tokens,output_tokens,key"]
    for _ in range(300):
        time += roll.expovariate(0.3)
        key = roll.choice(["alice", "bob", "ci", "ci", "ci"])
        lines.append(f"{time:.3f},{roll.choice(MODELS)},500,200,{key}")
    (tmp_path / "trace.csv").write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def simulate(*words):
    return CliRunner().invoke(app, ["simulate", *words])


def keys_of(*words):
    done = simulate("trace.csv", *words, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    before, after = document["keys"].values()
    return before, after, document


def total(figures, name):
    return sum(each[name] for each in figures.values())


def test_a_budget_for_one_key():
    before, after, document = keys_of("--budget", "ci=0.1/day", "--gpu-hour", "0.9")
    assert (document["policy"], document["currency"]) == ("adaptive", "usd")
    assert list(document["keys"]) == ["as it is", "with --budget ci=0.1/day"]
    assert list(before) == ["alice", "bob", "ci", "(house)"]
    assert total(before, "refused") == 0
    assert [after[name]["refused"] for name in ("alice", "bob")] == [0, 0]
    assert 0 < after["ci"]["refused"] < after["ci"]["requests"] == before["ci"]["requests"]
    assert before["ci"]["cost_micros"] > 100_000
    assert 90_000 < after["ci"]["cost_micros"] < 115_000  # its last request may cost more than was left
    assert after["ci"]["switches"] < before["ci"]["switches"]
    for found in (before, after):  # what all pay is the time that the GPU was held
        seconds = total(found, "gpu_seconds") + total(found, "switch_seconds")
        assert total(found, "cost_micros") == pytest.approx(seconds * 0.9 / 3600 * 1e6, abs=len(found) * 300)


def test_for_each_key_and_only_what_is_awake():
    _, after, _ = keys_of("--budget", "*=0.02/day,soft=0.5,then=awake_only", "--gpu-hour", "0.9", "-p", "fifo")
    assert all(after[name]["refused"] for name in ("alice", "bob", "ci"))
    assert all(after[name]["cost_micros"] < 25_000 for name in ("alice", "bob", "ci"))


def test_the_budgets_of_a_configuration():
    before, after, document = keys_of("--budget", "config", "-c", "config.yaml")
    assert document["currency"] == "eur"
    assert after["ci"]["refused"] > 0
    assert after["alice"]["refused"] == after["bob"]["refused"] == 0
    assert 9e6 <= after["ci"]["cost_micros"] < 30e6 < before["ci"]["cost_micros"]


def test_fair_keys_do_not_wait_for_a_flood(folder):
    """By weight, too."""
    roll, lines = random.Random(2), (folder / "trace.csv").read_text().splitlines()
    lines += [f"{300 + number / 5},{roll.choice(MODELS)},2000,300,flood" for number in range(500)]
    (folder / "trace.csv").write_text("\n".join(lines))
    before, after, document = keys_of("--fair", "key", "--slots", "4")
    assert list(document["keys"]) == ["as it is", "with --fair key"]
    assert document["currency"] == ""
    for name in ("alice", "bob", "ci"):
        assert after[name]["mean_wait"] < 0.5 * before[name]["mean_wait"]
    assert after["flood"]["mean_wait"] > before["flood"]["mean_wait"]
    assert total(after, "refused") == 0
    assert all(each["cost_micros"] is None for each in after.values())
    _, weighed, _ = keys_of("--fair", "key,flood=50,output=1,switch_second=0", "--slots", "4")
    assert weighed["flood"]["mean_wait"] < 0.8 * after["flood"]["mean_wait"]


def test_small_amounts_are_seen():
    told = simulate("trace.csv", "--budget", "ci=0.001/day", "--gpu-hour", "0.009").stdout
    assert re.search(r" 0\.00\d[1-9] ", told)


def test_both_at_once():
    _, after, document = keys_of("--budget", "ci=0.1/day", "--fair", "key", "--gpu-hour", "0.9")
    assert list(document["keys"])[1] == "with --budget ci=0.1/day --fair key"
    assert after["ci"]["refused"] > 0


def test_people_read_a_table():
    told = simulate("trace.csv", "--budget", "ci=0.1/day", "--gpu-hour", "0.9").stdout
    assert "GPU" in simulate("trace.csv", "--fair", "key").stdout
    assert told.startswith("trace.csv:\n")
    for word in ("adaptive, as it is", "adaptive, with --budget ci=0.1/day", "alice", "(house)", "usd", "refused"):
        assert word in told
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu-hour", "1"], "--gpu-hour is about keys; add --budget"),
        *(
            (["--budget", "ci=1/day", "--gpu-hour", amount], "--gpu-hour: must be an amount from 0 on, as 0.90")
            for amount in ("-1", "nan", "inf")
        ),
        (["--budget", "ci=1/day"], "--budget: the price is not known; add --gpu-hour 0.90"),
        (["--budget", "eve=1/day", "--gpu-hour", "1"], "no request is by 'eve'; there are alice, bob, ci"),
        (["--budget", "ci", "--gpu-hour", "1"], "write KEY=AMOUNT/month or /day"),
        (["--budget", "ci=1/week", "--gpu-hour", "1"], "write KEY=AMOUNT/month or /day"),
        (["--budget", "ci=x/day", "--gpu-hour", "1"], "write KEY=AMOUNT/month or /day"),
        (["--budget", "ci=1/day,hard=1", "--gpu-hour", "1"], "write KEY=AMOUNT/month or /day"),
        (["--budget", "ci=1/day,soft=2", "--gpu-hour", "1"], "write KEY=AMOUNT/month or /day"),
        (["--budget", "config", "--gpu-hour", "1"], "--budget config: add --config, whose keys are meant"),
        (["--fair", "model"], "--fair model: write key, and perhaps weights above 0 of alice, bob, ci"),
        (["--fair", "key,eve=2"], "--fair key,eve=2: write key"),
        (["--fair", "key,ci=0"], "--fair key,ci=0: write key"),
        (["--fair", "key,ci=x"], "--fair key,ci=x: write key"),
        (["--fair", "key", "--what-if", "cost=÷2"], "--what-if cannot be combined with --fair key"),
        (["--budget", "ci=1", "--gpu-hour", "1", "-p", "fifo", "-p", "idle"], "give --policy once"),
        (["--budget", "ci=1", "--gpu-hour", "1", "--what-if", "cost=÷2"], "--what-if cannot be combined"),
    ],
)
def test_what_is_refused(words, said):
    done = simulate("trace.csv", *words)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_a_trace_without_keys(folder):
    text = (folder / "trace.csv").read_text().splitlines()
    (folder / "trace.csv").write_text("\n".join(line.rpartition(",")[0] for line in text))
    assert {job.key for job in read_trace(folder / "trace.csv").jobs} == {""}
    done = simulate("trace.csv", "--budget", "*=1", "--gpu-hour", "1")
    assert "says of no request which key sent it" in " ".join(done.output.split())
