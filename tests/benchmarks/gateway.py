"""The cost of a gateway for each event of a stream, relative to that of a host, in the same run.

    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.gateway [--streams 40] [--events 1000] [--rounds 3]

Clients here, then the gateway, one host, and its engine: each is a process of its own, and all events pass through
gateway and host. The CPU of these two is read from the kernel's scheduler, in nanoseconds, before and after; it
includes what both spend on the reports and on each request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
from pathlib import Path

from tests.harness.lease.fleet import Door
from tests.harness.lease.raw import request

MUST, AIM = 1.15, 1.05
INTERVAL = 0.02  # seconds between two events of a stream


def spent(pid: int) -> float:
    """Return the seconds of CPU that all threads of a process have had."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += int((task / "schedstat").read_text().split()[0])
    return found / 1e9


async def stream(door: Door, events: int) -> int:
    """Read one stream to its end; return how many events it had."""
    line = await door.wire()
    body = {"model": "a", "messages": [], "stream": True}
    await line.send(request("POST", "/v1/chat/completions", body=body, do={"sse": events, "interval": INTERVAL}))
    head = await line.head()
    assert head.status == 200, head
    answer = await line.body(head)
    await line.close()
    assert answer.whole
    return answer.body.count(b"data: ") - 1


async def measure(door: Door, streams: int, events: int) -> tuple[float, float]:
    """Return the microseconds of CPU per event of the gateway and of the host."""
    host = door.hosts["one"]
    assert door.process is not None
    assert host.process is not None
    pids = door.process.pid, host.process.pid
    before = [spent(pid) for pid in pids]
    counts = await asyncio.gather(*(stream(door, events) for _ in range(streams)))
    assert counts == [events] * streams
    gateway, one = (1e6 * (spent(pid) - then) / sum(counts) for pid, then in zip(pids, before, strict=True))
    return gateway, one


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=40)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        door = Door(Path(folder))
        try:
            await door.up("one")
            await door.chat("a")
            await measure(door, given.streams, 50)  # warm
            ratios = []
            for _ in range(given.rounds):
                gateway, one = await measure(door, given.streams, given.events)
                ratios.append(gateway / one)
                print(f"gateway {gateway:.1f} us, host {one:.1f} us an event: {gateway / one:.2f}")
            ratio = statistics.median(ratios)
            load = os.getloadavg()[0]
            verdict = "missed" if ratio > MUST else "kept"
            print(
                f"median {ratio:.2f}; must {MUST} ({verdict}), aim {AIM};"
                f" load {load:.1f} on {os.cpu_count()} cores"
            )
        finally:
            door.finish()


if __name__ == "__main__":
    asyncio.run(main())
