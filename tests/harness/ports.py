"""Ports to listen on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

LOWEST, COUNT = 11000, 20_000  # below those that the examples take, and outgoing connections are given

_CHANCE = random.SystemRandom()  # test plugins seed the other one
_GIVEN: set[int] = set()
_TAKEN = Path(tempfile.gettempdir()) / "llmux-test-ports"
"""A file of which a byte is locked for each port, by the process that it was given to, until that ends."""


def free_port() -> int:
    """Return a port of this machine that nothing listens on.

    No two are the same, nor those of other tests on this machine, which may not listen yet, or not any more: an
    llmux that is killed and started again must find its port as it left it.
    """
    while True:
        port = LOWEST + _CHANCE.randrange(COUNT)
        if port not in _GIVEN and _take(port) and _is_free(port):
            _GIVEN.add(port)
            return port


def _take(port: int) -> bool:
    try:
        fcntl.lockf(_file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


def _file() -> int:
    # These locks are the process's: they go with it, a child that is forked off has none of them, and what it
    # closes does not matter. But they would go when this process closes the file, so it stays open.
    owner, file = _OPEN.get("file", (0, -1))
    if owner != os.getpid():
        file = os.open(_TAKEN, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):
            _TAKEN.chmod(0o666)  # whoever else tests here
        _OPEN["file"] = os.getpid(), file
    return file


_OPEN: dict[str, tuple[int, int]] = {}


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
