"""What the accounts cost: per request and event, next to a llmux without them, and queries to a large ledger.

    python tests/benchmarks/accounts.py request [--rounds 12] [--revision 4346424]
    python tests/benchmarks/accounts.py direct
    python tests/benchmarks/accounts.py ledger [--rows 10000000] [--folder /var/tmp]

``request``: two llmuxes of this tree, one with ``ledger``, run at once on one core and get the same load in turns:
JSON requests, then streams of ``SHORT`` and of ``LONG`` events. The cost of a stream is modelled as a constant
plus a cost per event, which the two lengths separate. Prints microseconds of CPU of the whole process, the event
loop thread's part of it, the median of the rounds' differences and that of their ratios. The ledger's work within
``SETTLES`` seconds after a load is included. With ``--revision`` a llmux of that revision with accounts takes its
turns, too.

``direct``: the share of the code alone, in this process, where other load hardly shows: a request that enters and
ends, and an event that is passed on, in the loop, in turns without a ledger and with one; and their processing in
the ledger's thread. The first quarter of the rounds counts.

``ledger``: writes a ledger of so many rows over 90 days, with 20 keys and 5 models; then queries its usage, and
deletes rows. Prints microseconds a row, the size, and the times of each.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measure
import proxy_speed
import rivals
from simulate_speed import unpack, unpack_here

from llmux.accounts import usage
from llmux.accounts.ledger_file import BATCH, FORGOTTEN, Row, Store
from llmux.app import middleware_for
from llmux.config import Config
from llmux.middleware.context import RequestContext, new_id
from llmux.middleware.paths import ForwardedPaths
from llmux.proxy import Exchange
from llmux.proxy.relay import Relay
from llmux.upstream import EngineActivity, EngineAddress

DAYS = 90


SHORT, LONG = 10, 200  # events of a stream
RATE = 100  # of them a second
SETTLES = 0.4  # seconds
KINDS = ("a JSON request", "a stream", "an event", f"a {LONG}th of a stream of {LONG} events")


def spent(pid: int) -> tuple[float, float]:
    """Return the microseconds of CPU that a process has had: all of it, and the event loop's thread."""
    loop = int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0])
    return proxy_speed.spent(pid), loop / 1000


def under(load: tuple[Any, ...], pid: int) -> tuple[Any, tuple[float, float]]:
    """Put a process under a load; return what the load saw, and what it cost."""
    before = spent(pid)
    seen = measure.client(*load)
    time.sleep(SETTLES)
    all_, loop = (now - then for now, then in zip(spent(pid), before, strict=True))
    return seen, (all_, loop)


def one_round(port: int, pid: int) -> dict[str, tuple[float, float]]:
    """Return the microseconds of a request, a stream and an event: of all, and of the loop's thread."""
    seen, cost = under(("full", port, proxy_speed.PATH, 32, 0.6), pid)
    figures = {KINDS[0]: tuple(part / seen["complete"] for part in cost)}
    by_length = []
    for length, seconds in ((SHORT, 1.0), (LONG, 2.4)):
        path = f"{proxy_speed.PATH}?n={length}&r={RATE}&s=200"
        seen, cost = under(("stream", port, path, 60, seconds, 0.2), pid)
        by_length.append([part / seen["chunks"] for part in cost])
    pairs = list(zip(*by_length, strict=True))
    figures[KINDS[1]] = tuple((short - long) * SHORT * LONG / (LONG - SHORT) for short, long in pairs)
    figures[KINDS[2]] = tuple((long * LONG - short * SHORT) / (LONG - SHORT) for short, long in pairs)
    figures[KINDS[3]] = tuple(long for _, long in pairs)
    return figures


