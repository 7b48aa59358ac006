"""A connection between two processes that can be cut: a TCP proxy which drops or resets what passes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

from tests.harness.lease.raw import HOST
from tests.harness.ports import free_port

_PIECE = 1 << 16


class Line:
    """Passes bytes on from ``port`` to ``to``, while it is whole.

    While it is cut, connections are made and nothing passes, in either direction, as with a network that drops
    packets: what was written arrives once it is whole again. A reset ends all connections; until it is whole again
    new ones are reset, too.
    """

    def __init__(self, to: int) -> None:
        self.to = to
        self.port = free_port()
        self.resets = False
        self._whole = asyncio.Event()
        self._whole.set()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, HOST, self.port)

    def cut(self) -> None:
        """Lose what passes."""
        self._whole.clear()

    def reset(self) -> None:
        """End what is open, and what comes."""
        self.resets = True
        for writer in list(self._open):
            _reset(writer)

    def mend(self) -> None:
        """Make it whole."""
        self.resets = False
        self._whole.set()

    async def close(self) -> None:
        """End it, and all that passes."""
        if self._server is not None:
            self._server.close()
        self.reset()
        self._whole.set()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        other, ended = None, False
        try:
            if self.resets:
                return
            await self._whole.wait()
            there, other = await asyncio.open_connection(HOST, self.to)
            self._open.add(other)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, other))
                both.create_task(self._pass(there, writer))
            ended = True
        except* (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for each in filter(None, (writer, other)):
                if ended:
                    each.close()
                else:
                    _reset(each)
                self._open.discard(each)
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_PIECE):
            await self._whole.wait()
            writer.write(data)
            await writer.drain()
        await self._whole.wait()
        with contextlib.suppress(OSError):
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
