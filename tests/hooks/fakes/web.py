"""As much of HTTP as stand-ins for engines need, in aiohttp's words: what imports only this starts at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Query:
    """The fields of a query."""

    def __init__(self, text: str) -> None:
        self._fields = parse_qs(text)

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, [default])[0]

    def getall(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)


class Headers(dict[str, str]):
    """Headers, whose names are lower case."""

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


@dataclass
class Request:
    """A request that has arrived whole."""

    method: str
    path_qs: str
    headers: Headers
    body: bytes
    writer: asyncio.StreamWriter
    match_info: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.path_qs).path)

    @property
    def query(self) -> Query:
        return Query(urlsplit(self.path_qs).query)

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        return self.body

    async def text(self) -> str:
        return self.body.decode()

    async def json(self) -> Any:
        return json.loads(self.body)


class StreamResponse:
    """An answer that ends with its connection, as all of them do."""

    def __init__(self, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.headers = status, {"Connection": "close", **(headers or {})}
        self._writer: asyncio.StreamWriter | None = None

    async def prepare(self, request: Request) -> None:
        self._writer = request.writer
        lines = [f"HTTP/1.1 {self.status} .", *(f"{name}: {value}" for name, value in self.headers.items())]
        await self.write("\r\n".join([*lines, "", ""]).encode())

    async def write(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(data)
        await self._writer.drain()

    async def write_eof(self) -> None: ...


class Response(StreamResponse):
    """An answer of known length."""

    def __init__(self, *, status: int = 200, text: str = "", content_type: str = "text/plain") -> None:
        self.body = text.encode()
        super().__init__(
            status=status, headers={"Content-Type": content_type, "Content-Length": str(len(self.body))}
        )


def json_response(document: Any, *, status: int = 200) -> Response:
    return Response(status=status, text=json.dumps(document), content_type="application/json")


Handler = Callable[[Request], Awaitable[StreamResponse]]
RouteDef = tuple[str, re.Pattern[str], Handler]


def route(method: str, path: str, handler: Handler) -> RouteDef:
    return method, re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path)), handler


def get(path: str, handler: Handler) -> RouteDef:
    return route("GET", path, handler)


def post(path: str, handler: Handler) -> RouteDef:
    return route("POST", path, handler)


async def listen(routes: Sequence[RouteDef], guard: Callable[..., Awaitable[StreamResponse]], port: int) -> Any:
    """Serve on loopback. A handler whose client goes away is cancelled."""

    async def handle(request: Request) -> StreamResponse:
        for method, path, handler in routes:
            if method == request.method and (found := path.fullmatch(request.path)):
                request.match_info = found.groupdict()
                return await handler(request)
        return Response(status=404)

    async def answer(request: Request) -> None:
        try:
            response = await guard(request, handle)
        except Exception:  # noqa: BLE001 - a stand-in answers 500 and says why, as a server does
            traceback.print_exc()
            response = Response(status=500)
        if isinstance(response, Response):
            await response.prepare(request)
            await response.write(response.body)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split()
                headers = Headers()
                for line in filter(None, head[1:]):
                    name, _, value = line.partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                answering = asyncio.ensure_future(answer(Request(method, target, headers, body, writer)))
                leaving = asyncio.ensure_future(reader.read())
                await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
                for task in (answering, leaving):
                    task.cancel()
                await asyncio.gather(answering, leaving, return_exceptions=True)
        finally:
            writer.close()

    return await asyncio.start_server(connected, "127.0.0.1", port)
