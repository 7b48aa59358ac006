"""The idle connections to the engines.

There is no limit on connections: how much an engine is given at once is the admission's business. A
connection belongs to an *owner*, the one stretch of time that an engine is awake; it is never given to
another owner, so a request cannot reach, through a connection left over, an engine that has since been
replaced by another one on the same port.
"""

from __future__ import annotations

import asyncio
import ssl

from llmux.upstream import native
from llmux.upstream.connection import EngineConnection
from llmux.upstream.engine import EngineAddress, EngineRefusedError
from llmux.upstream.names import Names, connect, is_name
from llmux.upstream.sockets import tune

# llama.cpp closes idle connections after 5 s; a request must not meet that moment.
IDLE_TIMEOUT = 3.5
CONNECT_TIMEOUT = 10.0
_HERE = frozenset({"127.0.0.1", "localhost", "::1"})


class ConnectionPool:
    """Idle connections, the most recently used first."""

    def __init__(
        self,
        *,
        idle_timeout: float = IDLE_TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._idle_timeout = idle_timeout
        self._connect_timeout = connect_timeout
        self._ssl_context = ssl_context
        self._idle: dict[object, list[EngineConnection]] = {}  # by owner; the freshest is last
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._names = Names()
        self._native: native.NativeRelay | None = None

    @property
    def idle_count(self) -> int:
        """How many connections are idle."""
        return sum(map(len, self._idle.values()))

    def take(self, owner: object) -> EngineConnection | None:
        """Take an idle connection of this owner's, if there is one."""
        idle = self._idle.get(owner)
        while idle:
            connection = idle.pop()
            connection.on_idle_end = None
            if connection.lost or connection.transport.is_closing():
                continue
            if connection.loop.time() - connection.idle_since > self._idle_timeout:
                connection.abort()
                continue
            return connection
        return None

    def interruptible(self) -> asyncio.Timeout:
        """Return the time limit to enter around ``connect``; rescheduled, it ends the attempt."""
        return asyncio.timeout(self._connect_timeout)

    async def connect(self, address: EngineAddress) -> EngineConnection:
        """Open a connection. EngineRefusedError when there is no way to."""
        loop = asyncio.get_running_loop()
        if self._native is None and not self._closed:
            self._native = native.of(loop)

        def made() -> EngineConnection:
            return EngineConnection(loop, self._native)

        try:
            if address.socket:
                _, connection = await loop.create_unix_connection(made, address.socket)
                return connection
            tls = self._tls() if address.tls else None
            place, name = (address.host, address.port), address.host if address.tls else None
            found = await self._names.find(*place) if is_name(address.host) else []
            # Several are tried in turn, and one with a scope is known by more than its address.
            if len(found) > 1 or (found and any(found[0][4][2:])):
                named = await connect(found)
                _, connection = await loop.create_connection(made, sock=named, ssl=tls, server_hostname=name)
            else:
                place = found[0][4][:2] if found else place
                _, connection = await loop.create_connection(made, *place, ssl=tls, server_hostname=name)
        except OSError as error:
            raise EngineRefusedError(f"No connection to the engine at {address}: {error}.") from error
        tune(connection.transport, far=address.host not in _HERE)
        return connection

    def _tls(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
        return self._ssl_context

    def release(self, connection: EngineConnection, owner: object) -> None:
        """Keep the connection for the owner's next request, if it is fit for one."""
        if not connection.reusable or connection.lost or self._closed or connection.transport.is_closing():
            connection.abort()
            return
        connection.resume_reading()  # so that its end is noticed
        loop = connection.loop  # asking asyncio which one runs costs a system call
        connection.idle_since = loop.time()
        connection.pooled = True
        idle = self._idle.get(owner)
        if idle is None:
            idle = self._idle[owner] = []
        idle.append(connection)
        connection.on_idle_end = idle.remove
        if self._sweep_timer is None:
            self._sweep_timer = loop.call_later(self._idle_timeout, self._sweep)

    def discard(self, owner: object) -> None:
        """Close the owner's idle connections: its engine is about to go."""
        for connection in self._idle.pop(owner, ()):
            connection.on_idle_end = None
            connection.abort()

    def _sweep(self) -> None:
        self._sweep_timer = None
        loop = asyncio.get_running_loop()
        oldest_allowed = loop.time() - self._idle_timeout
        next_expiry: float | None = None
        for owner, idle in list(self._idle.items()):
            expired = [connection for connection in idle if connection.idle_since <= oldest_allowed]
            for connection in expired:
                idle.remove(connection)
                connection.on_idle_end = None
                connection.abort()
            if not idle:
                del self._idle[owner]
            elif next_expiry is None or idle[0].idle_since < next_expiry:
                next_expiry = idle[0].idle_since
        if next_expiry is not None:
            self._sweep_timer = loop.call_at(next_expiry + self._idle_timeout, self._sweep)

    async def close(self) -> None:
        """Close every idle connection, and each of the others when its exchange ends."""
        self._closed = True
        if self._native is not None:
            self._native.let_go()
            self._native = None
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        for owner in list(self._idle):
            self.discard(owner)
        await asyncio.sleep(0)  # the transports close in the loop's next turn
