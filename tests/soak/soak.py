"""A long run on bad days: ``python -m tests.soak.soak SECONDS [SEED]`` (``make soak``).

A real llmux, five models, real hooks and engine processes that hold a lease on a pretended GPU. Clients come and
leave in every phase; hooks fail, hang, talk too much; engines are killed; the configuration is replaced; operators
pin models, switch by hand and lend the GPU to a foreign job; llmux itself is killed and started again. At the end
a report; the exit code is 0 only without a violation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.harness.lease.lab import Lab, running

MODELS = "ada bob cyd dot eve"
MAX_WAIT = 4.0
DRAIN = 3.0
HANG = 1.0  # timeout of wake and sleep hooks
CLIENTS = 24
BY_OPERATORS = 30.0  # that leases and switching by hand may add to a wait
PATIENCE = 60.0  # no answer for so long, while llmux is up, is a wedge

STAYS = "sleep 5"  # what a successful wake leaves behind is nobody's to end

FAULTS = (
    ("wake", "exit 1"),
    ("sleep", "exit 1"),
    ("wake", "sleep 30"),
    ("sleep", "trap '' TERM; sleep 30"),
    ("wake", "head -c 3000000 /dev/urandom"),
    ("wake", f"{STAYS} & true"),
    ("alive", "exit 1"),
    ("alive", "sleep 30"),
    ("sleep", "kill -9 $$"),
)


@dataclass
class Report:
    """What happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest_wait: float = 0.0
    memory: list[int] = field(default_factory=list)  # KiB, one series per life of llmux
    descriptors: list[int] = field(default_factory=list)
    growth: list[tuple[int, int, int, int]] = field(default_factory=list)


