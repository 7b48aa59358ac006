"""What is going on when ``crash_points`` kills llmux."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from tests.harness.lease.raw import Answer
    from tests.soak.crash_lab import CrashLab

HOOKS = ("wake", "sleep", "prefetch", "stop")


class Scenario:
    """A first model is woken; what others do differently is theirs."""

    name = "wake"
    fails = False  # hooks do, so that a request may be told to come again
    check_holding = True
    models: ClassVar[dict[str, dict[str, Any]]] = {"a": {}, "b": {}}
    top: ClassVar[dict[str, Any]] = {}
    headers: ClassVar[list[tuple[str, str]]] = []

    def write(self, lab: CrashLab) -> None:
        """Write the configuration, and have hooks of a killed llmux wait."""
        lab.write({name: dict(model) for name, model in self.models.items()}, **self.top)
        for name in self.models:
            for hook in HOOKS:
                lab.script(name, hook, lab.ORPHAN)

    async def play(self, lab: CrashLab) -> None:
        """Do it. What fails because llmux was killed is no problem."""
        await asked(lab, "a")

    async def check(self, lab: CrashLab) -> None:
        """Look at the llmux that has come after it. AssertionError."""

    async def ended(self, lab: CrashLab) -> None:
        """Look at what that one has left."""


async def asked(lab: CrashLab, model: str, **more: Any) -> None:
    assert (await lab.chat(model, **more)).status == 200


async def both(lab: CrashLab, *, streams: bool = True) -> None:
    """Switch from a to b while an answer of a is under way."""
    await asked(lab, "a")
    do = {"sse": 4, "hold_after": [2, "stream"]} if streams else {"hold": "stream"}
    async with asyncio.TaskGroup() as requests:
        requests.create_task(asked(lab, "a", do=do))
        await lab.until_model("a", in_flight=1)
        requests.create_task(asked(lab, "b"))
        await lab.until_phase("a", "DRAINING")
        await asyncio.sleep(0.1)
        lab.release("stream")


class Switch(Scenario):
    name = "switch"

    async def play(self, lab: CrashLab) -> None:
        await both(lab)
        await asked(lab, "a")


class FailedWake(Scenario):
    name = "failed-wake"
    fails = True

    def write(self, lab: CrashLab) -> None:
        super().write(lab)
        lab.script("b", "wake", f"{lab.ORPHAN}; exit 3", times=1)

    async def play(self, lab: CrashLab) -> None:
        await asked(lab, "a")
        assert (await lab.chat("b")).status == 503

        async def served() -> bool:
            return (await lab.chat("b")).status == 200

        await lab.until(served)


class Fence(Scenario):
    """An engine dies, and is woken again; then a sleep fails, so that it is stopped, and looked at until it is."""

    name = "fence"
    fails = True
    models: ClassVar = {name: {hook: f"sh ./hook.sh {hook}" for hook in ("stop", "verify")} for name in "ab"}

    async def play(self, lab: CrashLab) -> None:
        await asked(lab, "a")
        await asyncio.to_thread(lab.crash, "a")
        await asked(lab, "a")
        lab.script("a", "sleep", f"{lab.ORPHAN}; exit 3", times=1)
        await asked(lab, "b")


class Stubborn(Scenario):
    """The shell of a sleep hook takes TERM, its child does not."""

    name = "stubborn"
    fails = True
    models: ClassVar = {"a": {"sleep": "sh ./hook.sh sleep & wait", "timeouts": {"sleep": 0.2}}, "b": {}}

    def write(self, lab: CrashLab) -> None:
        super().write(lab)
        lab.script("a", "sleep", "trap '' TERM; " + lab.hold("all"), times=1)

    async def play(self, lab: CrashLab) -> None:
        await asked(lab, "a")
        line = await lab.begin("b")
        await lab.until(lambda: "hook_killed" in lab.log)
        await asyncio.sleep(0.05)
        await line.close()


class StubbornWake(Scenario):
    """The same of a wake hook."""

    name = "stubborn-wake"
    fails = True
    models: ClassVar = {"a": {"wake": "sh ./hook.sh wake & wait", "timeouts": {"wake": 0.2}}, "b": {}}

    def write(self, lab: CrashLab) -> None:
        super().write(lab)
        lab.script("a", "wake", "trap '' TERM; " + lab.hold("all"), times=1)

    async def play(self, lab: CrashLab) -> None:
        line = await lab.begin("a")
        await lab.until(lambda: "hook_killed" in lab.log)
        await asyncio.sleep(0.05)
        await line.close()


class Prefetch(Scenario):
    name = "prefetch"
    models: ClassVar = {"a": {}, "b": {"prefetch": "sh ./hook.sh prefetch"}}

    async def play(self, lab: CrashLab) -> None:
        await both(lab, streams=False)


class Levels(Scenario):
    name = "levels"
    models: ClassVar = {name: {"levels": [{"ram": "20GiB"}, "disk"]} for name in "abc"}
    top: ClassVar = {"host_memory": "20GiB"}

    async def play(self, lab: CrashLab) -> None:
        lab.serves = "bac"
        for name in "abc":
            await asked(lab, name)

    async def check(self, lab: CrashLab) -> None:
        memory = (await lab.status())["host_memory"]
        assert memory["taken"] <= memory["limit"], memory


class Operators(Scenario):
    """Each answer of 2xx is a promise, which the next llmux keeps."""

    name = "operators"

    async def order(self, lab: CrashLab, name: str, value: object, doing: Awaitable[Answer]) -> Answer:
        lab.told[name] = None
        answer = await doing
        assert answer.status in (200, 202), answer
        lab.told[name] = value
        return answer

    async def play(self, lab: CrashLab) -> None:
        lab.told |= {"pin": False, "lease": "", "manual": False}
        await self.order(lab, "pin", True, lab.post("/llmux/models/a/pin", body={"for": "1h", "reason": "a demo"}))
        await self.order(lab, "manual", True, lab.post("/llmux/manual"))
        await self.order(lab, "pin", False, lab.post("/llmux/models/a/unpin"))
        await lab.until(lambda: lab.log.count("switch_ended") == 1)  # no request: it would be a point of its own
        assert (await lab.post("/llmux/models/b/wake")).status == 202
        await lab.until(lambda: lab.log.count("switch_ended") == 2)
        assert (await lab.post("/llmux/models/b/sleep")).status == 202
        await lab.until(lambda: lab.log.count("switch_ended") == 3)
        await self.order(lab, "manual", False, lab.ask("DELETE", "/llmux/manual"))
        lease = {"for": "1h", "reason": "a job"}
        answer = await self.order(lab, "lease", None, lab.post("/llmux/lease", body=lease))
        lab.told["lease"] = answer.json()["id"]
        await self.order(lab, "lease", "", lab.ask("DELETE", "/llmux/lease"))

    async def check(self, lab: CrashLab) -> None:
        status = await lab.status()
        lease = status["lease"]
        found = {
            "pin": bool(status["models"]["a"]["pinned"]),
            "lease": lease["id"] if lease else "",
            "manual": status["manual"],
        }
        wrong = {name: (told, found[name]) for name, told in lab.told.items() if told not in (None, found[name])}
        assert not wrong, f"told and found: {wrong}"
        for method, path in (("POST", "models/a/unpin"), ("DELETE", "manual"), ("DELETE", "lease")):
            await lab.ask(method, f"/llmux/{path}", body={})


class Reload(Scenario):
    """The model that is awake leaves the configuration, and comes back."""

    name = "reload"

    async def play(self, lab: CrashLab) -> None:
        await asked(lab, "a")
        lab.serves = "b"
        lab.write("b")
        lab.signal(signal.SIGHUP)
        await lab.until(lambda: lab.count("sleep", "a", "end"))
        await asked(lab, "b")
        lab.serves = "ba"
        super().write(lab)
        lab.signal(signal.SIGHUP)
        await lab.until(lambda: lab.log.count("config_reloaded") > 1)
        await asked(lab, "a")


class Stop(Scenario):
    """TERM while a model wakes and another one answers."""

    name = "stop"
    models: ClassVar = {"a": {"memory": "1GiB"}, "b": {"memory": "1GiB"}}
    top: ClassVar = {"capacity": "2GiB", "shutdown_grace": 5}
    check_holding = False

    def write(self, lab: CrashLab) -> None:
        self.models["a"]["env"] = self.models["b"]["env"] = {"LEASE_CAPACITY": "2"}
        super().write(lab)
        lab.script("b", "wake", lab.ORPHAN + "; sleep 0.2")

    async def play(self, lab: CrashLab) -> None:
        await asked(lab, "a")
        async with asyncio.TaskGroup() as requests:
            requests.create_task(asked(lab, "a", do={"hold": "stream"}))
            await lab.until_model("a", in_flight=1)
            line = await lab.begin("b")
            await lab.until(lambda: lab.count("wake", "b"))
            lab.signal(signal.SIGTERM)
            assert (await line.head()).status == 503
            lab.release("stream")
        await lab.until(lambda: lab.process is None)


class ExitAsleep(Scenario):
    """TERM puts the engines to sleep."""

    name = "exit-asleep"
    top: ClassVar = {"on_exit": "sleep"}

    async def play(self, lab: CrashLab) -> None:
        await asked(lab, "a")
        lab.signal(signal.SIGTERM)
        await lab.until(lambda: lab.process is None)


class Accounts(Scenario):
    """Each row that was there before the kill is there once afterwards, and the sums are those of the rows."""

    name = "accounts"
    top: ClassVar = {
        "ledger": "ledger.db",
        "audit": "audit.jsonl",
        "record": "record.jsonl",
        "captures": {"keys": ["alice"], "folder": "captures"},
        "prices": {"currency": "usd", "models": {"a": {"input": 1, "output": 2}, "b": {"input": 1, "output": 2}}},
        "admin_key": "key-of-admin",
        "api_keys": [{"name": "alice", "key": "key-of-alice", "budget": {"usd": 50, "per": "month"}}],
    }

    headers: ClassVar = [("Authorization", "Bearer key-of-alice")]

    async def play(self, lab: CrashLab) -> None:
        names: list[str] = []
        for model in "aab":
            answer = await lab.chat(model, headers=self.headers)
            assert answer.status == 200, answer
            names.append(answer.get("X-Request-ID") or "")
            usage = await lab.get("/llmux/usage", headers=[("Authorization", "Bearer key-of-admin")])
            assert usage.status == 200, usage
            lab.told["written"] = list(names)

    async def ended(self, lab: CrashLab) -> None:
        with contextlib.closing(sqlite3.connect(lab.root / "ledger.db")) as file:
            rows = [name for (name,) in file.execute("SELECT request_id FROM requests WHERE kind IN (0, 3)")]
            assert len(rows) == len(set(rows)), f"twice: {rows}"
            missing = set(lab.told.get("written", ())) - set(rows)  # type: ignore[call-overload]
            assert not missing, f"lost: {missing} of {rows}"
            (requests,) = file.execute("SELECT count(*) FROM requests WHERE kind = 0").fetchone()
            for table in ("hours", "days"):
                (summed,) = file.execute(f"SELECT sum(requests) FROM {table}").fetchone()
                assert summed == requests, f"{table} sum up to {summed} of {requests}"
            (left,) = file.execute("SELECT count(*) FROM reservations").fetchone()
            assert not left, f"{left} reservations"
        for name in ("audit.jsonl", "record.jsonl"):
            for line in (lab.root / name).read_text().splitlines():
                json.loads(line)


SCENARIOS = {
    scenario.name: scenario()
    for scenario in (
        Scenario, Switch, FailedWake, Fence, Stubborn, StubbornWake, Prefetch, Levels, Operators, Reload, Stop,
        ExitAsleep, Accounts,
    )
}  # fmt: skip
