import json

import pytest

from llmux.estimates.costs import SwitchCosts
from llmux.observability.state_file import dump_costs
from llmux.simulator import CostMatrix, TraceError
from llmux.simulator.cost_matrix import parse_costs


def written(tmp_path, text, name="costs.yaml"):
    (tmp_path / name).write_text(text)
    return parse_costs(str(tmp_path / name))


def test_one_duration_for_all():
    assert parse_costs("1m30s").of("a", "b") == 90.0


def test_a_mapping_of_mappings(tmp_path):
    costs = written(tmp_path, "a: {b: 2s}\nb: {a: 500ms}\ndefault: 10s\n")
    assert (costs.of("a", "b"), costs.of("b", "a"), costs.of("a", "c")) == (2.0, 0.5, 10.0)


def test_halves(tmp_path):
    costs = written(tmp_path, "sleep: {a: 1s, b: 2s}\nwake: {a: 10, b: 20}\n")
    assert (costs.of("a", "b"), costs.of("b", "a")) == (21.0, 12.0)


def test_a_grid(tmp_path):
    costs = written(tmp_path, "models: [a, b]\ncosts: [[0, 5s], [9s, 0]]\n")
    assert (costs.of("a", "b"), costs.of("b", "a")) == (5.0, 9.0)


def test_rows_as_the_status_has_them(tmp_path):
    rows = [{"from": "a", "to": "b", "seconds": 3.5, "samples": 2}, {"from": None, "to": "a", "seconds": 1}]
    costs = written(tmp_path, json.dumps(rows), "status.json")
    assert costs.pairs == {("a", "b"): 3.5}


def test_the_state_file(tmp_path):
    measured = SwitchCosts()
    measured.record(["a"], "b", 4.0)
    measured.record_sleep("b", 1.0)
    measured.record_wake("a", 2.0)
    state = {"version": 1, "holders": [], "last_use": {}, "costs": dump_costs(measured)}
    costs = written(tmp_path, json.dumps(state), "state.json")
    assert (costs.of("a", "b"), costs.of("b", "a"), costs.of("c", "a")) == (4.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "needs from, to and seconds"),
        ("hello", "has no costs"),
        ("a: 3s", "a: must be a mapping"),
        ("a: {b: soon}", "a.b: "),
        ("sleep: 3\nwake: {}", "sleep: must be a mapping"),
        ("models: [a]\ncosts: [[0, 1]]", "one row and one column"),
        ("{version: 1, costs: 3}", "without usable costs"),
        ("a: [", "costs.yaml"),
        ("a: " + "[" * 10_000, "costs.yaml"),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path, text, words):
    with pytest.raises(TraceError, match=words):
        written(tmp_path, text)


def test_no_file_and_no_duration():
    with pytest.raises(TraceError, match="No such file"):
        parse_costs("nowhere.yaml")
    with pytest.raises(TraceError, match="--cost"):
        parse_costs("soon")


def test_a_direction_without_a_cost():
    with pytest.raises(TraceError, match="from 'a' to 'b'"):
        CostMatrix().check(["a", "b"])
