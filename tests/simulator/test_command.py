import json

import pytest
from typer.testing import CliRunner

from llmux.cli import app
from llmux.simulator import Job
from llmux.simulator.synthetic import Poisson, generate
from tests.simulator.traces import lines

KEYS = {
    "mean_wait", "p50_wait", "p95_wait", "p99_wait", "max_wait", "mean_ttft", "p99_ttft", "switching", "draining",
    "switches", "completed", "requests",
}  # fmt: skip


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines(generate(Poisson(3, 2.0), 100.0, 1).jobs)))
    return str(path)


def simulate(*words):
    return CliRunner().invoke(app, ["simulate", *map(str, words)])


def test_json(trace):
    done = simulate(
        trace, "--policy", "fifo", "--policy", "idle", "--policy", "adaptive", "--cost", "10s", "--slots", 16,
        "--decode", 60, "--prefill", 6000, "--slowdown", 0.03, "--stretch", 8, "--horizon", "700s", "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert list(found) == ["policies"]
    assert list(found["policies"]) == ["fifo", "idle", "adaptive"]
    assert all(set(each) >= KEYS for each in found["policies"].values())
    assert found["policies"]["fifo"]["requests"] > 100


def test_the_same_again(trace):
    words = (trace, "--policy", "adaptive", "--json")
    assert simulate(*words).stdout == simulate(*words).stdout


def test_options_of_a_policy(trace):
    words = (trace, "-p", "exhaustive:staleness=5,route=longest", "-p", "exhaustive", "--stretch", 4, "--json")
    found = json.loads(simulate(*words).stdout)["policies"]
    assert list(found) == ["exhaustive:staleness=5,route=longest", "exhaustive"]
    assert found["exhaustive"] != found["exhaustive:staleness=5,route=longest"]


def test_a_policy_of_ones_own(trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from llmux.core.policy import SwitchTo\n"
        "class Mine:\n"
        "    def decide(self, now):\n"
        "        return SwitchTo(now.waiting[-1])\n"
    )
    assert list(json.loads(simulate(trace, "-p", "./mine.py:Mine", "--json").stdout)["policies"]) == [
        "./mine.py:Mine"
    ]


def test_a_table_and_advice(trace):
    done = simulate(trace, "--stretch", 4)
    assert done.exit_code == 0
    assert "p99" in done.stdout
    assert "Use " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_equal_columns_are_named(trace):
    one_model = simulate(
        "--poisson=models=1,rate=0.1", "--horizon", "300s", "-p", "fifo", "-p", "idle", "-p", "adaptive"
    )
    assert "fifo, idle and adaptive: no difference\n" in one_model.stdout
    assert (
        simulate(trace, "-p", "exhaustive:staleness=5", "-p", "exhaustive:staleness=5.0").stdout.count(
            ": no difference\n"
        )
        == 1
    )
    different = simulate(trace, "-p", "fifo", "-p", "idle", "--stretch", 4)
    assert different.exit_code == 0, different.stderr
    assert "no difference" not in different.stdout


def test_the_objective_is_said(trace):
    assert "SLO: the first token within 30 s of the request's arrival" in simulate(trace, "-p", "fifo").stdout
    assert "SLO: the first token within 90 s " in simulate(trace, "-p", "fifo", "--slo", "1.5m").stdout


@pytest.mark.parametrize("load", ["--poisson=models=2", "--onoff=", "--agents=agents=2"])
def test_generated_traffic(load):
    assert simulate(load, "--horizon", "300s", "-p", "fifo", "--json").exit_code == 0


def test_a_picture(trace, tmp_path):
    pytest.importorskip("matplotlib")
    done = simulate(trace, "--stretch", 4, "--plot", tmp_path / "waits.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "waits.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_that_cannot_be_written(trace, tmp_path):
    pytest.importorskip("matplotlib")
    assert simulate(trace, "--plot", tmp_path / "no" / "waits.png").exit_code == 2
    assert simulate(trace, "--plot", tmp_path / "waits.nonsense").exit_code == 2


def test_wrong_estimates(trace):
    words = (trace, "--stretch", 8, "-p", "adaptive", "--json")
    assert simulate(*words).stdout != simulate(*words, "--misjudge", 3).stdout
    assert simulate(*words).stdout == simulate(*words, "--misjudge", 1).stdout


def test_parts_of_a_trace(trace):
    def requests(*words):
        return json.loads(simulate(trace, "-p", "fifo", "--json", *words).stdout)["policies"]["fifo"]["requests"]

    everything = requests()
    assert requests("--start", "50s") < everything
    assert requests("--top", 1) < everything


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("\n".join([*lines([Job(0.0, "a", 1, 1)]), "x,a,1,1"]))
    done = simulate(path)
    assert done.exit_code == 2
    assert "bad.csv:3: arrival_s is not a number: 'x'" in done.stderr


def test_the_hundredth_line_is_called_100(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("\n".join([*lines([Job(0.0, "a", 1, 1)] * 98), "x,a,1,1"]))
    assert "bad.csv:100: arrival_s is not a number: 'x'" in simulate(path).stderr


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "raise ValueError('ill')",
            "warning: ./mine.py raised ValueError: ill; treated as first come, first served",
        ),
        ("raise SystemExit(3)", "warning: ./mine.py raised SystemExit: 3; treated as"),
        ("return 5", "warning: ./mine.py answered 5, which is not a decision; treated as"),
    ],
)
def test_a_policy_that_is_overruled_is_told_once(trace, tmp_path, monkeypatch, body, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"class Mine:\n    def decide(self, now):\n        {body}\n")
    done = simulate(trace, "-p", "./mine.py", "-p", "fifo", "--json")
    assert (done.exit_code, done.stderr.count("warning")) == (0, 1)
    assert said in done.stderr
    assert list(json.loads(done.stdout)["policies"]) == ["./mine.py", "fifo"]


def test_the_name_of_a_policy_is_shown_as_it_is(trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[b].py").write_text("class A:\n    def decide(self, now):\n        return None\n")
    assert "./a[b].py:A" in simulate(trace, "-p", "./a[b].py:A").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a trace, or one of"),
        (["--poisson", "", "--onoff", ""], "give a trace, or one of"),
        (["--poisson", "", "-p", "fifp"], "did you mean fifo?"),
        (["--poisson", "", "-p", "exhaustive:route=sideways"], "policy.options.route"),
        (["--poisson", "", "-p", "exhaustive:=3"], "is not KEY=VALUE"),
        (["--poisson", "", "--cost", "cheap"], "--cost"),
        (["--poisson", "", "--cost", "x" * 256], "is not a duration"),
        (["--poisson", "", "--engine", f"{'x' * 256}:slots=2"], "the traffic has no model"),
        (["--poisson", "", "--horizon", "later"], "is not a duration"),
        (["--poisson", "", "--stretch", "0"], "greater than 0"),
        (["--poisson", "", "--slowdown", "inf"], "0 or greater"),
        (["--poisson", "", "-p", "./x.py:A:limit=1"], "policy.use: ./x.py:A: there is no file"),  # :A: is an emoji
    ],
)
def test_mistakes_on_the_command_line(words, said):
    done = simulate(*words)
    assert done.exit_code == 2
    assert said in done.stderr
