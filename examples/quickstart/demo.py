#!/usr/bin/env python3
"""Show llmux at work: real engines on the CPU, real hooks, the official SDKs, many switches.

It cleans up after itself, however it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # to import what follows takes seconds, in which Ctrl-C should leave no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import aiohttp
import openai
from clients import Clients, Ledger
from comparison import POLICIES, Outcome, plan, send, show
from display import Display
from machine import Machine, measure
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from tiny_gguf import Shape, demo_folder, write

HERE = Path(__file__).resolve().parent
SHAPES = (
    Shape("quill", dim=256, layers=4, feed_forward=704),
    Shape("atlas", dim=512, layers=8, heads=8, kv_heads=4, feed_forward=1408, seed=1),
    Shape("vector", dim=128, feed_forward=352, seed=2),
)
MODELS = [shape.name for shape in SHAPES]
USUAL_PORT = 3000
AT_LEAST = 8.0  # seconds of load, by default
AT_MOST = 14.0  # on a machine that is busy with other things, until there are so many switches
SWITCHES = 12
BUDGET = 56.0  # seconds for all of it, about
ENOUGH = 3  # switches without which nothing was shown


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def is_free(port: int) -> bool:
    """Say whether the port can be bound."""
    with socket.socket() as one, contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", port))
        return True
    return False


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, below those that outgoing connections are given."""
    candidates = range(31001, 32301)
    return [port for port in random.sample(candidates, 100) if is_free(port)][:count]


class Stage:
    """The models, a folder for this run, and llmux itself; afterwards nothing of it is left."""

    def __init__(self, console: Console, *, usual_port: bool) -> None:
        self.console = console
        self.folder = demo_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        self.log = self.run / "llmux.log"
        port, *engines = free_ports(len(MODELS) + 1)
        self.ports = dict(zip(MODELS, engines, strict=True))
        self.port = USUAL_PORT if usual_port and is_free(USUAL_PORT) else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {
            **os.environ,
            # The hooks need curl, wget or a python3; a bare machine may have only the one that runs this.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LLMUX_DEMO_DIR": str(self.folder),
            "LLMUX_DEMO_RUN": str(self.run),
            "LLMUX_DEMO_PYTHON": sys.executable,
            "LLMUX_DEMO_PORT": str(self.port),
            **{f"LLMUX_DEMO_{name.upper()}_PORT": str(port) for name, port in self.ports.items()},
        }

    @contextlib.contextmanager
    def set_up(self, policy: str = "adaptive") -> Iterator[subprocess.Popen[bytes]]:
        """Make the models, start llmux; at the end stop it, and make sure that no engine is left."""
        for shape in SHAPES:
            path = self.folder / f"{shape.name}.gguf"
            if not path.exists():
                write(path, shape)
        command = [Path(sys.executable).with_name("llmux"), "-c", HERE / "config.yaml"]
        with (
            self.log.open("wb") as log,
            subprocess.Popen(
                command,
                env=self.env | {"LLMUX_DEMO_POLICY": policy},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops llmux
            ) as llmux,
            guard(llmux),
        ):
            try:
                yield llmux
            finally:
                self.tear_down(llmux)

    def tear_down(self, llmux: subprocess.Popen[bytes]) -> None:
        """Stop llmux, which puts its engines to sleep, and any engine that is left all the same."""
        llmux.terminate()
        try:
            llmux.wait(20)
        except subprocess.TimeoutExpired:
            llmux.kill()
        for name, port in self.ports.items():
            hook_env = {"LLMUX_MODEL": name, "LLMUX_PORT": str(port), "PID_DIR": str(self.run)}
            subprocess.run(
                [HERE.parents[1] / "hooks" / "llama-cpp.sh", "stop"],
                env=self.env | hook_env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                check=False,
            )

    def strike(self) -> None:
        """Remove the folder of this run."""
        shutil.rmtree(self.run, ignore_errors=True)


@contextlib.contextmanager
def guard(llmux: subprocess.Popen[bytes]) -> Iterator[None]:
    """Have llmux stopped even if the demo is killed: its end of a pipe closes then, whatever ended it."""
    watch = ["sh", "-c", 'read -r _; kill "$1"', "sh", str(llmux.pid)]
    with subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True) as guardian:
        try:
            yield
        finally:
            guardian.kill()


