"""A running llmux, spoken to over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote

import aiohttp
import typer
from pydantic import BaseModel, ValidationError

from llmux import control
from llmux.cli.exits import CommandError, Exit
from llmux.cli.place import UNIX, Place, place
from llmux.cli.seen import Commanded
from llmux.cli.terminal import complain

TIMEOUT = 10.0  # seconds that an answer may take; llmux answers at once
SILENCE = 40.0  # seconds between two events; llmux sends something every 15 s
_LIMIT = 16 * 2**20  # bytes of one event: a status with thousands of models
_SOON = aiohttp.ClientTimeout(TIMEOUT)
_EVER = aiohttp.ClientTimeout(None, sock_connect=TIMEOUT, sock_read=SILENCE)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Event(NamedTuple):
    """One event of ``/llmux/events``."""

    name: str
    fields: dict[str, Any]


class Remote:
    """One llmux. Whatever goes wrong is a CommandError, with the exit code that it means."""

    def __init__(self, where: Place, session: aiohttp.ClientSession) -> None:
        self.url = where.url  # as it is told
        self._base = "http://localhost" if where.url.startswith(UNIX) else where.url
        self._session = session

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object that a path answers with."""
        return await self._ask("GET", path)

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Have something done."""
        return await self._ask("POST", path, body)

    async def delete(self, path: str) -> dict[str, Any]:
        """End something."""
        return await self._ask("DELETE", path)

    async def command(self, model: str, verb: str, body: Mapping[str, Any] | None = None) -> Commanded:
        """Have something done with a model."""
        if {"", ".", ".."} & set(model.split("/")):  # a path would not hold it
            raise CommandError(Exit.NO_SUCH_MODEL, f"model {model!r} not found")
        answer = await self.post(f"/llmux/models/{quote(model, safe='', errors='replace')}/{verb}", body)
        return self.read(Commanded, answer)

    def read(self, shape: type[M], document: Mapping[str, Any]) -> M:
        """Return what a document says."""
        try:
            return shape.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            self._no_llmux(f"its answer is not understood ({where}: {first['msg']})")

    async def text(self, path: str) -> str:
        """Return the text that a path answers with."""
        async with self._send("GET", path, _SOON) as answer:
            with self._heard():
                return await answer.text()

    @asynccontextmanager
    async def events(self, query: str = "") -> AsyncIterator[AsyncIterator[Event]]:
        """Listen: the events from now on, the first of which is the status. They end when llmux stops."""
        async with self._send("GET", f"/llmux/events{query}", _EVER) as answer:
            if answer.content_type != "text/event-stream":
                self._no_llmux("it streams no events")
            yield self._read(answer)

    async def _read(self, answer: aiohttp.ClientResponse) -> AsyncIterator[Event]:
        name = ""
        lines = answer.content
        while True:
            try:
                line = await lines.readline()
                word, _, value = line.rstrip(b"\r\n").partition(b": ")
                fields = json.loads(value) if word == b"data" else None
            except (aiohttp.ClientError, TimeoutError, OSError):
                return  # it has gone; whoever still waits for something says so
            except ValueError as error:
                self._no_llmux(str(error))
            if not line:
                return
            if word == b"event":
                name = value.decode(errors="replace")
            elif isinstance(fields, dict):
                yield Event(name, fields)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        async with self._send(method, path, _SOON, body) as answer:
            with self._heard():
                data = await answer.read()
        try:
            found = json.loads(data)
        except ValueError as error:
            self._no_llmux(str(error))
        if not isinstance(found, dict):
            self._no_llmux("it answers with no JSON object")
        return found

    @asynccontextmanager
    async def _send(
        self, method: str, path: str, patience: aiohttp.ClientTimeout, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        # A redirect would show the key to whoever it leads to.
        options: dict[str, Any] = {"timeout": patience, "allow_redirects": False, "json": body}
        with self._heard():
            answer = await self._session.request(method, self._base + path, **options)
        async with answer:
            if answer.status // 100 != 2:  # noqa: PLR2004
                with self._heard():
                    data = await answer.read()
                self._refused(answer, data)
            yield answer

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno
            # Its own text names the address, which is told anyway; a name that is not known has no such number.
            self._unreachable(os.strerror(number) if number and number > 0 else str(error.os_error))
        except TimeoutError:
            self._unreachable(f"no answer within {TIMEOUT:.0f} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._unreachable(str(error) or type(error).__name__)

    def _refused(self, answer: aiohttp.ClientResponse, data: bytes) -> NoReturn:
        try:
            error = json.loads(data)["error"]
            message, code = str(error["message"]), str(error["code"])
        except (ValueError, LookupError, TypeError):
            message, code = "", ""
        if answer.status in (401, 403, 429):
            hint = "give the admin key in LLMUX_ADMIN_KEY, or its file with --key-file"
            raise CommandError(Exit.NOT_ALLOWED, f"{self.url}: {message or answer.reason} ({hint})")
        known = {
            (400, code): Exit.USAGE,
            (404, "model_not_found"): Exit.NO_SUCH_MODEL,
            (409, "conflict"): Exit.REFUSED,
        }
        if message and (answer.status, code) in known:
            raise CommandError(known[answer.status, code], message)
        self._no_llmux(f"it answers {answer.status}{f': {message}' if message else ''}")

    def _unreachable(self, why: str) -> NoReturn:
        hint = "does llmux run there? Give its address with --url or LLMUX_URL"
        raise CommandError(Exit.UNREACHABLE, f"{self.url}: {why}; {hint}") from None

    def _no_llmux(self, why: str) -> NoReturn:
        raise CommandError(Exit.UNREACHABLE, f"{self.url}: {why}; is it llmux, and of this version?") from None


def speak(url: str, key_file: Path | None, act: Callable[[Remote], Awaitable[int | None]]) -> None:
    """Run a command's ``act`` with the llmux at ``url``; exit with what it returns, or its error means."""
    try:
        code = asyncio.run(speaking(place(url, key_file), act))
    except CommandError as error:
        complain(str(error))
        code = error.exit
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except asyncio.CancelledError:
        code = Exit.TERMINATED
    if code:
        raise typer.Exit(int(code))


async def speaking(where: Place, act: Callable[[Remote], Awaitable[T]]) -> T:
    """Return what ``act`` returns."""
    headers = {} if where.key is None else {"Authorization": f"Bearer {where.key}"}
    with ExitStack() as stack:
        connector = None
        if where.socket is not None:
            try:
                address = stack.enter_context(control.address_of(where.socket))
            except OSError as error:
                raise CommandError(Exit.UNREACHABLE, f"{where.url}: {error.strerror or error}") from None
            connector = aiohttp.UnixConnector(address)
        async with aiohttp.ClientSession(headers=headers, read_bufsize=_LIMIT, connector=connector) as session:
            return await act(Remote(where, session))
