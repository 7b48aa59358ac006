"""The cost of a refused request in llmux, next to that of a served one.

    python tests/benchmarks/refusals.py [--requests 3000] [--rounds 3] [FOLDER …]

Each FOLDER is a checkout of llmux (default: this one); they are measured in turns, in one run. One client sends
one request after the other, and reconnects when llmux closes the connection. Prints llmux's microseconds of CPU
per request, over all rounds (``/proc/PID/stat``, so 10 ms at the finest), and the statuses of the answers:

- served: a valid key that has been seen before, for a model that is awake;
- no key, and the same for a GET and for Anthropic's envelope;
- one wrong key, the same each time;
- new wrong keys, once the attempts of the address are used up: nearly all are 429.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from measure import cpu_seconds, free_port

from llmux.config.access import hash_of, new_key

HERE = Path(__file__).parents[2]
READY = 60.0  # seconds
TOO_MANY = 429


class Engine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one segment

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response_only(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


class Client:
    """One connection, opened anew where it was closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self.opened = 0

    def ask(self, data: bytes) -> int:
        """Send a request and return the status of its answer."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.opened += 1
        self._socket.sendall(data)
        got = b""
        while b"\r\n\r\n" not in got:
            got += self._read()
        head, _, body = got.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        while len(body) < length:
            body += self._read()
        if b"connection: close" in lines:
            self.close()
        return int(head.split()[1])

    def _read(self) -> bytes:
        assert self._socket is not None
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError("llmux closed the connection")
        return data

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def post(path: str, *headers: str) -> bytes:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hello"}]}'
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def scenarios(key: str) -> dict[str, Iterator[bytes]]:
    chat = "/v1/chat/completions"
    return {
        "served": itertools.repeat(post(chat, f"Authorization: Bearer {key}")),
        "no key": itertools.repeat(post(chat)),
        "no key, GET": itertools.repeat(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
        "no key, Anthropic": itertools.repeat(post("/v1/messages")),
        "one wrong key": itertools.repeat(post(chat, "Authorization: Bearer sk-wrong")),
        "new wrong keys": (post(chat, f"Authorization: Bearer sk-{n}") for n in itertools.count()),
    }


@contextlib.contextmanager
def serving(checkout: Path, engine: int, key: str) -> Iterator[tuple[int, int]]:
    """Serve from a checkout; give the process's id and port."""
    with tempfile.TemporaryDirectory(prefix="llmux-refusals-") as name:
        folder, port = Path(name), free_port()
        model = {"port": engine, "wake": "true", "sleep": "true", "alive": "true"}
        # The second hash is of a key that nobody shows: wrong keys have to be checked all the time.
        keys = [hash_of(key), hash_of(new_key())]
        config = {"port": port, "state": None, "alive_every": 0, "models": {"m": model}, "api_keys": keys}
        (folder / "config.json").write_text(json.dumps(config))
        environ = {**os.environ, "PYTHONPATH": str(checkout)}
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "llmux", "-c", "config.json"],
                cwd=folder,
                env=environ,
                stdout=log,
                stderr=log,
            )
        try:
            deadline = time.monotonic() + READY
            client = Client(port)
            while True:
                with contextlib.suppress(OSError):
                    if client.ask(post("/v1/chat/completions", f"X-API-Key: {key}")) == 200:
                        break
                client.close()
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"llmux does not serve: {(folder / 'log').read_text()}")
                time.sleep(0.05)
            client.close()
            yield process.pid, port
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[HERE])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    key = new_key()
    engine = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    total: collections.Counter[tuple[int, str]] = collections.Counter()
    statuses: dict[tuple[int, str], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    opened: collections.Counter[tuple[int, str]] = collections.Counter()
    for _ in range(options.rounds):
        with contextlib.ExitStack() as stack:
            served = [
                stack.enter_context(serving(checkout.resolve(), engine.server_port, key))
                for checkout in options.checkouts
            ]
            for name in scenarios(key):
                for nth, (pid, port) in enumerate(served):
                    requests = scenarios(key)[name]
                    client = Client(port)
                    client.ask(next(requests))
                    while name == "new wrong keys" and client.ask(next(requests)) != TOO_MANY:
                        pass
                    before = cpu_seconds(pid)
                    for data in itertools.islice(requests, options.requests):
                        statuses[nth, name][client.ask(data)] += 1
                    total[nth, name] += round((cpu_seconds(pid) - before) * 1e6)
                    opened[nth, name] += client.opened
                    client.close()
    for name in scenarios(key):
        for nth, checkout in enumerate(options.checkouts):
            per_request = total[nth, name] / options.requests / options.rounds
            told = ", ".join(f"{count} x {status}" for status, count in sorted(statuses[nth, name].items()))
            print(f"{name:18} {checkout!s:24} {per_request:6.1f} µs  {told}, {opened[nth, name]} connections")


if __name__ == "__main__":
    main()