def requests(rounds: int, revision: str | None) -> None:
    """Compare, and print."""
    measure.build()
    measure.pin(measure.LOAD_CORE)
    plain = rivals.LLMUX
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = (stack.enter_context(rivals.engine(scratch)), stack.enter_context(rivals.engine(scratch)))
        code = unpack_here()
        running = {"plain": proxy_speed.started(stack, "plain", code, engines, scratch)}
        rivals.LLMUX = plain + "ledger: ledger.db\n"
        running["metered"] = proxy_speed.started(stack, "metered", code, engines, scratch)
        if revision is not None:
            then = unpack(revision)
            running[f"metered at {revision}"] = proxy_speed.started(stack, "then", then, engines, scratch)
        rivals.LLMUX = plain
        found = []
        for _ in range(rounds):  # by turns, and neither is always the first
            found.append({name: one_round(*each) for name, each in running.items()})
            running = dict(reversed(running.items()))
    metered = sorted(found[0].keys() - {"plain"})
    for what in KINDS:
        for part, at in (("", 0), (", the loop's thread", 1)):
            without, *others = ([one[name][what][at] for one in found] for name in ("plain", *metered))
            print(f"{what}{part}: plain {statistics.median(without):.2f} µs (least {min(without):.2f})")
            for name, with_ in zip(metered, others, strict=True):
                ratio = statistics.median(new / old for old, new in zip(without, with_, strict=True))
                more = statistics.median(new - old for old, new in zip(without, with_, strict=True))
                print(
                    f"    {name} {statistics.median(with_):.2f} (least {min(with_):.2f}): {more:+.2f} µs,"
                    f" {ratio:.3f} times"
                )


class Sink:
    """A client, its flow and its transport, which take everything."""

    modern = keep_alive = True
    writing_paused = False

    @property
    def flow(self) -> Sink:
        return self

    def open_transport(self) -> Any:
        return self

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        """Take it."""


EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"m","choices":[{"delta":{"content":"a"}}]}'
)
ANSWER = b'{"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":3,"total_tokens":15}}'
STREAMS, EACH = 60, 400  # streams by turns, and requests of one round
TOLD = 4  # events of which a relay is told at once


class InProcess:
    """An llmux in this process, and its loop's own code for a request and an event."""

    def __init__(self, folder: Path, more: str) -> None:
        folder.mkdir()
        file = folder / "config.yaml"
        file.write_text(
            f"state: state.json\nmodels: {{m: {{port: 9, wake: ':', sleep: ':', alive: ':'}}}}\n{more}"
        )
        front, self.switcher = middleware_for(Config.from_file(file))
        self.reporting = front.fast_path.reporting
        self.route = ForwardedPaths().decide(b"/v1/chat/completions", "POST")
        self.activity = EngineActivity()

    async def ready(self) -> None:
        async with self.switcher.hold("m"):
            pass

    def exchange(self) -> Exchange:
        counted = self.switcher.accounts is not None
        return Exchange(EngineAddress("127.0.0.1", 9), "id", self.activity, counted=counted)

    def requests(self) -> int:
        for _ in range(EACH):
            context = RequestContext(self.reporting, new_id(), self.route, self.switcher.now())
            context.asked = context.model = "m"
            context.ticket = self.switcher.enter("m", "")
            exchange = context.exchange = self.exchange()
            exchange.status, exchange.first_byte_at = 200, self.switcher.now()
            exchange.tail.append(ANSWER)
            context.finish(200)
        return EACH

    def events(self) -> int:
        loop = asyncio.get_running_loop()
        relays = [Relay(Sink(), self.exchange(), loop) for _ in range(STREAMS)]
        for relay in relays:
            relay.exchange.status, relay.exchange.opening = 200, EVENT
            relay._begin_body(stream=True)
        blocks = [[b"bc\r\n%b%d\n\n\r\n" % (EVENT, number)] * TOLD for number in range(10)]
        for chunks in blocks:
            for relay in relays:
                relay.chunks_passed(chunks)
        return len(blocks) * TOLD * STREAMS


