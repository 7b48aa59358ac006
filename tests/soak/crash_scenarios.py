"""What is going on when ``crash_points`` kills llmux."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import sqlite3
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tests.harness.store_server import Server
from tests.soak.crash_lab import CrashDoor, CrashLab

if TYPE_CHECKING:
    from tests.harness.lease.raw import Answer

HOOKS = ("wake", "sleep", "prefetch", "stop")


class Scenario:
    """A first model is woken; what others do differently is theirs."""

    name = "wake"
    fails = False  # hooks do, so that a request may be told to come again
    check_holding = True
    models: ClassVar[dict[str, dict[str, Any]]] = {"a": {}, "b": {}}
    top: ClassVar[dict[str, Any]] = {}
    headers: ClassVar[list[tuple[str, str]]] = []
    kinds: tuple[bool, ...] = (True, False)  # orphans wait, and go on
    traces_store = False  # it is the store that is killed (and frozen, for True), not llmux

    def laboratory(self, root: Path) -> CrashLab:
        """Return a new one."""
        return CrashLab(root)

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
        await lab.until(lambda: '"models": ["a", "b"], "policy"' in lab.log.partition('"config_reloaded"')[2])
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


# ---- gateways

COST = 600  # millionths, of each request of alice
RESERVED = 1000  # at most, for one
USAGE = base64.b64encode(b'{"usage": {"prompt_tokens": 300, "completion_tokens": 300}}').decode()
PLAIN = {"body": USAGE, "headers": [["Content-Type", "application/json"]]}


class Fleet(Scenario):
    """Requests are let in, reserved for, served by two hosts, and settled; one waits at its host at the end.

    What was told to be spent is spent afterwards, and not more than what was begun could take; the store says the
    same as the file, and nothing is reserved any more.
    """

    name = "gateway"
    check_holding = False
    kinds = (True,)
    headers = Accounts.headers
    store = True
    top: ClassVar = {
        "audit": "audit.jsonl",
        "state": "state/gateway.json",
        "admin_key": "key-of-admin",
        "prices": {"models": {name: {"input": 1, "output": 1} for name in "ab"}},
        "api_keys": [
            {
                "name": "alice",
                "key": "key-of-alice",
                "limits": {"requests": "1M/d", "concurrent": 50},
                "budget": {"usd": 50, "per": "month"},
            }
        ],
    }

    def laboratory(self, root: Path) -> CrashLab:
        return CrashDoor(root)

    def write(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)
        for name in ("one", "two"):
            lab.add(name)
        if self.store:
            lab.store = Server()
        self.configure(lab)

    def configure(self, lab: CrashDoor) -> None:
        fleet = {"store": lab.store.url if lab.store else "embedded"}
        lab.write_gateway(fleet=fleet, **self.top)

    async def paid(self, lab: CrashDoor, model: str, **more: Any) -> Answer:
        """Have alice ask, and wait until what it cost is in the file: no request, which would be a point."""
        before, lab.begun = lab.spent(), lab.begun + 1
        answer = await lab.chat(model, headers=self.headers, do=more or PLAIN)
        if answer.status == 200:
            await lab.until(lambda: lab.spent() > before and not lab.kept().get("reserved"))
            lab.told["spent"] = lab.spent()
            lab.told["confirmed"] = lab.begun
        return answer

    async def play(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)
        for model in "ab":
            assert (await self.paid(lab, model)).status == 200
        assert (await self.paid(lab, "a", sse=4)).status == 200
        lab.begun += 1
        line = await lab.begin("a", headers=self.headers, do={"hold": "end"})
        await lab.until(lambda: sum(lab.kept().get("reserved", {}).values()))
        await line.close()
        await lab.until(lambda: not sum(lab.kept().get("reserved", {}).values()))

    async def check(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)

        def settled() -> bool:
            kept = lab.kept()
            return "spent" in kept and not kept.keys() & {"untold", "batch"} and not kept["reserved"]

        await lab.until(settled)
        spent, told = lab.spent(), int(lab.told.get("spent", 0))  # type: ignore[call-overload]
        most = told + RESERVED * (lab.begun - int(lab.told.get("confirmed", 0)))  # type: ignore[call-overload]
        assert told <= spent <= most, f"{spent} are spent; told were {told}, and {most} is the most"
        if lab.store is not None:
            await lab.until(lambda: lab.stored() == spent, every=0.1)

    async def ended(self, lab: CrashLab) -> None:
        for line in (lab.root / "audit.jsonl").read_text().splitlines():
            json.loads(line)


class FleetEmbedded(Fleet):
    """The same with a store that is the gateway's child: it goes with it."""

    name = "gateway-embedded"
    store = False


