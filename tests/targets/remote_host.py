"""A host of ours that serves an API over TLS, and misbehaves as a test says; with certificates of its own."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.server.house import HOST

KEY = "sk-remote-secret-1234567890"
CHAT = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "theirs",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "from afar"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500},
}
AUTHORITY = """
[ca]
default_ca=d
[d]
database={folder}/index
new_certs_dir={folder}
serial={folder}/serial
default_md=sha256
policy=p
copy_extensions=copy
[p]
commonName=supplied
"""


@dataclass
class Certificates:
    """An authority, and what it has signed, each with ``.key`` and ``.pem``."""

    folder: Path

    @property
    def authority(self) -> str:
        return str(self.folder / "authority.pem")

    def context(self, name: str = "good") -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        return context


def make_certificates(folder: Path) -> Certificates:
    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req",
        "-x509",
        *new,
        "-days",
        "2",
        "-subj",
        "/CN=ours",
        "-keyout",
        "authority.key",
        "-out",
        "authority.pem",
    )
    (folder / "ca.conf").write_text(AUTHORITY.format(folder=folder))
    (folder / "index").touch()
    (folder / "serial").write_text("01\n")
    for name, host in (("good", "localhost"), ("other", "elsewhere.example"), ("expired", "localhost")):
        san = f"subjectAltName=DNS:{host}"
        openssl(
            "req", *new, "-subj", f"/CN={name}", "-addext", san, "-keyout", f"{name}.key", "-out", f"{name}.csr"
        )
        dates = (
            ("20200101000000Z", "20200102000000Z") if name == "expired" else ("20200101000000Z", "20990101000000Z")
        )
        openssl(
            *("ca", "-batch", "-config", "ca.conf", "-in", f"{name}.csr", "-out", f"{name}.pem", "-notext"),
            *("-cert", "authority.pem", "-keyfile", "authority.key", "-startdate", dates[0], "-enddate", dates[1]),
        )
    san = "subjectAltName=DNS:localhost"
    openssl(
        "req",
        "-x509",
        *new,
        "-days",
        "2",
        "-subj",
        "/CN=self",
        "-addext",
        san,
        "-keyout",
        "self.key",
        "-out",
        "self.pem",
    )
    return Certificates(folder)


@dataclass
class Asked:
    """One request that came."""

    line: str
    headers: dict[str, str]
    body: bytes
    raw: list[tuple[str, str]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.line.split()[1]

    def json(self) -> Any:
        return json.loads(self.body)


Says = bytes | Callable[["RemoteHost", asyncio.StreamWriter], Awaitable[None]]


def answer(body: Any = None, status: str = "200 OK", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(CHAT if body is None else body).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "\r\n"]).encode() + data


def error(status: str, message: str = "no", **headers: str) -> bytes:
    return answer(
        {"error": {"message": message, "type": "server_error", "code": None, "param": None}}, status, **headers
    )


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class RemoteHost:
    """Answers with what is in ``says``, in order, the last for ever after."""

    def __init__(self, *says: Says, tls: ssl.SSLContext | None = None) -> None:
        self.says: list[Says] = list(says) or [answer()]
        self.asked: list[Asked] = []
        self.connections = 0
        self.open = 0
        self.go = asyncio.Event()
        self.port = 0
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.go.set()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://localhost:{self.port}"

    def settings(self, **more: Any) -> dict[str, Any]:
        return {"url": self.url, "key": KEY, "models": {"m": "theirs/m"}} | more

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            while True:
                await self._one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError, ssl.SSLError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head.split("\r\n")[:-2]
        raw = [(name, value.strip()) for name, _, value in (each.partition(":") for each in rest)]
        headers = {name.lower(): value for name, value in raw}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.asked.append(Asked(line, headers, body, raw))
        says = self.says[0] if len(self.says) == 1 else self.says.pop(0)
        if isinstance(says, bytes):
            writer.write(says)
            await writer.drain()
        else:
            await says(self, writer)


async def hang(host: RemoteHost, writer: asyncio.StreamWriter) -> None:
    while not (host.go.is_set() or writer.transport.is_closing()):  # noqa: ASYNC110 - the reader is taken
        await asyncio.sleep(0.01)
    raise ConnectionResetError


async def cut(_host: RemoteHost, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    raise ConnectionResetError


def then(data: bytes, after: Says = cut) -> Says:
    """Send some bytes, and go on with something else."""

    async def both(host: RemoteHost, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if isinstance(after, bytes):
            writer.write(after)
        else:
            await asyncio.sleep(0.05)
            await after(host, writer)

    return both


OPEN = {"remotes_for_all": True}
SOON = {"first_byte": "200ms", "idle": "200ms"}


async def opened(house: Any, host: RemoteHost, certificates: Certificates, models: Any = "a", **more: Any) -> None:
    given = more.pop("remote", {})
    remotes = {"r": host.settings(ca=certificates.authority, **given)}
    await house.open(models, remotes=remotes, **(OPEN | more))


async def broken(house: Any, model: str) -> tuple[Any, bytes]:
    """Ask for a stream that breaks off; return its head, and what came before its connection's end."""
    line = await house.begin("POST", "/v1/chat/completions", {"model": model, "stream": True})
    return await line.head(), await line.closed()


def chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    document = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "x", "choices": [choice]}
    return b"data: " + json.dumps(document).encode() + b"\n\n"
