"""The dashboard and the alerts among the examples: what they ask Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from llmux.gateway.views import HELP as FLEET
from llmux.observability.metrics import Metrics
from tests.docs.pages import ROOT

FOLDER = ROOT / "examples" / "monitoring"
METRIC = re.compile(r"\b(?:llmux|process|python)_[a-z_]+\b")
# What Grafana puts in for its variables.
FILLED_IN = {"$instance": ".*", "$model": ".*", "$host": ".*", "$__rate_interval": "1m"}
BOARDS = ("dashboard", "fleet")  # of a host, of gateways


def dashboard(name: str = "dashboard") -> Any:
    return json.loads((FOLDER / "grafana" / f"{name}.json").read_text())


def alerts() -> list[Any]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return group["rules"]


def questions(*boards: str) -> Iterator[tuple[str, str]]:
    """Yield every expression of the dashboards, or some, as Prometheus gets it, with its panel's title."""
    for panel in (panel for name in boards or BOARDS for panel in dashboard(name)["panels"]):
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", filled_in(target["expr"])


def filled_in(expression: str) -> str:
    for variable, value in FILLED_IN.items():
        expression = re.sub(re.escape(variable) + r"\b", value, expression)
    assert "$" not in expression, expression
    return expression


def metrics() -> set[str]:
    """Return the names of all series that llmux has."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return set(FLEET) | {
        family.name + suffix
        for family in Metrics().registry.collect()
        for suffix in suffixes.get(family.type, ("",))
    }
