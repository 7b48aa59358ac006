"""Bad days of a fleet, with real processes under load: killed, frozen, cut off, with wrong clocks.

Three hosts, two gateways and a store; clients with plain requests and streams at both gateways. All connections
between gateways and hosts, and from both to the store, go through proxies that can cut or reset them. Hosts,
gateways, engines and the store are killed; hosts, gateways and the store are frozen; the clocks of hosts jump. At
the end: no request ran twice, each answer was its request's, no host had two models awake, every request was
answered or reported, nothing is still counted as in flight, and the memory of all is what it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from llmux.fleet.store import Store, StoreError
from tests.harness.launcher import ROOT
from tests.harness.lease.fleet import Door
from tests.harness.lease.lab import Lab, running
from tests.harness.lease.raw import HOST, Answer, Gone, request, uid, wire
from tests.harness.partition import Line
from tests.harness.store_server import SERVER, Server

CLIENTS = 8
NAMES = ("one", "two", "three")
SKEWED = ("two", "three")  # hosts whose clocks are wrong, and jump
MODELS = "abc"
CHAT = "/v1/chat/completions"
LIMIT = 60.0  # seconds that a request may take
GROWTH = 48.0  # MiB of a process; its caches fill
SLOW = 30.0  # seconds: what the guide says takes 6 at most, on a machine that has other work
EVENTS = 8  # of a stream
HARMS = {
    "kill a host": 2, "freeze a host": 3, "kill a gateway": 1, "freeze a gateway": 1, "kill an engine": 3,
    "cut host and gateway": 3, "reset host and gateway": 2, "change a clock": 2, "kill the store": 1,
    "freeze the store": 1, "cut off the store": 2, "nothing": 1,
}  # fmt: skip
# Read by Python when it starts. The time since is right, as on every machine: only what it is called is not.
CLOCK = """
import os, time

def skewed(real=time.time, file=os.environ["CLOCK_FILE"]):
    try:
        with open(file) as offset:
            return real() + float(offset.read())
    except (OSError, ValueError):
        return real()

time.time = skewed
"""


class Second(Door):
    """Another gateway to the same hosts."""

    def __init__(self, root: Path, first: Door) -> None:
        super().__init__(root)
        self.hosts = first.hosts

    def finish(self) -> None:
        """Stop it alone: the hosts are the first one's."""
        Lab.finish(self)


