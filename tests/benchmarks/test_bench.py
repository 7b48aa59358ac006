"""The benchmarks run. What they measure here means nothing."""

import shutil

import bench
import pytest

pytestmark = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("taskset")), reason="needs gcc and taskset"
)


def test_the_benchmark_runs_and_everybody_is_answered(tmp_path, capsys):
    results = bench.main(["--quick", "--rounds", "1", "--only", "direct", "llmux", "--out", str(tmp_path)])
    assert [each["errors"] for them in results["rounds"].values() for each in them] == [0, 0]
    assert [crowd["wrong"] for crowd in results["crowds"]["llmux"][0].values()] == [0, 0]
    assert "µs CPU per request" in capsys.readouterr().out
    assert {"benchmark.json", "benchmark.md"} <= {file.name for file in tmp_path.iterdir()}
