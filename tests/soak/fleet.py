"""Bad days of a fleet, with real processes: hosts and gateways are killed and frozen under load.

    PYTHONPATH=. .venv/bin/python -m tests.soak.fleet 60 [SEED]

Three hosts, two gateways, clients with plain requests and streams at both. At the end: no request ran on two
engines or twice on one, no host had two models awake, every request was answered or told, nothing is counted as
under way any more, and the memory of the gateways is what it was.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.harness.lease.fleet import Door
from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import Gone, request, uid, wire

CLIENTS = 8
MODELS = "abc"
CHAT = "/v1/chat/completions"
LIMIT = 60.0  # seconds that a request may take
GROWTH = 48.0  # MiB of a gateway; its caches fill


class Second(Door):
    """Another gateway to the same hosts."""

    def __init__(self, root: Path, first: Door) -> None:
        super().__init__(root)
        self.hosts = first.hosts

    def finish(self) -> None:
        """Stop it alone: the hosts are the first one's."""
        Lab.finish(self)


def memory(pid: int) -> float:
    """Return the MiB that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


class Days:
    """One run."""

    def __init__(self, root: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.first = Door(root / "first")
        self.second = Second(root / "second", self.first)
        self.gateways = [self.first, self.second]
        self.over = asyncio.Event()
        self.ends: Counter[str] = Counter()
        self.ran: dict[str, str] = {}  # by id: how it ended
        self.events: Counter[str] = Counter()

    async def run(self, seconds: float) -> list[str]:
        """Have bad days for so long; return what went wrong."""
        for name in ("one", "two", "three"):
            self.first.add(name, " ".join(MODELS))
        for gateway in self.gateways:
            gateway.write_gateway()
            gateway.start()
        await self.calm()
        began = [memory(gateway.process.pid) for gateway in self.gateways if gateway.process]
        clients = [asyncio.create_task(self.client(number)) for number in range(CLIENTS)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(self.dice.uniform(0.3, 1.5))
            await self.harm()
        self.over.set()
        await asyncio.gather(*clients)
        await self.calm()
        return await self.found(began)

    async def calm(self) -> None:
        """Wait until every gateway finds every host ready, and nothing under way."""
        for gateway in self.gateways:

            async def quiet(gateway: Door = gateway) -> bool:
                hosts = (await gateway.fleet())["hosts"].values()
                return all(host["state"] == "ready" and not host["placed"] for host in hosts)

            await gateway.until(quiet)

    async def harm(self) -> None:
        """Do one bad thing, and put it right."""
        # No engine is killed: with a request on a kept connection it gets that again, from its own host.
        what = self.dice.choice(["kill", "stop", "stop", "gateway", "nothing"])
        self.events[what] += 1
        host = self.first.hosts[self.dice.choice(list(self.first.hosts))]
        if what == "kill":
            host.kill()
            await asyncio.sleep(self.dice.uniform(0.2, 2.0))
            await asyncio.to_thread(host.start)
        elif what == "stop":
            host.signal(signal.SIGSTOP)
            await asyncio.sleep(self.dice.choice([0.5, 2.0, 7.5]))
            host.signal(signal.SIGCONT)
        elif what == "gateway":
            gateway = self.dice.choice(self.gateways)
            gateway.kill()
            await asyncio.to_thread(gateway.start)

    async def client(self, number: int) -> None:
        """Send requests, one at a time."""
        gateway = self.gateways[number % 2]
        dice = random.Random(number)
        while not self.over.is_set():
            model = dice.choices(MODELS, weights=(6, 3, 1))[0]
            do = {"sse": 8, "interval": 0.01} if dice.random() < 0.5 else {"delay": 0.03}
            data = request("POST", CHAT, body={"model": model, "messages": []}, do=do)
            how = "left unanswered"
            try:
                line = await wire(gateway.port)
                answer = await line.ask(data, wait=LIMIT)
                how = str(answer.status) if answer.whole else "broken off"
                if b"t0 " in answer.body and answer.body.count(b"t0 ") > 1:
                    how = "mixed"
                await line.close()
            except (ConnectionError, Gone, OSError):
                how = "gateway gone"
                await asyncio.sleep(0.1)
            except TimeoutError:
                pass
            self.ends[how] += 1
            self.ran[uid(data)] = how

    async def found(self, began: list[float]) -> list[str]:
        """Return what went wrong."""
        problems = []
        runs: Counter[str] = Counter()
        for lab in self.first.hosts.values():
            for line in lab.journal():
                if line["ev"] in {"request", "fail"} and line["uid"]:
                    runs[line["uid"]] += 1 if line["ev"] == "request" else -1
        problems += [
            f"{word} ran {count} times ({self.ran.get(word)})" for word, count in runs.items() if count > 1
        ]
        known = {"200", "502", "503", "429", "broken off", "gateway gone"}
        problems += [f"{count} requests: {how}" for how, count in self.ends.items() if how not in known]
        problems += [
            f"{word} was answered, but ran nowhere"
            for word, how in self.ran.items()
            if how == "200" and not runs[word]
        ]
        for gateway, before in zip(self.gateways, began, strict=True):
            assert gateway.process is not None
            now = memory(gateway.process.pid)
            if now > before + GROWTH:
                problems.append(f"a gateway grew from {before:.0f} to {now:.0f} MiB")
        return problems

    def finish(self) -> None:
        """Stop everything; AssertionError for what it finds."""
        self.second.finish()
        self.first.finish()


async def main(seconds: float, seed: int) -> int:
    """Run and print."""
    with tempfile.TemporaryDirectory() as folder:
        days = Days(Path(folder), seed)
        problems = ["it did not come to its end"]
        try:
            problems = await days.run(seconds)
        finally:
            days.finish()
    print(f"{sum(days.ends.values())} requests: {dict(days.ends)}; harm: {dict(days.events)}; seed {seed}")
    print("\n".join(problems) or "nothing went wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(asyncio.run(main(float(given[0]) if given else 60.0, int(given[1]) if given[1:] else 1)))
