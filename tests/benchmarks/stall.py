"""How long does a large body block the event loop?

    python tests/benchmarks/stall.py [--megabytes 20] [--bodies 5] [--plain] [--json]

llmux runs in this process, and its loop turns all the time; a client in another process sends chat requests whose
body is one long base64 string, dense JSON, or text full of escapes, through llmux to the fake engine. One sample
is the longest gap between two turns of the loop while a body is read and sent on. Prints the median over the
bodies, in ms of wall time and of the thread's own time, without what the kernel gave to others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import measure
import rivals

from llmux.app import build_app
from llmux.config import Config
from llmux.observability.notices import EventLog
from llmux.server import Runner

KINDS = {
    "base64": b'{"model": "m", "messages": [{"role": "user", "content": "%b"}]}',
    "dense": b'{"messages": [%b], "model": "m"}',
    "escapes": b'{"messages": [{"role": "user", "content": "%b"}], "model": "m"}',
}
FILLING = {
    "base64": b"QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9wcXJzdHV2d3h5ejAxMjM0NTY3ODkr",
    "dense": b'{"a":[1,2,{"b":null}],"c":"\\"x\\""},',
    "escapes": b'\\"\\\\\\n\\u0041 \\"model\\": \\"x\\", ',
}


class Gaps:
    """Turns the loop over and over; remembers the longest gap between two turns."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self.reset()
        self._turn()

    def reset(self) -> None:
        self.wall = self.thread = 0.0
        self._wall, self._thread = time.perf_counter(), time.thread_time()

    def stop(self) -> None:
        self._stopped = True

    def _turn(self) -> None:
        wall, thread = time.perf_counter(), time.thread_time()
        self.wall = max(self.wall, wall - self._wall)
        self.thread = max(self.thread, thread - self._thread)
        self._wall, self._thread = wall, thread
        if not self._stopped:
            self._loop.call_soon(self._turn)


def body(kind: str, size: int) -> bytes:
    """Return a request's body of about ``size`` bytes."""
    filling = FILLING[kind] * (size // len(FILLING[kind]))
    return KINDS[kind] % (filling.rstrip(b",") if kind == "dense" else filling)


async def measured(kind: str, size: int, bodies: int, port: int) -> tuple[float, float]:
    """Send bodies of a kind through llmux; return the medians of the longest gaps, in ms: wall, thread."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(body(kind, size))
        file.flush()
        wall, thread = [], []
        for _ in range(bodies):
            sender = await asyncio.create_subprocess_exec(
                *measure.pinned(measure.LOAD_CORE), sys.executable, __file__, "--send", str(port), file.name
            )
            await asyncio.sleep(0.3)  # it starts, reads the file, and waits a moment
            gaps = Gaps()
            code = await sender.wait()
            gaps.stop()
            if code:
                raise SystemExit("the body was not answered")
            wall.append(gaps.wall * 1e3)
            thread.append(gaps.thread * 1e3)
    return statistics.median(wall), statistics.median(thread)


def send(port: int, file: Path) -> None:
    """Send one body and wait for the answer."""
    import http.client  # noqa: PLC0415 - only the child needs it

    content = file.read_bytes()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    time.sleep(0.5)
    connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    raise SystemExit(answer.status != http.client.OK)


async def serve(options: argparse.Namespace, engine: int, folder: Path) -> dict[str, float]:
    """Run llmux in this loop, and measure."""
    port = measure.free_port()
    file = folder / "configuration.yaml"
    file.write_text(rivals.LLMUX.format(port=port, engine=engine, other=engine + 1, wake_seconds=1))
    app, _ = build_app(Config.from_file(file))
    runner = Runner(app, EventLog())
    await runner.setup()
    await listen(runner, port)
    await asyncio.to_thread(rivals.wait_for, port, "/ready")
    found = {}
    try:
        for kind in KINDS:
            wall, thread = await measured(kind, options.megabytes * 1_000_000, options.bodies, port)
            found[kind] = wall
            found[f"{kind}, thread"] = thread
    finally:
        await runner.cleanup()
    return found


async def listen(runner: Runner, port: int) -> None:
    from aiohttp import web  # noqa: PLC0415 - the sender starts faster without

    await web.TCPSite(runner, "127.0.0.1", port).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--bodies", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="asyncio's own loop, not uvloop")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    factory = None
    if not options.plain:
        import uvloop  # noqa: PLC0415 - an extra

        factory = uvloop.new_event_loop
    measure.build()
    measure.pin(measure.PROXY_CORE)  # alone there: whom it starts is on the other
    with (
        tempfile.TemporaryDirectory() as name,
        rivals.engine(Path(name)) as engine,
        asyncio.Runner(loop_factory=factory) as runner,
    ):
        found = runner.run(serve(options, engine, Path(name)))
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.write("".join(f"{kind:18} {value:6.2f} ms\n" for kind, value in found.items()))


if __name__ == "__main__":
    if "--send" in sys.argv:
        send(int(sys.argv[2]), Path(sys.argv[3]))
    main()
