"""llmux as a process of its own, without the time that Python takes to import it.

``launch`` lets a process which has imported everything fork: the child runs the command line, with its own
arguments, environment, folder, output, signals and exit code. ``LLMUX_UNDER_TEST`` names another command to start
instead. Tests of the start itself run ``python -m llmux``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

ROOT = Path(__file__).resolve().parents[2]
UNDER_TEST = "LLMUX_UNDER_TEST"
COMMAND = os.environ.get(UNDER_TEST, f"{sys.executable} -m llmux").split()
LARGEST = 1 << 20  # bytes of a request, the environment included
STARTUP = {"PYTHONWARNINGS": "default", "PYTHONUNBUFFERED": "1"}  # read by Python when it starts
OUTSIDE = dict(os.environ)  # as no test has changed it: tests find what they started by its environment


class Running(Protocol):
    """What tests use of ``subprocess.Popen``."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Launcher:
    """The process which has imported llmux, and forks; forked itself from another one where there is one.

    ``engines``: the FIFO in which the pretended engines of laboratories are asked for.
    """

    def __init__(self, other: Launcher | None = None) -> None:
        self.engines = other.engines if other else ""
        self._forks_engines: subprocess.Popen[bytes] | None = None
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        for end in (self._socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST)
        with theirs:
            if other is not None:
                other.ask([theirs.fileno()], share=True)
                return
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.harness.forked", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env={**OUTSIDE, **STARTUP},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ask(self, fds: Sequence[int] = (), **request: Any) -> int:
        """Send a request, and return the number that answers it."""
        with self._lock:
            with contextlib.suppress(BrokenPipeError):  # then nothing answers
                socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
            answer = self._socket.recv(100)
        assert answer, "the process that forks has ended"
        return int(answer)

    def start_engines(self) -> None:
        """Start what forks them: it ends with the last process that has this one's end of its pipe."""
        self.engines = os.path.join(tempfile.mkdtemp(prefix="llmux-engines-"), "engines")  # noqa: PTH118
        os.mkfifo(self.engines)
        self._forks_engines = subprocess.Popen(
            [sys.executable, "-I", "-S", ROOT / "tests/harness/lease/engine.py", self.engines],
            stdin=subprocess.PIPE,
            env=OUTSIDE,
            start_new_session=True,
        )

    def close(self) -> None:
        self._socket.close()
        if self._forks_engines is not None:
            assert self._forks_engines.stdin is not None
            self._forks_engines.stdin.close()
            self._forks_engines.wait()
            shutil.rmtree(Path(self.engines).parent)
        if self._process is not None:
            self._process.wait()


class Forked:
    """A process that the launcher has forked."""

    def __init__(self, launcher: Launcher, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._launcher = launcher
        self._fd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._fd], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(self._launcher.ask(reap=self.pid))
            os.close(self._fd)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._fd], [], [], timeout)[0]:
            assert timeout is not None
            raise subprocess.TimeoutExpired(COMMAND, timeout)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_RUNNING: list[Launcher] = []  # the first one launches; the others are of the processes this one was forked from


def _launcher() -> Launcher:
    if not _RUNNING:
        use(Launcher())
    return _RUNNING[0]


def share() -> Launcher:
    """Return a launcher for a process that is to be forked from this one: there it is to be used."""
    engines()
    return Launcher(_launcher())


def use(launcher: Launcher) -> None:
    """Launch with this one, until this process ends."""
    _RUNNING.insert(0, launcher)
    atexit.register(launcher.close)


def engines() -> str:
    """Return the FIFO in which pretended engines are asked for."""
    launcher = _launcher()
    if not launcher.engines:
        launcher.start_engines()
    return launcher.engines


def launch(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    log: int,
    env: Mapping[str, str],
    cwd: str | os.PathLike[str] = ".",
    cold: bool = False,
    stopped: bool = False,
) -> Running:
    """Start llmux in a session of its own.

    ``log``: a descriptor for its output; ``cold``: with a new Python; ``stopped``: it begins when it gets CONT.
    """
    words = [os.fspath(argument) for argument in arguments]
    if cold or UNDER_TEST in os.environ:
        return subprocess.Popen(
            [*COMMAND, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
    launcher = _launcher()
    where = os.path.abspath(cwd)  # noqa: PTH100, as the test has it: links included
    return Forked(launcher, launcher.ask([log], arguments=words, env=dict(env), cwd=where, stopped=stopped))


@dataclass
class Piped:
    """A running llmux, and the pipe that it writes to."""

    process: Running
    output: TextIO

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.output.close()


def piped(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str],
    cwd: str | os.PathLike[str] = ".",
    cold: bool = False,
) -> Piped:
    """Launch llmux with a pipe for what it writes to standard output and standard error."""
    reading, writing = os.pipe()
    try:
        return Piped(launch(arguments, log=writing, env=env, cwd=cwd, cold=cold), os.fdopen(reading))
    finally:
        os.close(writing)


def run(arguments: Sequence[str], *, env: Mapping[str, str], cwd: str | os.PathLike[str] = ".") -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it wrote."""
    command = piped(arguments, env=env, cwd=cwd)
    with command.output:
        said = command.output.read()
        return command.process.wait(), said
