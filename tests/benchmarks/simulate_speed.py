"""How many requests the simulator handles per second of CPU time: here, and at a revision, in turns.

    .venv/bin/python tests/benchmarks/simulate_speed.py --revision f51077b --rounds 5

FIFO, four models, 200,000 arrivals, one process each; the best round of each counts, as other load on the machine
can only make a round slower.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[2]
ONE_ROUND = """
import time
from pathlib import Path
from llmux.plugins import load_policy
try:
    from llmux.simulator.cost_matrix import CostMatrix
except ImportError:  # an older revision
    from llmux.simulator.costs import CostMatrix
from llmux.simulator import simulate
from llmux.simulator.synthetic import Poisson, generate
ARRIVALS = {arrivals}
load = Poisson(models=4, rate={rate})
trace = generate(load, ARRIVALS / {rate}, seed=1)
policy = load_policy("fifo", {{}}, Path())
began = time.process_time()
outcome = simulate(trace, policy, CostMatrix(default=5.0))
took = time.process_time() - began
print(len(trace.jobs), took, outcome.switches, sum(t is not None for t in outcome.finished))
"""


def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="llmux-revision-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def unpack(revision: str) -> Path:
    """Return a folder with the files of a revision."""
    archive = subprocess.run(
        ["git", "archive", revision, "llmux", "policies", "hooks"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    folder = _scratch()
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    for name in ("policies", "hooks"):
        if not (folder / "llmux" / name).exists():
            (folder / "llmux" / name).symlink_to(folder / name)
    return folder


def one_round(folder: Path, arrivals: int, rate: float) -> tuple[int, float, str]:
    """Return the requests, the seconds of CPU time, and what came out."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_ROUND.format(arrivals=arrivals, rate=rate)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    jobs, took, *outcome = done.stdout.split()
    return int(jobs), float(took), " ".join(outcome)


def main() -> None:
    """Measure in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--revision", default="f51077b")
    parser.add_argument("--arrivals", type=int, default=200_000)
    parser.add_argument("--rate", type=float, default=0.5, help="requests a second, of all models together")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    folders = {given.revision: unpack(given.revision), "here": unpack_here()}
    speeds: dict[str, list[float]] = {name: [] for name in folders}
    for number in range(given.rounds):
        for name, folder in folders.items():
            jobs, took, outcome = one_round(folder, given.arrivals, given.rate)
            speeds[name].append(jobs / took)
            print(
                f"round {number + 1} {name:10} {jobs / took:9.0f} requests/s of CPU time  ({outcome})", flush=True
            )
    then, now = max(speeds[given.revision]), max(speeds["here"])
    ratios = sorted(b / a for a, b in zip(speeds[given.revision], speeds["here"], strict=True))
    print(f"best: {then:.0f} then, {now:.0f} here, {now / then:.2f} x; median of the rounds' ratios "
          f"{ratios[len(ratios) // 2]:.2f} x")  # fmt: skip


def unpack_here() -> Path:
    """Return a folder with the files as they are here."""
    folder = _scratch()
    (folder / "llmux").mkdir()
    for path in (ROOT / "llmux").iterdir():
        (folder / "llmux" / path.name).symlink_to(path)
    for name in ("policies", "hooks"):
        if not (folder / "llmux" / name).exists():
            (folder / "llmux" / name).symlink_to(ROOT / name)
    return folder


if __name__ == "__main__":
    main()
