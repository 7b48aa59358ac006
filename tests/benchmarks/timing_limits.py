"""Limits on durations: ``make timing``, on an otherwise idle machine. The suite measures no time."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmux.core.spec import HookKind
from llmux.extract import SLICE, ModelScanner
from llmux.hookrunner import HookJob, HookResult, HookRunner
from llmux.observability.state_file import State, StateFile
from llmux.plugins import load_policy
from tests.benchmarks import decide

SIZE = 20_000_000
TURN = json.dumps({"role": "user", "content": "hi there"}).encode()
IMAGE = b'{"messages":[{"content":[{"image_url":{"url":"'
SHAPES = {
    "base64": IMAGE + b"QUJD" * (SIZE // 4) + b'"}}]}],"model":"m"}',
    "dense": b'{"messages":[' + TURN + (b"," + TURN) * (SIZE // len(TURN)) + b'],"model":"m"}',
}


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


@pytest.mark.parametrize("shape", SHAPES)
def test_no_slice_of_20_mb_stalls(shape: str) -> None:
    body, scanner = SHAPES[shape], ModelScanner()
    slices = [body[start : start + SLICE] for start in range(0, len(body), SLICE)]
    times = [seconds(lambda data=data: scanner.feed(data)) for data in slices]
    found = scanner.finish()
    assert found is not None
    assert found.name == "m"
    print(f"\n{shape}: longest {max(times) * 1000:.3f} ms, all {sum(times) * 1000:.0f} ms")
    assert max(times) < 0.025


def test_a_save_of_the_state_is_quick(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state.json", lambda *_, **__: None)
    file.open()
    times = sorted(
        seconds(lambda n=n: file.save(State(frozenset({"a"}), {f"model-{m}": 1.5 + n for m in range(100)})))
        for n in range(50)
    )
    file.close()
    print(f"\na save: median {times[25] * 1000:.3f} ms")
    assert times[25] < 0.005


async def test_a_hook_which_prints_100_mb_does_not_stall_the_loop(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[HookResult] = loop.create_future()
    runner = HookRunner(on_line=lambda *_: None, on_orphan_pipe=lambda *_: None)
    script = "yes 0123456789abcdef | head -c 100000000"
    runner.start(HookJob(script=script, id=1, model="m", kind=HookKind.WAKE, cwd=tmp_path), done.set_result)
    longest, last = 0.0, loop.time()
    while not done.done():
        await asyncio.sleep(0)
        longest, last = max(longest, loop.time() - last), loop.time()
    print(f"\na hook's 100 MB: the loop stood still for {longest * 1000:.1f} ms at most")
    assert longest < 0.05


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("taskset")), reason="needs gcc and taskset")
def test_the_benchmark_runs_and_every_request_is_answered(tmp_path: Path) -> None:
    import bench  # noqa: PLC0415, it keeps this process on one core

    results = bench.main(["--quick", "--rounds", "1", "--only", "direct", "llmux", "--out", str(tmp_path)])
    assert [each["errors"] for them in results["rounds"].values() for each in them] == [0, 0]
    assert [crowd["wrong"] for crowd in results["crowds"]["llmux"][0].values()] == [0, 0]
    assert {"benchmark.json", "benchmark.md"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("policy", ["fifo", "adaptive"])
def test_a_policy_decides_quickly(policy: str) -> None:
    """About 40 µs."""
    taken = decide.seconds(load_policy(policy, {}, Path()), decide.crowded())
    print(f"\n{policy}: {taken * 1e6:.0f} µs")
    assert taken < 500e-6
