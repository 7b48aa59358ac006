"""What llmux adds to a request, next to nginx, haproxy and a Go proxy in the shape of llama-swap's.

    make bench [ROUNDS=5] [PEER=name=http://127.0.0.1:PORT]
    python tests/benchmarks/bench.py [--rounds 5] [--only llmux nginx] [--quick] [--out FOLDER]

Every proxy runs on a core of its own, with everything it needs and its defaults: llmux with metrics, request ids,
the queue's header and admission. The fake engine and the load client share the other core. In every round each
proxy is started afresh and gets, one after the other,

- 1,000 event streams of 10 events a second and 200 bytes an event (RSS growth, CPU per event, time to first byte,
  delay of an event);
- as many requests as it can serve, 1 KB of JSON each way, on 32 connections (CPU per request);
- the same with 100 KB of a conversation in each request;
- 200 such requests a second (latency, minus that of the engine alone), and one after the other on one
  connection;

and llmux also 1,000 clients that wait for a model, and 1,000 streams at once. Prints medians over the rounds;
``benchmark.json`` has every round. A peer must be running, with its settings, in front of an engine on port 9900.

The original in Rust (``cargo install llmux --locked``, or ``LLMUX2=PATH``) takes part if loopback is the only
interface, since it listens on all of them: as root ``unshare -n sh -c 'ip link set lo up; make bench'``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import report
import rivals

PATH = "/v1/chat/completions"
PEERS_ENGINE = 9900
MB = 1e6


@dataclass(frozen=True)
class Load:
    """How much is asked for."""

    streams: int = 1000
    rate: float = 10.0
    events: int = 60
    stream_seconds: float = 9.0
    ramp: float = 2.0
    connections: int = 32
    json_seconds: float = 3.0
    long_bytes: int = 100_000
    paced_seconds: float = 4.0
    paced_rate: float = 200.0
    single_seconds: float = 1.0
    waiting: int = 1000
    wake_seconds: float = 2.0


QUICK = Load(
    streams=20,
    events=5,
    stream_seconds=0.7,
    ramp=0.05,
    json_seconds=0.3,
    paced_seconds=0.4,
    single_seconds=0.2,
    waiting=20,
    wake_seconds=0.3,
)  # only to see that it runs


def one_round(rival: rivals.Rival, load: Load) -> dict[str, Any]:
    """Put one rival under load and return its figures: times in ms, memory in MB."""
    measure.client("full", rival.port, PATH, 2, 0.2 if load is QUICK else 1.0)  # warm
    figures: dict[str, Any] = {}
    stream = f"{PATH}?n={load.events}&r={load.rate:g}&s=200"
    watch = measure.Watch(rival.pid)
    seen = watch.run(
        lambda: measure.client("stream", rival.port, stream, load.streams, load.stream_seconds, load.ramp)
    )
    figures["first_byte"], figures["event_delay"] = seen.get("first"), seen["delay"]
    figures["errors"] = seen["errors"]
    figures["events"] = seen["chunks"]
    if rival.pid is not None:
        figures["sse_cpu_s_per_100k"] = watch.cpu / seen["chunks"] * 100_000
        figures["rss_growth_mb"] = watch.growth / MB
        figures["rss_mb"] = measure.resident(rival.pid) / MB
    watch = measure.Watch(rival.pid)
    seen = watch.run(lambda: measure.client("full", rival.port, PATH, load.connections, load.json_seconds))
    figures["json_per_second"] = seen["measured"] / seen["seconds"]
    figures["errors"] += seen["errors"]
    if rival.pid is not None:
        figures["json_cpu_us"] = watch.cpu / seen["complete"] * 1e6
    watch = measure.Watch(rival.pid)
    long = (load.connections, load.json_seconds, load.long_bytes)
    seen = watch.run(lambda: measure.client("full", rival.port, PATH, *long))
    figures["errors"] += seen["errors"]
    if rival.pid is not None:
        figures["long_cpu_us"] = watch.cpu / seen["complete"] * 1e6
    seen = measure.client("paced", rival.port, PATH, 8, load.paced_seconds, load.paced_rate)
    figures["latency"] = seen["latency"]
    figures["errors"] += seen["errors"]
    seen = measure.client("full", rival.port, PATH, 1, load.single_seconds)
    figures["one_by_one"] = seen["latency"]
    figures["errors"] += seen["errors"]
    return figures


def crowds(rival: rivals.Rival, load: Load) -> dict[str, Any]:
    """Return what many clients at once see: those that wait for a model, and those that all begin a stream."""
    figures: dict[str, Any] = {}
    watch = measure.Watch(rival.pid)
    stream = f"{PATH}?n={load.events}&r={load.rate:g}&s=200"
    seconds = load.events / load.rate + 30
    seen = watch.run(lambda: measure.client("once", rival.port, stream, load.streams, seconds))
    figures["streams_at_once"] = _crowd(seen, watch) | {"slowest_first_byte_ms": seen["first"]["max"]}
    watch = measure.Watch(rival.pid)
    seen = watch.run(lambda: measure.client("once", rival.port, PATH, load.waiting, 60, model="slow"))
    figures["waiting"] = _crowd(seen, watch) | {"first_to_last_answer_ms": seen["to"] - seen["from"]}
    return figures


def _crowd(seen: dict[str, Any], watch: measure.Watch) -> dict[str, Any]:
    wrong = seen["errors"] + seen["unanswered"]
    return {"clients": seen["complete"], "wrong": wrong, "rss_growth_mb": watch.growth / MB}


def everything(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all rounds."""
    load = QUICK if options.quick else Load()
    names = [name for name in rivals.available() if not options.only or name in options.only]
    rounds: dict[str, list[dict[str, Any]]] = {}
    crowd: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmux-bench-")))
        engine = stack.enter_context(rivals.engine(folder, PEERS_ENGINE if options.peer else 0))
        other = stack.enter_context(rivals.engine(folder))
        for number in range(options.rounds):
            turn = names[number % len(names) :] + names[: number % len(names)]
            for name in turn:
                place = rivals.Place(
                    folder / f"{number}-{name.replace(' ', '-')}", engine, other, load.wake_seconds
                )
                place.folder.mkdir()
                with rivals.running(name, place) as rival:
                    rounds.setdefault(name, []).append(one_round(rival, load))
                    if name.startswith("llmux"):
                        crowd.setdefault(name, []).append(crowds(rival, load))
                say(f"round {number + 1}, {name}: {report.brief(rounds[name][-1])}")
            if options.peer:
                rival = rivals.peer(options.peer)
                rounds.setdefault(rival.name, []).append(one_round(rival, load))
                say(f"round {number + 1}, {rival.name}: {report.brief(rounds[rival.name][-1])}")
    stalls = {} if options.quick or (options.only and "llmux" not in options.only) else _stalls(say)
    return {"machine": _machine(), "rounds": rounds, "crowds": crowd, "stalls": stalls}


def _stalls(say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, in processes of their own, how long a large body holds up the event loop."""
    found = {}
    for name in ("llmux", "llmux without uvloop"):
        command = [sys.executable, str(measure.HERE / "stall.py"), "--json"]
        command += [] if name == "llmux" else ["--plain"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120)
        found[name] = json.loads(done.stdout)
        say(f"{name}: longest stalls in ms {found[name]}")
    return found


def _machine() -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "cpu": model[0].partition(":")[2].strip() if model else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; print and save its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of the proxies to run; all, if not given")
    parser.add_argument("--peer", help="NAME=URL of another proxy, which runs already")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder for benchmark.json, benchmark.md and benchmark.png")
    options = parser.parse_args(arguments)

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    measure.build()
    results = everything(options, say)
    results["load"] = vars(QUICK if options.quick else Load())
    text = report.markdown(results)
    sys.stdout.write(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "benchmark.md").write_text(text)
        report.picture(results, options.out / "benchmark.png")
    return results


if __name__ == "__main__":
    main()
