"""llmux's own share of a switch: the time that it takes between the hooks, with hooks that do nothing.

    python tests/benchmarks/switch.py [--switches 100] [--waiters 500] [--json]

Two models take turns. While one answers an event stream, ``--waiters`` clients send requests for the other. Every
hook is a program that writes the time and ends; the engine writes the time into its last event and into its
answers; llmux runs in a process of its own that records when each hook has been started. Prints p50 and p99 in ms:

- drained:  from the last byte in flight (as its engine wrote it) to the start of the sleep hook
- idle:     the same with nothing in flight, from the moment one client sent its request
- between:  from the exit of the sleep hook to the start of the wake hook
- served:   from the exit of the wake hook to the first request that reaches the engine
- all:      from the exit of the wake hook to the last first byte of the waiters' answers

All include the kernel's part: noticing an exit, starting a process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measure
import rivals

CONFIG = """\
port: {port}
policy: {{use: fifo}}  # which decides at once: what is measured is how long the rest takes
state: {folder}/state
models:
  a: {{port: {engine}, wake: {hook} wake, sleep: {hook} sleep, alive: ":"}}
  b: {{port: {other}, wake: {hook} wake, sleep: {hook} sleep, alive: "false"}}
"""
PATH = "/v1/chat/completions"
PARTS = ("drained", "idle", "between", "served", "all")


def serve(file: Path, notes: Path) -> None:
    """Run llmux in this process; note when its hooks have been started."""
    import uvloop  # noqa: PLC0415 - only this child needs them

    from llmux.config import Config  # noqa: PLC0415
    from llmux.core.effects import RunHook  # noqa: PLC0415
    from llmux.observability.log import configure  # noqa: PLC0415
    from llmux.process import Process  # noqa: PLC0415
    from llmux.runtime import Switcher  # noqa: PLC0415

    configure("info", "json")
    started = Switcher.start

    with notes.open("a", buffering=1) as out:

        def start(switcher: Switcher) -> None:
            def note(effect: object) -> None:
                # Listeners are told of an effect when it has been carried out.
                if isinstance(effect, RunHook):
                    out.write(f"started-{effect.kind.value} {time.monotonic_ns()}\n")

            switcher.subscribe(note)
            started(switcher)

        setattr(Switcher, "start", start)  # noqa: B010
        config = Config.from_file(file)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Process(config, lambda: config, lambda *_: None).run())


class Notes:
    """The file to which hooks and llmux add their lines, read on from where it was read last."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.touch()
        self._at = 0

    def new(self) -> dict[str, float]:
        """Return the new notes, in ms."""
        with self._file.open() as file:
            file.seek(self._at)
            text = file.read()
            self._at = file.tell()
        return {word: int(time) / 1e6 for word, time in (line.split() for line in text.splitlines())}


def one_switch(port: int, names: tuple[str, str], waiters: int, notes: Notes, *, idle: bool) -> dict[str, float]:
    """Switch from one model to the other; return what the parts took, in ms."""
    source, target = names
    notes.new()
    found: dict[str, Any] = {}
    stream = threading.Thread(target=lambda: found.update(_stream(port, source)))
    if not idle:
        stream.start()
        time.sleep(0.1)
    seen = measure.client("once", port, PATH, waiters, 60, model=target)
    if seen["errors"] or seen["unanswered"]:
        raise SystemExit(f"not all were answered: {seen}")
    if not idle:
        stream.join()
    times = notes.new()
    if idle:
        return {"idle": times["started-sleep"] - seen["begun"]}
    return {
        "drained": times["started-sleep"] - found["last"],
        "between": times["started-wake"] - times["sleep"],
        "served": seen["received"] - times["wake"],
        "all": seen["to"] - times["wake"],
    }


def _stream(port: int, model: str) -> dict[str, Any]:
    """Read one stream of 0.6 s; return when its last event was made."""
    seen: dict[str, Any] = measure.client("once", port, f"{PATH}?n=7&r=10&s=200", 1, 30, model=model)
    return seen


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def run(switches: int, waiters: int) -> dict[str, dict[str, float]]:
    """Run the benchmark."""
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmux-switch-")))
        engine = stack.enter_context(rivals.engine(folder))
        other = stack.enter_context(rivals.engine(folder))
        notes = Notes(folder / "notes")
        port = measure.free_port()
        file = folder / "configuration.yaml"
        hook = f"exec {measure.BUILD / 'stamp'} {folder / 'notes'}"
        file.write_text(CONFIG.format(port=port, folder=folder, engine=engine, other=other, hook=hook))
        command: rivals.Command = [sys.executable, __file__, "--serve", file, folder / "notes"]
        stack.enter_context(rivals.process(command, core=measure.PROXY_CORE, log=folder / "log"))
        rivals.wait_for(port, "/ready")
        names = ("a", "b")
        for number in range(switches):
            idle = number % 4 >= 2
            if idle:
                time.sleep(0.2)  # until those who were answered before have closed their connections
            parts = one_switch(port, names, 1 if idle else waiters, notes, idle=idle)
            names = (names[1], names[0])
            for part, value in parts.items():
                samples[part].append(value)
    return {
        part: {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "switches": len(values)}
        for part, values in samples.items()
        if values
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", type=int, default=100)
    parser.add_argument("--waiters", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    measure.build()
    found = run(options.switches, options.waiters)
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        for part, figures in found.items():
            sys.stdout.write(f"{part:10} p50 {figures['p50']:7.2f} ms  p99 {figures['p99']:7.2f} ms\n")


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
