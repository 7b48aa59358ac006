"""What a prefetch saves: from the decision to switch to the first token, with a real llama.cpp server.

    PYTHONPATH=. python -m tests.benchmarks.prefetch [--rounds 7] [--disk MB/s] [--others CORES] [--json]

A model of 1.5 GB of random weights is written into a temporary folder and removed afterwards. llmux runs with the
real hooks. While a small model writes an answer of ``--tokens`` tokens, a client sends a request for the large
one, whose file is not in the page cache: it is dropped before each switch, and checked page by page. Three
variants take turns:

- cold:        no prefetch hook
- prefetched:  ``hooks/prefetch.sh`` runs during the drain
- cached:      no prefetch hook, but the file is in the page cache: the best that a prefetch could reach

``--disk`` makes the kernel read at most so many MB/s for all processes (a control group; needs root): the disk of
a virtual machine may be its host's memory.

On a machine that others use as well, ``--others`` repeats each switch during which their processes (and the
hypervisor) took more than so many cores.

Prints medians, with the smallest and the largest, in seconds: from the decision to the first token (``first``),
from the end of the drain to it (``after``), the duration of the answer that was drained (``drained``), and the CPU
time of the hooks and of the large engine up to its first token (``cpu``).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from examples.quickstart.tiny_gguf import Shape, write
from tests.engine.mux import Engine, Mux
from tests.engine.real import LLAMA_SERVER, ROOT, wait_until
from tests.harness.page_cache import drop

LARGE = Shape("large", dim=2048, layers=8, heads=16, kv_heads=4, feed_forward=6016, context=512)
SMALL = Shape("small", dim=384, layers=6, heads=6, kv_heads=2, feed_forward=1024)
WAYS = ("cold", "prefetched", "cached")
FIGURES = ("first", "after", "drained", "cpu")
TICKS = os.sysconf("SC_CLK_TCK")


def read(file: Path) -> float:
    """Read a file, and return the seconds that it took."""
    begun = time.monotonic()
    with file.open("rb", buffering=0) as opened:
        while opened.read(1 << 20):
            pass
    return time.monotonic() - begun


@contextlib.contextmanager
def slow_disk(megabytes: float | None, folder: Path) -> Iterator[None]:
    """Have this process, and what it starts from here on, read at most so many MB/s; None: no limit."""
    if megabytes is None:
        yield
        return
    device = folder.stat().st_dev
    group = Path("/sys/fs/cgroup/blkio/llmux-prefetch")
    limit = f"{os.major(device)}:{os.minor(device)} {int(megabytes * 1e6)}"
    try:
        group.mkdir(exist_ok=True)
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        (group / "tasks").write_text(str(os.getpid()))
    except OSError as error:
        raise SystemExit(f"--disk needs root and version 1 of the control groups: {error}") from None
    try:
        yield
    finally:
        (group.parent / "tasks").write_text(str(os.getpid()))
        group.rmdir()


class Answer(threading.Thread):
    """One streamed answer: when it was asked for, and when its first token and its end came."""

    def __init__(self, port: int, model: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self._body = json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": tokens,
                "stream": True,
            }
        )
        self._port = port
        self.began = self.first = self.end = 0.0
        self.status = 0
        self.started_to_answer = threading.Event()
        self.on_end: Callable[[], None] = lambda: None

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        self.began = time.monotonic()
        connection.request(
            "POST", "/v1/chat/completions", self._body, {"Content-Type": "application/json", "Connection": "close"}
        )
        response = connection.getresponse()
        self.status = response.status
        for line in response:
            if not self.first and line.startswith(b"data: {") and _content(json.loads(line[6:])):
                self.first = time.monotonic()
                self.started_to_answer.set()
        self.end = time.monotonic()
        self.on_end()
        connection.close()
        self.started_to_answer.set()

    def result(self) -> Answer:
        """Wait for its end; it has to be a good one."""
        self.join()
        if self.status != http.HTTPStatus.OK or not self.first:
            raise SystemExit(f"an answer failed: {self.status}")
        return self


def _content(event: Any) -> Any:
    return event["choices"] and event["choices"][0]["delta"].get("content")


def cpu_of(pid: int, *, children: bool = False) -> float:
    """Return the CPU seconds of a process, or those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    user, system = (13, 14) if children else (11, 12)
    return (int(fields[user]) + int(fields[system])) / TICKS


