"""What a request and an event cost this llmux, beside those of another git revision, in one run.

    python tests/benchmarks/proxy_speed.py [--revision f51077b] [--rounds 6] [--model "apis: [chat]"]

Both run at once on one core, with the defaults of ``bench.py``, and are put under the same load by turns: as many
requests as it takes on 32 connections, then 60 event streams of 100 events a second. Printed are microseconds of
CPU, the median and the least of the rounds, and the median of the rounds' ratios. ``--model`` is a setting of the
model here, and not there. Needs gcc, for the load.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import measure
import rivals
from simulate_speed import unpack, unpack_here

PATH = "/v1/chat/completions"
STREAM = f"{PATH}?n=200&r=100&s=200"
# The folder given, not what is installed.
RUN = (
    "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in repr(one).lower()];"
    "sys.path.insert(0, {folder!r}); sys.argv = ['llmux', '-c', {file!r}];"
    "from llmux.cli import main; main()"
)


def started(
    stack: ExitStack, name: str, code: Path, engines: tuple[int, int], scratch: Path, setting: str = ""
) -> tuple[int, int]:
    """Start the llmux of a folder, with a setting of its model; return its port and its process."""
    folder = scratch / name
    folder.mkdir()
    port, file = measure.free_port(), folder / "configuration.yaml"
    engine, other = engines
    text = rivals.LLMUX.format(port=port, engine=engine, other=other, wake_seconds=0, folder=folder)
    file.write_text(text.replace("  m:\n", f"  m:\n    {setting}\n", 1))
    run = RUN.format(folder=str(code), file=str(file))
    command = ["env", f"XDG_STATE_HOME={folder}", sys.executable, "-c", run]
    pid = stack.enter_context(rivals.process(command, core=measure.PROXY_CORE, log=folder / "log"))
    rivals.wait_for(port, "/ready")
    return port, pid


def one_round(port: int, pid: int) -> tuple[float, float]:
    """Return the microseconds of a request and of an event."""
    watch = measure.Watch(pid)
    seen = watch.run(lambda: measure.client("full", port, PATH, 32, 1.5))
    request = watch.cpu / seen["complete"] * 1e6
    watch = measure.Watch(pid)
    seen = watch.run(lambda: measure.client("stream", port, STREAM, 60, 2.6, 0.3))
    return request, watch.cpu / seen["chunks"] * 1e6


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--revision", default="f51077b")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", default="", metavar="SETTING")
    options = parser.parse_args()
    measure.build()
    measure.pin(measure.LOAD_CORE)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = (stack.enter_context(rivals.engine(scratch)), stack.enter_context(rivals.engine(scratch)))
        running = [
            started(stack, "then", unpack(options.revision), engines, scratch),
            started(stack, "now", unpack_here(), engines, scratch, options.model),
        ]
        rounds = [[one_round(*each) for each in running] for _ in range(options.rounds)]
    for what, at in (("request", 0), ("event", 1)):
        then, now = ([one[which][at] for one in rounds] for which in (0, 1))
        ratio = statistics.median(new / old for old, new in zip(then, now, strict=True))
        print(
            f"{what}: {statistics.median(then):.1f} µs (least {min(then):.1f}) at {options.revision},"
            f" {statistics.median(now):.1f} (least {min(now):.1f}) now: {ratio:.2f} times"
        )


if __name__ == "__main__":
    main()
