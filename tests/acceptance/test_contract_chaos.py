"""Hooks that fail at random, engines that die at random, clients that leave at random: nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal

import pytest

from tests.harness.lease.raw import Gone

SEEDS = [int(n) for n in os.environ.get("CHAOS_SEEDS", "1").split()]
DICE = "test $(($(od -An -N1 -tu1 /dev/urandom) % {n})) -ne 0 || {{ sleep 0.02; echo unlucky; exit 1; }}"
NAMES = "abc"


class Chaos:
    def __init__(self, lab, seed: int) -> None:
        self.lab = lab
        self.chance = random.Random(seed)
        self.statuses: list[int] = []

    async def client(self, n: int) -> None:
        for _ in range(8):
            name = self.chance.choice(NAMES)
            do = self.chance.choice([{}, {"delay": 0.02}, {"sse": 8, "interval": 0.01}])
            try:
                if self.chance.random() < 0.3:
                    line = await self.lab.begin(name, do=do)
                    await asyncio.sleep(self.chance.random() * 0.2)
                    await (line.reset() if n % 2 else line.close())
                else:
                    self.statuses.append((await self.lab.chat(name, do=do)).status)
            except (Gone, ConnectionError):
                self.statuses.append(0)
            await asyncio.sleep(self.chance.random() * 0.05)

    async def reaper(self) -> None:
        while True:
            await asyncio.sleep(0.2 + self.chance.random() * 0.4)
            with contextlib.suppress(OSError, ValueError):
                os.kill(self.lab.engine_pid(self.chance.choice(NAMES)), signal.SIGKILL)

    async def operator(self) -> None:
        while True:
            await asyncio.sleep(0.05 + self.chance.random() * 0.2)
            verb = self.chance.choice(["wake", "sleep", "pin", "unpin", "reset", "lease", "end", "reload"])
            name = self.chance.choice(NAMES)
            if verb == "reload":
                self.lab.signal(signal.SIGHUP)
            elif verb == "lease":
                assert (await self.lab.post("/llmux/lease", body={"for": "100ms"})).status in (202, 409)
            elif verb == "end":
                assert (await self.lab.ask("DELETE", "/llmux/lease")).status in (202, 409)
            else:
                body = {"for": "150ms"} if verb == "pin" else {}
                assert (await self.lab.post(f"/llmux/models/{name}/{verb}", body=body)).status in (202, 409)


def models(kind: str) -> dict[str, dict]:
    if kind == "with stop":
        return {n: {"stop": "sh ./hook.sh stop", "verify": "sh ./hook.sh verify"} for n in NAMES}
    if kind == "placed":
        env = {"LEASE_CAPACITY": "20", "LEASE_SIZE": "10"}
        return {n: {"memory": "10GiB", "env": {"KEY": n, **env}} for n in NAMES}
    return {n: {} for n in NAMES}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["plain", "with stop", "placed", "operated"])
async def test_chaos(lab, seed, kind):
    lab.write(
        models(kind),
        alive_every="200ms",
        backoff={"first": "50ms", "max": "200ms"},
        policy={"drain_timeout": "300ms", "max_wait": "1s"},
        capacity="20GiB" if kind == "placed" else None,
    )
    for key in NAMES:
        lab.script(key, "wake", DICE.format(n=8))
        lab.script(key, "sleep", DICE.format(n=8))
    lab.check_holding = kind in ("plain", "with stop")
    lab.start()
    chaos = Chaos(lab, seed)
    trouble = [asyncio.create_task(chaos.reaper())]
    if kind == "operated":
        trouble.append(asyncio.create_task(chaos.operator()))
    await asyncio.gather(*(chaos.client(n) for n in range(8)))
    for task in trouble:
        if task.done():
            task.result()
        task.cancel()
    assert set(chaos.statuses) <= {200, 502, 503}, chaos.statuses
    assert 200 in chaos.statuses, chaos.statuses  # how many is a matter of how fast the machine is
    for key in NAMES:
        lab.unscript(key, "wake")
        lab.unscript(key, "sleep")
    for name in NAMES * 2:

        async def served(name=name):
            return (await lab.chat(name)).status == 200

        await lab.until(served, every=0.05)
    status = await lab.status()
    assert all(m["in_flight"] == 0 and m["queued"] == 0 for m in status["models"].values())
    assert (await lab.get("/health")).status == 200
