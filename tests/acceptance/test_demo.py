"""The demo does what the README promises, ends by itself and leaves nothing behind, however it ends."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.engine.real import ROOT, wait_until, with_tools
from tests.harness.waiting import PATIENCE, processes_with

DEMO = ROOT / "examples" / "quickstart" / "demo.py"
# Each switch starts an engine: a few show as much as a dozen, and so do a few short answers of small models.
FOLDER = f"import sys; sys.path.insert(0, {str(DEMO.parent)!r}); "
SHORT = f"""{FOLDER}
import dataclasses
import demo, machine
machine.ANSWER, machine.MEASURED, machine.FEW, machine.MANY = 0.1, 0.2, 10, 10
demo.SHAPES = [dataclasses.replace(shape, dim=128, layers=2, feed_forward=352) for shape in demo.SHAPES[:2]]
demo.SHAPES.append(demo.Shape("vector", dim=64, feed_forward=176, seed=2))
demo.SWITCHES = 2
demo.main()
"""
SERVING = f"""{FOLDER}
import runpy, types
for name in ("anthropic", "openai"):  # a second and a half to import, and nothing that it needs to serve
    sys.modules[name] = types.ModuleType(name)
runpy.run_path({str(DEMO)!r}, run_name="__main__")
"""


@pytest.fixture
def demo(tmp_path):
    """Return a function that starts the demo; at the end nothing of it may be running."""
    started = []

    def start(*options: str, program: Sequence[str]) -> subprocess.Popen[str]:
        log = tmp_path / "demo.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, *program, *options],
                env={**with_tools(), "LLMUX_DEMO_DIR": str(tmp_path)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    nothing_is_left(tmp_path)


def nothing_is_left(folder: Path) -> None:
    """Wait until everything has ended; say what has not."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not processes_with(f"LLMUX_DEMO_DIR={folder}"))
    logs = "".join(log.read_text() for log in folder.glob("run-*/llmux.log"))
    assert not processes_with(f"LLMUX_DEMO_DIR={folder}"), "\n".join(logs.splitlines()[-30:])


@pytest.mark.timeout(300)
def test_it_shows_many_switches_and_right_answers(demo, tmp_path):
    process = demo("--seconds", "1", program=("-c", SHORT))
    assert process.wait(280) == 0, (tmp_path / "demo.log").read_text()
    said = (tmp_path / "demo.log").read_text()
    assert not processes_with(f"LLMUX_DEMO_DIR={tmp_path}")
    assert int(re.search(r"and (\d+) switches in", said)[1]) >= 2  # what it calls enough
    assert re.search(r"Measured here: quill [\d,]+ tokens/s alone", said)
    verdict = " ".join(said[said.rindex("┘") + 1 :].split())
    assert re.match(
        r"With (adaptive|fifo) requests waited|The mean waits differ by less|The engines took", verdict
    )
    assert "Every answer came from the engine that was asked for; none failed." in said
    beside = r"vector stayed awake beside the others: \d+ of its \d+ requests did not wait"
    assert re.search(beside + "|No request found a model awake that stayed so throughout", said)  # in one second
    assert all(re.search(rf"{policy} +│ +\d+\.\d\d s │", said) for policy in ("adaptive", "fifo"))
    assert "\x1b" not in said
    assert "→" in said
    assert not list(tmp_path.glob("run-*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_it_stays_up_for_curl_and_leaves_nothing_running_however_it_ends(demo, tmp_path, number, code):
    process = demo("--serve", program=("-c", SERVING))
    log = tmp_path / "demo.log"
    wait_until(lambda: "curl" in log.read_text(), 4 * PATIENCE, what="the command to copy")
    url, body = re.search(r"curl (http\S+/v1/chat/completions) -H '[^']+' -d '([^']+)'", log.read_text()).groups()
    with urllib.request.urlopen(urllib.request.Request(url, body.encode()), timeout=PATIENCE) as answer:
        assert b'"model":"quill"' in answer.read()  # an engine runs
    process.send_signal(number)
    assert process.wait(PATIENCE) == code
    nothing_is_left(tmp_path)
