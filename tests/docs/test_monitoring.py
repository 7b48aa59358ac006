"""Prometheus takes the alerts, they fire when they should, and all that is asked for exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from llmux.core.phases import Phase
from llmux.observability.metrics import HELP
from tests.docs.monitoring import BOARDS, FILLED_IN, FLEET, FOLDER, METRIC, alerts, dashboard, metrics, questions


def promtool(*arguments: str | Path) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed; on Debian and Ubuntu: apt install prometheus")
    done = subprocess.run(
        ["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_alerts():
    assert f"{len(alerts())} rules found" in promtool("check", "rules", "alerts.yaml")


def test_the_alerts_fire_when_they_should():
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yaml")


def test_every_alert_is_seen_to_fire_and_not_to_fire():
    checks = [
        check
        for test in yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
        for check in test["alert_rule_test"]
    ]
    names = {rule["alert"] for rule in alerts()}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == names
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == names


def test_prometheus_takes_its_configuration():
    assert "SUCCESS" in promtool("check", "config", "prometheus.yaml")


def test_prometheus_takes_every_expression_of_the_dashboard(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": expression} for number, (_, expression) in enumerate(questions())
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", tmp_path / "rules.yaml")


def test_every_metric_that_is_asked_for_exists():
    asked = {name for _, expression in questions() for name in METRIC.findall(expression)}
    for rule in alerts():
        asked |= set(METRIC.findall(rule["expr"]))
    variables = [variable for name in BOARDS for variable in dashboard(name)["templating"]["list"]]
    asked |= {name for variable in variables for name in METRIC.findall(str(variable))}
    assert asked - metrics() == set()
    assert len(asked) > len(HELP) / 2
    assert set(FLEET) - asked == set()


@pytest.mark.parametrize("name", BOARDS)
def test_the_dashboard_is_one_that_grafana_takes(name):
    board = dashboard(name)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    known = {f"${variable['name']}" for variable in board["templating"]["list"]} | {*FILLED_IN, "$__all"}
    text = (FOLDER / "grafana" / f"{name}.json").read_text()
    assert {f"${name}" for name in re.findall(r"\$\{?(\w+)\b", text)} <= known
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["description"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_the_phases_of_the_dashboard_are_those_of_the_core():
    (panel,) = [panel for panel in dashboard()["panels"] if panel["type"] == "state-timeline"]
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    shown = {text["text"]: number for number, text in mapping["options"].items()}
    asked = dict(re.findall(r'phase="(\w+)"} \* (\d+)', panel["targets"][0]["expr"]))
    assert asked == shown
    assert asked.keys() == set(Phase)
