"""Gateways with a store, as real processes: what a frozen store costs requests, and what a second gateway costs.

    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.gateways frozen [--seconds 60] [--rate 20]
    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.gateways two [--seconds 60] [--rate 6] [--rounds 2]
    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.gateways simulated
    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.gateways limits [--seconds 6] [--rate 80] [--rounds 3]
    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.gateways carry [--seconds 3] [--rounds 4]

``frozen``: one gateway, two hosts and a store; requests come at a steady rate while the store runs, while it is
stopped (SIGSTOP), and when it continues. Their key has limits, which are counted through the store.

``two``: four hosts with fake engines whose switches take most of a second, eight models, random arrivals; the same
arrivals at one gateway, and alternately at two that share a store. Compares the mean wait, in the gateway and in
the host's queue together. Each run begins with new hosts, where every model is asleep.

``simulated``: the same in virtual time, over the scenarios of ``tests.benchmarks.fleet``, in half an hour.

``limits``: two gateways, and requests at a steady rate, alternating between them, of a key that may have half of
them in an hour: how many more are admitted, and how many when all come within a moment.

``carry``: the CPU of a request and of an event at two gateways which know nothing of each other, and at two that
share a store and their hosts, each with the same load: 32 connections with one request after the other, then 60
streams of 100 events a second. All share the machine's cores in either case, so the difference is what sharing
costs; two gateways on cores of their own carry twice the first over the second. Needs gcc, for the load and the
engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks import fleet as fleets
from tests.benchmarks.gateway import spent
from tests.harness.lease.fleet import Door
from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import HOST
from tests.harness.store_server import Server

sys.path.insert(0, str(Path(__file__).parent))  # as the programs there find each other

import measure
import rivals

KEY = [("Authorization", "Bearer sk-bench")]
SERVICE, SLEEP, WAKE = 0.15, 0.2, 0.6  # seconds
MODELS = "a b c d e f g h"
POPULAR = (8, 4, 4, 2, 2, 1, 1, 1)
SLOWER, RATIO = 0.005, 1.10  # what must be kept: seconds at the 99th percentile; mean wait of two over that of one


class Fleet:
    """Hosts that make themselves known in a store, and gateways that find them there."""

    def __init__(
        self,
        root: Path,
        server: Server,
        hosts: int,
        gateways: int,
        models: str,
        requests: str | None = "1M/d",
        **model: Any,
    ) -> None:
        self.hosts: list[Lab] = []
        self.gateways: list[Door] = []
        delays = {"WAKE_DELAY": str(WAKE), "SLEEP_DELAY": str(SLEEP)}
        for number in range(hosts):
            lab = Lab(root / f"host{number}")
            lab.write(
                {name: {"env": delays, **model} for name in models.split()},
                fleet={"store": server.url, "name": f"host{number}", "url": f"http://{HOST}:{lab.port}"},
            )
            lab.start()
            self.hosts.append(lab)
        for number in range(gateways):
            door = Door(root / f"gateway{number}")
            limits = {"requests": requests, "concurrent": 10_000}
            keys = [{"name": "bench", "key": "sk-bench", "limits": limits}]
            door.write_gateway(fleet={"store": server.url}, api_keys=None if requests is None else keys)
            door.start(ready=False)
            self.gateways.append(door)

    async def ready(self) -> None:
        """Wait until each gateway knows each host, and the others."""
        for door in self.gateways:

            async def whole(door: Door = door) -> bool:
                document = (await door.ask("GET", "/llmux/fleet", headers=KEY)).json()
                states = [host["state"] for host in document["hosts"].values()]
                limits = document["store"]["limits"]  # None where no key has any
                alone = limits is not None and limits["gateways"] != len(self.gateways)
                return states == ["ready"] * len(self.hosts) and not alone

            await door.until(whole)

    def close(self) -> None:
        """End all of it."""
        for lab in (*self.gateways, *self.hosts):
            lab.finish()


@contextlib.contextmanager
def fleet(
    hosts: int, gateways: int, models: str, requests: str | None = "1M/d", **model: Any
) -> Iterator[tuple[Server, Fleet]]:
    """Start a store, hosts and gateways."""
    folder, server = tempfile.mkdtemp(), Server()
    try:
        found = Fleet(Path(folder), server, hosts, gateways, models, requests, **model)
        try:
            yield server, found
        finally:
            server.go_on()
            found.close()
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def percentile(values: Sequence[float], part: float) -> float:
    """Return a percentile of values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


