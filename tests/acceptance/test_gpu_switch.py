"""The example of weights that leave the GPU and come back runs without a GPU, and leaves nothing running."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest

from tests.engine.real import ROOT
from tests.harness.waiting import PATIENCE, processes_with

RUN = ROOT / "examples" / "gpu-switch" / "run.py"


def run(*options: str, mark: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, RUN, "--json", *options]
    env = {**os.environ, "MARK": mark}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=4 * PATIENCE, check=False)


def test_weights_move_and_every_answer_comes_from_the_right_engine(tmp_path):
    done = run("--device", "cpu", "--size", "1MiB", "--switches", "4", mark=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] == 1 << 20
    assert found["switches"] >= 4
    assert found["answers"] > found["switches"]
    assert found["wrong"] == found["failed"] == 0
    assert 0 < found["to_host"] + found["to_device"] < found["cost"]
    assert processes_with(f"MARK={tmp_path}") == {}


def test_what_cannot_be_is_said(monkeypatch):
    """In this process: what it says is the message with which it exits."""
    main = runpy.run_path(str(RUN))["main"]
    for options, said in (
        (["--device", "cpu", "--size", "4 horses"], "is not a size"),
        (["--device", "cuda:99", "--size", "4MiB"], "cuda:99"),
    ):
        monkeypatch.setattr(sys, "argv", [str(RUN), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert said in ended.value.code
        assert "Traceback" not in ended.value.code


@pytest.mark.parametrize(("device", "needed"), [("cpu", "torch or numpy"), ("cuda", "torch")])
def test_what_a_device_needs_is_said_where_it_is_not_installed(device, needed, monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    for module in ("torch", "numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    main = runpy.run_path(str(RUN.with_name("engine.py")))["main"]
    monkeypatch.setattr(sys, "argv", ["engine.py", "probe", "0", "--bandwidth", "--device", device])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code.startswith(f"--device {device} needs {needed}: ")