class FleetFailover(Fleet):
    """A host dies with a request before its first byte, and the next one is served elsewhere."""

    name = "gateway-failover"

    async def play(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)
        served = await self.paid(lab, "a")
        holder, _ = lab.holder(served)
        async with asyncio.TaskGroup() as requests:
            asked = requests.create_task(self.paid(lab, "a", hold="end"))
            await lab.until(lambda: sum(lab.kept().get("reserved", {}).values()))
            await asyncio.sleep(0.1)  # it is at the engine, or on its way
            holder.kill()
        answer = asked.result()
        assert (answer.status, answer.json()["error"]["code"]) == (502, "host_lost"), answer
        # Else what the next one has cost could be taken for written when this one's share of it is.
        await lab.until(lambda: not sum(lab.kept().get("reserved", {}).values()))
        assert (await self.paid(lab, "a")).status == 200
        assert (await self.paid(lab, "b")).status == 200


class FleetDrain(Fleet):
    """A host is drained and taken back: what the operator was told holds."""

    name = "gateway-drain"

    async def play(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)
        for act in ("drain", "undrain"):
            lab.told["drained"] = None
            answer = await lab.post(f"/llmux/fleet/one/{act}", headers=[("Authorization", "Bearer key-of-admin")])
            assert answer.status == 202, answer
            lab.told["drained"] = act == "drain"
            assert (await self.paid(lab, "b")).status == 200

    async def check(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)
        lease = (await lab.hosts["one"].status())["lease"]
        told = lab.told.get("drained", False)
        assert told in (None, bool(lease)), f"{told} was told, and {lease} is"
        await super().check(lab)


class FleetReload(Fleet):
    """A host leaves the configuration, and comes back."""

    name = "gateway-reload"

    async def play(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)
        assert (await self.paid(lab, "a")).status == 200
        hosts = lab.hosts
        for number in (1, 2):
            lab.hosts = {"two": hosts["two"]} if number == 1 else hosts
            try:
                self.configure(lab)
            finally:
                lab.hosts = hosts
            lab.signal(signal.SIGHUP)
            await lab.until(lambda number=number: lab.log.count("config_reloaded") >= number)
            assert (await self.paid(lab, "b")).status == 200


class FleetStop(Fleet):
    """TERM during an answer, which ends."""

    name = "gateway-stop"

    async def play(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)
        async with asyncio.TaskGroup() as requests:
            asked = requests.create_task(self.paid(lab, "a", sse=4, hold_after=[2, "stream"]))
            await lab.until(lambda: sum(lab.kept().get("reserved", {}).values()))
            lab.signal(signal.SIGTERM)
            await lab.until(lambda: '"stopping"' in lab.log)
            for host in lab.hosts.values():
                host.release("stream")
        assert asked.result().status == 200
        await lab.until(lambda: lab.process is None)


class FleetStore(Fleet):
    """The store is killed, or frozen, at each answer of its own: all is served, and counted exactly once."""

    name = "store"
    kinds = (True, False)
    traces_store = True

    async def play(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)
        for model in "abab":
            answer = await self.paid(lab, model)
            assert answer.status == 200, answer

    async def check(self, lab: CrashLab) -> None:
        assert isinstance(lab, CrashDoor)
        await lab.until(lambda: lab.kept().get("spent") and not lab.kept().keys() & {"untold", "batch"})
        await super().check(lab)
        assert lab.spent() == lab.begun * COST, f"{lab.spent()} are spent of {lab.begun} requests"
        assert (await self.paid(lab, "a")).status == 200


SCENARIOS = {
    scenario.name: scenario()
    for scenario in (
        Scenario, Switch, FailedWake, Fence, Stubborn, StubbornWake, Prefetch, Levels, Operators, Reload, Stop,
        ExitAsleep, Accounts, Fleet, FleetEmbedded, FleetFailover, FleetDrain, FleetReload, FleetStop, FleetStore,
    )
}  # fmt: skip
