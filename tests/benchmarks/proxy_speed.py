"""The cost of a request and an event in this llmux, next to that in another git revision, in one run.

    python tests/benchmarks/proxy_speed.py [--revision f51077b] [--rounds 6] [--model "apis: [chat]"] [--beside go]
        [--bytes 100000] [--answer 1000000]

Both run at once on one core, with the defaults of ``bench.py``, and get the same load in turns: as many requests
as they can serve on 32 connections (of 1 KB, or ``--bytes`` of a conversation; answered with 1 KB, or with
``--answer`` bytes), then 60 event streams of 100 events a second. Prints microseconds of CPU: the median and the
least of the rounds, and the median ratio. ``--model`` is a setting of the model here but not there. ``--beside``
lets peers of ``bench.py`` take turns, too, and prints the ratio to each; ``relay`` is the floor for any proxy: it
only copies bytes between sockets. Needs gcc. ``LLMUX_NATIVE=0`` before it disables the native relay.

With ``--late`` it prints instead how late the events of 20 streams are, here with and without the native relay,
alone and beside a client that sends bodies of 9 MB.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
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


def one_round(port: int, pid: int, size: int = 0, answer: int = 0) -> tuple[float, float]:
    """Return the microseconds of a request, with so many bytes in it and in its answer, and of an event."""
    began = spent(pid)
    seen = measure.client("full", port, f"{PATH}?b={answer}", 32, 1.5, size)
    between = spent(pid)
    request = (between - began) / seen["complete"]
    seen = measure.client("stream", port, STREAM, 60, 2.6, 0.3)
    return request, (spent(pid) - between) / seen["chunks"]


@contextmanager
def large_bodies(port: int) -> Iterator[None]:
    """Send one body after the other, each of many small parts."""
    parts = [{"type": "text", "text": "x" * 50, "n": number} for number in range(100_000)]
    body = json.dumps({"messages": [{"role": "user", "content": parts}], "model": "m"}).encode()
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            with suppress(OSError):
                connection.request("POST", PATH, body, {"Content-Type": "application/json"})
                connection.getresponse().read()
            connection.close()

    sending = threading.Thread(target=send)
    sending.start()
    try:
        yield
    finally:
        over.set()
        sending.join()


def show_delays(engines: tuple[int, int], scratch: Path, rounds: int) -> None:
    """Print how late events are, in milliseconds."""
    with ExitStack() as stack:
        running = []
        for name, switch in (("native", "1"), ("python", "0")):
            os.environ["LLMUX_NATIVE"] = switch
            running.append((name, started(stack, name, unpack_here(), engines, scratch)[0]))
        for busy in (False, True):
            found: dict[str, list[dict[str, float]]] = {name: [] for name, _ in running}
            for _ in range(rounds):
                for name, port in running:
                    with large_bodies(port) if busy else nullcontext():
                        seen = measure.client("stream", port, f"{PATH}?n=2000&r=100&s=200", 20, 2.5, 0.5)
                    found[name].append(seen["delay"])
            for name, delays in found.items():
                at = {part: statistics.median(one[part] for one in delays) for part in ("p50", "p95", "p99")}
                told = ", ".join(f"{part} {value:.3f}" for part, value in at.items())
                print(f"{name}, {'beside large bodies' if busy else 'alone'}: {told} ms late")


def spent(pid: int) -> float:
    """Return the microseconds of CPU that a process and those that it has started have had."""
    found = 0
    for member in measure.family(pid):
        for task in Path(f"/proc/{member}/task").iterdir():
            with suppress(OSError):
                found += int((task / "schedstat").read_text().split()[0])
    return found / 1000


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--revision", default="f51077b")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", default="", metavar="SETTING")
    parser.add_argument(
        "--beside", nargs="*", default=[], metavar="PEER", choices=["go", "nginx", "haproxy", "relay", "rust"]
    )
    parser.add_argument("--bytes", type=int, default=0, metavar="N")
    parser.add_argument("--answer", type=int, default=0, metavar="N")
    parser.add_argument("--late", action="store_true")
    options = parser.parse_args()
    measure.build()
    measure.pin(measure.LOAD_CORE)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = (stack.enter_context(rivals.engine(scratch)), stack.enter_context(rivals.engine(scratch)))
        if options.late:
            show_delays(engines, scratch, options.rounds)
            return
        running = [
            started(stack, "then", unpack(options.revision), engines, scratch),
            started(stack, "now", unpack_here(), engines, scratch, options.model),
        ]
        for name in options.beside:
            place = rivals.Place(scratch / name, *engines, 0.0)
            place.folder.mkdir()
            peer = stack.enter_context(rivals.running(name, place))
            assert peer.pid is not None
            running.append((peer.port, peer.pid))
        rounds = [
            [one_round(*each, options.bytes, options.answer) for each in running] for _ in range(options.rounds)
        ]
    for what, at in (("request", 0), ("event", 1)):
        then, now = ([one[which][at] for one in rounds] for which in (0, 1))
        ratio = statistics.median(new / old for old, new in zip(then, now, strict=True))
        print(
            f"{what}: {statistics.median(then):.1f} µs (least {min(then):.1f}) at {options.revision},"
            f" {statistics.median(now):.1f} (least {min(now):.1f}) now: {ratio:.2f} times"
        )
        for which, name in enumerate(options.beside, 2):
            peers = [one[which][at] for one in rounds]
            ratio = statistics.median(new / other for other, new in zip(peers, now, strict=True))
            cost = f"{statistics.median(peers):.1f} µs (least {min(peers):.1f})"
            print(f"    {name}: {cost}; now {ratio:.2f} times that")


if __name__ == "__main__":
    main()
