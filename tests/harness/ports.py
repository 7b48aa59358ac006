"""Ports to listen on."""

from __future__ import annotations

import os
import random
import socket

LOWEST, STEP, COUNT = 11000, 8, 2500  # below those that outgoing connections are given

_CHANCE = random.SystemRandom()  # test plugins seed the other one
_GIVEN: set[int] = set()


def free_port() -> int:
    """Return a port of this machine that nothing listens on.

    No two are the same, nor those of tests which run beside these: nothing listens on them yet.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % STEP
    while True:
        port = LOWEST + STEP * _CHANCE.randrange(COUNT) + worker
        if port not in _GIVEN and _is_free(port):
            _GIVEN.add(port)
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
