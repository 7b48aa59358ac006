"""What the loop's transports do not offer: the options of a TCP socket, and what its kernel knows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct

# On a fresh connection Linux acknowledges each event by itself as it is read, an eighth of what an event costs.
# Off, they go two at a time, as on a connection that is used again. Linux turns it on itself once one has waited
# for 40 ms, so an engine that waits for them (with Nagle's algorithm) does so once.
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)
# A machine that is gone, and no process that is frozen, answers no probes; the system's own first one is after two
# hours. What is on this machine cannot go by itself.
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))  # seconds, seconds, probes
_KEPT_ALIVE = [(getattr(socket, name), value) for name, value in _KEEPALIVE if hasattr(socket, name)]
_TCP_INFO = 256  # bytes of what Linux tells of a connection
_AT_ONCE = struct.pack("ii", 1, 0)


def tune(transport: asyncio.Transport, *, far: bool) -> None:
    """Set the options of a fresh connection to an engine, ``far`` if it is on another machine."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family == getattr(socket, "AF_UNIX", None):
        return
    with contextlib.suppress(OSError):
        # There is no total timeout: this is how the death of an engine's whole machine is noticed.
        if far:
            probe_when_silent(sock)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if _QUICKACK is not None:
            sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 0)


def probe_when_silent(sock: socket.socket) -> None:
    """Have the system find out whether the other machine is still there; of a listener: those that connect."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEPT_ALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def reset(transport: asyncio.Transport) -> None:
    """Close a connection so that the other side cannot take it for a proper end."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    transport.abort()


def hang_up(transport: asyncio.Transport) -> None:
    """End both directions of a transport that is open. uvloop's sockets can be asked for their number only."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(sock.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)


def has_all(transport: asyncio.Transport) -> bool:
    """Whether the other side's kernel has acknowledged all that was written to a transport; True if unknown.

    A process that dies with bytes unread has its kernel answer with a reset, which acknowledges nothing; bytes
    that come after its end are answered so, too.
    """
    sock = transport.get_extra_info("socket")
    option = getattr(socket, "TCP_INFO", None)
    if sock is None or option is None or transport.get_extra_info("ssl_object") is not None:
        return True
    if transport.get_write_buffer_size():
        return False
    try:
        with socket.socket(fileno=os.dup(sock.fileno())) as same:
            told = same.getsockopt(socket.IPPROTO_TCP, option, _TCP_INFO)
        (acknowledged,) = struct.unpack_from("Q", told, 120)
        sent, again = struct.unpack_from("QQ", told, 200)
    except (OSError, ValueError, struct.error):  # no TCP, another system's, an old one, or it is closed already
        return True
    return bool(acknowledged > sent - again)  # the handshake counts as one byte