async def direct(rounds: int = 60) -> None:
    """Measure in this process, and print."""
    with tempfile.TemporaryDirectory() as scratch:
        both = {
            "plain": InProcess(Path(scratch) / "plain", ""),
            "metered": InProcess(Path(scratch) / "metered", "ledger: ledger.db\n"),
        }
        for one in both.values():
            one.switcher.start()
        await asyncio.gather(*(one.ready() for one in both.values()))
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)  # as llmux does
        accounts = both["metered"].switcher.accounts
        assert accounts is not None
        ledger = accounts.ledger
        assert ledger is not None
        clock = time.pthread_getcpuclockid(ledger._thread.ident or 0)
        for what in ("requests", "events"):
            found: dict[str, list[float]] = {name: [] for name in (*both, "beside")}
            for _ in range(rounds):
                for name, one in both.items():
                    thread, began = time.clock_gettime(clock), time.thread_time()
                    count = getattr(one, what)()
                    found[name].append((time.thread_time() - began) / count * 1e6)
                    await asyncio.sleep(0.1)  # what is due beside the loop is not its code
                    ledger.wake()
                    await ledger.settled()
                    if name == "metered":
                        found["beside"].append((time.clock_gettime(clock) - thread) / count * 1e6)
            without, with_, beside = (sorted(each)[rounds // 4] for each in found.values())
            print(
                f"{what}, the loop's code: plain {without:.2f} µs, metered {with_:.2f}: {with_ - without:+.2f} µs;"
                f" the ledger's thread: {beside:.2f} µs"
            )
        for one in both.values():
            await one.switcher.stop()


def ledger(count: int, folder: Path) -> None:
    """Write a ledger, ask it, and print."""
    roll = random.Random(1)
    path = folder / "ledger.db"
    store = Store(path)
    now = round(time.time() * 1000)
    step = DAYS * 86_400_000 / count
    began = time.process_time()
    for start in range(0, count, BATCH):
        rows = [
            Row(
                time=round(now - (count - number) * step),
                request_id=f"{number:032x}", key=f"key-{roll.randrange(20)}",
                asked="alias", served=f"model-{roll.randrange(5)}", target="model", input=roll.randrange(4000),
                cached=0, output=roll.randrange(800), reasoning=0, estimated=0, cost=roll.randrange(10_000),
                currency="usd", price=1, waited=0, service=1200, gpu=900_000, switch=0, prompt=None, decode=None,
                status=200, reason="",
            )
            for number in range(start, min(start + BATCH, count))
        ]  # fmt: skip
        store.write(rows)
    took = time.process_time() - began
    print(f"{count:,} rows: {took / count * 1e6:.1f} µs of CPU a row, to make it included; "
          f"{path.stat().st_size / 1e9:.2f} GB")  # fmt: skip
    for by in ("key,model,day", "key,model", "day", "key", "hour", ""):
        question = usage.asked({"by": by, "since": f"{DAYS}d"}, now / 1000)
        times, cpu = [], time.process_time()
        for _ in range(5):
            began = time.perf_counter()
            found = usage.read(path, question)
            times.append(time.perf_counter() - began)
        print(
            f"by={by or '(nothing)'}: {len(found)} rows in {statistics.median(times) * 1000:.0f} ms,"
            f" {(time.process_time() - cpu) / len(times) * 1000:.0f} of CPU",
            flush=True,
        )
    slices = []
    for _ in range(200):
        began = time.perf_counter()
        assert store.forget(now)
        slices.append(time.perf_counter() - began)
    middle, most = statistics.median(slices) * 1000, max(slices) * 1000
    print(f"{FORGOTTEN} old rows deleted in {middle:.1f} ms, at most {most:.0f} ms")
    store.close()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("request", "direct", "ledger"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--revision")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    if options.what == "request":
        requests(options.rounds, options.revision)
        return
    if options.what == "direct":
        asyncio.run(direct())
        return
    folder = Path(tempfile.mkdtemp(prefix="llmux-ledger-", dir=options.folder))
    try:
        ledger(options.rows, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
