"""A raw HTTP/1.1 client: sends exactly the given bytes, and keeps exactly the bytes it receives."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import struct
import uuid
from dataclasses import dataclass, field

from tests.harness.waiting import PATIENCE

HOST = "127.0.0.1"


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    head: bytes
    body: bytes | bytearray = b""
    whole: bool = True  # the body ended as its framing says
    times: list[float] = field(default_factory=list)

    def get(self, name: str) -> str | None:
        found = self.all(name)
        return found[0] if found else None

    def all(self, name: str) -> list[str]:
        return [v for n, v in self.headers if n.lower() == name.lower()]

    def json(self):
        return json.loads(self.body)

    @property
    def seen(self) -> bytes:
        """The head of the request, as the engine got it."""
        return base64.b64decode(self.json()["head"])

    def seen_headers(self) -> list[tuple[str, str]]:
        lines = self.seen.decode("latin-1").split("\r\n")[1:]
        return [(n, v.strip()) for n, _, v in (line.partition(":") for line in lines)]


class Gone(Exception):  # noqa: N818
    """The connection ended before an answer's head was whole."""


OPEN: list[Wire] = []


async def close_all() -> None:
    """Reset what a failed test has left open."""
    while OPEN:
        await OPEN[-1].reset()


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        OPEN.append(self)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def forget(self) -> None:
        if self in OPEN:
            OPEN.remove(self)

    async def close(self) -> None:
        self.forget()
        self.writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(self.writer.wait_closed(), 2)

    async def reset(self) -> None:
        self.forget()
        sock = self.writer.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(self.writer.wait_closed(), 2)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, wait: float = PATIENCE) -> Answer:
        try:
            head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), wait)
        except asyncio.IncompleteReadError as error:
            raise Gone(error.partial) from None
        lines = head[:-4].decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ")[1])
        headers = [(n, v.strip()) for n, _, v in (line.partition(":") for line in lines[1:])]
        if 100 <= status < 200 and status != 101:
            return await self.head(wait)
        return Answer(status, headers, head)

    async def body(self, answer: Answer, *, method: str = "POST", wait: float = PATIENCE) -> Answer:
        async with asyncio.timeout(wait):
            try:
                if method == "HEAD" or answer.status in (101, 204, 304):
                    return answer
                if "chunked" in (answer.get("Transfer-Encoding") or "").lower():
                    answer.body = bytearray()
                    while True:
                        size = int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16)
                        data = await self.reader.readexactly(size + 2)
                        answer.times.append(asyncio.get_running_loop().time())
                        answer.body += data[:-2]
                        if size == 0:
                            return answer
                elif answer.get("Content-Length") is not None:
                    answer.body = await self.reader.readexactly(int(answer.get("Content-Length") or 0))
                else:
                    answer.body = await self.reader.read(-1)
            except asyncio.IncompleteReadError as error:
                answer.whole = False
                answer.body += error.partial
            except (OSError, ValueError):
                answer.whole = False
            finally:
                answer.body = bytes(answer.body)
        return answer

    async def ask(self, data: bytes, *, method: str = "POST", wait: float = PATIENCE) -> Answer:
        await self.send(data)
        return await self.body(await self.head(wait), method=method, wait=wait)


async def wire(port: int) -> Wire:
    return Wire(*await asyncio.open_connection(HOST, port, limit=2**20))


def request(
    method: str,
    target: str,
    *,
    headers: list[tuple[str, str]] | None = None,
    body: bytes | dict | None = None,
    do: dict | None = None,
    host: str = "localhost",
    version: str = "1.1",
) -> bytes:
    """Return the bytes of a request. A unique ``X-Uid`` lets the engine's journal tell deliveries apart."""
    fields = [("Host", host), ("X-Uid", uuid.uuid4().hex), *(headers or [])]
    if do is not None:
        fields.append(("X-Do", json.dumps(do)))
    names = {n.lower() for n, _ in fields}
    if isinstance(body, dict):
        body = json.dumps(body).encode()
        if "content-type" not in names:
            fields.append(("Content-Type", "application/json"))
    if body is not None and not names & {"content-length", "transfer-encoding"}:
        fields.append(("Content-Length", str(len(body))))
    head = f"{method} {target} HTTP/{version}\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields)
    return head.encode("latin-1") + b"\r\n" + (body or b"")


def uid(data: bytes) -> str:
    found = re.search(rb"X-Uid: (\w+)", data)
    assert found
    return found[1].decode()
