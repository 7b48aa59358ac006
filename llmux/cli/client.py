"""HTTP client for a running llmux: HTTP/1.1 on asyncio's streams, parsed by httptools.

A command makes a few requests and ends: a client library takes longer to import than llmux to answer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import SplitResult, quote, unquote, urlsplit

import httptools
import typer

from llmux import control
from llmux.cli.api_models import Commanded, decode
from llmux.cli.terminal import CommandError, Exit, print_error
from llmux.normal_path import path_of

UNIX = "unix:"  # the address of a socket
KEYS = ("LLMUX_ADMIN_KEY", "LLMUX_API_KEY")
TIMEOUT = 10.0  # seconds for an answer; llmux answers at once
SILENCE = 40.0  # seconds between two events; llmux sends something every 15 s
_PIECE = 2**16  # bytes
_PORTS = {"http": 80, "https": 443}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Connection:
    """The address of a running llmux, without a slash at its end, and the key for it."""

    url: str
    key: str | None
    socket: Path | None = None  # its control socket, if that is on this host


def connection(url: str, key_file: Path | None) -> Connection:
    """Return the connection that the options specify. Raises CommandError for an invalid address or key."""
    key, source = _key(key_file)
    check_key(key, source)
    if url.startswith(UNIX):
        path = Path("/" + url.removeprefix(UNIX).lstrip("/"))
        return Connection(f"{UNIX}{path}", key, path)
    try:
        parts = urlsplit(url)
        usable = parts.scheme in _PORTS and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise CommandError(Exit.USAGE, f"{url!r} is not an address of llmux; write --url http://HOST:PORT")
    return Connection(url.rstrip("/"), key, _socket(parts))


def _socket(parts: SplitResult) -> Path | None:
    """Return the control socket of the llmux at an address, if it runs on this host as the same user."""
    if parts.scheme != "http" or parts.path.strip("/"):
        return None
    here = control.found(parts.hostname or "", parts.port or 80, os.environ)
    return next(filter(control.answers, here), None)


def check_key(key: str | None, source: str) -> None:
    """Raise CommandError for a key that cannot be sent in a header."""
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise CommandError(Exit.USAGE, f"{source} contains no key: a key is printable ASCII, without spaces")


def _key(file: Path | None) -> tuple[str | None, str]:
    if file is not None:
        try:
            text = file.read_text().strip()
        except OSError as error:
            raise CommandError(Exit.USAGE, f"{file}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            text = "\0"
        if not text:
            raise CommandError(Exit.USAGE, f"{file} is empty; it should hold the admin key")
        return text, str(file)
    for name in KEYS:
        text = os.environ.get(name, "").strip()
        if text:
            return text, name
    return None, ""


class Event(NamedTuple):
    """One event of ``/llmux/events``."""

    name: str
    fields: dict[str, Any]


class Remote:
    """One llmux. Every failure is a CommandError, with its exit code."""

    def __init__(self, where: Connection) -> None:
        self.url = where.url  # as shown to the user
        self._where = where

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path."""
        return await self._ask("GET", path)

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send a POST request; return the JSON object of the answer."""
        return await self._ask("POST", path, body)

    async def delete(self, path: str) -> dict[str, Any]:
        """Send a DELETE request; return the JSON object of the answer."""
        return await self._ask("DELETE", path)

    async def command(self, model: str, verb: str, body: Mapping[str, Any] | None = None) -> Commanded:
        """Send an operator's command about a model."""
        if not model:
            raise CommandError(Exit.NO_SUCH_MODEL, f"model {model!r} not found")
        path = path_of("/llmux/models", model, verb)
        if path is None:
            why = f"model {model!r} not found by that name, which can stand in no path; use an alias of it"
            raise CommandError(Exit.NO_SUCH_MODEL, why)
        answer = await self.post(path, body)
        return self.read(Commanded, answer)

    def read(self, shape: type[T], document: Mapping[str, Any]) -> T:
        """Return a document decoded as ``shape``."""
        try:
            return decode(shape, document)
        except ValueError as error:
            self._no_llmux(f"its answer is not understood ({error})")

    async def text(self, path: str) -> str:
        """Return the text at a path."""
        return (await self._whole("GET", path)).decode(errors="replace")

    @asynccontextmanager
    async def events(self, query: str = "") -> AsyncIterator[AsyncIterator[Event]]:
        """Subscribe to the events from now on, the first of which is the status. They end when llmux stops."""
        async with self._send("GET", f"/llmux/events{query}", SILENCE) as answer:
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                self._no_llmux("it streams no events")
            yield self._read(answer)

    async def _read(self, answer: _Answer) -> AsyncIterator[Event]:
        name, rest = "", b""
        while True:
            try:
                async with asyncio.timeout(SILENCE):
                    piece = await answer.piece()
            except (OSError, EOFError, httptools.HttpParserError):
                return  # the stream has ended; a command that still waits for something reports that
            if not piece:
                return
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                word, _, value = line.rstrip(b"\r").partition(b": ")
                if word == b"event":
                    name = value.decode(errors="replace")
                elif word == b"data":
                    fields = self._json(value)
                    if isinstance(fields, dict):
                        yield Event(name, fields)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        found = self._json(await self._whole(method, path, body))
        if not isinstance(found, dict):
            self._no_llmux("it does not answer with a JSON object")
        return found

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            self._no_llmux(str(error))

    async def _whole(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        with self._reported():
            async with asyncio.timeout(TIMEOUT), self._send(method, path, TIMEOUT, body) as answer:
                return await answer.read()

    @asynccontextmanager
    async def _send(
        self, method: str, path: str, patience: float, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[_Answer]:
        """Send a request, and read the head of the answer within ``patience`` seconds."""
        with self._reported():
            async with asyncio.timeout(TIMEOUT):
                answer = await _Answer.connect(self._where)
        try:
            with self._reported():
                async with asyncio.timeout(patience):
                    await answer.send(_request(self._where, method, path, body))
                    # Redirects are not followed: that would send the key to another server
                    data = b"" if answer.status // 100 == 2 else await answer.read()  # noqa: PLR2004
            if answer.status // 100 != 2:  # noqa: PLR2004
                self._refused(answer, data, looks=method == "GET")
            yield answer
        finally:
            answer.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            self._unreachable(f"no answer within {TIMEOUT:.0f} s")
        except httptools.HttpParserError:
            self._no_llmux("it does not answer in HTTP")
        except EOFError:
            self._unreachable("the connection was closed before the answer was complete")
        except ssl.SSLError as error:
            self._unreachable(str(error))
        except OSError as error:
            # Its own text repeats the address; an unknown host name has no such number.
            number = error.errno or 0
            self._unreachable(os.strerror(number) if number > 0 else error.strerror or str(error))
        except ValueError as error:  # a host that cannot be looked up
            self._unreachable(str(error))

    def _refused(self, answer: _Answer, data: bytes, *, looks: bool) -> NoReturn:
        try:
            error = json.loads(data)["error"]
            message, code = str(error["message"]), str(error["code"])
        except (ValueError, LookupError, TypeError):
            message, code = "", ""
        if answer.status in (401, 403, 429):
            hint = "give the admin key in LLMUX_ADMIN_KEY, or its file with --key-file"
            if looks:
                hint = "an API key suffices, in LLMUX_API_KEY; or the admin key in LLMUX_ADMIN_KEY or --key-file"
            raise CommandError(Exit.NOT_ALLOWED, f"{self.url}: {message or answer.reason} ({hint})")
        known = {
            (400, code): Exit.USAGE,
            (404, "model_not_found"): Exit.NO_SUCH_MODEL,
            (404, "host_not_found"): Exit.NO_SUCH_MODEL,
            (404, "request_not_found"): Exit.NO_SUCH_MODEL,
            (404, "no_ledger"): Exit.USAGE,
            (409, "conflict"): Exit.REFUSED,
        }
        if message and (answer.status, code) in known:
            raise CommandError(known[answer.status, code], message)
        gateway = " Of a gateway ask `llmux fleet status`" if answer.status == 404 else ""  # noqa: PLR2004
        self._no_llmux(f"it answers {answer.status}{f': {message}' if message else ''}".rstrip("."), gateway)

    def _unreachable(self, why: str) -> NoReturn:
        hint = "does llmux run there? Give its address with --url or LLMUX_URL"
        raise CommandError(Exit.UNREACHABLE, f"{self.url}: {why}; {hint}") from None

    def _no_llmux(self, why: str, hint: str = "") -> NoReturn:
        text = f"{self.url}: {why}; is it llmux, and of this version?{hint}"
        raise CommandError(Exit.UNREACHABLE, text) from None


def _request(where: Connection, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
    parts = urlsplit("http://localhost" if where.url.startswith(UNIX) else where.url)
    called = [part.encode("idna").decode() for part in parts.netloc.rpartition("@")[2].split(":")]
    lines = [
        f"{method} {quote(parts.path, safe='/%:@!$&()*+,;=~')}{path} HTTP/1.1",
        f"Host: {':'.join(called)}",
        "Accept: */*",
        "Connection: close",
    ]
    if where.key is not None:
        lines.append(f"Authorization: Bearer {where.key}")
    elif parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        lines.append(f"Authorization: Basic {base64.b64encode(pair.encode()).decode()}")
    content = b"" if body is None else json.dumps(body).encode()
    if body is not None:
        lines.append("Content-Type: application/json")
    if body is not None or method != "GET":
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


class _Answer:
    """One answer, read piece by piece from a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._begun = self._complete = False
        self.reason = ""
        self.headers: dict[str, str] = {}

    @classmethod
    async def connect(cls, where: Connection) -> _Answer:
        """Connect to the control socket, or to each address of the host's name until one accepts."""
        if where.socket is not None:
            with control.address_of(where.socket) as path:
                return cls(*await asyncio.open_unix_connection(path))
        parts = urlsplit(where.url)
        host, tls = parts.hostname or "", parts.scheme == "https"
        found = await asyncio.get_running_loop().getaddrinfo(host, parts.port or _PORTS[parts.scheme], type=1)
        for number, (*_, address) in enumerate(found, 1):
            try:
                reader, writer = await asyncio.open_connection(
                    *address[:2], ssl=tls or None, server_hostname=host if tls else None
                )
            except OSError:
                if number == len(found):
                    raise
            else:
                return cls(reader, writer)
        raise OSError(f"{host} has no address")

    async def send(self, request: bytes) -> None:
        """Send the request, and read the head of the answer."""
        self._writer.write(request)
        while not self._begun:
            await self._feed()

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self._parser.get_status_code())

    async def piece(self) -> bytes:
        """Return what has arrived of the body since, b"" at its end."""
        while not self._pieces and not self._complete:
            await self._feed()
        data, self._pieces = b"".join(self._pieces), []
        return data

    async def read(self) -> bytes:
        """Return the rest of the body."""
        pieces = []
        while piece := await self.piece():
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()

    async def _feed(self) -> None:
        data = await self._reader.read(_PIECE)
        if data:
            self._parser.feed_data(data)
        elif self._begun and not {"content-length", "transfer-encoding"} & self.headers.keys():
            self._complete = True  # such an answer ends with its connection
        else:
            raise EOFError

    # ---- called by the parser

    def on_status(self, status: bytes) -> None:
        self.reason += status.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._begun = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = True


def speak(url: str, key_file: Path | None, act: Callable[[Remote], Awaitable[int | None]]) -> None:
    """Run a command's ``act`` with the llmux at ``url``; exit with its result, or the exit code of its error."""
    try:
        code = asyncio.run(_acted(connection(url, key_file), act))
    except CommandError as error:
        print_error(str(error))
        code = error.exit
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except asyncio.CancelledError:
        code = Exit.TERMINATED
    if code:
        raise typer.Exit(int(code))


async def _acted(where: Connection, act: Callable[[Remote], Awaitable[T]]) -> T:
    return await act(Remote(where))


def models(url: str, key_file: Path | None, within: float) -> dict[str, Any]:
    """Return the answer of ``/v1/models``; empty if there is none within ``within`` seconds."""

    async def ask(remote: Remote) -> dict[str, Any]:
        async with asyncio.timeout(within):
            return await remote.get("/v1/models")

    try:
        return asyncio.run(_acted(connection(url, key_file), ask))
    except (CommandError, TimeoutError):
        return {}
