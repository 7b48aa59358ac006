#!/usr/bin/env python3
"""Show a fleet at work: four hosts with real engines on the CPU, two gateways, and a store.

A host is killed midway, and the store as well. Without a server for the store, or its client library, the gateways
do without.

It cleans up after itself, however it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # to import what follows takes seconds, in which Ctrl-C should leave no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))  # the models and the stage of `make demo`

import aiohttp  # noqa: E402
import openai  # noqa: E402
from demo import DemoError, Stage, Status, free_ports, guard  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from llmux.errors import ConfigError  # noqa: E402
from llmux.fleet.embedded import server  # noqa: E402

HOSTS = 4
GATEWAYS = 2
VICTIM = 2  # which host is killed
CLIENTS = 8
SECONDS = 16.0  # of load
TOKENS = {"quill": 48, "atlas": 24}
LATE = 75.0  # seconds after which the demo ends, whatever has been shown


@dataclass
class Ledger:
    """What was sent, and what became of it."""

    answered: Counter[str] = field(default_factory=Counter)  # by host
    after: Counter[str] = field(default_factory=Counter)  # by host, of those that were sent after the kill
    broken: int = 0  # whose answer had begun on the host that died, or that its engine may have worked on
    lost: list[str] = field(default_factory=list)  # all others
    waits: list[float] = field(default_factory=list)


class Clients:
    """Programs with the official SDK, each with one request at a time, each at one of the gateways."""

    def __init__(self, urls: list[str], ledger: Ledger, tokens: dict[str, int]) -> None:
        self.ledger = ledger
        self.killed = False
        self._tokens = tokens
        self._dice = random.Random(1)
        self._sdks = [
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) for url in urls
        ]

    async def close(self) -> None:
        """Close the connections."""
        for sdk in self._sdks:
            await sdk.close()

    async def run(self, number: int, stop: asyncio.Event) -> None:
        """Send requests until it is time to stop."""
        sdk = self._sdks[number % len(self._sdks)]
        while not stop.is_set():
            model = self._dice.choices(list(self._tokens), weights=(3, 1))[0]
            await self.one(sdk, model, stream=self._dice.randrange(2) == 0)

    async def one(self, sdk: openai.AsyncOpenAI, model: str, *, stream: bool) -> None:
        """Send one request."""
        ledger, after, began = self.ledger, self.killed, False
        asked: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": "a word about queues"}],
            "max_tokens": self._tokens[model],
            "stream": stream,
        }
        try:
            raw = await sdk.chat.completions.with_raw_response.create(**asked)
            host = raw.headers["x-llmux-host"]
            began = True
            ledger.waits.append(float(raw.headers["x-llmux-queue-seconds"]))
            answer = raw.parse()
            if stream:
                async for _ in answer:
                    pass
        except openai.APIStatusError as error:
            if error.status_code == 502 and "host_lost" in str(error.body):  # noqa: PLR2004
                ledger.broken += 1
            else:
                ledger.lost.append(f"{error.status_code}: {error.message}")
        except (openai.APIError, openai.OpenAIError) as error:
            if began:
                ledger.broken += 1
            else:
                ledger.lost.append(repr(error))
        else:
            ledger.answered[host] += 1
            if after:
                ledger.after[host] += 1


class Gateway:
    """One gateway, as a process."""

    def __init__(self, folder: Path, port: int, hosts: dict[str, str]) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"gateway-{port}.log"
        self.file = folder / f"gateway-{port}.json"
        self.folder = folder
        told: dict[str, Any] = {"port": port, "hosts": {name: {"url": url} for name, url in hosts.items()}}
        if has_store():
            told["fleet"] = {"store": "embedded"}
        self.file.write_text(json.dumps(told))

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Have it run."""
        command: list[str | Path] = [Path(sys.executable).with_name("llmux"), "gateway", "-c", self.file]
        with (
            self.log.open("wb") as log,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "RUNTIME_DIRECTORY": str(self.folder)},  # a store of their own
            ) as process,
            guard(process),
        ):
            try:
                yield process
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()


def has_store() -> bool:
    """Whether there is what an embedded store takes."""
    try:
        server(os.environ)
    except ConfigError:
        return False
    return find_spec("redis") is not None


def kill_store(gateways: list[Gateway]) -> bool:
    """Kill the store's server, which one of the gateways runs; return whether there was one."""
    for gateway in gateways:
        for line in reversed(gateway.log.read_text().splitlines()):
            with contextlib.suppress(ValueError, ProcessLookupError):
                event = json.loads(line)
                if event["event"] == "store_started":
                    os.kill(event["pid"], signal.SIGKILL)
                    return True
    return False


