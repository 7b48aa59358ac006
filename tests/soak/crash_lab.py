"""The laboratories of ``crash_points``: an llmux, a gateway or a store that is traced, and killed at a point."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.harness.lease.fleet import Door
from tests.harness.lease.lab import ENGINE, Lab
from tests.harness.store_server import Server
from tests.harness.waiting import PATIENCE

CALLS = (
    "openat,unlink,unlinkat,rename,renameat,renameat2,mkdir,mkdirat,chmod,fchmod,fchmodat,write,writev,pwrite64,"
    "pwritev,sendto,sendmsg,ftruncate,fallocate,fdatasync,fsync,flock,bind,listen,connect,shutdown,kill,tgkill,"
    "fork,vfork,clone,clone3"
)
# The log, what wakes llmux's own loop, its threads, and files that are only read.
UNSEEN = re.compile(
    r'write\([12],|write\(\d+, "(\\1(\\0){7}|\\0)", \d\)|sendto\(\d+, "\\0", 1,'
    r"|kill\(-?\d+, 0|.*CLONE_THREAD|openat\((?!.*O_CREAT)"
)
LINE = re.compile(r"(\d+) +((\w+)\(.*)")
READY = '"event": "ready"'
FOLLOWED = '"event": "host_followed"'


class Point(NamedTuple):
    """A call, and which of its calls in a thread."""

    call: str
    number: int
    cut: bool = False  # llmux was killed there

    def __str__(self) -> str:
        return f"{self.call}:{self.number}"

    @classmethod
    def of(cls, text: str) -> Point:
        """Return what ``str`` made a text of."""
        call, _, number = text.partition(":")
        return cls(call, int(number))


class CrashLab(Lab):
    """A laboratory whose next llmux is traced, and killed at a point.

    An orphaned hook waits for ``ctl/go``, where it got as far before it was known that its llmux is dead.
    """

    ready = READY
    ORPHAN = 'sleep 0.1; while [ -e "$LAB/ctl/dead.$LIFE" ] && [ ! -e "$LAB/ctl/go" ]; do sleep 0.02; done'

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.life = 0
        self.serves = "ba"  # the models that answer in the end
        self.told: dict[str, object] = {}  # what an operator was told is in force; None: that is not known
        self.tracer: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        self.life += 1
        self.env["LIFE"] = str(self.life)
        super().launch()

    def trace_of(self, life: int) -> Path:
        return self.root / f"strace.{life}"

    def start_traced(self, kill: Point | None) -> bool:
        """Start llmux, traced; return whether it lives until it is ready."""
        self.stopped = True
        self.launch()
        assert self.process
        status = Path(f"/proc/{self.process.pid}/status")
        while "State:\tT" not in status.read_text():
            time.sleep(0.005)
        self.trace(self.process.pid, kill)
        self.process.send_signal(signal.SIGCONT)
        self.stopped = False
        ready = self.log.count(self.ready)
        until = time.monotonic() + PATIENCE
        while (
            self.log.count(self.ready) == ready and self.process.poll() is None
        ):  # no request: it would be traced
            assert time.monotonic() < until, f"not ready:\n{self.log}"
            time.sleep(0.01)
        if self.process.poll() is None:
            return True
        self.process = None
        assert kill is not None, f"llmux ended:\n{self.log}"
        return False

    def trace(self, pid: int, kill: Point | None, number: str = "KILL") -> None:
        """Trace a process, and send it a signal at a point."""
        command = ["strace", "-f", "-b", "execve", "-q", "-s", "60", "-e", f"trace={CALLS}", "-e", "signal=none"]
        if kill is not None:
            command += ["-e", f"inject={kill.call}:signal={number}:when={kill.number}"]
        status = Path(f"/proc/{pid}/status")
        self.tracer = subprocess.Popen(
            [*command, "-o", self.trace_of(self.life), "-p", str(pid)], stderr=subprocess.DEVNULL
        )
        with contextlib.suppress(FileNotFoundError):  # it was killed at once
            while "TracerPid:\t0" in status.read_text():
                assert self.tracer.poll() is None or kill, "strace may not trace here"
                if self.tracer.poll() is not None:
                    break
                time.sleep(0.005)

    def dead(self, *, orphans_wait: bool) -> None:
        """Kill it, if it lives yet."""
        if self.process is not None:
            self.kill()
        for name in [f"dead.{self.life}"] + ["go"] * (not orphans_wait):
            (self.root / "ctl" / name).touch()
        if self.tracer is not None:
            self.tracer.wait(PATIENCE)

    def sites(self, life: int) -> dict[str, Point]:
        """Return what is worth a kill, by what is done there: numbers differ from run to run."""
        counts: Counter[tuple[str, str]] = Counter()
        shapes: Counter[str] = Counter()
        found = {}
        for line in self.trace_of(life).read_text(errors="replace").splitlines():
            if match := LINE.match(line):
                thread, text, call = match.groups()
                counts[thread, call] += 1
                if not UNSEEN.match(text):
                    shape = re.sub(r"\d+", "N", text.partition(" = ")[0].replace(str(self.root), ""))[:90]
                    shape = f"{shapes['vfork(']} {shape}".removesuffix("<unfinished ...>").strip()
                    shapes[shape] += 1
                    shapes["vfork("] += "fork(" in shape
                    cut = text.endswith("= ?")
                    found[f"{shape} {shapes[shape]}"] = Point(call, counts[thread, call], cut)
        return found

    def clear(self) -> None:
        """End all that runs of it, whatever has failed."""
        if self.process is not None:
            self.kill()
        for pid, _ in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def others(self) -> set[tuple[int, str]]:
        """Return what runs of this laboratory, but llmux and the engines."""
        mine = self.process.pid if self.process else 0
        found = set()
        for pid, command in self.processes():
            with contextlib.suppress(OSError):
                if pid != mine and ENGINE not in command:
                    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    found.add((pid, stat[19]))
        return found

    def drafts(self) -> list[str]:
        """Return files that are not meant to stay, but those named after a process that runs."""
        folders = [self.root / name for name in ("state", "xdg", "captures")]
        files = [file for folder in folders for file in folder.rglob("*") if not file.is_dir()]
        ends = (".tmp", ".sock", ".part")
        found = [file for file in files if file.name[0] == "." or file.name.endswith(ends)]
        return [str(file) for file in found if not (Path("/proc") / file.suffix[1:] / "stat").exists()]


class CrashDoor(CrashLab, Door):
    """A gateway that is killed, with hosts and a store that are not."""

    ready = FOLLOWED

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.store: Server | None = None
        self.begun = 0  # requests of alice
        self.env["XDG_RUNTIME_DIR"] = str(root / "runtime")
        (root / "runtime").mkdir()

    def kept(self) -> dict[str, dict[str, int]]:
        """Return what the gateway's file says of budgets."""
        with contextlib.suppress(OSError):
            return json.loads((self.root / "state" / "gateway.json").read_text())
        return {}

    def spent(self) -> int:
        return sum(self.kept().get("spent", {}).values())

    def stored(self) -> int:
        """Return what the store says that alice spent."""
        assert self.store is not None
        words = ["redis-cli", "-p", str(self.store.port), "--raw"]
        keys = subprocess.run([*words, "keys", "{llmux}:use:budget:*"], capture_output=True, text=True, check=True)
        return sum(
            int(subprocess.run([*words, "get", key], capture_output=True, text=True, check=True).stdout)
            for key in keys.stdout.split()
        )

    def drafts(self) -> list[str]:
        """Return those, and sockets that nothing answers at, but that of the embedded store."""
        runtime = [file for file in (self.root / "runtime").rglob("*") if file.is_socket()]
        return super().drafts() + [str(file) for file in runtime if file.parent.name != "store"]

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            if self.store is not None:
                self.store.close()

    def clear(self) -> None:
        """End all that runs of it, whatever has failed."""
        for lab in (*self.hosts.values(), self):
            if lab.process is not None:
                lab.kill()
            for pid, _ in lab.processes():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        if self.store is not None:
            self.store.close()
