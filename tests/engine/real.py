"""Real engines without a GPU, for the tests: llama.cpp's server on tiny models with random weights.

The generator and the server are the quickstart's own, so that there is one copy of each.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from examples.quickstart.tiny_gguf import Shape, cached
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE, processes_with

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "examples" / "quickstart" / "engine.py"
LLAMA_SERVER = shlex.join([sys.executable, str(ENGINE)])

TINY = Shape("tiny")  # about 4,000 tokens/s: answers at once
SLOW = Shape("slow", dim=384, layers=6, heads=6, kv_heads=2, feed_forward=1024)  # about 500 tokens/s: streams last

VECTOR = Shape("vector", dim=128, feed_forward=352)  # its embeddings are of a length of their own


def wait_until(condition, seconds: float = PATIENCE, *, what: str = "the condition") -> None:
    """Poll until the condition holds; fail when it does not within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not hold within {seconds} s"
        time.sleep(0.02)


def status_of(url: str) -> int:
    """Return the HTTP status of a GET, 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def text_of(url: str) -> str:
    """Return what a GET answers."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        text: str = response.read().decode()
        return text


def runs(pid: int) -> bool:
    """Say whether the process exists; a zombie does not count, unless some of its threads still run.

    They hold its sockets: until the last one has gone its port takes connections.
    """
    process = Path(f"/proc/{pid}")
    try:
        stat = (process / "stat").read_text()
        return stat.rpartition(") ")[2][0] != "Z" or len(list((process / "task").iterdir())) > 1
    except OSError:
        return False


@contextlib.contextmanager
def foreground(alias: str, port: int, *, shape: Shape = TINY) -> Iterator[subprocess.Popen[bytes]]:
    """Run an engine that no hook has started, until the block ends."""
    command = [sys.executable, ENGINE, "--model", cached(shape), "--port", str(port), "--alias", alias]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: status_of(f"http://127.0.0.1:{port}/health") == 200, what="the engine's health")
            yield process
        finally:
            process.kill()


def with_tools() -> dict[str, str]:
    """Return the environment, with this Python as python3: a bare machine has neither curl nor wget."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def end_engines(pid_dir: Path) -> None:
    """Kill whatever was started with this folder for pid files, and nothing else.

    Some engines write their names over their environment. What they began is in the session of one which still has
    its own, or of which a hook has noted the process: that session is killed whole, and no other.
    """
    stats = _stats()
    found = {*processes_with(f"PID_DIR={pid_dir}"), *_noted(pid_dir, stats)}
    sessions = {pid for pid in found if pid in stats and int(stats[pid][3]) == pid} - {os.getsid(0)}
    for pid in found:
        _kill(pid)

    def all_killed() -> bool:
        left = [pid for pid, stat in _stats().items() if int(stat[3]) in sessions and runs(pid)]
        for pid in left:
            _kill(pid)
        return not left

    if sessions:
        wait_until(all_killed, what=f"the end of what is in the sessions {sessions}")


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def _stats() -> dict[int, list[str]]:
    """What /proc has of each process after its name: the state, the parent, the group, the session, …"""
    stats = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (process / "stat").read_text(errors="replace")
            stats[int(process.name)] = stat.rpartition(") ")[2].split()
    return stats


def _noted(pid_dir: Path, stats: Mapping[int, list[str]]) -> Iterator[int]:
    """The processes of the pid files, if their numbers have not gone to others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    births = {f"{pid} {stat[19]}-{boot}": pid for pid, stat in stats.items()}
    for file in pid_dir.glob("*.pid"):
        with contextlib.suppress(OSError, KeyError):  # it was removed meanwhile, or its process has ended
            yield births[" ".join(file.read_text(errors="replace").split()[:2])]


class Hook:
    """A hook script and the environment that llmux would give it."""

    def __init__(self, script: Path, folder: Path, model: str, *, shell: str = "sh", **env: str) -> None:
        self.script, self.folder, self.shell, self.model = script, folder, shell, model
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.pid_dir = folder / "pids"
        self.env = {
            "LLMUX_MODEL": model,
            "LLMUX_PORT": str(self.port),
            "LLMUX_URL": self.url,
            "PID_DIR": str(self.pid_dir),
            **env,
        }

    def run(self, action: str, timeout: float = 60.0, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the action, as llmux does in a process group of its own; never raises for an exit code."""
        return subprocess.run(
            [self.shell, self.script, action],
            cwd=self.folder,
            env={**with_tools(), **self.env, "LLMUX_HOOK": action, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            start_new_session=True,
        )

    def ok(self, action: str, **env: str) -> str:
        """Run the action, which has to succeed, and return what it printed."""
        done = self.run(action, **env)
        assert done.returncode == 0, f"{action}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def fails(self, action: str, code: int = 1, **env: str) -> str:
        """Run the action, which has to fail with this code, and return what it complained about."""
        done = self.run(action, **env)
        assert done.returncode == code, f"{action}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stderr

    @property
    def pid_file(self) -> Path:
        """The file in which the script keeps the engine's process id."""
        return self.pid_dir / f"{self.model.replace('/', '_')}-{self.port}.pid"

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return int(self.pid_file.read_text().split()[0])

    def clean_up(self) -> None:
        """Leave nothing behind, whatever the test did."""
        end_engines(self.pid_dir)
