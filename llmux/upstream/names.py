"""The addresses of hosts that are known by name, and which of them answers.

An event loop looks names up in few threads, of which uvloop lends two to this; asyncio's do other work, too. A
resolver that does not answer blocks each of them for ten seconds and more, and meanwhile nothing else is looked
up, not even ``localhost``. So each name has a thread of its own here, one for all requests that wait for it.

Of several addresses the first that answers is used. If one is silent (an IPv6 route that leads nowhere), the next
is tried as well, ``NEXT_AFTER`` seconds later.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
import threading
from typing import Any

from aiohappyeyeballs import start_connection

NEXT_AFTER = 0.25  # seconds, as RFC 8305 has it
KEPT = 1.0  # seconds that what was found is used again: many connections may be opened at once

_Place = tuple[str, int]
Found = list[tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]]
"""What ``getaddrinfo`` returns."""


@functools.lru_cache(maxsize=1024)
def is_name(host: str) -> bool:
    """Whether a host has to be looked up: it is no IP address."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return False
    return True


async def connect(found: Found) -> socket.socket:
    """Return a socket that is connected to one of several addresses. Raises OSError."""
    return await start_connection(found, happy_eyeballs_delay=NEXT_AFTER)


class Names:
    """Looks names up for one loop, each once at a time."""

    def __init__(self) -> None:
        self._asked: dict[_Place, asyncio.Future[Found]] = {}

    async def find(self, host: str, port: int) -> Found:
        """Return the addresses of a name. Raises OSError."""
        return await asyncio.shield(self._asked.get((host, port)) or self._ask((host, port)))

    def _ask(self, place: _Place) -> asyncio.Future[Found]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Found] = loop.create_future()

        def told(found: Found | OSError) -> None:
            if isinstance(found, OSError):
                del self._asked[place]
                answer.set_exception(found)
                answer.exception()  # those that waited may have gone
            else:
                loop.call_later(KEPT, self._asked.pop, place)
                answer.set_result(found)

        def look_up() -> None:
            found: Any
            try:
                found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
            except OSError as error:
                found = error
            except UnicodeError as error:
                found = OSError(f"it is no name: {error}")
            with contextlib.suppress(RuntimeError):  # the loop may have ended meanwhile
                loop.call_soon_threadsafe(told, found)

        try:
            threading.Thread(target=look_up, name="llmux-names", daemon=True).start()
        except RuntimeError as error:
            raise OSError(f"its name cannot be looked up: {error}") from error
        self._asked[place] = answer
        return answer
