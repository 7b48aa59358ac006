"""Hooks that fail at random, engines that die at random, clients that leave at random: nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal

import pytest
from lease.raw import Gone

SEEDS = [int(n) for n in os.environ.get("CHAOS_SEEDS", "1 2").split()]
DICE = "test $(($(od -An -N1 -tu1 /dev/urandom) % {n})) -ne 0 || {{ sleep 0.02; echo unlucky; exit 1; }}"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stop", [True, False])
async def test_chaos(lab, seed, stop):  # noqa: C901
    more = {"stop": "sh ./hook.sh stop", "verify": "sh ./hook.sh verify"} if stop else {}
    lab.write(
        {name: dict(more) for name in "abc"},
        alive_every="200ms",
        backoff={"first": "50ms", "max": "200ms"},
        policy={"drain_timeout": "300ms", "max_wait": "1s"},
    )
    for key in "abc":
        lab.script(key, "wake", DICE.format(n=8))
        lab.script(key, "sleep", DICE.format(n=8))
    lab.allow_again = True
    lab.start()
    chance = random.Random(seed)
    statuses: list[int] = []

    async def client(n: int):
        for _ in range(8):
            name = chance.choice("abc")
            do = chance.choice([{}, {"delay": 0.02}, {"sse": 8, "interval": 0.01}])
            try:
                if chance.random() < 0.3:
                    line = await lab.begin(name, do=do)
                    await asyncio.sleep(chance.random() * 0.2)
                    await (line.reset() if n % 2 else line.close())
                else:
                    statuses.append((await lab.chat(name, do=do, wait=15)).status)
            except (Gone, ConnectionError):
                statuses.append(0)
            await asyncio.sleep(chance.random() * 0.05)

    async def reaper() -> None:
        while True:
            await asyncio.sleep(0.2 + chance.random() * 0.4)
            with contextlib.suppress(OSError, ValueError):
                os.kill(lab.engine_pid(chance.choice("abc")), signal.SIGKILL)

    killing = asyncio.create_task(reaper())
    await asyncio.gather(*(client(n) for n in range(8)))
    killing.cancel()
    assert set(statuses) <= {200, 502, 503}, statuses
    assert statuses.count(200) >= 10, statuses
    for key in "abc":
        lab.unscript(key, "wake")
        lab.unscript(key, "sleep")
    for name in "abcabc":

        async def served(name=name):
            return (await lab.chat(name)).status == 200

        await lab.until(served, wait=8, every=0.05)
    status = await lab.status()
    assert all(m["in_flight"] == 0 and m["queued"] == 0 for m in status["models"].values())
    assert (await lab.get("/health")).status == 200
