#!/usr/bin/env python3
"""Have llmux switch between two engines under load, and say where the time of a switch goes.

python run.py [--device cuda|cpu] [--size 8GiB] [--switches 20] [--json]

Each engine is started once (weights made on the device); from then on a switch moves weights: one engine's to
pinned host memory, the other's back. The bytes moved, over the bandwidth measured beforehand between host and
device, is the least that a switch can take; the last line says by how much it took longer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

HERE = Path(__file__).resolve().parent
MODELS = ("north", "south")
CLIENTS = 4  # for each model
TOKENS = 8
READY_WITHIN = 900.0


class Failed(Exception):  # noqa: N818 - it reads as what it says
    """The run cannot go on; the message says why."""


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, and that other examples do not take."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(32301, 32767)  # below those that outgoing connections are given
        with socket.socket() as one, contextlib.suppress(OSError):
            if port in found:
                continue
            one.bind(("127.0.0.1", port))
            found.append(port)
    return found


@contextlib.asynccontextmanager
async def llmux(options: argparse.Namespace, folder: Path) -> AsyncIterator[tuple[str, dict[str, int]]]:
    """Run llmux on config.yaml; afterwards it and its engines are gone."""
    port, *engines = free_ports(3)
    ports = dict(zip(MODELS, engines, strict=True))
    env = {
        **os.environ,
        "PORT": str(port),
        "NORTH": str(ports["north"]),
        "SOUTH": str(ports["south"]),
        "RUN": str(folder),
        "PYTHON": sys.executable,
        "SIZE": options.size,
        "DEVICE": options.device,
    }
    log = folder / "llmux.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "llmux", "-c", HERE / "config.yaml"]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)  # noqa: ASYNC220 - nothing else runs yet
    url = f"http://127.0.0.1:{port}"
    try:
        await until_ready(url, process, log)
        yield url, ports
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        for file in folder.glob("*.pid"):  # noqa: ASYNC240 - nothing else runs any more
            with contextlib.suppress(OSError, ValueError):
                os.killpg(int(file.read_text()), signal.SIGKILL)


async def until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until llmux is ready."""
    async with aiohttp.ClientSession() as session:
        while process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/ready") as answer:
                    if answer.ok:
                        return
            await asyncio.sleep(0.05)
    raise Failed(f"llmux has ended:\n{log.read_text()}")  # noqa: ASYNC240 - nothing runs any more


class Load:
    """Clients that ask both models, each waiting for its answer before it asks again."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session
        self.answers = 0
        self.wrong = 0

    async def ask(self, model: str) -> None:
        """Ask once; the answer has to come from the engine of that name."""
        body = {"model": model, "max_tokens": TOKENS, "messages": [{"role": "user", "content": "Which way?"}]}
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as answer:
            said = await answer.json()
            if not answer.ok:
                raise Failed(f"{answer.status} for {model}: {said}")
        self.answers += 1
        self.wrong += said["model"] != model

    async def keep_asking(self, model: str, ending: asyncio.Event) -> None:
        """Ask again and again."""
        while not ending.is_set():
            await self.ask(model)
            await asyncio.sleep(random.expovariate(20))


async def switches(
    url: str, session: aiohttp.ClientSession, count: int, ending: asyncio.Event
) -> list[dict[str, Any]]:
    """Follow llmux's events until so many switches have ended."""
    found: list[dict[str, Any]] = []
    async with session.get(f"{url}/llmux/events", timeout=aiohttp.ClientTimeout(total=None)) as events:
        kind = ""
        async for line in events.content:
            name, _, value = line.decode().strip().partition(": ")
            if name == "event":
                kind = value
            elif name == "data" and kind == "switch_ended":
                event = json.loads(value)
                if event["from"] in MODELS and event["to"] in MODELS:
                    found.append(event)
            if len(found) >= count:
                break
    ending.set()
    return found


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the load, and put together what it took."""
    probe = [sys.executable, HERE / "engine.py", "probe", "0", "--bandwidth", "--size", options.size]
    probe += ["--device", options.device]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)  # noqa: ASYNC221 - nothing else runs yet
    if done.returncode:
        raise Failed(done.stderr.strip())
    bandwidth = json.loads(done.stdout)
    async with llmux(options, folder) as (url, ports), aiohttp.ClientSession() as session:
        load = Load(url, session)
        for model in MODELS:  # makes the weights
            await asyncio.wait_for(load.ask(model), READY_WITHIN)
        ending = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            seen = group.create_task(switches(url, session, options.switches, ending))
            for model in MODELS * CLIENTS:
                group.create_task(load.keep_asking(model, ending))
        moves: list[dict[str, Any]] = []
        for port in ports.values():
            async with session.get(f"http://127.0.0.1:{port}/moves") as answer:
                told = await answer.json()
            moves += told["moves"]
    return put_together(seen.result(), moves, told["bytes"], bandwidth, load)


def put_together(
    seen: list[dict[str, Any]], moves: list[dict[str, Any]], size: int, bandwidth: dict[str, float], load: Load
) -> dict[str, Any]:
    """Return the medians, in seconds."""
    sleeps = [move for move in moves if move["move"] == "sleep"]
    wakes = [move for move in moves if move["move"] == "wake"]
    cost = statistics.median(event["cost_secs"] for event in seen)
    least = size / bandwidth["to_host"] + size / bandwidth["to_device"]
    return {
        "answers": load.answers,
        "wrong": load.wrong,
        "switches": len(seen),
        "failed": sum(event["result"] != "success" for event in seen),
        "bytes": size,
        "bandwidth": bandwidth,
        "drain": statistics.median(event["drain_secs"] for event in seen),
        "cost": cost,
        "to_host": statistics.median(move["seconds"] for move in sleeps),
        "to_device": statistics.median(move["seconds"] for move in wakes),
        "least": least,
        "ratio": cost / least,
    }


def tell(found: dict[str, Any]) -> None:
    """Print it."""
    rest = found["cost"] - found["to_host"] - found["to_device"]
    out, back = (found["bandwidth"][way] / 1e9 for way in ("to_host", "to_device"))
    size = found["bytes"] / 2**30
    print(f"{found['switches']} switches, {found['answers']} answers, {found['wrong']} from the wrong engine")
    print(f"weights of {size:.2f} GiB; {out:.1f} GB/s to the host, {back:.1f} GB/s to the device")
    print("median seconds of a switch:")
    for what, seconds in (
        ("drain", found["drain"]),
        ("weights to the host", found["to_host"]),
        ("weights to the device", found["to_device"]),
        ("hooks, verify, llmux", rest),
        ("all, without the drain", found["cost"]),
    ):
        print(f"  {what:24}{seconds:8.3f}")
    least = found["least"]
    print(f"that is {found['ratio']:.2f} times what moving the bytes takes at that bandwidth ({least:.3f} s)")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="8GiB", help="of the weights of each engine")
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmux-gpu-") as folder:
        try:
            found = asyncio.run(measure(options, Path(folder)))
        except* Failed as failed:
            sys.exit(str(failed.exceptions[0]))
    found["took"] = time.monotonic() - began
    if options.json:
        print(json.dumps(found))
    else:
        tell(found)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
