"""Has the llmux of another revision serve a scripted load, and keeps its record and its state file.

    git archive f51077b | tar x -C /tmp/then
    PYTHONPATH=/tmp/then .venv/bin/python tests/server/older/make.py fifo tests/server/older

The load has levels, prefetches that are ended, clients that leave, waits beyond ``max_wait``, a pin, a lease
that is waited for, the manual mode, and a model that an operator puts to sleep.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from llmux.app import FRONT, build_app
from tests.server.house import ALIVE, SLEEP, WAKE, House, until

StateFile = import_module("llmux.observability.state").StateFile  # where that revision has it
SLOWLY = {"wake": f"sleep 0.03; {WAKE}", "sleep": f"sleep 0.01; {SLEEP}", "alive": ALIVE}
LEVELS = [{"ram": "1GiB"}, "disk"]
MODELS = {
    "a": {**SLOWLY, "levels": LEVELS},
    "b": {**SLOWLY, "levels": LEVELS, "aliases": ["other"]},
    "c": {**SLOWLY, "prefetch": "sleep 9"},
    "d": {**SLOWLY, "levels": LEVELS, "max_queued": 3},
}
RULES = {"max_wait": "300ms", "request_timeout": "20s", "min_active": "20ms"}


async def serve(house: House, policy: str) -> None:
    """Serve with a record and a state file."""
    more = {"host_memory": "1GiB", "record": "record.jsonl", "policy": {"use": policy, **RULES}}
    config = house.config(MODELS, **more)
    app, house.switcher = build_app(config, log=house.log, store=StateFile(house.folder / "state.json"))
    house.front = app[FRONT]
    await house.serve(app)
    house.front.port = house.port
    house.front.configure(config)
    await until(lambda: house.switcher.core.state.ready)


async def requests(house: House) -> None:
    """Some arrive, and some of them leave."""
    chance, pending = random.Random(1), []
    for number in range(40):
        pending.append(asyncio.create_task(house.chat(chance.choice("aaaabbbccd"))))
        await asyncio.sleep(chance.uniform(0.0, 0.05))
        if number % 15 == 7:
            line = await house.begin("POST", "/v1/x", {"model": chance.choice("abc")})
            await asyncio.sleep(0.01)
            line.abort()
    await asyncio.gather(*pending)


async def operators(house: House) -> None:
    """Operators pin, lend the GPU, and switch by hand."""
    state = house.switcher.core.state
    await house.ask("POST", "/llmux/models/a/pin")
    await asyncio.sleep(0.1)
    await house.chat("b")
    await house.ask("POST", "/llmux/models/a/unpin")
    await house.chat("b")
    lease = await house.ask("POST", "/llmux/lease", {"for": "1h", "requests": "wait"})
    waiter = await house.begin("POST", "/v1/x", {"model": "c"})
    await until(lambda: state.lease.told and house.queued("c"))
    await house.ask("POST", "/llmux/lease", {"for": 0.05, "id": lease.json()["id"]})
    await waiter.reply()
    await house.ask("POST", "/llmux/manual")
    waiter = await house.begin("POST", "/v1/x", {"model": "b"})
    await until(lambda: house.queued("b"))
    await house.ask("POST", "/llmux/models/b/wake")
    await waiter.reply()
    await house.ask("POST", "/llmux/models/b/sleep")
    await until(lambda: state.switch is None)
    await house.ask("POST", "/llmux/models/c/pin", {"reason": "it is shown to guests"})
    await until(lambda: state.switch is None)


async def main(policy: str, folder: Path) -> None:
    """Serve, and keep what is left."""
    with tempfile.TemporaryDirectory() as given:
        async with House(Path(given)) as house:
            await serve(house, policy)
            await requests(house)
            await operators(house)
            await house.close()
            record = (house.folder / "record.jsonl").read_bytes()
            (folder / f"{policy}.jsonl.gz").write_bytes(gzip.compress(record, mtime=0))
            (folder / "state.json").write_bytes((house.folder / "state.json").read_bytes())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
