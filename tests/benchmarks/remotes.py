"""The cost of a piece of a stream from a remote, next to one from an engine of this host.

    PYTHONPATH=. python -m tests.benchmarks.remotes [--pieces 20000] [--rounds 5]

llmux, an engine, a client and the remote share one process and one loop; prints its CPU time for each piece, in
microseconds, the median of the rounds, minus that of a client that reads from the same server directly.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import ssl
import statistics
import tempfile
import time
from pathlib import Path

import uvloop

from tests.server.house import HOST, House
from tests.targets.remote_host import STREAM_HEAD, chunked, make_certificates

DELTA = {"index": 0, "delta": {"content": "some text"}, "finish_reason": None}
EVENT = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [DELTA]}
PIECE = chunked(b"data: " + json.dumps(EVENT).encode() + b"\n\n")
END = b"0\r\n\r\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pieces: int) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            writer.write(STREAM_HEAD)
            for _ in range(pieces):
                writer.write(PIECE)
                await asyncio.sleep(0)  # each is sent by itself
                await writer.drain()
            writer.write(END)


async def ask(port: int, model: str, tls: ssl.SSLContext | None = None) -> float:
    """Return the seconds of CPU that one stream takes."""
    name = None if tls is None else "localhost"
    reader, writer = await asyncio.open_connection(HOST, port, ssl=tls, server_hostname=name)
    body = json.dumps({"model": model, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n\r\n"
    began = time.process_time()
    writer.write(head.encode() + body)
    while not (await reader.read(1 << 16)).endswith(END):
        pass
    took = time.process_time() - began
    writer.close()
    return took


async def measure(pieces: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificates = make_certificates(folder)
        plain = await asyncio.start_server(lambda *pair: serve(*pair, pieces), HOST, 0)
        secure = await asyncio.start_server(
            lambda *pair: serve(*pair, pieces), HOST, 0, ssl=certificates.context()
        )
        port, tls_port = (server.sockets[0].getsockname()[1] for server in (plain, secure))
        remotes = {
            "plain": {"url": f"http://{HOST}:{port}", "models": {"m": "m"}},
            "tls": {"url": f"https://localhost:{tls_port}", "models": {"m": "m"}, "ca": certificates.authority},
        }
        trusted = ssl.create_default_context(cafile=certificates.authority)
        async with House(folder) as house:
            await house.open({"here": {"port": port}}, remotes=remotes, remotes_for_all=True)
            ways = {"here": (port, None), "plain/m": (port, None), "tls/m": (tls_port, trusted)}
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, (direct, context) in ways.items():
                    taken[way].append(await ask(house.port, way) - await ask(direct, way, context))
        for server in (plain, secure):
            server.close()
    for way, seconds in taken.items():
        print(f"{way:8} {statistics.median(seconds) / pieces * 1e6:5.1f} us a piece")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pieces", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    uvloop.run(measure(given.pieces, given.rounds))
