"""The native relay: streams that a thread in C relays, if that could be compiled.

Theory of operation
===================

Much of the cost of a stream's event is the way of its bytes through the loop and Python, which do not look at
them. So with the first chunk of an answer, if its client takes that at once (``EngineConnection``), both sockets
are *lent* to a thread (``native.c``), which passes whole chunks on as ``data_received`` does, and counts the same.
It does nothing else: anything that is not a whole chunk, or does not go at once, comes *back*, with the remaining
bytes, to the connection that lent it, and takes Python's path from there. So the rules of HTTP, of errors and of
back-pressure exist only once.

While a stream is lent, the engine's transport does not read and nothing is written to the client's. What ends the
exchange takes the stream back first: ``EngineConnection.abort`` and ``_over``, through which all ends go. The
client's side is read by its transport as ever, so that its leaving is noticed.

There is one relay for each event loop, shared by the pools on it, and its thread starts with the first stream that
is lent. Calls keep the GIL: they are short, and the thread never asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import select
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

SWITCH = "LLMUX_NATIVE"
"""The environment variable: 0 leaves the native relay out."""

# Lending a stream and taking it back costs as much as it saves with so many blocks. As long as most come back
# sooner, new streams are lent later: they may be over by then.
WORTHWHILE = 12  # blocks
PATIENCE = 4
_MISSED = 32  # chunks that it keeps from being lent
_SMOOTHING = 0.1

MOST = 4096  # streams that are lent at a time
_SHARE = 16  # and of the files that may be open; each takes two
_VERSION = 1
_BLOCKS = 4


class _Report(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("events", ctypes.c_uint64),
        ("last", ctypes.c_double),
        ("left", ctypes.c_void_p),
        ("unsent", ctypes.c_uint64),
        ("unread", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("tail", ctypes.c_void_p * _BLOCKS),
        ("sizes", ctypes.c_uint64 * _BLOCKS),
    )


class Passed(NamedTuple):
    """What was passed on since it was asked last."""

    size: int  # bytes
    events: int
    last: float  # when, on the loop's clock; 0: nothing
    tail: list[bytes]  # the last blocks, once the stream is back


class Back(NamedTuple):
    """A stream that has come back."""

    passed: Passed
    blocks: int  # that were passed on since it was lent
    unsent: bytes  # counted as passed, and still to be written to the client
    unread: bytes  # received, and nothing else


class Lender(Protocol):
    """A connection that has lent its stream."""

    transport: asyncio.Transport

    def handed_back(self, back: Back) -> None:
        """Go on with the stream."""


def _load() -> ctypes.PyDLL | None:
    if os.environ.get(SWITCH) == "0":
        return None
    for path in Path(__file__).parent.glob("native.linux.so"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            library = ctypes.PyDLL(str(path))
            if ctypes.c_int.in_dll(library, "relay_version").value == _VERSION:
                return _declared(library)
    return None


def _declared(library: ctypes.PyDLL) -> ctypes.PyDLL:
    pointer, key, report = ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(_Report)
    for name, result, arguments in (
        ("relay_open", pointer, (ctypes.c_size_t, ctypes.c_int)),
        ("relay_close", None, (pointer,)),
        ("relay_wake", ctypes.c_int, (pointer,)),
        ("relay_lend", key, (pointer, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)),
        ("relay_look", ctypes.c_int, (pointer, key, report)),
        ("relay_take", ctypes.c_int, (pointer, key, report)),
        ("relay_next", ctypes.c_int, (pointer, report)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class NativeRelay:
    """The relay of one loop."""

    left: ClassVar[int] = 0
    """Files that all which open from now on leave to connections and hooks."""

    def __init__(self, loop: asyncio.AbstractEventLoop, library: ctypes.PyDLL) -> None:
        self.users = 0  # pools
        self.patience = 0  # a stream that begins is lent after so many times ``AT_ONCE`` chunks; 0: at once
        self._usual = float(2 * WORTHWHILE)  # blocks that could be passed until a stream is handed back
        self._loop = loop
        self._closed = False
        self._library = library
        self._relay: int | None = None
        self._lent: dict[int, Lender] = {}
        self._watched: select.epoll | None = None  # the files that uvloop waits for

    def _open(self) -> bool:
        files = _open_files()
        streams = min(most_streams(), (files - self.left) // 2)
        if streams > 0:
            self._relay = self._library.relay_open(streams, files // 2)
        if self._relay is None:
            self._closed = streams <= 0  # else there may be files and memory for it later
            return False
        self._loop.add_reader(self._library.relay_wake(self._relay), self._take_all_back)
        if watched := getattr(self._loop, "_get_backend_id", None):
            with contextlib.suppress(OSError):  # no file is left
                self._watched = select.epoll.fromfd(os.dup(watched()))
        return True

    def lend(self, lender: Lender, client: asyncio.Transport, data: bytes) -> int:
        """Write what ends between two chunks to a client, or nothing, and have all chunks that follow passed on.

        Returns the stream's key; 0 if it cannot be lent now, and nothing was written.
        """
        engine = lender.transport
        ends = _socket(engine), _socket(client)
        if -1 in ends or client.get_write_buffer_size() or self._closed:
            return 0
        if self._relay is None and not self._open():
            return 0
        engine.pause_reading()
        key: int = self._library.relay_lend(self._relay, *ends, data, len(data))
        if not key:
            engine.resume_reading()
            return 0
        self._lent[key] = lender
        if self._watched is not None:
            # Else uvloop is woken up by the next chunk, only to find that it reads no more: it drops a file when
            # something comes. What it waits for from now on, if only to write, it sets anew.
            with contextlib.suppress(OSError):
                self._watched.modify(ends[0], 0)
        return key

    def look(self, key: int) -> Passed:
        """Return what was passed on of a stream that is lent."""
        report = _Report()
        if self._relay is not None:
            self._library.relay_look(self._relay, key, report)
        return Passed(report.bytes, report.events, report.last, [])

    def take(self, key: int) -> Back:
        """Take a stream back. That of a loop which was closed may have none any more."""
        del self._lent[key]
        report = _Report()
        if self._relay is not None:
            self._library.relay_take(self._relay, key, report)
        return _read(report)

    def let_go(self) -> None:
        """Close it with the last of its users. What is lent comes back, and goes on."""
        self.users -= 1
        if not self.users:
            _relays.pop(self._loop, None)
            self.close()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        if self._relay is None:
            return
        if not self._loop.is_closed():
            while self._lent:
                key, lender = next(iter(self._lent.items()))
                lender.handed_back(self.take(key))
            self._loop.remove_reader(self._library.relay_wake(self._relay))
        self._library.relay_close(self._relay)
        self._relay = None
        if self._watched is not None:
            self._watched.close()

    def _take_all_back(self) -> None:
        report = _Report()
        while self._relay is not None and self._library.relay_next(self._relay, report):
            could = report.blocks + (_MISSED if self.patience else 0)
            self._usual += (could - self._usual) * _SMOOTHING
            self.patience = 0 if self._usual >= WORTHWHILE else PATIENCE
            self._lent.pop(report.key).handed_back(_read(report))


def _read(report: _Report) -> Back:
    left = ctypes.string_at(report.left, report.unsent + report.unread)
    tail = [ctypes.string_at(at, size) for at, size in zip(report.tail, report.sizes, strict=True) if size]
    passed = Passed(report.bytes, report.events, report.last, tail)
    return Back(passed, report.blocks, left[: report.unsent], left[report.unsent :])


def _socket(transport: asyncio.Transport) -> int:
    """Return a transport's descriptor; -1 where its socket does not carry just what is written to it."""
    sock: Any = transport.get_extra_info("socket")
    if sock is None or transport.is_closing() or getattr(transport, "tapped", False):
        return -1
    return -1 if transport.get_extra_info("ssl_object") is not None else int(sock.fileno())


_library = _load()
_relays: dict[asyncio.AbstractEventLoop, NativeRelay] = {}
if _library is not None:
    os.register_at_fork(after_in_child=_relays.clear)  # the threads are the parent's


def of(loop: asyncio.AbstractEventLoop) -> NativeRelay | None:
    """Return the relay of a loop, which its pools share until each has let go of it; None where there is none."""
    if _library is None:
        return None
    for other in tuple(_relays):  # which other threads change
        if other.is_closed() and (relay := _relays.pop(other, None)) is not None:
            relay.close()  # of a pool that was never closed
    if loop not in _relays:
        _relays[loop] = NativeRelay(loop, _library)
    relay = _relays[loop]
    relay.users += 1
    return relay


def most_streams() -> int:
    """Return how many streams a relay has at most; each takes two files beside those of its connections."""
    return 0 if _library is None else min(MOST, _open_files() // _SHARE)


def _open_files() -> int:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST * _SHARE if files == resource.RLIM_INFINITY else files


def which() -> str:
    """Return what passes streams on: "native", or "python"."""
    return "python" if _library is None else "native"