# ---- a frozen store


async def steady(door: Door, seconds: float, rate: float) -> list[float]:
    """Send requests at a steady rate; return what each took, in seconds."""
    loop = asyncio.get_running_loop()

    async def one() -> float:
        began = time.perf_counter()
        answer = await door.chat("a", headers=KEY)
        assert answer.status == 200, answer
        return time.perf_counter() - began

    tasks, began = [], loop.time()
    for number in range(int(seconds * rate)):
        await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
        tasks.append(asyncio.create_task(one()))
    return list(await asyncio.gather(*tasks))


async def frozen(given: argparse.Namespace) -> None:
    """Measure requests before, while and after the store is stopped."""
    with fleet(2, 1, "a b") as (server, found):
        await found.ready()
        door = found.gateways[0]
        await steady(door, 3.0, given.rate)  # warm
        kinds = ("before", "frozen", "after")
        took: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(given.rounds):
            for kind in kinds:
                if kind == "frozen":
                    server.stop()
                elif kind == "after":
                    server.go_on()
                took[kind] += await steady(door, given.seconds, given.rate)
        for kind in kinds:
            found_ = [1000 * percentile(took[kind], part) for part in (0.5, 0.9, 0.99, 1.0)]
            words = ", ".join(
                f"{name} {ms:.1f}" for name, ms in zip(("p50", "p90", "p99", "max"), found_, strict=True)
            )
            print(f"{kind:>7}: {len(took[kind])} requests, {words} ms")
        slower = percentile(took["frozen"], 0.99) - percentile(took["before"], 0.99)
        verdict = "missed" if slower > SLOWER else "kept"
        print(f"p99 {1000 * slower:+.1f} ms; must {1000 * SLOWER:.0f} ({verdict}); {load()}")


# ---- one gateway, and two


async def arrivals(found: Fleet, seconds: float, rate: float, seed: int) -> list[float]:
    """Send the requests of one seed to the gateways in turn; return the wait of each, in seconds."""
    chance = random.Random(seed)
    loop = asyncio.get_running_loop()
    turns = itertools.cycle(found.gateways)
    models = MODELS.split()

    async def one(door: Door, model: str) -> float:
        answer = await door.chat(model, headers=KEY, do={"delay": SERVICE}, wait=300.0)
        assert answer.status == 200, answer
        return float(answer.get("X-LLMux-Queue-Seconds"))

    tasks, due, began = [], 0.0, loop.time()
    while (due := due + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + due - loop.time()))
        model = chance.choices(models, POPULAR)[0]
        tasks.append(asyncio.create_task(one(next(turns), model)))
    return list(await asyncio.gather(*tasks))


async def two(given: argparse.Namespace) -> None:
    """Compare the waits of the same arrivals at one gateway and at two."""
    waits: dict[int, list[float]] = {1: [], 2: []}
    for seed in range(given.rounds):
        for gateways in (1, 2) if seed % 2 == 0 else (2, 1):
            with fleet(4, gateways, MODELS) as (_, found):
                await found.ready()
                one = await arrivals(found, given.seconds, given.rate, seed)
                wakes = sum(lab.count("wake") for lab in found.hosts)
            waits[gateways] += one
            mean = statistics.mean(one)
            print(f"{gateways} gateways, seed {seed}: {len(one)} requests, mean {mean:.3f} s, {wakes} wakes")
    means = {gateways: statistics.mean(each) for gateways, each in waits.items()}
    ratio = means[2] / means[1]
    for gateways, each in waits.items():
        late = percentile(each, 0.95)
        print(f"{gateways} gateways: mean {means[gateways]:.3f} s, p95 {late:.2f} s, of {len(each)}")
    print(f"ratio {ratio:.2f}; must {RATIO} ({'missed' if ratio > RATIO else 'kept'}); {load()}")


async def simulated(_given: argparse.Namespace) -> None:
    """Print the mean wait of two gateways over that of one, by scenario."""
    for title, scenarios in (("development", fleets.development()), ("held-out", fleets.held_out())):
        ratios = []
        for name, setting in scenarios.items():
            waits = []
            for gateways in (1, 2):
                fleets.RUNS[name, str(gateways)] = dataclasses.replace(setting, gateways=gateways), "least_wait"
                waits.append(fleets.run((name, str(gateways)))[1])
            ratios.append(fleets.ratio(waits[1], waits[0], "mean_wait"))
            print(f"{name}: {ratios[-1]:.2f}, {waits[0].mean_wait:.2f} s with one", flush=True)
        print(f"{title}: {fleets.geometric(ratios):.3f}, at most {max(ratios):.2f}", flush=True)


