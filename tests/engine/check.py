"""The shipped hooks with the engines that they are for: `make engines`.

Each engine which is on this machine (tests/engine/installed.py says where it is looked for) goes through

1. ``llmux hooks test`` of each of its models,
2. a mixed load of the official SDKs, streams and whole answers, until there have been 20 switches, and
3. SIGKILL of the engine while it streams: the SDK raises, and the next request is answered.

Exit code 1 when one fails. An engine that is not here is named, with the reason, and is no failure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import yaml

from tests.engine.installed import ENGINES, Installed, MissingError
from tests.engine.mux import LLMUX, Mux
from tests.engine.real import end_engines, with_tools
from tests.harness.ports import free_port

MESSAGES: list[Any] = [{"role": "user", "content": "The capital of France is"}]
SWITCHES = 20
CLIENTS = 4
PATIENCE = 600.0  # seconds for one answer
NOTICED = 60.0  # seconds after which a dead model must have been noticed
LONG = 3000  # tokens of an answer in the middle of which the engine is killed


class FailedError(Exception):
    """One of the three went wrong."""


class Check:
    """One engine, in a folder of its own."""

    def __init__(self, installed: Installed, folder: Path) -> None:
        self.installed = installed
        self.config = folder / "config.yaml"
        self.port = free_port()
        timeouts = {"wake": installed.seconds, "sleep": installed.seconds, "alive": 30}
        models = {name: {"timeouts": timeouts, **section} for name, section in installed.models.items()}
        settings = {
            "port": self.port,
            "state": "state.json",
            "on_exit": "sleep",
            "alive_every": "2s",
            "models": models,
        }
        settings["policy"] = {"use": "fifo"}
        self.config.write_text(yaml.safe_dump(settings, sort_keys=False))
        os.environ["PID_DIR"] = str(folder / "pids")
        self.mux = Mux.on(self.config, self.port)

    def hooks(self) -> str:
        """Try the hooks of each model."""
        for name in self.installed.models:
            done = subprocess.run(
                [LLMUX, "hooks", "test", name, "-c", self.config, "-v"],
                env=with_tools(), capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise FailedError(f"hooks test {name}:\n{done.stdout}{done.stderr}")
        return f"{len(self.installed.models)} models, nothing found"

    async def load(self) -> str:
        """Ask with several clients until there have been enough switches."""
        self.answers: Counter[str] = Counter()
        started = time.monotonic()
        async with self._sdks(), asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(random.Random(number)))
        answers, took = sum(self.answers.values()), time.monotonic() - started
        return f"{self._switches()} switches, {answers} answers in {took:.0f} s: {dict(self.answers)}"

    async def kill(self) -> str:
        """Kill the engine of the slower model, whose streams last, while it streams, and ask once more."""
        async with self._sdks():
            return await self._survive("slow")

    async def _survive(self, name: str) -> str:
        error = await self._cut_off(name)
        # Until the kernel has buried it, its port takes connections: 502, which the SDKs try again. A server in
        # front of it says 400 until the alive hook has noticed.
        client = self.openai.with_options(max_retries=5)
        until = time.monotonic() + NOTICED
        while True:
            try:
                answer = await client.completions.create(model=name, prompt="The capital", max_tokens=4)
                break
            except openai.BadRequestError:
                if not self.installed.hides_deaths or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.2)
        self._answered(answer.model, name)
        return error

    def _answered(self, model: str, name: str) -> None:
        if model.removesuffix(":latest") != name:
            raise FailedError(f"{model} answered in place of {name}")

    async def _client(self, chance: random.Random) -> None:
        ways = [self._chat, self._stream] + [self._message] * ("anthropic" in self.installed.speaks)
        while self._switches() < SWITCHES:
            name = chance.choice(list(self.installed.models))
            way = chance.choice(ways)
            self._answered(await way(name), name)
            self.answers[f"{way.__name__[1:]} of {name}"] += 1

    async def _chat(self, name: str) -> str:
        answer = await self.openai.chat.completions.create(model=name, messages=MESSAGES, max_tokens=8)
        return answer.model

    async def _stream(self, name: str) -> str:
        model = ""
        stream = await self.openai.chat.completions.create(
            model=name, messages=MESSAGES, max_tokens=32, stream=True
        )
        async for chunk in stream:
            model = chunk.model
        return model

    async def _message(self, name: str) -> str:
        answer = await self.claude.messages.create(model=name, messages=MESSAGES, max_tokens=8)
        return answer.model

    async def _cut_off(self, name: str) -> str:
        stream = await self.openai.completions.create(
            model=name, prompt="x", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
        )
        chunks, finished = 0, False
        try:
            async for chunk in stream:
                chunks += 1
                finished = finished or chunk.choices[0].finish_reason is not None
                if chunks == 2:
                    self._end(name)
        except FailedError:
            raise
        except Exception as error:  # noqa: BLE001 - the SDK's, or that of the library beneath it
            return f"{type(error).__name__} after {chunks} chunks"
        if self.installed.hides_deaths and not finished:
            return (
                f"the server in front of the model ended the stream after {chunks} chunks, without a finish_reason"
            )
        raise FailedError(f"the stream of {name} ended as if it were whole, after {chunks} chunks")

    def _end(self, name: str) -> None:
        marks = [mark.encode() for mark in self.installed.marks[name]]
        found = False
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = file.read_bytes()
                if all(mark in line for mark in marks) and int(file.parent.name) != os.getpid():
                    os.kill(int(file.parent.name), signal.SIGKILL)
                    found = True
        if not found:
            raise FailedError(f"no process of {name} was found")

    @contextlib.asynccontextmanager
    async def _sdks(self) -> AsyncIterator[None]:
        url = self.mux.url
        async with (
            openai.AsyncOpenAI(
                base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
            ) as self.openai,
            anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE) as self.claude,
        ):
            yield

    def _switches(self) -> int:
        return int(sum(value for labels, value in self.mux.samples("llmux_switch_total") if labels["to"] != ""))


def check(name: str) -> bool | None:
    """Try one engine; None where it is not on this machine."""
    with tempfile.TemporaryDirectory(prefix=f"llmux-{name}-") as text:
        folder = Path(text)
        try:
            with ENGINES[name](folder) as installed:
                it = Check(installed, folder)
                try:
                    tell(name, "hooks test", it.hooks())
                    it.mux.start()
                    tell(name, "mixed load", asyncio.run(it.load()))
                    tell(name, "SIGKILL in a stream", asyncio.run(it.kill()))
                    tell(name, "stopped", f"exit code {it.mux.stop()}")
                except BaseException as error:
                    tell(name, "FAILED", f"{error or type(error).__name__}: {getattr(error, 'exceptions', '')}")
                    if it.mux.process is not None:
                        sys.stdout.write(it.mux.said()[-3000:])
                    if not isinstance(error, Exception):
                        raise
                    return False
                finally:
                    it.mux.clean_up()
                    end_engines(folder / "pids")
        except MissingError as error:
            tell(name, "not here", str(error))
            return None
    return True


def tell(name: str, what: str, said: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{name:<17} {what:<20} {said}\n")
    sys.stdout.flush()


def main() -> None:
    """Try the engines that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", choices=[*ENGINES, []], help="which ones; default: all")
    names = parser.parse_args().engines or list(ENGINES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # of `timeout`, say: what it started ends, too
    if False in [check(name) for name in names]:
        sys.exit(1)


if __name__ == "__main__":
    main()
