"""Is the simulator right? Real engines under several policies, and its prediction from their records.

    python -m tests.benchmarks.truth             its prediction from the records in tests/simulator/records
    python -m tests.benchmarks.truth --record    record them again: llama.cpp's server, ten minutes

Two models of different size take turns on the CPU; the load is ``calm`` or ``overload``.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp

from examples.quickstart.tiny_gguf import Shape
from tests.engine.mux import Engine, Mux
from tests.simulator.truth import LOADS, POLICIES, RECORDS, Truth, measured, records, simulated

SHAPES = (
    Shape("quill", dim=256, layers=4, feed_forward=704),
    Shape("atlas", dim=512, layers=8, heads=8, kv_heads=4, feed_forward=1408, seed=1),
)
TOKENS = (20, 120)


def truths(load: str) -> Iterator[Truth]:
    """Compare each record with what is simulated from it and from the others."""
    known = records(load)
    for source, record in known.items():
        for policy in known:
            yield Truth(load, source, policy, measured(known[policy]), simulated(record, policy))


async def play(url: str, rate: float, seconds: float) -> None:
    """Send the same requests at the same times as at every call with these arguments."""
    chance = random.Random(7)
    at, tasks = 0.0, []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = asyncio.get_running_loop().time()

        async def one(at: float, model: str, tokens: int, words: int) -> None:
            await asyncio.sleep(began + at - asyncio.get_running_loop().time())
            message = {"role": "user", "content": "word " * words}
            body = {"model": model, "messages": [message], "max_tokens": tokens, "stream": True}
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()

        while (at := at + chance.expovariate(rate)) < seconds:
            model = chance.choice([shape.name for shape in SHAPES])
            tasks.append(one(at, model, chance.randint(*TOKENS), chance.randint(5, 40)))
        await asyncio.gather(*tasks)


def make(load: str, policy: str) -> None:
    """Record one policy under one load."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engines = {shape.name: Engine(shape) for shape in SHAPES}
        mux = Mux(folder, engines, record="record.jsonl", policy={"use": policy})
        try:
            mux.start()
            asyncio.run(play(mux.url, *LOADS[load]))
            mux.stop()
        finally:
            mux.clean_up()
        RECORDS.mkdir(exist_ok=True)
        packed = gzip.compress((folder / "record.jsonl").read_bytes(), mtime=0)
        (RECORDS / f"{load}-{policy}.jsonl.gz").write_bytes(packed)


def main() -> None:
    """Record where asked, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="make the records anew, with real engines")
    if parser.parse_args().record:
        for load in LOADS:
            for policy in POLICIES:
                print(f"{load}, {policy} ...", flush=True)
                make(load, policy)
    for load in LOADS:
        for each in truths(load):
            mean, p95 = each.ratios
            own = "" if each.source == each.policy else f" from {each.source}"
            print(
                f"{load:9} {each.policy + own:30} measured {each.measured[0]:5.2f} {each.measured[1]:6.2f} s,"
                f" simulated {each.simulated[0]:5.2f} {each.simulated[1]:6.2f} s: {mean:.2f} {p95:.2f}"
            )


if __name__ == "__main__":
    main()
