"""A real Prometheus scrapes a real llmux: every panel of the dashboard shows something, every alert is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import pytest
import yaml

from tests.docs.monitoring import FOLDER, alerts, questions
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="Prometheus is not installed; on Debian and Ubuntu: apt install prometheus",
)


class Prometheus:
    """One Prometheus, with the example's configuration but for its address and its pace."""

    def __init__(self, folder, llmux: int) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "100ms", "evaluation_interval": "100ms", "scrape_timeout": "100ms"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{llmux}"]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        shutil.copy(FOLDER / "alerts.yaml", folder)
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def get(self, path: str, **query: str) -> Any:
        """Return the answer's data; None as long as it is not there yet."""
        try:
            with urllib.request.urlopen(
                f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=PATIENCE
            ) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 503:
                    return None
                raise AssertionError(error.read().decode()) from None
        except OSError:
            return None
        assert found["status"] == "success"
        return found["data"]

    def ask(self, expression: str) -> list[Any]:
        data = self.get("/api/v1/query", query=expression)
        return [] if data is None else data["result"]


@pytest.fixture
def prometheus(lab, tmp_path):
    made = Prometheus(tmp_path, lab.port)
    yield made
    made.stop()


async def a_bad_day(lab) -> None:
    """Let everything happen that there is a panel for."""
    lab.script("c", "wake", "exit 1")
    assert [(await lab.chat(model)).status for model in ("a", "b", "a", "c", "nobody")] == [
        200,
        200,
        200,
        503,
        404,
    ]
    lab.crash("a")
    await lab.chat("a")
    line = await lab.begin("a", do={"hold": "for ever"})
    await lab.until_model("a", in_flight=1)
    await lab.chat("b")  # a's answer is cut: drain_timeout
    await line.close()


async def test_every_panel_shows_something_and_every_alert_can_be_asked(lab, prometheus):
    policy = {"use": "fifo", "shadow": ["idle"], "drain_timeout": "100ms"}
    lab.write({"a": {}, "b": {}, "c": {}}, policy=policy)
    lab.start()
    await lab.until(lambda: prometheus.ask("llmux_build_info"), every=0.05)
    await a_bad_day(lab)
    missing = dict(questions("dashboard"))  # that of a host; a fleet's metrics are compared by name only

    def all_seen() -> bool:
        for panel, expression in list(missing.items()):
            if prometheus.ask(expression):
                del missing[panel]
        return not missing

    try:
        await lab.until(all_seen, every=0.1)
    except AssertionError:
        raise AssertionError(f"panels that show nothing: {missing}") from None
    (group,) = await lab.until(lambda: rules_of(prometheus), every=0.05)
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in alerts()]
    assert {rule["name"]: rule["lastError"] for rule in group["rules"] if rule["health"] != "ok"} == {}


def rules_of(prometheus: Prometheus) -> list[Any]:
    """Return the groups of rules once all of them have been evaluated."""
    groups = (prometheus.get("/api/v1/rules") or {"groups": []})["groups"]
    return groups if all(rule["health"] != "unknown" for group in groups for rule in group["rules"]) else []
