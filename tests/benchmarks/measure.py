"""The costs of a process, and what its clients observe. Linux only: it reads ``/proc``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.harness.ports import free_port

__all__ = ["free_port"]

HERE = Path(__file__).parent
BUILD = HERE / "build"
PROXY_CORE, LOAD_CORE = 0, 1  # the proxy has one to itself, the load and the engine share the other

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LISTENING = "0A"


def build() -> None:
    """Compile what is missing or older than its source. Without Go there is no Go proxy."""
    BUILD.mkdir(exist_ok=True)
    for name in ("engine", "client", "relay", "stamp"):
        source, program = HERE / "load" / f"{name}.c", BUILD / name
        if _older(program, source):
            subprocess.run(["gcc", "-O2", "-Wall", "-o", program, source], check=True)
    source, program = HERE / "load" / "goproxy", BUILD / "goproxy"
    if _older(program, source / "main.go"):
        with suppress(FileNotFoundError):
            subprocess.run(["go", "build", "-o", program, "."], cwd=source, check=True)


def _older(program: Path, source: Path) -> bool:
    return not program.exists() or program.stat().st_mtime < source.stat().st_mtime


# Before this process is kept on one itself.
_SEVERAL_CORES = len(os.sched_getaffinity(0)) > 1


def pinned(core: int) -> list[str]:
    """Return the words that, before a command, keep it on a core; none where there is only one."""
    return ["taskset", "-c", str(core)] if _SEVERAL_CORES else []


def pin(core: int) -> None:
    """Keep this process on a core; whom it starts is kept on another with ``pinned``."""
    if _SEVERAL_CORES:
        os.sched_setaffinity(0, {core})


def client(
    mode: str, port: int, path: str, connections: int, seconds: float, *last: float, model: str = "m"
) -> Any:
    """Run the load client and return what it measured."""
    command = [*pinned(LOAD_CORE), str(BUILD / "client"), mode, str(port), path, model, str(connections)]
    done = subprocess.run(
        [*command, str(seconds), *map(str, last)], check=True, stdout=subprocess.PIPE, timeout=seconds + 60
    )
    return json.loads(done.stdout)


# ---- processes


def family(pid: int) -> list[int]:
    """Return a process and all that come from it."""
    members = [pid]
    for member in members:
        with suppress(OSError):
            for task in Path(f"/proc/{member}/task").iterdir():
                members += map(int, (task / "children").read_text().split())
    return members


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children, those that have ended included."""
    ticks = 0
    for member in family(pid):
        with suppress(OSError):
            ticks += sum(map(int, _stat(member)[11:15]))  # utime, stime, cutime, cstime
    return ticks / _TICK


def resident(pid: int) -> int:
    """Return the resident bytes of a process and its children."""
    pages = 0
    for member in family(pid):
        with suppress(OSError):
            pages += int(_stat(member)[21])
    return pages * _PAGE


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def listener(port: int) -> int | None:
    """Return the process that listens on a port of this machine, if it can be seen."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for row in map(str.split, Path(table).read_text().splitlines()[1:]):
                if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{row[9]}]")
    for process in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        with suppress(OSError):
            if any(str(link.readlink()) in inodes for link in Path(f"/proc/{process}/fd").iterdir()):
                return process
    return None


class Watch:
    """Runs a load and remembers what a process cost meanwhile. Without a process it only runs the load."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._over = threading.Event()
        self.cpu = 0.0
        self.growth = 0  # bytes, at the peak

    def run(self, load: Callable[[], Any]) -> Any:
        if self._pid is None:
            return load()
        before, idle = cpu_seconds(self._pid), resident(self._pid)
        thread = threading.Thread(target=self._look, args=(idle,))
        thread.start()
        try:
            return load()
        finally:
            self.cpu = cpu_seconds(self._pid) - before
            self._over.set()
            thread.join()

    def _look(self, idle: int) -> None:
        assert self._pid is not None
        while not self._over.wait(0.2):
            self.growth = max(self.growth, resident(self._pid) - idle)