def memory(lab: Lab) -> float:
    """Return the MiB that a process holds."""
    assert lab.process is not None
    lines = Path(f"/proc/{lab.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


class Days:
    """One run."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.dice = random.Random(seed)
        self.first = Door(root / "first")
        self.second = Second(root / "second", self.first)
        self.gateways = [self.first, self.second]
        self.store = Server() if SERVER and importlib.util.find_spec("redis") else None
        self.lines: dict[tuple[str, str], Line] = {}  # by both ends
        self.over = asyncio.Event()
        self.harmed: set[object] = set()  # what is being harmed now
        self.ends: Counter[str] = Counter()
        self.served: Counter[str] = Counter()  # answers, by host
        self.ran: dict[str, str] = {}  # by id: how it ended
        self.events: Counter[str] = Counter()
        self.took: dict[str, list[float]] = {}  # seconds until something was noticed, or whole again

    # ---- the house

    async def line(self, one: str, other: str, port: int) -> Line:
        """Return a new line between the two."""
        line = self.lines[one, other] = Line(port)
        await line.open()
        return line

    async def stored(self, one: str) -> dict[str, str]:
        """Return a new way to the store."""
        if self.store is None:
            return {}
        line = await self.line(one, "store", self.store.port)
        return {"store": f"redis://{HOST}:{line.port}/0"}

    async def open(self) -> None:
        """Start everything."""
        (self.root / "sitecustomize.py").write_text(CLOCK)
        for name in NAMES:
            lab = self.first.hosts[name] = Lab(self.first.root / name)
            fleet = await self.stored(name)
            lab.write(
                " ".join(MODELS),
                fleet={**fleet, "name": name, "url": f"http://{HOST}:{lab.port}"} if fleet else None,
            )
            if name in SKEWED:
                lab.cold = True
                lab.env = {"PYTHONPATH": f"{self.root}:{ROOT}", "CLOCK_FILE": str(self.clock(name))}
                self.clock(name).write_text(str(self.dice.choice([-7200.0, 86400.0])))
            await asyncio.to_thread(lab.start)
        for number, gateway in enumerate(self.gateways):
            hosts = {}
            for name, lab in self.first.hosts.items():
                line = await self.line(f"gateway {number}", name, lab.port)
                hosts[name] = {"url": f"http://{HOST}:{line.port}"}
            fleet = await self.stored(f"gateway {number}")
            gateway.write_gateway(hosts, fleet=fleet or None)
            await asyncio.to_thread(gateway.start)

    def clock(self, name: str) -> Path:
        """Return the file which says how wrong a host's clock is."""
        return self.root / f"clock.{name}"

    async def run(self, seconds: float) -> list[str]:
        """Have bad days for so long; return what went wrong."""
        await self.open()
        await self.idle()
        labs = [*self.gateways, *self.first.hosts.values()]
        began = [memory(lab) for lab in labs]
        clients = [asyncio.create_task(self.client(number)) for number in range(CLIENTS)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(self.dice.uniform(0.2, 1.0))
            await asyncio.gather(*(self.harm() for _ in range(self.dice.choice([1, 1, 2]))))
        self.over.set()
        await asyncio.gather(*clients)
        await self.idle()
        grown = [
            f"{lab.root.name} grew from {before:.0f} to {now:.0f} MiB"
            for lab, before in zip(labs, began, strict=True)
            if (now := memory(lab)) > before + GROWTH
        ]
        return [*grown, *await self.found()]

    async def idle(self) -> None:
        """Wait until every gateway finds every host ready, and nothing is under way anywhere."""
        for gateway in self.gateways:

            async def quiet(gateway: Door = gateway) -> bool:
                hosts = (await gateway.fleet())["hosts"].values()
                return all(host["state"] == "ready" and not host["placed"] for host in hosts)

            await gateway.until(quiet)
        for lab in self.first.hosts.values():

            async def idle(lab: Lab = lab) -> bool:
                models = (await lab.status())["models"].values()
                return not any(model["queued"] or model["in_flight"] for model in models)

            await lab.until(idle)

    # ---- harm

    async def harm(self) -> None:
        """Do one bad thing, and put it right."""
        dice = self.dice
        (what,) = dice.choices(list(HARMS), list(HARMS.values()))
        name, number = dice.choice(NAMES), dice.randrange(len(self.gateways))
        subject: object = name
        if "gateway" in what and "host" not in what:
            subject = number
        elif "store" in what:
            subject = "store"
        if subject in self.harmed or (subject == "store" and self.store is None):
            return
        self.harmed.add(subject)
        self.events[what] += 1
        try:
            await self._do(what, name, number)
        finally:
            self.harmed.discard(subject)

    async def _do(self, what: str, name: str, number: int) -> None:  # noqa: C901, PLR0912 - a list of cases
        dice, host, gateway = self.dice, self.first.hosts[name], self.gateways[number]
        for_ = dice.choice([0.5, 2.0, 7.5])
        match what:
            case "kill a host":
                host.kill()
                await self.unseen(what, name, dice.uniform(0.2, 2.0))
                await asyncio.to_thread(host.start)
            case "freeze a host":
                host.signal(signal.SIGSTOP)
                if for_ > 6.0:
                    await self.unseen(what, name, for_)
                else:
                    await asyncio.sleep(for_)
                host.signal(signal.SIGCONT)
            case "kill a gateway":
                gateway.kill()
                await asyncio.to_thread(gateway.start)
            case "freeze a gateway":
                gateway.signal(signal.SIGSTOP)
                await asyncio.sleep(min(for_, 2.0))
                gateway.signal(signal.SIGCONT)
            case "kill an engine":
                awake = [key for key in MODELS if self._awake(host, key)]
                if awake:
                    await asyncio.to_thread(host.crash, dice.choice(awake))
            case "change a clock":
                if name in SKEWED:
                    self.clock(name).write_text(str(dice.uniform(-1e5, 1e5)))
            case "kill the store":
                assert self.store is not None
                self.store.process.kill()
                await asyncio.sleep(dice.uniform(0.0, 2.0))
                self.store.restart()
                await self.until(what, self._all_registered)
            case "freeze the store":
                assert self.store is not None
                self.store.stop()
                await asyncio.sleep(for_)
                self.store.go_on()
            case "cut off the store":
                await self.cut(self.lines[dice.choice([name, f"gateway {number}"]), "store"], what, for_)
            case "cut host and gateway" | "reset host and gateway":
                both = dice.random() < 0.3  # the host is cut off from all
                lines = [self.lines[f"gateway {each}", name] for each in range(2) if both or each == number]
                await asyncio.gather(*(self.cut(line, what, for_) for line in lines))

    @staticmethod
    async def cut(line: Line, what: str, seconds: float) -> None:
        """Cut or reset a line for so long."""
        if what.startswith("reset"):
            line.reset()
        else:
            line.cut()
        await asyncio.sleep(seconds)
        line.mend()

    @staticmethod
    def _awake(host: Lab, key: str) -> bool:
        with contextlib.suppress(OSError, ValueError):
            state = (host.root / "run" / f"{key}.state").read_text()
            return state == "awake" and running(host.engine_pid(key))
        return False

    # ---- how soon

    async def until(self, what: str, so: Callable[[], Awaitable[bool]]) -> None:
        """Measure how long it takes until something is so."""
        began = time.monotonic()
        while not await so():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.02)
        self.took.setdefault(what, []).append(time.monotonic() - began)

    async def unseen(self, what: str, name: str, least: float) -> None:
        """Measure how long a gateway that can be asked goes on sending to a host; take ``least`` seconds."""
        began = time.monotonic()
        free = [gateway for number, gateway in enumerate(self.gateways) if number not in self.harmed]

        async def out() -> bool:
            for gateway in free:
                with contextlib.suppress(Gone, OSError, TimeoutError, ValueError):
                    if (await gateway.fleet())["hosts"][name]["state"] == "ready":
                        return False
            return True

        await self.until(what, out)
        await asyncio.sleep(max(0.0, least - (time.monotonic() - began)))

    async def _all_registered(self) -> bool:
        """Whether the store knows all hosts that are not harmed themselves."""
        assert self.store is not None
        store = Store(self.store.url)
        try:
            return set(await store.hosts()) >= set(NAMES) - self.harmed
        except StoreError:
            return False
        finally:
            await store.close()

    # ---- clients

    async def client(self, number: int) -> None:
        """Send requests, one at a time."""
        gateway = self.gateways[number % 2]
        dice = random.Random(number)
        while not self.over.is_set():
            model = dice.choices(MODELS, weights=(6, 3, 1))[0]
            do = {"sse": EVENTS, "interval": 0.01} if dice.random() < 0.5 else {"delay": 0.03}
            data = request("POST", CHAT, body={"model": model, "messages": []}, do=do)
            how = "left unanswered"
            try:
                line = await wire(gateway.port)
                answer = await line.ask(data, wait=LIMIT)
                how = self.judge(answer, data, streams="sse" in do)
                await line.close()
            except (ConnectionError, Gone, OSError) as error:
                how = "left unanswered" if isinstance(error, TimeoutError) else "gateway gone"
                await asyncio.sleep(0.1)
            self.ends[how] += 1
            self.ran[uid(data)] = how

    def judge(self, answer: Answer, data: bytes, *, streams: bool) -> str:
        """Say how a request has ended; ``mixed`` if its answer is not its own, whole and once."""
        if answer.status != 200:
            return str(answer.status) if answer.whole else "broken off"
        self.served[answer.get("X-LLMux-Host") or "?"] += 1
        if streams:
            events = [int(found) for found in re.findall(rb'"t(\d+) "', answer.body)]
            if events != list(range(EVENTS if answer.whole and b'"error"' not in answer.body else len(events))):
                return "mixed"
            return "200" if len(events) == EVENTS else "broken off"
        if not answer.whole:
            return "broken off"
        return "200" if uid(answer.seen) == uid(data) else "mixed"

    async def found(self) -> list[str]:
        """Return what went wrong."""
        problems = []
        runs: Counter[str] = Counter()
        for lab in self.first.hosts.values():
            runs.update(line["uid"] for line in lab.journal("request") if line["uid"])
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
        problems += [f"{name} has served nothing" for name in NAMES if not self.served[name]]
        problems += [
            f"{what}: noticed after {max(took):.1f} s" for what, took in self.took.items() if max(took) > SLOW
        ]
        return problems

    async def finish(self) -> None:
        """Stop everything; AssertionError for what it finds."""
        try:
            await asyncio.to_thread(self.second.finish)
        finally:
            try:
                await asyncio.to_thread(self.first.finish)
            finally:
                for line in self.lines.values():
                    await line.close()
                if self.store is not None:
                    self.store.close()
