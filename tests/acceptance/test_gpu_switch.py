"""The example of weights that leave the GPU and come back runs without a GPU, and leaves nothing running."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.engine.real import ROOT

RUN = ROOT / "examples" / "gpu-switch" / "run.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, RUN, "--json", *options], capture_output=True, text=True, timeout=60, check=False
    )


def test_weights_move_and_every_answer_comes_from_the_right_engine():
    done = run("--device", "cpu", "--size", "4MiB", "--switches", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] == 4 << 20
    assert found["switches"] >= 4
    assert found["answers"] > found["switches"]
    assert found["wrong"] == found["failed"] == 0
    assert 0 < found["to_host"] + found["to_device"] < found["cost"]
    left = subprocess.run(["pgrep", "-f", "gpu-switch/engine.py"], capture_output=True, text=True, check=False)
    assert left.stdout == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cpu", "--size", "4 horses"], "is not a size"),
        (["--device", "cuda:99", "--size", "4MiB"], "cuda:99"),
    ],
)
def test_what_cannot_be_is_said(options, said):
    done = run(*options)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