# ---- a limit over two gateways


async def limits(given: argparse.Namespace) -> None:
    """Count what is let in beyond a limit: at a steady rate, and all at once."""
    most = int(given.seconds * given.rate / 2)
    for words, rate in (("steady", given.rate), ("at once", 1e9)):
        for _ in range(given.rounds):
            with fleet(1, 2, "a", f"{most + 1}/h") as (_, found):
                await found.ready()
                assert (await found.gateways[0].chat("a", headers=KEY)).status == 200  # it wakes
                await asyncio.sleep(2.0)
                loop, tasks, began = asyncio.get_running_loop(), [], asyncio.get_running_loop().time()
                for number in range(2 * most):
                    await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
                    tasks.append(asyncio.create_task(found.gateways[number % 2].chat("a", headers=KEY)))
                statuses = [answer.status for answer in await asyncio.gather(*tasks)]
                took = loop.time() - began
            admitted = statuses.count(200)
            grown = most * took / 3600
            print(
                f"{words}: {len(statuses)} requests in {took:.1f} s, limit {most}, let in {admitted}:"
                f" {admitted - most - grown:+.1f}; {load()}"
            )


# ---- what one carries, and two


def loaded(doors: Sequence[Door], mode: str, path: str, count: int, *last: float) -> tuple[float, int]:
    """Put a load on each of the gateways at once; return their seconds of CPU, and what was served."""
    pids = [door.process.pid for door in doors if door.process is not None]
    began = sum(map(spent, pids))
    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(measure.client, mode, door.port, path, count, *last, model="a") for door in doors]
        seen = [one.result() for one in clients]
    assert not any(one["errors"] for one in seen), seen
    return sum(map(spent, pids)) - began, sum(one["chunks" if mode == "stream" else "complete"] for one in seen)


async def carry(given: argparse.Namespace) -> None:
    """Compare what a request and an event cost gateways that are alone, and those that share a store."""
    measure.build()
    path = "/v1/chat/completions"
    costs: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, rivals.engine(Path(folder)) as port:
        served = {"port": port, "wake": ":", "sleep": ":", "alive": ":"}
        for number in range(given.rounds):
            for fleets_of in (1, 2) if number % 2 == 0 else (2, 1):
                with contextlib.ExitStack() as stack:
                    doors = []
                    for _ in range(2 // fleets_of):
                        _, found = stack.enter_context(fleet(2, fleets_of, "a", None, **served))
                        await found.ready()
                        doors += found.gateways
                    loaded(doors, "full", path, 32, 0.5)  # warm
                    request = loaded(doors, "full", path, 32, given.seconds)
                    stream = f"{path}?n=200&r=100&s=200"
                    event = loaded(doors, "stream", stream, 60, given.seconds, 0.3)
                for what, (cpu, count) in (("request", request), ("event", event)):
                    costs.setdefault((what, fleets_of), []).append(1e6 * cpu / count)
    for what in ("request", "event"):
        alone, sharing = (statistics.median(costs[what, fleets_of]) for fleets_of in (1, 2))
        print(
            f"{what}: {alone:.1f} µs at a gateway that is alone, {sharing:.1f} at each of two:"
            f" {2 * alone / sharing:.2f} times; {load()}"
        )


def load() -> str:
    """Say how much else there was to do."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("frozen", "two", "simulated", "limits", "carry"))
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--rate", type=float, default=None, help="requests a second")
    parser.add_argument("--rounds", type=int, default=None)
    given = parser.parse_args()
    work, rate, rounds, seconds = {
        "frozen": (frozen, 20.0, 1, 60.0),
        "two": (two, 6.0, 2, 60.0),
        "limits": (limits, 80.0, 3, 6.0),
        "carry": (carry, 0.0, 4, 3.0),
        "simulated": (simulated, 0.0, 1, 0.0),
    }[given.what]
    given.rate, given.rounds, given.seconds = given.rate or rate, given.rounds or rounds, given.seconds or seconds
    asyncio.run(work(given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
