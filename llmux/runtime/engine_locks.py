"""Notices that another llmux on this machine controls the same engines.

Only one llmux may have a state file. Two with copies of a configuration, another port and another state file would
adopt each other's engines, and wake and stop them behind each other's back: two engines on the GPU. So each holds
a lock for the address of every engine that it controls, and says when another llmux has it.

A lock is a datagram socket in Linux's abstract namespace, bound to a name made of the address. The kernel gives
each name to one socket, and takes it back when the process ends, however it ends: there are no files to clean up,
and no folders that users do not share or that are read-only, and no hook inherits it. Such names belong to the
network namespace, as loopback addresses do: 127.0.0.1:8001 in another container is another engine. Only llmuxes on
several machines that control an engine on yet another one are not noticed.

The holder of a lock answers a datagram with its pid and the file of its configuration, and learns in the same way
which llmux asks. A lock that another llmux has is tried again every ``RETRY`` seconds.

A lock takes an open file. Where few may be open, the engines that come last have none.

It is told, and not refused: an engine that takes no GPU, as one for embeddings on the CPU, may well serve several.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import resource
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from llmux.config import Config, EngineDefinition
from llmux.config.setting_types import Address
from llmux.observability.notices import EventLog

RETRY = 10.0  # seconds between two tries to get the locks that another llmux has
PATIENCE = 0.2  # seconds for its answer
ASKED = 8  # locks whose holder is asked at once; it is most likely the same
NAMED = 64  # llmuxes that asked and are named in the log; any user may send questions
_SHARE, _LEAST = 4, 64  # locks take up to a quarter of the open files; fewer models have room for so many
_LONGEST = 80  # bytes of an address in a name, which may have 107
_ANSWER = 4096  # bytes


class Other(NamedTuple):
    """Another llmux; 0 and "" where it has not said."""

    pid: int = 0
    config: str = ""

    def __str__(self) -> str:
        name = f"the llmux with pid {self.pid}" if self.pid else "another llmux"
        return f"{name} ({self.config})" if self.config else name


def engine_of(definition: EngineDefinition | Address) -> str:
    """Return the address of an engine, the same for all names of this machine."""
    host, port = Address(definition.host, definition.port).endpoint
    return f"{host}:{port}{definition.base_path}"


def engines_of(config: Config) -> list[str]:
    """Return the addresses of all engines of a configuration."""
    return [engine_of(model.address) for model in config.models.values()]


def most_locks(models: int) -> int:
    """Return how many locks an llmux that starts with so many models may have; other files stay free."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    wanted = max(_LEAST, 2 * models)  # a reload may bring more
    return wanted if files == resource.RLIM_INFINITY else min(wanted, files // _SHARE)


def controlled(engine: str) -> Other | None:
    """Return the llmux that controls an engine; None if there is none, or where that cannot be known."""
    found = _take(engine)
    if isinstance(found, socket.socket):
        found.close()
    return _ask(engine, Other()) if found is False else None


class EngineLocks:
    """The locks of the engines that this llmux controls. All is called from the thread of the running loop."""

    def __init__(self, log: EventLog, config: str, most: int) -> None:
        self.taken: dict[str, Other] = {}
        """The engines that another llmux controls, too."""
        self._me = Other(os.getpid(), config)
        self._most = most
        self._log = log
        self._held: dict[str, socket.socket] = {}
        self._askers: set[Other] = set()  # that the log has named
        self._next: asyncio.Handle | None = None  # look for what has changed
        self._soon = False  # in the next turn of the loop
        self._engines: Callable[[], Iterable[str]] = tuple

    def follow(self, engines: Callable[[], Iterable[str]]) -> None:
        """Hold the locks of the engines that this returns, from now on."""
        self._engines = engines
        self.look()

    def look_soon(self) -> None:
        """Look at the end of all that goes on now: thousands of models may have been removed."""
        if not self._soon:
            self._soon = True
            self._later(asyncio.get_running_loop().call_soon(self.look))

    def look(self) -> None:
        """Hold the locks of the present engines, and no others; log which of them another llmux has."""
        self._soon = False
        wanted = dict.fromkeys(self._engines())
        for engine in self._held.keys() - wanted.keys():
            self._let_go(engine)
        news: dict[Other, list[str]] = {}
        taken, self.taken = self.taken, {}
        asked, other = 0, Other()
        for engine in wanted:
            if engine in self._held or len(self._held) >= self._most or self._take(engine):
                continue
            if engine in taken:
                self.taken[engine] = taken[engine]
                continue
            if asked < ASKED:
                asked += 1
                other = _ask(engine, self._me)
                asked = asked if other.pid else ASKED
            self.taken[engine] = other
            news.setdefault(other, []).append(engine)
        for other, addresses in news.items():
            self._tell(other, addresses)
        self._later(asyncio.get_running_loop().call_later(RETRY, self.look) if self.taken else None)

    def _later(self, handle: asyncio.Handle | None) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next = handle

    def close(self) -> None:
        """Let go of all."""
        self._later(None)
        for engine in list(self._held):
            self._let_go(engine)

    def _take(self, engine: str) -> bool:
        """Take a lock; False if another llmux has it."""
        found = _take(engine)
        if isinstance(found, socket.socket):
            self._held[engine] = found
            asyncio.get_running_loop().add_reader(found.fileno(), self._asked, engine, found)
        return found is not False

    def _let_go(self, engine: str) -> None:
        lock = self._held.pop(engine)
        asyncio.get_running_loop().remove_reader(lock.fileno())
        lock.close()

    def _asked(self, engine: str, lock: socket.socket) -> None:
        """Answer the question which llmux holds a lock."""
        with contextlib.suppress(OSError):
            question, sender = lock.recvfrom(_ANSWER)
            asker = _other(question)
            # One that says nothing only wants to know.
            if asker.pid and asker not in self._askers and len(self._askers) < NAMED:
                self._askers.add(asker)
                self._tell(asker, [engine])
            if sender:
                lock.sendto(json.dumps(self._me).encode(), sender)

    def _tell(self, other: Other, engines: list[str]) -> None:
        self._log.emit("engine_controlled_twice", engines=engines, by=str(other))


def document(locks: EngineLocks | None) -> list[Mapping[str, Any]]:
    """Return the engines that another llmux controls, too, as JSON values."""
    taken = {} if locks is None else locks.taken
    return [
        {"engine": engine, "pid": other.pid or None, "config": other.config or None}
        for engine, other in taken.items()
    ]


def _name(engine: str) -> str:
    text = engine if len(engine.encode()) <= _LONGEST else hashlib.sha256(engine.encode()).hexdigest()
    return f"\0llmux/engine/{text}"


def _take(engine: str) -> socket.socket | bool:
    """Return the lock of an engine; False if another has it, True where there are no such locks."""
    try:
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError:  # no files are left, or a sandbox forbids it
        return True
    try:
        lock.setblocking(False)
        lock.bind(_name(engine))
    except OSError as error:
        lock.close()
        return error.errno != errno.EADDRINUSE  # else another system than Linux
    return lock


def _ask(engine: str, me: Other) -> Other:
    """Return the llmux that holds a lock; if it does not answer in time, nothing of it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asker:
        asker.bind("")  # a name of its own, to which the answer is sent
        asker.settimeout(PATIENCE)
        asker.sendto(json.dumps(me).encode(), _name(engine))
        return _other(asker.recv(_ANSWER))
    return Other()


def _other(message: bytes) -> Other:
    with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
        pid, config = json.loads(message)
        return Other(int(pid), str(config))
    return Other()
