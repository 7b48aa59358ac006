"""llmux as a user runs it: a process with a configuration file, real hooks and real engines."""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from examples.quickstart.tiny_gguf import Shape, cached
from tests.engine.real import (
    LLAMA_SERVER,
    ROOT,
    TINY,
    end_engines,
    runs,
    status_of,
    wait_until,
    with_tools,
)
from tests.harness.launcher import Running, launch
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE

LLMUX = Path(sys.executable).with_name("llmux")
HOOK = ROOT / "hooks" / "llama-cpp.sh"
ACTIONS = ("wake", "sleep", "alive", "verify", "stop")


@dataclass(frozen=True)
class Engine:
    """One model of the configuration: what it runs, and what else its section says."""

    shape: Shape = TINY
    args: str = ""
    settings: Mapping[str, Any] | None = None


class Mux:
    """One llmux and its engines, in a folder of their own."""

    def __init__(self, folder: Path, engines: Mapping[str, Engine], **settings: Any) -> None:
        self.folder = folder
        self.pids = folder / "pids"
        self.log = folder / "llmux.log"
        self.ports = {name: free_port() for name in engines}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = {
            "port": self.port,
            "state": "state.json",
            "on_exit": "sleep",
            "models": {name: self.section(name, engine) for name, engine in engines.items()},
            **settings,
        }
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config, sort_keys=False))
        self.process: Running | None = None

    @classmethod
    def on(cls, config: Path, port: int) -> Mux:
        """Return llmux on a configuration that is written by somebody else, with PID_DIR in the environment."""
        mux = cls.__new__(cls)
        mux.folder, mux.config, mux.port = config.parent, config, port
        mux.pids, mux.log = Path(os.environ["PID_DIR"]), config.parent / "llmux.log"
        mux.url = f"http://127.0.0.1:{port}"
        mux.ports, mux.process = {}, None
        return mux

    def section(self, name: str, engine: Engine) -> dict[str, Any]:
        env = {
            "MODEL": str(cached(engine.shape)),
            "LLAMA_SERVER": LLAMA_SERVER,
            "PID_DIR": str(self.pids),
            "ARGS": engine.args,
        }
        hooks = {action: f"'{HOOK}' {action}" for action in ACTIONS}
        return {"port": self.ports[name], "env": env, **hooks, **(engine.settings or {})}

    def start(self) -> None:
        """Start llmux and wait until it is ready."""
        with self.log.open("ab") as log:
            self.process = launch(["-c", self.config], log=log.fileno(), env=with_tools())
        wait_until(self.is_ready, what=f"/ready; llmux says:\n{self.said()}\n")

    def is_ready(self) -> bool:
        """Say whether llmux takes requests; fail when it has ended."""
        assert self.process is not None
        assert self.process.poll() is None, f"llmux ended:\n{self.said()}"
        return status_of(f"{self.url}/ready") == 200

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop llmux and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def clean_up(self) -> None:
        """Leave nothing behind, whatever the test did."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        end_engines(self.pids)

    def said(self) -> str:
        """What llmux has logged."""
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> Any:
        """Return the JSON that a path answers."""
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as response:
            return json.load(response)

    def status(self) -> dict[str, Any]:
        """Return /llmux/status."""
        status: dict[str, Any] = self.get("/llmux/status")
        return status

    def phase(self, model: str) -> str:
        """Return the phase of a model."""
        phase: str = self.status()["models"][model]["phase"]
        return phase

    def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Return the labels and values of a metric."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE) as response:
            text = response.read().decode()
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]

    def engine_pids(self) -> list[int]:
        """Return the processes of the engines that run."""
        pids = [int(file.read_text().split()[0]) for file in self.pids.glob("*.pid")]
        return [pid for pid in pids if runs(pid)]

    def idle(self) -> bool:
        """Say whether nobody waits and nothing is in flight or switching."""
        status = self.status()
        models = status["models"].values()
        return status["switch"] is None and not any(model["queued"] + model["in_flight"] for model in models)
