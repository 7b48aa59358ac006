"""How long does starting a hook block the event loop?

    python tests/benchmarks/spawn.py [--count 200] [--rss 0 500]

Three ways to start ``sh -c true`` in a folder, in a process group of its own, with its output in a pipe. For
each one the loop turns all the time, and one sample is the longest gap between two turns while one hook is started
(until the caller has its pid). Prints the median and the largest sample in milliseconds, per event loop and size
of the process in MB (pages really touched: a plain ``fork`` would copy their page tables).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable

import uvloop

SCRIPT = "true"
IN_FOLDER = 'cd -- "$1" && exec /bin/sh -c "$2"'
Start = Callable[[str], Awaitable[Callable[[], Awaitable[None]]]]


class Heartbeat:
    """Turns the loop over and over, and remembers the longest gap between two turns, in seconds."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last = time.perf_counter()
        self._stopped = False
        self.longest = 0.0
        self._beat()

    def _beat(self) -> None:
        now = time.perf_counter()
        self.longest = max(self.longest, now - self._last)
        self._last = now
        if not self._stopped:
            self._loop.call_soon(self._beat)

    def reset(self) -> None:
        self._last = time.perf_counter()
        self.longest = 0.0

    def stop(self) -> None:
        self._stopped = True


async def with_posix_spawn(cwd: str) -> Callable[[], Awaitable[None]]:
    read, write = os.pipe()
    pid = os.posix_spawn(  # noqa: ASYNC221  (that it blocks is what is measured)
        "/bin/sh",
        ["sh", "-c", IN_FOLDER, "sh", cwd, SCRIPT],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, write, 1),
            (os.POSIX_SPAWN_DUP2, write, 2),
        ],
        setpgroup=0,
        setsigmask=[],
        setsigdef=[signal.SIGPIPE],
    )
    os.close(write)

    async def reap() -> None:
        os.close(read)
        await asyncio.to_thread(os.waitpid, pid, 0)

    return reap


async def with_popen(cwd: str) -> Callable[[], Awaitable[None]]:
    process = subprocess.Popen(  # noqa: ASYNC220  (that it blocks is what is measured)
        ["/bin/sh", "-c", SCRIPT],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )

    async def reap() -> None:
        assert process.stdout is not None
        process.stdout.close()
        await asyncio.to_thread(process.wait)

    return reap


async def with_subprocess_exec(cwd: str) -> Callable[[], Awaitable[None]]:
    # uvloop knows no process_group: a session of its own costs the same.
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        SCRIPT,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    async def reap() -> None:
        await process.communicate()

    return reap


WAYS: dict[str, Start] = {
    "posix_spawn": with_posix_spawn,
    "Popen": with_popen,
    "subprocess_exec": with_subprocess_exec,
}


async def measure(start: Start, cwd: str, count: int) -> list[float]:
    heart = Heartbeat()
    samples = []
    for number in range(count + 5):
        await asyncio.sleep(0.001)
        heart.reset()
        reap = await start(cwd)
        await asyncio.sleep(0)
        if number >= 5:  # the first ones warm caches up
            samples.append(heart.longest)
        await reap()
    heart.stop()
    await asyncio.sleep(0)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="hooks per line")
    parser.add_argument("--rss", type=int, nargs="*", default=[0, 500], help="MB to touch beforehand")
    options = parser.parse_args()
    out = sys.stdout
    out.write(f"{'way':16} {'loop':8} {'+MB':>5} {'RSS MB':>7} {'median ms':>10} {'max ms':>8}\n")
    with tempfile.TemporaryDirectory() as cwd:
        for megabytes in options.rss:
            ballast = bytearray(os.urandom(1024)) * (megabytes * 1024)
            gc.collect()
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            for loop_name, factory in (
                ("asyncio", asyncio.new_event_loop),
                ("uvloop", uvloop.new_event_loop),
            ):
                for name, start in WAYS.items():
                    with asyncio.Runner(loop_factory=factory) as runner:
                        samples = [s * 1000 for s in runner.run(measure(start, cwd, options.count))]
                    median, largest = statistics.median(samples), max(samples)
                    out.write(f"{name:16} {loop_name:8} {megabytes:5} {rss:7} {median:10.2f} {largest:8.2f}\n")
            del ballast


if __name__ == "__main__":
    main()