def cpu_of_all() -> float:
    """Return the CPU seconds that the machine has spent, those included that its hypervisor took from it."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS


def _taken_in(seconds: float) -> float:
    before = cpu_of_all()
    time.sleep(seconds)
    return (cpu_of_all() - before) / seconds


class Bench:
    """One llmux with a small model and a large one under three names."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.file = folder / "large.gguf"
        print("writing 1.5 GB", file=sys.stderr)
        write(self.file, LARGE)
        read(self.file)
        prefetch = f"{shlex.quote(str(ROOT / 'hooks' / 'prefetch.sh'))}"
        env = {
            "MODEL": str(self.file),
            "LLAMA_SERVER": LLAMA_SERVER,
            "PID_DIR": str(folder / "pids"),
            "ARGS": "--threads 2 --parallel 1 --ctx-size 512",
        }
        engines = {way: Engine(SMALL, settings={"env": env}) for way in WAYS}
        engines["prefetched"] = Engine(SMALL, settings={"env": env, "prefetch": prefetch})
        engines = {"small": Engine(SMALL, args="--parallel 1"), **engines}
        self.mux = Mux(folder, engines, policy={"use": "fifo"}, alive_every=0)
        self.tokens = tokens

    def ask(self, model: str, tokens: int) -> Answer:
        """Ask, and wait for the end of the answer."""
        answer = Answer(self.mux.port, model, tokens)
        answer.start()
        return answer.result()

    def turn(self, way: str) -> dict[str, float]:
        """Switch once from the small model to the large one; return the figures."""
        if way == "cached":
            read(self.file)
        else:
            drop(self.file)
        assert self.mux.process is not None
        llmux = self.mux.process.pid
        small = self.engine("small")
        draining = Answer(self.mux.port, "small", self.tokens)
        small_cpu = [cpu_of(small)]

        def note() -> None:
            with contextlib.suppress(OSError):  # it is put to sleep at this moment
                small_cpu.append(cpu_of(small))

        draining.on_end = note
        begun, machine, hooks = time.monotonic(), cpu_of_all(), cpu_of(llmux, children=True)
        own = cpu_of(llmux) + cpu_of(os.getpid())
        draining.start()
        draining.started_to_answer.wait()
        large = Answer(self.mux.port, way, 4)
        large.start()
        large.started_to_answer.wait()
        cpu = cpu_of(self.engine(way)) + cpu_of(llmux, children=True) - hooks
        own = cpu_of(llmux) + cpu_of(os.getpid()) - own + small_cpu[-1] - small_cpu[0] + cpu
        others = (cpu_of_all() - machine - own) / (time.monotonic() - begun)
        draining.result()
        large.result()
        self.ask("small", 1)  # the large one sleeps again, and nothing maps its file
        wait_until(self.mux.idle, what="quiet")
        return {
            "first": large.first - large.began,
            "after": large.first - draining.end,
            "drained": draining.end - draining.began,
            "cpu": cpu,
            "others": others,
        }

    def quiet_turn(self, way: str, most: float | None) -> dict[str, float]:
        """The same, again and again until others took at most so many cores meanwhile."""
        while True:
            while most is not None and _taken_in(1.0) > most:
                pass
            figures = self.turn(way)
            print(way, {key: round(value, 2) for key, value in figures.items()}, file=sys.stderr, flush=True)
            if most is None or figures["others"] <= most:
                return figures

    def engine(self, way: str) -> int:
        """Return the process of the large engine."""
        return int((self.mux.pids / f"{way}-{self.mux.ports[way]}.pid").read_text().split()[0])


def run(rounds: int, tokens: int, disk_limit: float | None, most: float | None) -> dict[str, Any]:
    """Run the benchmark."""
    with tempfile.TemporaryDirectory(prefix="llmux-prefetch-") as name, slow_disk(disk_limit, Path(name)):
        bench = Bench(Path(name), tokens)
        size = bench.file.stat().st_size
        drop(bench.file)
        disk = size / read(bench.file)
        samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        try:
            bench.mux.start()
            bench.ask("small", 1)
            for number in range(rounds + 1):
                for way in WAYS:
                    figures = bench.quiet_turn(way, most)
                    if number:  # the first round only warms up
                        samples[way].append(figures)
        finally:
            bench.mux.clean_up()
    return {
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "bytes": size,
        "disk_bytes_per_second": disk,
        "others": statistics.median(each["others"] for found in samples.values() for each in found),
        "ways": {
            way: {figure: spread([sample[figure] for sample in found]) for figure in FIGURES}
            for way, found in samples.items()
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1200, help="that the leaving model still writes")
    parser.add_argument("--disk", type=float, metavar="MB/s", help="read at most so fast")
    parser.add_argument("--others", type=float, metavar="CORES", help="repeat a switch in which others took more")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # what was begun is taken away again
    found = run(options.rounds, options.tokens, options.disk, options.others)
    if options.json:
        print(json.dumps(found))
        return
    disk = found["disk_bytes_per_second"] / 1e9
    others = f"others took {found['others']:.2f} of them"
    print(f"{found['bytes'] / 1e9:.2f} GB, disk {disk:.2f} GB/s; {found['machine']}, {others}")
    for way, figures in found["ways"].items():
        each = (
            f"{key} {one['median']:.2f} ({one['min']:.2f} to {one['max']:.2f})" for key, one in figures.items()
        )
        print(f"{way:11}", "  ".join(each))


if __name__ == "__main__":
    main()
