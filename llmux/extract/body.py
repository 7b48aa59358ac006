"""A request's body: read once from the client, scanned for its model, sent as often as needed.

The engine gets exactly what the client sent, including a compressed body, which the server must not decompress:
it must be created with ``auto_decompress=False``, as ``AppRunner(app, auto_decompress=False)``. Compressed bodies
are not scanned; such a request names its model in the query. A JSON body of up to 1 MiB is read at once when it is
complete (``members_of``); a larger one, and one in which that finds no model, is scanned slice by slice.

``Store`` holds the bytes: in memory, or beyond 1 MiB in an unlinked temporary file. ``BodyBudget`` counts how much
all bodies hold.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from aiohttp import StreamReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from llmux.errors import BadRequestError, BodyTooLargeError, SlowClientError, UnavailableError
from llmux.extract.json_object import MOST, members_of, place_of_model
from llmux.extract.json_scan import ModelScanner, members_but
from llmux.extract.model_field import (
    SLICE,
    ModelField,
    MultipartScanner,
    ambiguous,
    boundary_of,
    checked_name,
    json_literal,
    model_in_query,
)

_MIB = 1024 * 1024
_RETRY_AFTER = 5.0


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits of bodies: ``max_body`` bytes each and ``max_buffered`` bytes for all together.

    ``idle_timeout`` is in seconds: how long an unfinished body may pause.
    """

    max_body: int = 256 * _MIB
    max_buffered: int = 1024 * _MIB
    idle_timeout: float = 60.0


class BodyBudget:
    """The bytes that all bodies hold together, in memory or in files. One for all requests.

    Bytes count as they arrive, not as announced: a client that announces many and sends none uses nothing of the
    budget.
    """

    def __init__(self, max_buffered: int) -> None:
        self.max_buffered = max_buffered
        self.held = 0

    def take(self, size: int) -> None:
        """Count ``size`` bytes more; UnavailableError ``bodies_full`` if they are too many."""
        if self.held + size > self.max_buffered:
            raise UnavailableError(
                f"the bodies of waiting requests already take {self.held} bytes of {self.max_buffered}",
                code="bodies_full",
                retry_after=_RETRY_AFTER,
            )
        self.held += size

    def give_back(self, size: int) -> None:
        """Count ``size`` bytes less."""
        self.held -= size


MEMORY = MOST
"""Bytes: a body of more goes to a file."""


