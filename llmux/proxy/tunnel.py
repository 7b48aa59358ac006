"""After 101: bytes both ways, unparsed, until either side closes.

From the engine to the client the bytes take the relay's path, as any response's do. From the client to the
engine they come through aiohttp's protocol, which after an upgrade feeds what arrives to a *payload parser*
(meant for its own WebSocket reader): the tunnel takes that place and parses nothing. Bytes that came in one
segment with the handshake are fed first, by ``set_parser``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmux.upstream import EngineConnection


class Tunnel:
    """The client's direction of a tunnel, in the shape of aiohttp's payload parsers."""

    __slots__ = ("_connection", "_on_close", "_paused", "_transport")

    def __init__(
        self,
        connection: EngineConnection,
        transport: asyncio.Transport,
        on_close: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._transport = transport
        self._on_close = on_close
        self._paused = False
        connection.watch_upload(self)

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Pass bytes on to the engine. True would tell aiohttp to close, which the relay does."""
        if self._paused and self._transport.is_reading():
            # aiohttp had paused too, for the bytes that came before the 101, and has resumed since.
            self._transport.pause_reading()
        if not self._connection.transport.is_closing():
            self._connection.transport.write(data)
        return False, b""

    def feed_eof(self) -> None:
        """Close the engine's side too: the client has gone."""
        self._on_close()

    def upload_paused(self) -> None:
        """Stop reading from the client until the engine has read."""
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def upload_resumed(self) -> None:
        """Read from the client again."""
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