class Soak:
    """The world around one llmux."""

    def __init__(self, lab: Lab, seconds: float, seed: int) -> None:
        self.lab = lab
        self.rng = random.Random(seed)
        self.report = Report()
        self.until = time.monotonic() + seconds
        self.down = False  # llmux is being killed and started again
        self.lives = 0

    def configure(self) -> None:
        rng = self.rng
        names = MODELS.split()
        if rng.random() < 0.3:
            names.remove(rng.choice(names))
        more = {"timeouts": {"wake": HANG, "sleep": HANG, "alive": 0.5, "stop": 2, "verify": 1}}
        models = {
            name: {
                **more,
                "verify": "sh ./hook.sh verify",
                "stop": "sh ./hook.sh stop",
                "max_in_flight": rng.choice([None, 3]),
                "idle_sleep": rng.choice([None, "500ms"]),
                "levels": rng.choice([None, [{"ram": "4GiB"}, "disk"]]),
            }
            for name in names
        }
        policy = {"max_wait": MAX_WAIT, "drain_timeout": DRAIN, "min_active": rng.choice([0, 0.1])}
        quiet = {"default_model": rng.choice([None, *names]), "default_after": "300ms"}
        room = {"host_memory": rng.choice([None, "4GiB", "8GiB"])}
        self.lab.write(models, policy=policy, alive_every="700ms", shutdown_grace=5, **quiet, **room)

    # ---- clients

    async def client(self, session: aiohttp.ClientSession) -> None:
        while time.monotonic() < self.until:
            await asyncio.sleep(self.rng.expovariate(20))
            if not self.down:
                await self.request(session)

    async def request(self, session: aiohttp.ClientSession) -> None:
        rng = self.rng
        model = rng.choice(MODELS.split()) if rng.random() < 0.98 else "nobody"
        do: dict[str, object] = {}
        if rng.random() < 0.5:
            do = {"sse": rng.randint(1, 30), "interval": 0.01}
        elif rng.random() < 0.3:
            do = {"delay": rng.random()}
        if rng.random() < 0.02:
            do = {"sse": 10, "interval": 0.01, "fail": rng.choice(["crash", "reset", "eof"]), "fail_after": 5}
        leave = rng.expovariate(2) if rng.random() < 0.2 else PATIENCE
        lives = self.lives
        try:
            async with asyncio.timeout(leave):
                outcome = await self.ask(session, model, do)
        except TimeoutError:
            outcome = "client left"
            if leave == PATIENCE:
                self.report.wrong.append(f"no answer in {PATIENCE:.0f} s for {model} {do}")
        except aiohttp.ClientPayloadError:
            outcome = "answer broken off"  # its engine was killed, or the drain's deadline came
        except aiohttp.ClientError as error:
            outcome = f"connection: {type(error).__name__}"
            if not (self.down or lives != self.lives):
                outcome += " (llmux up)"
        self.report.outcomes[outcome] += 1

    async def ask(self, session: aiohttp.ClientSession, model: str, do: dict[str, object]) -> str:
        url = f"http://127.0.0.1:{self.lab.port}/v1/chat/completions"
        headers = {"X-Do": json.dumps(do)} if do else {}
        async with session.post(url, json={"model": model, "messages": []}, headers=headers) as answer:
            await answer.read()
            waited = float(answer.headers["X-LLMux-Queue-Seconds"])
            if answer.status == 200:
                self.report.longest_wait = max(self.report.longest_wait, waited)
            if answer.status in (500, 504):
                self.report.wrong.append(f"{answer.status} for {model}: {await answer.text()}")
            return str(answer.status)

    # ---- bad days

    async def trouble(self) -> None:
        rng, lab = self.rng, self.lab
        while time.monotonic() < self.until - 5:
            await asyncio.sleep(rng.expovariate(1.2))
            dice = rng.random()
            if dice < 0.55:
                action, text = rng.choice(FAULTS)
                lab.script(rng.choice(MODELS.split()), action, text, times=1)
                self.report.faults[f"{action}: {text}"] += 1
            elif dice < 0.8:
                await self.crash(rng.choice(MODELS.split()))
            elif dice < 0.93:
                self.configure()
                with contextlib.suppress(AttributeError):
                    lab.signal(signal.SIGHUP)
                self.report.faults["configuration replaced"] += 1
            else:
                await self.restart()

    # ---- operators

    async def operate(self, session: aiohttp.ClientSession) -> None:
        rng = self.rng
        while time.monotonic() < self.until - 5:
            await asyncio.sleep(rng.expovariate(0.4))
            act = rng.choice([self.lend, self.lend, self.pin, self.by_hand])
            with contextlib.suppress(aiohttp.ClientError, OSError):  # llmux is being killed
                await self.order(session, "DELETE", "/llmux/manual")  # a kill may have come between the two
                await act(session)

    async def order(self, session: aiohttp.ClientSession, method: str, path: str, **body: object) -> int:
        async with session.request(method, f"http://127.0.0.1:{self.lab.port}{path}", json=body) as answer:
            return answer.status

    async def lend(self, session: aiohttp.ClientSession) -> None:
        """Be the foreign job: nothing else may be on the GPU while the lease is held."""
        lasts, requests = self.rng.uniform(0.5, 3), self.rng.choice(["wait", "reject"])
        if await self.order(session, "POST", "/llmux/lease", requests=requests, **{"for": lasts}) != 202:
            return
        held = False
        while True:
            asked = time.monotonic()
            async with session.get(f"http://127.0.0.1:{self.lab.port}/llmux/status") as answer:
                lease = (await answer.json())["lease"]
            if lease is None:
                break
            if lease["held"]:
                held = True
                there = self.on_the_gpu()
                if there and time.monotonic() < asked + lease["expires_in"]:
                    self.report.wrong.append(f"{there} on the leased GPU")
            await asyncio.sleep(0.02)
        self.report.faults["GPU leased" if held else "GPU leased, but never held"] += 1

    def on_the_gpu(self) -> list[str]:
        found = []
        for file in (self.lab.root / "gpu").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if running(int(file.read_text().split()[0])):
                    found.append(file.name)
        return found

    async def pin(self, session: aiohttp.ClientSession) -> None:
        path = f"/llmux/models/{self.rng.choice(MODELS.split())}/pin"
        if await self.order(session, "POST", path, **{"for": self.rng.uniform(0.2, 2)}) == 202:
            self.report.faults["model pinned"] += 1

    async def by_hand(self, session: aiohttp.ClientSession) -> None:
        if await self.order(session, "POST", "/llmux/manual") != 202:
            return
        self.report.faults["switched by hand"] += 1
        for _ in range(self.rng.randint(1, 3)):
            await asyncio.sleep(0.3)
            await self.order(session, "POST", f"/llmux/models/{self.rng.choice(MODELS.split())}/wake")
        await self.order(session, "DELETE", "/llmux/manual")

    async def crash(self, key: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            await asyncio.to_thread(self.lab.crash, key)
            self.report.faults["engine killed"] += 1

    async def restart(self) -> None:
        self.down = True
        self.sample()
        self.close_life()
        await asyncio.to_thread(self.lab.kill)
        self.report.faults["llmux killed and started again"] += 1
        await asyncio.to_thread(self.lab.start)
        self.lives += 1
        self.down = False

    async def watch(self) -> None:
        while time.monotonic() < self.until:
            await asyncio.sleep(1)
            self.sample()

    def sample(self) -> None:
        process = self.lab.process
        if process is None:
            return
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = next(line for line in status.splitlines() if line.startswith("VmRSS"))
            self.report.memory.append(int(memory.split()[1]))
            self.report.descriptors.append(sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir()))

    def close_life(self) -> None:
        memory, descriptors = self.report.memory, self.report.descriptors
        if len(memory) > 3:
            self.report.growth.append((memory[2], memory[-1], descriptors[2], descriptors[-1]))
        memory.clear()
        descriptors.clear()

    # ---- the end

    async def run(self) -> bool:
        self.configure()
        await asyncio.to_thread(self.lab.start)
        connector = aiohttp.TCPConnector(limit=0, force_close=self.rng.random() < 0.5)
        async with aiohttp.ClientSession(connector=connector) as session:
            jobs = [self.client(session) for _ in range(CLIENTS)]
            await asyncio.gather(*jobs, self.trouble(), self.operate(session), self.watch())
            await self.quiet(session)
        switches = sum(1 for hook in self.lab.hooks("wake"))
        self.sample()
        self.close_life()
        problems = await asyncio.to_thread(self.verdict)
        return self.tell(problems, switches)

    async def quiet(self, session: aiohttp.ClientSession) -> None:
        """After everything, every model still answers."""
        for path in (self.lab.root / "ctl").iterdir():
            path.unlink(missing_ok=True)
        self.configure()
        await asyncio.sleep(1)
        for path in ("/llmux/manual", "/llmux/lease"):
            await self.order(session, "DELETE", path)
        for model in MODELS.split():
            deadline = time.monotonic() + 30
            outcome = ""
            while outcome not in ("200", "404") and time.monotonic() < deadline:
                outcome = await self.ask(session, model, {})
                await asyncio.sleep(0.1)
            if outcome not in ("200", "404"):
                self.report.wrong.append(f"{model} never came back: {outcome}")

    def verdict(self) -> list[str]:
        self.lab.allow_again = True  # an engine that is killed has journalled what it did not answer
        self.lab.check_holding = False  # by the lease, not by the hooks' order: a restart forgets hooks
        deadline = time.monotonic() + 6
        while any(c.strip() == STAYS for c in self.lab.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        try:
            self.lab.finish()
        except AssertionError as error:
            return str(error).partition("\n---- log")[0].splitlines()
        return []

    def tell(self, problems: list[str], switches: int) -> bool:
        report = self.report
        bound = MAX_WAIT + 5 * (DRAIN + 5 * HANG + 5 + 2) + BY_OPERATORS
        print(f"requests: {sum(report.outcomes.values())}, wakes: {switches}, lives of llmux: {self.lives + 1}")
        for outcome, count in report.outcomes.most_common():
            print(f"  {count:7d}  {outcome}")
        print("faults injected:")
        for fault, count in report.faults.most_common():
            print(f"  {count:7d}  {fault}")
        print(f"longest wait of a request that was served: {report.longest_wait:.2f} s (bound {bound:.0f} s)")
        for first, last, opened, still in report.growth:
            print(f"memory {first / 1024:.1f} → {last / 1024:.1f} MiB, descriptors {opened} → {still}")
        if report.longest_wait > bound:
            report.wrong.append("a request waited longer than its bound")
        bad = [*report.wrong, *problems, *(o for o in report.outcomes if "(llmux up)" in o)]
        print(f"violations: {len(bad)}")
        for problem in bad[:20]:
            print(f"  {problem}")
        return not bad


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    print(f"soak: {seconds:.0f} s, seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="llmux-soak-"))
    fine = asyncio.run(Soak(Lab(folder), seconds, seed).run())
    if not fine:
        sys.exit(f"what happened is in {folder}: journal.jsonl, hooks.tsv, llmux.log")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
