"""A laboratory: a folder with a config, hooks, fake engines, and one llmux run as a real process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.harness.launcher import STARTUP, Running, engines, launch
from tests.harness.lease.raw import HOST, Answer, Gone, Wire, request, wire
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE

HERE = Path(__file__).parent
ENGINE = "engine.py"
BOOTED = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)  # once: two lists of hook runs are compared
TROUBLE = ("Traceback", "never retrieved", "was never awaited", "Unclosed", "Exception ignored", "was destroyed")


@dataclass
class HookRun:
    ev: str
    t: float
    pid: int
    action: str
    key: str
    model: str
    hook: str
    port: str
    url: str
    switch: str
    source: str
    to: str
    rc: str
    cwd: str


class Lab:
    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("run", "gpu", "ctl", "log"):
            (root / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "hook.sh", root)
        self.port = free_port()
        self.ports: dict[str, int] = {}
        self.file = root / "config.yaml"
        self.process: Running | None = None
        self.cwd = "/"
        self.cold = False  # started by a new Python: a test is about the start
        self.stopped = False  # launched so that it begins when it gets CONT
        self.env: dict[str, str] = {}
        self.allowed: set[str] = set()  # violations a test is about
        self.allow_again = False  # an engine may die with a request that came on a kept connection
        self.check_holding = True
        self.codes: list[int] = []
        self.expect_code: int | None = 0

    # ---- configuration

    def model(self, key: str, *, env: dict | None = None, names: str | None = None, **more) -> dict:
        self.ports.setdefault(key, more.pop("port", 0) or free_port())
        found = {
            "port": self.ports[key],
            "wake": "sh ./hook.sh wake",
            "sleep": "sh ./hook.sh sleep",
            "alive": "sh ./hook.sh alive",
            "env": {"KEY": key, "NAMES": names or key, **(env or {})},
        }
        found.update(more)
        return {k: v for k, v in found.items() if v is not None}

    def write(self, models: dict[str, dict] | str = "a b", *, policy: dict | None = None, **top) -> None:
        if isinstance(models, str):
            models = {name: {} for name in models.split()}
        built = {
            name: given if "wake" in given and "port" in given else self.model(given.pop("key", name), **given)
            for name, given in models.items()
        }
        config = {"host": HOST, "port": self.port, "models": built, "state": str(self.root / "state" / "s.json")}
        config["backoff"] = {"first": "200ms", "max": "400ms"}
        if policy is not None:
            config["policy"] = policy
        config.update(top)
        config = {k: v for k, v in config.items() if v is not None}
        draft = self.file.with_name(f".{self.file.name}")  # llmux watches it: half a file would be read
        draft.write_text(
            json.dumps(config) if self.file.suffix == ".json" else yaml.safe_dump(config, sort_keys=False)
        )
        draft.replace(self.file)

    def script(self, key: str, action: str, text: str, times: int | None = None) -> None:
        """Have the hook execute ``text`` before it does its work, always or so many times."""
        path = self.root / "ctl" / f"{key}.{action}"
        if times is not None:
            path.with_suffix(path.suffix + ".n").write_text(f"{times}\n")
        else:
            path.with_suffix(path.suffix + ".n").unlink(missing_ok=True)
        draft = path.with_name(f".{path.name}")
        draft.write_text(text + "\n")
        draft.replace(path)

    def unscript(self, key: str, action: str) -> None:
        (self.root / "ctl" / f"{key}.{action}").unlink(missing_ok=True)

    def release(self, name: str) -> None:
        (self.root / "ctl" / f"release.{name}").touch()

    def hold(self, name: str) -> str:
        """Shell text that waits for ``release(name)``."""
        return f'until [ -e "$LAB/ctl/release.{name}" ]; do sleep 0.01; done'

    # ---- the process

    def spawn(self, *args: str) -> Running:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LLMUX", "COV_"))}
        env |= {
            "LAB": str(self.root),
            "ENGINES": engines(),
            "XDG_STATE_HOME": str(self.root / "xdg"),
            **STARTUP,
            "NO_COLOR": "1",
            **self.env,
        }
        with (self.root / "llmux.log").open("ab") as log:
            return launch(args, log=log.fileno(), env=env, cwd=self.cwd, cold=self.cold, stopped=self.stopped)

    def launch(self) -> None:
        self.process = self.spawn("-c", str(self.file))

    def start(self, *, ready: bool = True, wait: float = PATIENCE) -> None:
        self.launch()
        deadline = time.monotonic() + wait
        while True:
            assert self.process
            if self.process.poll() is not None:
                code, self.process = self.process.returncode, None
                raise AssertionError(f"llmux ended with {code}:\n{self.log}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE)
                try:
                    connection.request("GET", "/ready" if ready else "/health")
                    status = connection.getresponse().status
                finally:
                    connection.close()
                if status == 200 or not ready:
                    return
            assert time.monotonic() < deadline, f"not ready after {wait} s:\n{self.log}"
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        assert self.process
        self.process.send_signal(number)

    def end(self, wait: float = PATIENCE) -> int:
        """TERM, wait, return the exit code."""
        assert self.process
        if self.process.poll() is None:
            self.process.terminate()
        return self.ended(wait)

    def ended(self, wait: float = PATIENCE) -> int:
        assert self.process
        try:
            code = self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.process = None
            raise AssertionError(f"llmux did not end within {wait} s of TERM:\n{self.log[-4000:]}") from None
        self.process = None
        return code

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()
        self.process = None

    @property
    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.root / "llmux.log").read_text(errors="replace")
        return ""

    def open_files(self) -> tuple[str, str]:
        """The soft and the hard limit of llmux."""
        assert self.process
        lines = Path(f"/proc/{self.process.pid}/limits").read_text().splitlines()
        soft, hard = next(line for line in lines if line.startswith("Max open files")).split()[3:5]
        return soft, hard

    # ---- what happened

    def journal(self, ev: str | None = None) -> list[dict]:
        try:
            text = (self.root / "journal.jsonl").read_text()
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in found if ev in (None, line["ev"])]

    def hooks(self, action: str | None = None, key: str | None = None, ev: str | None = "start") -> list[HookRun]:
        try:
            text = (self.root / "hooks.tsv").read_text()
        except FileNotFoundError:
            return []
        found = []
        for line in text.splitlines():
            parts = line.split("\t")
            if len(parts) == 14:
                found.append(HookRun(parts[0], BOOTED + float(parts[1]), int(parts[2]), *parts[3:]))
        return [
            run
            for run in found
            if (action is None or run.action == action)
            and (key is None or run.key == key)
            and ev in (None, run.ev)
        ]

    def count(self, action: str, key: str | None = None, ev: str = "start") -> int:
        return len(self.hooks(action, key, ev))

    def order(self) -> list[str]:
        """The wake, sleep and stop runs so far, in order, as ``wake a``."""
        return [f"{h.action} {h.key}" for h in self.hooks() if h.action in ("wake", "sleep", "stop")]

    def engine_pid(self, key: str) -> int:
        return int((self.root / "run" / f"{key}.pid").read_text())

    def crash(self, key: str) -> None:
        """Kill the engine, and wait until it is gone."""
        pid = self.engine_pid(key)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        while running(pid) and time.monotonic() < deadline:
            time.sleep(0.002)

    def processes(self) -> list[tuple[int, str]]:
        """Everything that was started below this laboratory's llmux: the number and command of each."""
        marker, logs = f"\0LAB={self.root}\0".encode(), f"{self.root}/log/"
        found = []
        for name in os.listdir("/proc"):  # noqa: PTH208 - this, and not Path, is what takes no time
            if not name.isdigit() or int(name) == os.getpid():
                continue
            ours = False
            with contextlib.suppress(OSError):  # an engine has its environment from what forks it
                ours = os.readlink(f"/proc/{name}/fd/1").startswith(logs)  # noqa: PTH115
            with contextlib.suppress(OSError):
                if not ours and marker not in b"\0" + _read(f"/proc/{name}/environ"):
                    continue
                if command := _read(f"/proc/{name}/cmdline"):
                    found.append((int(name), command.replace(b"\0", b" ").decode(errors="replace")))
        return found

    def leftovers(self) -> list[str]:
        return _but_engines(self.processes())

    def problems(self) -> list[str]:
        found = [str(v) for v in self.journal("violation") if v["what"] not in self.allowed]
        seen: dict[str, int] = {}
        for line in self.journal():
            if line["ev"] in ("request", "fail") and line["uid"]:  # a dead pooled connection does not count
                seen[line["uid"]] = seen.get(line["uid"], 0) + (1 if line["ev"] == "request" else -1)
        most = 2 if self.allow_again else 1
        found += [f"delivered {n} times: {u}" for u, n in seen.items() if n > most]
        if self.check_holding:
            found += self.overlaps()
        log = self.log
        for word in TROUBLE:
            if word in log:
                at = log.index(word)
                found.append(f"log: {log[max(0, at - 300) : at + 1500]}")
        return found

    def overlaps(self) -> list[str]:
        """Wakes that began before another model's sleep or stop had succeeded."""
        held: set[str] = set()
        found = []
        for line in self.hooks(ev=None):
            if line.ev == "start" and line.action == "wake":
                if others := held - {line.key}:
                    found.append(f"wake of {line.key} began while {others} held the GPU")
                held.add(line.key)
            elif line.ev == "end" and line.action in ("sleep", "stop") and line.rc == "0":
                held.discard(line.key)
        return found

    def finish(self) -> None:
        found, left = [], None
        try:
            if self.process is not None:
                code = self.end()
                if code != self.expect_code:
                    found.append(f"exit code {code} after TERM")
            deadline = time.monotonic() + PATIENCE
            left = self.processes()
            while (others := _but_engines(left)) and time.monotonic() < deadline:
                time.sleep(0.02)
                left = self.processes()
            found += [f"left behind: {command}" for command in others]
            found += self.problems()
        finally:
            for pid, _ in self.processes() if left is None else left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        assert not found, "\n".join(found) + "\n---- log\n" + self.log[-3000:]

    # ---- talking to it

    async def wire(self) -> Wire:
        return await wire(self.port)

    async def ask(self, method: str, target: str, *, wait: float = PATIENCE, **more) -> Answer:
        async with await self.wire() as line:
            return await line.ask(request(method, target, **more), method=method, wait=wait)

    async def raw(self, data: bytes, *, wait: float = PATIENCE, method: str = "POST") -> Answer:
        async with await self.wire() as line:
            return await line.ask(data, wait=wait, method=method)

    async def chat(self, model: str, *, path: str = "/v1/chat/completions", **more) -> Answer:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more.pop("extra", {})}
        return await self.ask("POST", path, body=body, **more)

    async def begin(self, model: str, *, path: str = "/v1/chat/completions", **more) -> Wire:
        """Send a request and leave the answer unread."""
        line = await self.wire()
        body = {"model": model, "messages": []}
        await line.send(request("POST", path, body=body, **more))
        return line

    async def get(self, target: str, **more) -> Answer:
        return await self.ask("GET", target, **more)

    async def post(self, target: str, **more) -> Answer:
        more.setdefault("body", {})
        return await self.ask("POST", target, **more)

    async def status(self) -> dict:
        answer = await self.get("/llmux/status")
        assert answer.status == 200, answer
        return answer.json()

    async def phase(self, model: str) -> str:
        return (await self.status())["models"][model]["phase"].upper()

    async def metrics(self) -> dict[str, float]:
        text = (await self.get("/metrics")).body.decode()
        lines = (line.rpartition(" ") for line in text.splitlines() if line and line[0] != "#")
        return {name: float(value) for name, _, value in lines}

    async def until(self, what: Callable[[], object], wait: float = PATIENCE, every: float = 0.01):
        """Poll until ``what()`` (perhaps a coroutine) is true, and less often the longer that takes."""
        deadline = time.monotonic() + wait
        while True:
            found = what()
            if isinstance(found, Awaitable):
                found = await found
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {wait} s; hooks {self.order()}; log:\n{self.log[-3000:]}")
            await asyncio.sleep(every)
            every = min(1.2 * every, 0.1)

    async def until_phase(self, model: str, *phases: str, wait: float = PATIENCE) -> str:
        async def there():
            now = await self.phase(model)
            return now if now in phases else None

        return await self.until(there, wait)

    async def until_model(self, model: str, wait: float = PATIENCE, **values) -> None:
        async def there():
            now = (await self.status())["models"][model]
            return all(now[k] == v for k, v in values.items())

        await self.until(there, wait)


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return file.read()


def _but_engines(processes: list[tuple[int, str]]) -> list[str]:
    return [command for _, command in processes if ENGINE not in command]


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


__all__ = ["Answer", "Gone", "HookRun", "Lab", "free_port", "running"]