async def fleet(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """Return ``/llmux/fleet``."""
    async with session.get(f"{url}/llmux/fleet") as response:
        found: dict[str, Any] = await response.json()
        return found


async def all_ready(session: aiohttp.ClientSession, gateways: list[Gateway]) -> None:
    """Wait until every gateway has heard of every host."""
    deadline = time.monotonic() + 30
    for gateway in gateways:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError):
                found = await fleet(session, gateway.url)
                hosts = found["hosts"]
                store = found["store"]
                if all(host["state"] == "ready" for host in hosts.values()) and not (store and store["trouble"]):
                    break
            await asyncio.sleep(0.05)
        else:
            raise DemoError(f"a gateway did not find all hosts; see {gateway.log}")


async def perform(console: Console, stages: list[Stage], seconds: float) -> bool:
    """Start everything, send the load, kill a host, show what became of it."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        llmuxes = [stack.enter_context(stage.set_up()) for stage in stages]
        hosts = {f"gpu{number}": stage.url for number, stage in enumerate(stages, 1)}
        ports = free_ports(GATEWAYS)
        gateways = [Gateway(stages[0].run, port, hosts) for port in ports]
        for gateway in gateways:
            stack.enter_context(gateway.running())
        async with aiohttp.ClientSession() as session:
            for stage, llmux in zip(stages, llmuxes, strict=True):
                await Status(session, stage.url).ready(llmux)
            await all_ready(session, gateways)
            if not has_store():
                console.print("Without a store: there is no valkey-server or redis-server here.", style="yellow")
            console.print(
                f"{HOSTS} hosts and {GATEWAYS} gateways run after {time.monotonic() - began:.0f} s;"
                f" {CLIENTS} clients send requests for {', '.join(TOKENS)}."
            )
            ledger, stop = Ledger(), asyncio.Event()
            clients = Clients([gateway.url for gateway in gateways], ledger, TOKENS)
            tasks = [asyncio.create_task(clients.run(number, stop)) for number in range(CLIENTS)]
            await asyncio.sleep(seconds / 2)
            llmuxes[VICTIM].send_signal(signal.SIGKILL)
            clients.killed = True
            killed = time.monotonic()
            console.print(f"gpu{VICTIM + 1} is killed.", style="red")
            await asyncio.sleep(1.0)
            if kill_store(gateways):
                console.print("The store is killed.", style="red")
            await asyncio.sleep(max(0.0, min(seconds / 2 - 1.0, LATE - (time.monotonic() - began) - 10)))
            stop.set()
            await asyncio.gather(*tasks)
            await clients.close()
            views = [await fleet(session, gateway.url) for gateway in gateways]
    show(console, views, ledger, time.monotonic() - killed)
    console.print(f"All of it took {time.monotonic() - began:.0f} s.")
    dead = f"gpu{VICTIM + 1}"
    return bool(ledger.after) and not ledger.lost and dead not in ledger.after


def show(console: Console, views: list[dict[str, Any]], ledger: Ledger, since: float) -> None:
    """Print the table of the hosts, and the sums."""
    table = Table(title="what each host did")
    for title in ("host", "state", "awake", "answered", "after the kill", "wakes/min", "in flight"):
        table.add_column(title, justify="left" if title in {"host", "state", "awake"} else "right")
    for name, host in views[0]["hosts"].items():
        table.add_row(
            name,
            host["state"],
            ", ".join(host["awake"]) or "-",
            str(ledger.answered[name]),
            str(ledger.after[name]),
            str(host["wakes_per_minute"]),
            str(host["in_flight"]),
        )
    console.print(table)
    waits = sorted(ledger.waits) or [0.0]
    console.print(
        f"{sum(ledger.answered.values())} answered; {ledger.broken} were on the host that died, and were told so;"
        f" {len(ledger.lost)} lost. Waits: mean {sum(waits) / len(waits):.2f} s,"
        f" p95 {waits[int(len(waits) * 0.95) - 1]:.2f} s. {since:.0f} s since the kill."
    )
    stores = [view["store"] for view in views if view["store"] is not None]
    if stores:
        away = [store["trouble"] for store in stores if store["trouble"]]
        console.print(f"The store {'is away: ' + away[0] if away else 'is back'}, and held no request up.")
    for line in ledger.lost[:5]:
        console.print(line, style="red", markup=False)


def main() -> int:
    """Run the demo."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description="A fleet of four hosts with real engines on the CPU.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long to send requests")
    given = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    stages = [Stage(console, usual_port=False) for _ in range(HOSTS)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    code = 1
    try:
        code = 0 if asyncio.run(perform(console, stages, given.seconds)) else 1
    except (DemoError, aiohttp.ClientError, openai.OpenAIError) as error:
        console.print(f"The demo failed: {error}", style="red", markup=False)
    except KeyboardInterrupt:
        code = 130
    if code == 1:
        console.print(f"The logs are in {', '.join(str(stage.run) for stage in stages)}.", markup=False)
    else:
        for stage in stages:
            stage.strike()
    return code


if __name__ == "__main__":
    sys.exit(main())
