"""The cost of a request and an event in llmux itself, without the kernel and without the event loop's share.

    .venv/bin/python tests/benchmarks/fast_path.py [--revision 29c64f6] [--rounds 60] [--bytes 900]

One process; the transports of clients and engines only accept data. Ten requests arrive, ten answers arrive, the
loop turns; then 400 event streams get an event each. Prints microseconds of CPU for each, the least and the median
of the rounds: on a busy machine compare the least. ``--revision`` does the same with another revision first.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulate_speed import unpack, unpack_here

AT_ONCE = 10  # requests
STREAMS = 400
SERVED = {"port": 9, "wake": ":", "sleep": ":", "alive": ":"}
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nContent-Type: application/json\r\n"
    "Authorization: Bearer sk-1234\r\nUser-Agent: bench/1\r\nAccept: */*\r\nContent-Length: {length}\r\n\r\n{body}"
)
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
# The folder given, not what is installed.
RUN = (
    "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in repr(one).lower()];"
    "sys.path[:0] = [{folder!r}, {here!r}];"
    "import os, uvloop, fast_path; uvloop.run(fast_path.measure({rounds}, {size})); os._exit(0)"
)


class Pipe:
    """A transport that only takes."""

    def __init__(self) -> None:
        self.taken = b""

    def write(self, data: bytes) -> None:
        """Take bytes."""
        self.taken = data

    def is_closing(self) -> bool:
        """Return False."""
        return False

    def get_write_buffer_size(self) -> int:
        """Return 0: all is taken at once."""
        return 0

    def get_extra_info(self, name: str) -> Any:
        """Return where a client is; there is no socket."""
        return ("127.0.0.1", 5) if name == "peername" else None


def request(size: int, *, stream: bool) -> bytes:
    """Return a request with so many bytes of text."""
    messages = [{"role": "user", "content": "x" * size}]
    body = json.dumps({"model": "m", "stream": stream, "messages": messages})
    return HEAD.format(length=len(body), body=body).encode()


def answer() -> bytes:
    """Return an answer as an engine gives it."""
    usage = {"prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46}
    body = json.dumps({"id": "x", "choices": [{"message": {"content": "y" * 800}}], "usage": usage}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def event(number: int) -> bytes:
    """Return an event in a chunk, each of another length than the last."""
    data = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"t" * (150 + number % 13))
    return b"%x\r\n%b\r\n" % (len(data), data)


class Served:
    """The llmux that can be imported, its model awake; clients and engines are connected in pairs."""

    def __init__(self) -> None:
        self.clients: list[Any] = []
        self._folder = tempfile.mkdtemp()

    async def start(self) -> None:
        """Serve."""
        from llmux.app import FRONT, build_app  # noqa: PLC0415 - of whichever revision
        from llmux.config import Config  # noqa: PLC0415
        from llmux.server import Runner  # noqa: PLC0415

        file = Path(self._folder) / "configuration.json"
        file.write_text(json.dumps({"port": 0, "state": None, "alive_every": 0, "models": {"m": SERVED}}))
        app, switcher = build_app(Config.from_file(file, environ={}))
        runner = Runner(app, switcher.log)
        await runner.setup()
        front, self._server = app[FRONT], runner.server
        front.port = 8080
        front.configure(switcher.config)
        while not switcher.core.state.ready:  # noqa: ASYNC110 - once
            await asyncio.sleep(0.01)
        self._pool = front.fast_path.forwarder.pool
        admitted: Any = type("Admitted", (), {"model": "m", "epoch": 1})
        self._activity = switcher.activities.of(admitted)

    def connect(self, count: int) -> None:
        """Connect more clients, and as many engines."""
        from llmux.upstream import EngineConnection  # noqa: PLC0415

        for _ in range(count):
            assert self._server is not None
            client: Any = self._server()
            client.connection_made(Pipe())
            self.clients.append(client)
            engine: Any = EngineConnection(asyncio.get_running_loop())
            engine.connection_made(Pipe())
            engine.reusable = True
            self._pool.release(engine, self._activity)

    async def requests(self, count: int, whole: bytes, said: bytes) -> float:
        """Serve so many from each client; return the microseconds of one."""
        began = time.thread_time_ns()
        for _ in range(count):
            for client in self.clients:
                client.data_received(whole)
            for engine in [client.fast_request._connection for client in self.clients]:
                engine.data_received(said)
            await asyncio.sleep(0)
        return (time.thread_time_ns() - began) / count / len(self.clients) / 1000

    def streams(self, whole: bytes) -> list[Callable[[bytes], None]]:
        """Begin a stream for each client; return what takes the bytes of their engines."""
        takes = []
        for client in self.clients:
            client.data_received(whole)
            engine = client.fast_request._connection
            for data in (STREAM, event(0), event(1)):
                engine.data_received(data)
            takes.append(engine.data_received)
        return takes


async def measure(rounds: int, size: int) -> None:
    """Measure, and print."""
    served = Served()
    await served.start()
    served.connect(AT_ONCE)
    whole, said = request(size, stream=False), answer()
    await served.requests(50, whole, said)
    gc.collect()
    gc.freeze()
    found = [await served.requests(20, whole, said) for _ in range(rounds)]
    print(f"request {min(found):.2f} µs at least, {statistics.median(found):.2f} in the median", end="; ")
    served.connect(STREAMS - AT_ONCE)
    takes = served.streams(request(size, stream=True))
    found = []
    for _ in range(rounds):
        events = [event(number) for number in range(STREAMS)]
        began = time.thread_time_ns()
        for number, take in enumerate(takes):
            take(events[number])
            events[number] = b""  # as if it had just been read
        found.append((time.thread_time_ns() - began) / STREAMS / 1000)
        await asyncio.sleep(0)
    print(f"event {min(found):.3f} µs at least, {statistics.median(found):.3f} in the median", flush=True)


def main() -> None:
    """Measure a revision, if there is one to compare with, and what is here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--revision")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--bytes", type=int, default=900, help="of text in a request")
    given = parser.parse_args()
    folders = {given.revision: unpack(given.revision)} if given.revision else {}
    for name, folder in {**folders, "here": unpack_here()}.items():
        print(f"{name:10}", end=" ", flush=True)
        run = RUN.format(
            folder=str(folder), here=str(Path(__file__).parent), rounds=given.rounds, size=given.bytes
        )
        subprocess.run([sys.executable, "-c", run + ";import os; os._exit(0)"], check=True)


if __name__ == "__main__":
    main()
