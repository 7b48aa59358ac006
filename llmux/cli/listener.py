"""Who listens on a port of this machine, by /proc: one server is told from the next without asking it."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

_LISTENING = "0A"  # its state in /proc/net/tcp


def sockets_on(port: int) -> frozenset[str]:
    """Return the inodes of the sockets that listen on a port; each server that is started has another."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return frozenset(found)


def holders_of(inodes: frozenset[str]) -> frozenset[int]:
    """Return the processes that hold one of these sockets; those of other users only when we are root."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(file) in wanted for file in (process / "fd").iterdir()):  # noqa: PTH115 - "socket:[1]"
                found.add(int(process.name))
    return frozenset(found)


def still_run(pids: frozenset[int]) -> frozenset[int]:
    """Return those that have not ended; one that waits for its parent has."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX":
                found.add(pid)
    return frozenset(found)


def is_open(host: str, port: int, patience: float = 2.0) -> bool:
    """Whether somebody accepts connections there, within ``patience`` seconds."""
    try:
        socket.create_connection((host, port), timeout=patience).close()
    except OSError:
        return False
    return True