class Store:
    """Takes a body's bytes in order and returns them by position.

    The file is written and read directly in the event loop, a slice at a time: through the page cache 64 KiB
    take 5 us (at most 0.5 ms in 256 MiB of them), less than passing them to a thread. It has no name, so it
    disappears with the process, however that ends.
    """

    def __init__(self, budget: BodyBudget) -> None:
        self.size = 0
        self.closed = False
        self._budget = budget
        self._memory: bytes | bytearray = b""
        self._file: IO[bytes] | None = None

    @property
    def spooled(self) -> bool:
        """Whether the bytes are in a file."""
        return self._file is not None

    def add(self, data: bytes) -> None:
        """Append ``data``, at most ``SLICE`` bytes. UnavailableError if the budget or the disk is full."""
        self._budget.take(len(data))
        self.size += len(data)
        if self._file is not None:
            self._write(self._file, data)
        elif self.size > MEMORY:
            self._spool(data)
        elif not self._memory:
            self._memory = data  # most bodies arrive in one piece, which is not copied
        else:
            if isinstance(self._memory, bytes):
                self._memory = bytearray(self._memory)
            self._memory += data

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` up to ``end``. ValueError after ``close``."""
        if self.closed:
            raise ValueError("the body is closed")
        if self._file is None:
            return bytes(self._memory[start:end])
        data = os.pread(self._file.fileno(), end - start, start)
        if len(data) != end - start:
            raise OSError(f"the spooled body is short: {len(data)} of {end - start} bytes at {start}")
        return data

    def close(self) -> None:
        """Drop the bytes and return their share of the budget. May be called again."""
        if self.closed:
            return
        self.closed = True
        self._budget.give_back(self.size)
        self._memory = b""
        if self._file is not None:
            self._file.close()

    def _spool(self, data: bytes) -> None:
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (close() closes it)
        except OSError as error:
            raise _disk_full(error) from error
        for start in range(0, len(self._memory), SLICE):
            self._write(self._file, bytes(self._memory[start : start + SLICE]))
        self._memory = b""
        self._write(self._file, data)

    @staticmethod
    def _write(file: IO[bytes], data: bytes) -> None:
        try:
            while (written := file.write(data)) < len(data):
                data = data[written:]
        except OSError as error:
            raise _disk_full(error) from error


def _disk_full(error: OSError) -> UnavailableError:
    return UnavailableError(
        f"the body cannot be kept in a temporary file: {error.strerror}",
        code="bodies_full",
        retry_after=_RETRY_AFTER,
    )


SINGLE = SLICE
"""Bytes: a body up to that size is sent in one piece."""

_BROKEN = (OSError, RuntimeError, HttpProcessingError, web.RequestPayloadError)
_STEP = 16 * 1024  # bytes scanned between two looks at the clock: bounds a stall by the worst input
_WORK = 0.0005  # seconds of work between two turns of the event loop


class Pace:
    """Gives the event loop its turn after every half a millisecond of work."""

    def __init__(self) -> None:
        self.since = perf_counter()

    async def turn(self) -> None:
        """Give others their turn, if it is due."""
        if perf_counter() - self.since > _WORK:
            await asyncio.sleep(0)
            self.since = perf_counter()


async def scan_slowly(scanner: ModelScanner | MultipartScanner, data: bytes, pace: Pace) -> None:
    """Have a scanner read data in steps."""
    for start in range(0, len(data), _STEP):
        scanner.feed(data[start : start + _STEP])
        await pace.turn()


class Splice(NamedTuple):
    """A replacement for the bytes from ``start`` up to ``end``, which are positions in the store."""

    start: int
    end: int
    text: bytes

    @property
    def grows_by(self) -> int:
        """Return by how many bytes the body gets longer."""
        return len(self.text) - (self.end - self.start)


class Body:
    """A complete body. ``close`` it, or leave its ``with`` block, to return its share of the budget.

    ``size`` is in bytes. ``model`` is None if the body names none. ``compressed`` bodies were not scanned.
    ``members`` are those of a JSON object that was read at once. Iterating, plainly or with ``async for``, gives
    slices of at most ``SLICE`` bytes, each time from the start.
    """

    def __init__(
        self,
        store: Store,
        field: ModelField | None,
        *,
        form: bool = False,
        compressed: bool = False,
        alike: bool = False,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = None if field is None else field.name
        if members is not None:
            self.model = checked_name(members["model"])
        self.alike = alike  # it names a model, but under a key in another case
        self.compressed = compressed
        self.size = store.size
        self.form = form
        self._store = store
        self._members = members
        self._received = field  # the model's place in the store, once it is known
        self._splices: tuple[Splice, ...] = ()  # in order, without overlaps

    @property
    def spooled(self) -> bool:
        """Whether the bytes are in a temporary file."""
        return self._store.spooled

    @property
    def single(self) -> bytes | None:
        """The whole body in one piece, or None if it is larger than ``SINGLE``."""
        return b"".join(self) if self.size <= SINGLE else None

    async def renamed(self, name: str) -> Body:
        """Return the body with ``name`` as its model, every other byte unchanged.

        It shares the bytes with this one: closing either closes both. A body that names no model is returned
        unchanged. Other tasks get their turns while the model is looked for.
        """
        field = await self._placed()
        if field is None:
            return self
        text = name.encode() if self.form else json_literal(name)
        others = [splice for splice in self._splices if splice.start != field.start]
        return self._with([*others, Splice(field.start, field.end, text)], name)

    async def _placed(self) -> ModelField | None:
        """Return the model that was received, and its place in the store."""
        if self._received is None and self._members is not None:
            whole = self._store.read(0, self._store.size)
            place = place_of_model(whole)
            if place is None:
                scanner = ModelScanner()
                await scan_slowly(scanner, whole, Pace())
                self._received = scanner.finish()
            else:
                self._received = ModelField(self._members["model"], *place)
        return self._received

    def edit(self, splices: Iterable[Splice]) -> Body:
        """Return the body with these changes in addition to earlier ones, every other byte unchanged.

        They must not overlap, nor touch the model's name. It shares the bytes with this one, as in ``renamed``.
        """
        return self._with([*self._splices, *splices], self.model)

    def _with(self, splices: Iterable[Splice], model: str | None) -> Body:
        body = object.__new__(type(self))
        body.__dict__.update(self.__dict__)  # copy.copy() takes ten times as long
        body._splices = tuple(sorted(splices))
        body.size = self._store.size + sum(splice.grows_by for splice in body._splices)
        body.model = model
        return body

    @property
    def edited(self) -> bool:
        """Whether more than the model's name was changed."""
        field = self._received
        return any(field is None or splice.start != field.start for splice in self._splices)

    @property
    def members(self) -> Mapping[str, Any] | None:
        """What ``members_of`` has found; None if it did not read this body as it is now."""
        return None if self.edited else self._members

    def shares(self, other: Body) -> bool:
        """Return whether both have the same bytes: closing either closes both."""
        return self._store is other._store

    def part(self, start: int, end: int) -> Iterator[bytes]:
        """Iterate over received bytes by their position, in slices, ignoring changes."""
        return self._range(start, end)

    @property
    def received(self) -> int:
        """The bytes that were received."""
        return self._store.size

    def close(self) -> None:
        """Drop the bytes. May be called again."""
        self._store.close()

    def __iter__(self) -> Iterator[bytes]:
        pos = 0
        for start, end, text in self._splices:
            yield from self._range(pos, start)
            if text:
                yield text
            pos = end
        yield from self._range(pos, self._store.size)

    def slices(self) -> Iterator[bytes]:
        """Iterate over it from the start; a request that is sent again is iterated a second time."""
        return iter(self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for data in self:
            yield data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _range(self, start: int, end: int) -> Iterator[bytes]:
        for pos in range(start, end, SLICE):
            yield self._store.read(pos, min(pos + SLICE, end))


def body_of(data: bytes, model: str, budget: BodyBudget) -> Body:
    """Return a JSON object that was received whole, at most ``MEMORY`` bytes, and names this model.

    UnavailableError if the budget is full.
    """
    store = Store(budget)
    store.add(data)
    return Body(store, None, members={"model": model})


def refuse_announced(request: web.Request, limits: BodyLimits) -> None:
    """Raise BodyTooLargeError if the client announces more than is allowed, before any of it has come."""
    length = request.content_length
    if length is not None and length > limits.max_body:
        raise _too_large(limits)


async def read_body(request: web.Request, limits: BodyLimits, budget: BodyBudget) -> Body:
    """Read the body of ``request`` to its end.

    Raises BodyTooLargeError, at once if the client announces the size; SlowClientError; UnavailableError if the
    budget or the disk is full; BadRequestError for a body that breaks off or is malformed where it names its
    model. Nothing is held after an error. The event loop gets its turn every half a millisecond.
    """
    refuse_announced(request, limits)
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "").strip().lower()
    compressed = encoding not in ("", "identity")
    scanner: ModelScanner | MultipartScanner | None = None
    if request.body_exists and not compressed:
        scanner = _scanner_for(request.headers.get(hdrs.CONTENT_TYPE, ""))
    store, pace, members = Store(budget), Pace(), None
    try:
        unread = await _receive(request.content, store, scanner, limits, pace)
        if unread and store.size:
            members = members_of(store.read(0, store.size))
            if members is not None:
                return Body(store, None, members=members)
            assert scanner is not None
            await scan_slowly(scanner, store.read(0, store.size), pace)
        field = scanner.finish() if scanner and store.size else None
    except BaseException:
        store.close()
        raise
    alike = scanner is not None and scanner.alike
    return Body(store, field, form=isinstance(scanner, MultipartScanner), compressed=compressed, alike=alike)


def model_of(body: Body | None, query: str) -> str:
    """Return the model that a request names: in its body, else in its raw query string.

    BadRequestError if it names none.
    """
    if body is not None and body.model is not None:
        return body.model
    name = model_in_query(query)
    if name is not None:
        if body is not None and body.alike:
            raise ambiguous("the request")
        return name
    if body is not None and body.compressed:
        raise BadRequestError(
            "the body is compressed and llmux does not look into it: "
            "send it uncompressed, or name the model in the query as ?model=NAME",
            code="compressed_body",
            param="model",
        )
    raise BadRequestError(
        f"the request {'names' if body is not None and body.size else 'has no body and names'} no model: "
        'expected "model" in a JSON object or a multipart form, or ?model=NAME in the URL',
        code="model_required",
        param="model",
    )


def _scanner_for(content_type: str) -> ModelScanner | MultipartScanner:
    if content_type.partition(";")[0].strip().lower() == "multipart/form-data":
        return MultipartScanner(boundary_of(content_type))
    return ModelScanner()  # it skips what does not start like an object, whatever the header says


async def _receive(
    content: StreamReader,
    store: Store,
    scanner: ModelScanner | MultipartScanner | None,
    limits: BodyLimits,
    pace: Pace,
) -> bool:
    """Receive a body, and scan it as it arrives. Returns whether it was not scanned: it can be read at once."""
    unread = isinstance(scanner, ModelScanner)
    while True:
        data, waited = await _next(content, limits.idle_timeout)
        if not data:
            return unread
        if waited:
            pace.since = perf_counter()
        if store.size + len(data) > limits.max_body:
            raise _too_large(limits)
        if unread and store.size + len(data) <= MOST:
            store.add(data)
            continue
        if unread and scanner is not None:
            unread = False
            await scan_slowly(scanner, store.read(0, store.size), pace)
        for start in range(0, len(data), _STEP):
            part = data[start : start + _STEP]
            store.add(part)
            if scanner is not None:
                scanner.feed(part)
            await pace.turn()


async def _next(content: StreamReader, idle: float) -> tuple[bytes, bool]:
    """Return what has arrived, b"" at the end, and whether that took waiting."""
    timer = asyncio.timeout(idle)
    try:
        data = content.read_nowait()
        if data or content.at_eof():
            return data, False
        async with timer:  # only waiting requires a timer
            return await content.readany(), True
    except _BROKEN as error:
        if timer.expired():
            raise SlowClientError(f"the client sent nothing of its body for {idle:g} s") from None
        raise BadRequestError("the request's body broke off", code="incomplete_body") from error


def _too_large(limits: BodyLimits) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {limits.max_body} bytes")


class StreamScanner(ModelScanner):
    """Determines whether ``"stream"`` is ``true``. As with the model, the last duplicate counts."""

    _wanted = b"stream"
    _members = members_but(_wanted)

    def __init__(self) -> None:
        super().__init__()
        self.on = False

    def _value(self, pos: int) -> int:
        self.on = self.on and not self._is_wanted
        return super()._value(pos)

    def _scalar(self, pos: int) -> int:
        end = super()._scalar(pos)
        if self._is_wanted:
            self.on = self._token == b"true"
        return end

    def _model_string(self, pos: int) -> int:
        return self._string(pos)


async def streams(body: Body) -> bool | None:
    """Return whether a body requests a stream; None if it is not a JSON object. Other tasks get their turns."""
    if body.compressed:
        return None
    if body.members is not None:
        return body.members.get("stream") is True
    scanner, pace = StreamScanner(), Pace()
    try:
        for data in body:
            await scan_slowly(scanner, data, pace)
    except BadRequestError:  # the engine reports it
        return None
    return scanner.on if scanner.is_object else None
