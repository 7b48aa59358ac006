import json

import pytest
from typer.testing import CliRunner

from llmux.cli import app
from llmux.cli.simulate_what_if import Change, parse_change
from llmux.estimates.costs import SwitchCosts
from llmux.observability.state_file import dump_costs
from llmux.simulator import Job, TraceError
from llmux.simulator.synthetic import Poisson, generate
from tests.simulator.traces import lines

CONFIG = """
state: state.json
capacity: 20GiB
policy: {use: idle}
models:
  qwen-2.5: {port: 8001, wake: "true", sleep: "true", alive: "true", memory: 14GiB, aliases: [q]}
  llama: {port: 8002, wake: "true", sleep: "true", alive: "true", memory: 8GiB}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def simulate(*words):
    return CliRunner().invoke(app, ["simulate", *map(str, words)])


LOAD = ("--poisson", "models=2,rate=0.2", "--horizon", "1200s", "--config", "config.yaml")


def test_the_configuration_and_its_policy_beside_the_usual():
    found = json.loads(simulate(*LOAD, "--json").stdout)["policies"]
    assert list(found) == ["idle", "fifo", "adaptive"]
    told = simulate(*LOAD).stdout
    assert "config.yaml: capacity 20GiB; costs: --cost 10s" in told
    assert "models awake" in told


def test_more_memory_in_a_column_of_its_own_with_a_verdict():
    done = simulate(*LOAD, "--what-if", "capacity=24GiB", "--what-if", "cost=÷4", "--json")
    found = json.loads(done.stdout)
    assert list(found["policies"]) == ["idle"]
    roomy, cheap = found["what_if"]
    assert (roomy["policy"], roomy["change"], cheap["change"]) == ("idle", "capacity=24GiB", "cost=÷4")
    plain = found["policies"]["idle"]
    assert roomy["switches"] == 2
    assert roomy["awake"] > 1.9 > plain["awake"]
    assert roomy["mean_wait"] < 0.2 * plain["mean_wait"]
    assert cheap["mean_wait"] < 0.5 * plain["mean_wait"]
    assert roomy["verdict"].endswith("2 switches instead of " + str(plain["switches"]) + ". It helps.")
    table = " ".join(simulate(*LOAD, "--what-if", "capacity=24GiB").stdout.split())
    assert roomy["verdict"] in table
    assert "Use " not in table


def test_a_change_for_the_worse_and_one_that_does_nothing():
    found = json.loads(simulate(*LOAD, "--what-if", "cost=*3", "--what-if", "capacity=21GiB", "--json").stdout)
    worse, same = (each["verdict"] for each in found["what_if"])
    assert worse.endswith("It does harm.")
    assert same.endswith("It makes no difference to speak of.")


def test_what_chance_could_do_is_not_called_a_gain():
    words = ("--poisson", "models=2,rate=0.01", "--horizon", "1200s", "--config", "config.yaml")
    found = json.loads(simulate(*words, "--what-if", "cost=/2", "--json").stdout)
    assert "too short, or too uneven, to say" in found["what_if"][0]["verdict"]


def test_a_policy_of_the_configuration_may_be_the_change():
    words = ("--what-if", "policy.use=fifo", "--what-if", "policy.use=adaptive,policy.options={patience: 9}")
    found = json.loads(simulate(*LOAD, *words, "--json").stdout)["what_if"]
    fifo = json.loads(simulate(*LOAD, "-p", "fifo", "--json").stdout)["policies"]["fifo"]
    assert found[0]["mean_wait"] == fifo["mean_wait"]
    assert found[1]["mean_wait"] != fifo["mean_wait"]


def test_each_policy_gets_each_change():
    found = json.loads(simulate(*LOAD, "-p", "fifo", "-p", "idle", "--what-if", "cost=/2", "--json").stdout)
    assert list(found["policies"]) == ["fifo", "idle"]
    assert [each["policy"] for each in found["what_if"]] == ["fifo", "idle"]
    assert "fifo, cost=/2" in " ".join(
        simulate(*LOAD, "-p", "fifo", "-p", "idle", "--what-if", "cost=/2").stdout.split()
    )


def test_dearer_and_cheaper_switches_need_no_configuration():
    words = ("--poisson", "models=3,rate=0.3", "--horizon", "900s", "--json")
    found = json.loads(simulate(*words, "--what-if", "cost=÷2").stdout)
    cheap = json.loads(simulate(*words, "--cost", "5s", "-p", "adaptive").stdout)["policies"]["adaptive"]
    assert list(found["policies"]) == ["adaptive"]
    assert found["what_if"][0]["mean_wait"] == cheap["mean_wait"]


def test_what_switches_took_is_known_from_the_state_file(folder):
    costs = SwitchCosts()
    costs.record(["qwen-2.5"], "llama", 3.0)
    costs.record(["llama"], "qwen-2.5", 5.0)
    (folder / "state.json").write_text(json.dumps({"version": 1, "costs": dump_costs(costs)}))
    told = simulate(*LOAD).stdout
    assert "costs: measured," in told
    measured = json.loads(simulate(*LOAD, "-p", "idle", "--json").stdout)["policies"]["idle"]
    given = json.loads(simulate(*LOAD, "-p", "idle", "--cost", "30s", "--json").stdout)["policies"]["idle"]
    assert measured["mean_wait"] < 0.5 * given["mean_wait"]


def test_a_trace_may_use_aliases(folder):
    jobs = [Job(0.0, "q", 1, 1), Job(1.0, "llama", 1, 1), Job(2.0, "qwen-2.5", 1, 1)]
    (folder / "trace.csv").write_text("\n".join(lines(jobs)))
    done = simulate("trace.csv", "--config", "config.yaml", "-p", "fifo", "--json")
    assert json.loads(done.stdout)["policies"]["fifo"]["completed"] == 3


def test_options_that_a_configuration_has_too():
    plain = json.loads(simulate(*LOAD, "-p", "idle", "--cost", "40s", "--json").stdout)["policies"]["idle"]
    bound = json.loads(simulate(*LOAD, "-p", "idle", "--cost", "40s", "--max-wait", "20s", "--json").stdout)[
        "policies"
    ]["idle"]
    assert bound["mean_wait"] != plain["mean_wait"]
    assert simulate(*LOAD, "--anticipate", "--json").exit_code == 0


def test_users_ask_the_models_of_the_configuration():
    done = simulate("--closed", "users=3", "--config", "config.yaml", "--horizon", "300s", "--json")
    assert done.exit_code == 0, done.stderr
    beside = simulate("--closed", "users=3", *LOAD, "--json")
    assert beside.exit_code == 0, beside.stderr


def test_the_picture_has_a_line_for_each_model(folder):
    pytest.importorskip("matplotlib")
    done = simulate(*LOAD, "--what-if", "capacity=24GiB", "--plot", "what.png")
    assert done.exit_code == 0, done.output
    assert (folder / "what.png").read_bytes()[:4] == b"\x89PNG"


def test_what_does_not_count_is_said(folder):
    models = CONFIG.replace("memory: 8GiB", 'memory: 8GiB, prefetch: "true", timeouts: {wake: 5s}')
    (folder / "config.yaml").write_text(models.replace("{use: idle}", "{use: idle, request_timeout: 5m}"))
    told = " ".join(simulate(*LOAD).stdout.split())
    assert "what the prefetch of llama saves is not known" in told
    assert "request_timeout does not count here" in told
    assert "requests were rejected, as their models could not be woken in time" in told
    (folder / "config.yaml").write_text(CONFIG.replace("{use: idle}", "{use: fifo, drain_timeout: 0}"))
    assert "answers were cut by drain_timeout" in " ".join(simulate(*LOAD).stdout.split())


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("capacity=32GiB", Change("capacity=32GiB", {"capacity": "32GiB"})),
        ("cost=/4", Change("cost=/4", {}, 0.25)),
        ("cost= ÷ 4", Change("cost= ÷ 4", {}, 0.25)),
        ("cost=*1.5", Change("cost=*1.5", {}, 1.5)),
        ("cost=\u00d72", Change("cost=\u00d72", {}, 2.0)),
        ("a.b=[1, 2],cost=/2", Change("a.b=[1, 2],cost=/2", {"a.b": [1, 2]}, 0.5)),
        ("a={x: 1, y: 2}", Change("a={x: 1, y: 2}", {"a": {"x": 1, "y": 2}})),
        ("a='{", Change("a='{", {"a": "'{"})),
    ],
)
def test_changes(text, change):
    assert parse_change(text) == change


@pytest.mark.parametrize(
    "name", ["a=b", "a,b=c", "a=1,b.c=2", "a.b", 'a["(', "org/a:8b", "größe, =", "a=b.memory=c"]
)
def test_a_model_s_name_is_whatever_it_is(folder, name):
    for text in (f"models.{name}.memory=5GiB,cost=/2", f"cost=/2,models.{name}.memory=5GiB"):
        change = parse_change(text, ["a", "llama", name])
        assert change == Change(text, {f"models.{name}.memory": "5GiB"}, 0.5)
    (folder / "config.yaml").write_text(CONFIG.replace("qwen-2.5", json.dumps(name)))
    done = simulate(*LOAD, "--what-if", f"models.{name}.memory=5GiB,models.llama.memory=6GiB", "--json")
    assert json.loads(done.stdout)["what_if"][0]["awake"] > 1.9


@pytest.mark.parametrize("text", ["capacity", "=3", "capacity=", "cost=3", "cost=/0", "cost=÷x", ""])
def test_changes_that_are_none(text):
    with pytest.raises(TraceError, match="--what-if"):
        parse_change(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "none.yaml"], "none.yaml: there is no such file"),
        (
            ["--what-if", "capacity=32GiB"],
            "capacity is a setting of a configuration; name that, too: --config FILE",
        ),
        (["--config", "config.yaml", "--what-if", "capcity=1GiB"], "capcity: unknown setting; did you mean"),
        (
            ["--config", "config.yaml", "--what-if", "capacity=1GiB"],
            "14GiB does not fit into the capacity of 1GiB",
        ),
        (["--config", "config.yaml", "--what-if", "capacity=lots"], "'lots' is not a size"),
        (["--config", "config.yaml", "--what-if", "models.q.memory=1GiB"], "names no setting of a model"),
        (["--config", "config.yaml", "--what-if", "policy.use=idel"], "did you mean idle?"),
    ],
)
def test_slips(words, said):
    done = simulate("--poisson", "models=2", "--horizon", "60s", *words)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_models_that_the_configuration_does_not_have(folder):
    (folder / "trace.csv").write_text("\n".join(lines(generate(Poisson(3, 1.0), 60.0, 1).jobs)))
    done = simulate("trace.csv", "--config", "config.yaml")
    assert "asks for 'm0', 'm1', 'm2', which the configuration does not have" in " ".join(done.stderr.split())
    many = simulate("--poisson", "models=5", "--config", "config.yaml")
    assert "asks for 5 models, the configuration has 2; write models=2" in " ".join(many.stderr.split())
    users = simulate("--closed", "models=3", "--config", "config.yaml")
    assert "models=3, but the configuration has only 2" in " ".join(users.stderr.split())
    dotted = simulate(*LOAD, "--what-if", "models.qwen-2.5.memory=5GiB", "--json")
    assert json.loads(dotted.stdout)["what_if"][0]["awake"] > 1.9