class Status:
    """Asks llmux how it is."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url

    async def now(self) -> Mapping[str, Any]:
        """Return ``/llmux/status``."""
        async with self.session.get(f"{self.url}/llmux/status") as response:
            response.raise_for_status()
            answer: Mapping[str, Any] = await response.json()
            return answer

    async def switches(self) -> int:
        """Return how many switches have succeeded, from ``/metrics``."""
        return int(await self.total("llmux_switch_total", result="success"))

    async def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all labels but these."""
        async with self.session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        # All of it takes 20 ms to read, which the engines want.
        lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
        families = text_string_to_metric_families("\n".join([*lines, ""]))
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def costs(self) -> list[float]:
        """Return what switches between models took, in seconds."""
        return [row["seconds"] for row in (await self.now())["switch_costs"] if row["from"] and row["samples"]]

    async def ready(self, llmux: subprocess.Popen[bytes]) -> None:
        """Wait until llmux is ready."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if llmux.poll() is not None:
                raise DemoError(f"llmux ended with exit code {llmux.returncode}")
            with contextlib.suppress(aiohttp.ClientError):
                async with self.session.get(f"{self.url}/ready") as response:
                    if response.ok:
                        return
            await asyncio.sleep(0.05)
        raise DemoError("llmux did not become ready")


async def look(stage: Stage, llmux: subprocess.Popen[bytes]) -> Machine:
    """Measure what this machine can do, through llmux."""
    clients = Clients(stage.url, Ledger(), {})
    async with aiohttp.ClientSession() as session:
        status = Status(session, stage.url)
        await status.ready(llmux)
        try:
            return await measure(clients, status.costs, stage.console)
        finally:
            await clients.close()


async def play(stage: Stage, machine: Machine, at_least: float) -> bool:
    """Send the load and show what happens; say whether all went well."""
    ledger, stop, started = Ledger(), asyncio.Event(), time.monotonic()
    clients = Clients(stage.url, ledger, {shape.dim: shape.name for shape in SHAPES}, machine.tokens)
    async with aiohttp.ClientSession() as session:
        status = Status(session, stage.url)
        before = await status.switches()
        with Display(stage.console, MODELS, ledger) as display:
            programs = clients.start(stop)
            try:
                while not all(program.done() and program.result() is None for program in programs):
                    display.show(await status.now())
                    seconds = time.monotonic() - started
                    if seconds > at_least and await status.switches() - before >= SWITCHES:
                        stop.set()
                    if seconds > AT_MOST:
                        stop.set()
                    await asyncio.sleep(0.1)
                await asyncio.gather(*programs)
            finally:
                for program in programs:
                    program.cancel()
                await asyncio.gather(*programs, return_exceptions=True)
                await clients.close()
        switches = await status.switches() - before
        display.summary(await status.now(), switches, time.monotonic() - started)
    return bool(ledger.answers) and not ledger.failures and not ledger.misrouted and switches >= ENOUGH


async def compare(stage: Stage, machine: Machine, seconds_left: float) -> bool:
    """Send the same requests to llmux under two policies, and show what became of them."""
    outcomes, planned, right = [], plan(machine, seconds_left), True
    for policy in POLICIES:
        these = f"the same {len(planned)} requests" if outcomes else f"{len(planned)} requests"
        stage.console.print(f"Now {these} under {policy} …", style="dim")
        with stage.set_up(policy) as llmux:
            async with aiohttp.ClientSession() as session:
                status = Status(session, stage.url)
                await status.ready(llmux)
                clients, started = Clients(stage.url, Ledger(), {}), time.monotonic()
                try:
                    answers = await send(clients, planned)
                    seconds = time.monotonic() - started
                finally:
                    await clients.close()
                right = right and all(answer.model == answer.expected for answer in answers)
                draining = await status.total("llmux_switch_drain_duration_seconds_sum")
                whole = await status.total("llmux_switch_duration_seconds_sum")
                waits = [answer.waited for answer in answers]
                switches = await status.switches()
                answer = statistics.fmean(answer.seconds - answer.waited for answer in answers)
                outcomes.append(Outcome(policy, waits, switches, whole - draining, draining, seconds, answer))
    show(stage.console, outcomes)
    return right


async def serve(stage: Stage, llmux: subprocess.Popen[bytes]) -> bool:
    """Stay up until the user has seen enough."""
    async with aiohttp.ClientSession() as session:
        status = Status(session, stage.url)
        await status.ready(llmux)
        body = '{"model": "quill", "max_tokens": 40, "messages": [{"role": "user", "content": "hello"}]}'
        stage.console.print(
            f"llmux serves {', '.join(MODELS)} at {stage.url}. In another terminal:\n\n"
            f"  curl {stage.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n\n"
            f"The same with another model makes it switch: {stage.url}/llmux/ui shows it. Ctrl-C ends it.\n",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        with Display(stage.console, MODELS, Ledger()) as display:
            while llmux.poll() is None:
                display.show(await status.now())
                await asyncio.sleep(0.1)
    raise DemoError(f"llmux ended with exit code {llmux.returncode}")


async def perform(stage: Stage, seconds: float | None) -> bool:
    """Run the load and the comparison, or without a time stay up."""
    began = time.monotonic()
    with stage.set_up() as llmux:
        if seconds is None:
            return await serve(stage, llmux)
        machine = await look(stage, llmux)
        if not await play(stage, machine, seconds):
            return False
    return await compare(stage, machine, BUDGET - (time.monotonic() - began))


async def interruptible(stage: Stage, seconds: float | None) -> int:
    """Perform; return an exit code. INT and TERM end it in order."""
    task = asyncio.ensure_future(perform(stage, seconds))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return 0 if await task else 1
    except asyncio.CancelledError:
        return 130 if seconds else 0


def main() -> int:
    """Run the demo."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description="llmux with real engines on the CPU.")
    parser.add_argument("--serve", action="store_true", help="stay up until Ctrl-C")
    parser.add_argument("--seconds", type=float, default=AT_LEAST, help="how long to send requests, at least")
    given = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    stage = Stage(console, usual_port=given.serve)
    code = 1
    try:
        code = asyncio.run(interruptible(stage, None if given.serve else given.seconds))
    except (DemoError, aiohttp.ClientError, openai.OpenAIError) as error:
        console.print(f"The demo failed: {error}", style="red", markup=False)
    except KeyboardInterrupt:
        code = 130
    if code == 1:
        console.print(f"llmux's log is {stage.log}; it ends:", markup=False)
        tail = stage.log.read_text(errors="replace").splitlines()[-15:]
        console.print("\n".join(tail), markup=False)
    else:
        stage.strike()
    return code


if __name__ == "__main__":
    sys.exit(main())
