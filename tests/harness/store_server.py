"""A real server of the store, for tests and benchmarks: Valkey's or Redis's, on loopback only."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.harness.lease.raw import HOST
from tests.harness.ports import free_port

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")


class Server:
    """A store's server, which takes connections. Skips the test where there is none on this machine."""

    def __init__(self, *options: str | Path, port: int = 0, tls: bool = False) -> None:
        if SERVER is None:
            pytest.skip("there is no valkey-server or redis-server (Debian: redis-server)")
        self.port = port or free_port()
        self.url = f"redis://{HOST}:{self.port}/0"
        listen = ["--port", "0", "--tls-port", str(self.port)] if tls else ["--port", str(self.port)]
        self._folder = tempfile.TemporaryDirectory()  # what replicas write there is read at a start
        where = ["--bind", HOST, "--save", "", "--dir", self._folder.name]
        self._command = [SERVER, *listen, *where, *map(str, options)]
        self.process = self._start()
        while self.process.poll() is None:  # a test's timeout bounds it
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((HOST, self.port)):
                break
            time.sleep(0.005)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        self.process.kill()
        self.process.wait()
        self._folder.cleanup()
