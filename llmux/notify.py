"""Telling systemd: the sd_notify protocol, for a unit with ``Type=notify`` and a watchdog.

Source: sd_notify(3). Nothing happens, and nothing fails, where there is no systemd.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Sends states to the socket that ``$NOTIFY_SOCKET`` names."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL byte of an abstract socket.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog: float | None = None
        """How often to call ``alive``, in seconds: half of what systemd waits. None: no watchdog."""
        if mine and watchdog.isdigit() and int(watchdog) > 0:
            self.watchdog = int(watchdog) / 2e6

    def ready(self, status: str) -> None:
        """The start, or a reload, is done."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """A reload begins."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The stop begins."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """All is well."""
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(state.encode(), self._address)
        except OSError:
            # systemd is not there any more, or slow: its watchdog will say so.
            return
