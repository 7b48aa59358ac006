"""The head of an engine's response: the status line, the headers, and how they delimit the body (RFC 9112, 6.3).

``ChunkTracker`` never takes a chunked body apart: it walks along the bytes, which pass through as they are, and
knows where the body ends and whether the stream stands *between* two chunks, the only place where a chunk of
another one may be put in.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import httptools
from httptools.parser import parser as _extension

from llmux.upstream.engine import EngineProtocolError

_CRLF = b"\r\n"
_CR = 0x0D
_LF = 0x0A

# A size line: hexadecimal size, then perhaps extensions, which are not used and must be skipped.
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
# What a size line that has not arrived whole may look like.
_PART_OF_SIZE_LINE = re.compile(rb"[0-9A-Fa-f]{1,15}[ \t]*(?:;[^\r\n]*)?\r?")


def _chunk_starts(digits: int) -> Iterator[bytes]:
    """Yield, by the length of a block, what it begins with if it is one chunk with a size of so many digits."""
    never = b"-" * (16**digits + 8)  # longer than the block: it does not begin with it
    yield from (never,) * 6
    for number in range(1, digits + 1):
        for size in range(16 ** (number - 1), 16**number):
            yield b"%x\r\n" % size
        yield never  # another digit is longer by two


CHUNK_STARTS = tuple(_chunk_starts(3))
"""What a block of bytes begins with, by its length, if it is exactly one chunk as most events are: up to 4 KiB."""

_SIZES = {b"%x" % size: size + len(_CRLF) for size in range(1, 4096)}  # with the line's own end

MAX_SIZE_LINE = 4096
MAX_TRAILERS = 65536


class Framing(enum.Enum):
    """What ends a body."""

    NONE = "none"  # there is none: HEAD, 204, 304
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until_close"
    TUNNEL = "tunnel"  # 101: no HTTP any more, in either direction


class ChunkError(Exception):
    """The body is not chunked as it should be. The bytes before ``offset`` were sound."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def is_one_chunk(data: bytes) -> bool:
    """Whether these bytes, which begin with a size line, are exactly one chunk as they usually are.

    Quick; False means nothing. ``EngineConnection.data_received`` has the same in line.
    """
    size = len(data)
    return size < len(CHUNK_STARTS) and data.startswith(CHUNK_STARTS[size]) and data.endswith(_CRLF)


def are_chunks(data: bytes) -> bool:
    """Whether these bytes, which begin with a size line, are a few whole chunks as they usually are.

    Quick; False means nothing. A busy engine sends several events before the first of them is read.
    """
    at, length = 0, len(data)
    while at < length:
        end = data.find(_CRLF, at + 1, at + 5)
        size = _SIZES.get(data[at:end])
        if end < 0 or size is None:
            return False
        at = end + size
        if data[at : at + 2] != _CRLF:
            return False
        at += 2
    return at == length


class ChunkTracker:
    """Follows one chunked body."""

    __slots__ = ("_left", "_line", "_trailers")

    def __init__(self) -> None:
        self._left = 0  # bytes of the current chunk still to come, its CRLF included; 0: a size line is next
        self._line = b""  # the part of a size line, or of the trailers, that has come so far
        self._trailers = False  # the last chunk has been seen

    @property
    def between_chunks(self) -> bool:
        """Whether the next byte would be the first of a size line."""
        return not (self._left or self._line or self._trailers)

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:  # noqa: C901, the innermost loop
        """Walk along ``data``. Return where in it the body ends, or -1.

        With ``payload``, the chunks' contents are appended to it.
        """
        shift = 0
        if self._line:
            # A line was split between two reads: look at it whole. Rare enough to copy.
            shift = len(self._line)
            data = self._line + data
        left = self._left
        position = 0
        length = len(data)
        while True:
            if left:
                available = length - position
                if payload is not None and left > len(_CRLF):
                    payload.append(data[position : position + min(available, left - len(_CRLF))])
                if available < left:
                    left -= available
                    if left == 1 and data[-1] != _CR:
                        raise self._error("a chunk is longer than its size says", length - 1 - shift)
                    break
                position += left
                if data[position - 1] != _LF or (left > 1 and data[position - 2] != _CR):
                    raise self._error("a chunk is longer than its size says", position - min(left, 2) - shift)
                left = 0
            if self._trailers:
                return self._in_trailers(data, position, shift)
            if position == length:
                self._line = b""
                break
            match = _SIZE_LINE.match(data, position)
            if match is None:
                self._split_line(data, position, shift)
                break
            position = match.end()
            size = int(match[1], 16)
            if size:
                self._line = b""
                left = size + len(_CRLF)
            else:
                self._trailers = True
        self._left = left
        return -1

    def _split_line(self, data: bytes, position: int, shift: int) -> None:
        line = data[position:]
        if len(line) > MAX_SIZE_LINE or _PART_OF_SIZE_LINE.fullmatch(line) is None:
            # Between chunks all the same, unless the line's beginning has been passed on before.
            raise self._error("a chunk's size line cannot be read", position - shift, between=position >= shift)
        self._line = line

    def _in_trailers(self, data: bytes, position: int, shift: int) -> int:
        if data.startswith(_CRLF, position):
            return position + len(_CRLF) - shift
        end = data.find(b"\r\n\r\n", position)
        if end >= 0:
            return end + 4 - shift
        self._left = 0
        self._line = data[position:]
        if len(self._line) > MAX_TRAILERS:
            raise self._error("the trailers are too long", position - shift)
        return -1

    def _error(self, message: str, offset: int, *, between: bool = False) -> ChunkError:
        self._line = b""
        self._left = 0 if between else 1
        return ChunkError(message, max(offset, 0))


# The classes that the extension module raises. ``httptools.HttpParserError`` is another one after the package
# has been imported a second time, which coverage does.
_ParserError: type[Exception] = _extension.HttpParserError  # type: ignore[attr-defined]
_ParserUpgrade: type[Exception] = _extension.HttpParserUpgrade  # type: ignore[attr-defined]

MAX_HEAD = 65536
SWITCHING_PROTOCOLS = 101
MOST_KNOWN = 2048  # bytes of a head that is remembered
MOST_DIGITS = 15  # of a length
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?(\d{1,15})\r\n")
_REQUEST_ID = b"\r\nx-request-id: "
_FIRST_FINAL = 200
_WITHOUT_BODY = frozenset({204, 304})


@dataclass(slots=True)
class ResponseHead:
    """A response's head but for the length of its body; shared by the responses that are alike in the rest.

    ``fields`` are (lower-case name, name, value), in the engine's order and case; the value of Content-Length is
    empty.
    """

    status: int = 0
    reason: bytes = b""
    fields: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    framing: Framing = Framing.UNTIL_CLOSE
    keep_alive: bool = False  # the engine will take another request on this connection
    named: frozenset[bytes] = frozenset()  # headers that Connection names as hop-by-hop, beyond the known ones
    event_stream: bool = False
    encoded: bool = False  # has a Content-Encoding
    written: dict[object, tuple[bytes, bool, bytes]] = field(default_factory=dict, compare=False)  # by ``proxy``


_USUAL_OPTIONS = frozenset({b"close", b"keep-alive", b"upgrade"})


def connection_options(value: bytes) -> set[bytes]:
    """Return the options in a Connection header's value, in lower case."""
    return {option for part in value.lower().split(b",") if (option := part.strip())}


class _Reader:
    """Takes httptools' callbacks and notes what matters for the framing as it goes by."""

    __slots__ = ("head", "length", "options", "transfer_encoding")

    def __init__(self) -> None:
        self.head = ResponseHead()
        self.length: bytes | None = None
        self.options: set[bytes] | None = None
        self.transfer_encoding: bytes | None = None

    def on_status(self, status: bytes) -> None:
        self.head.reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"content-length":
            self.length = value
            value = b""
        self.head.fields.append((lower, name, value))
        if lower == b"content-type":
            self.head.event_stream = value[:17].lower() == b"text/event-stream"
        elif lower == b"transfer-encoding":
            before = self.transfer_encoding
            self.transfer_encoding = value if before is None else before + b"," + value
        elif lower == b"connection":
            options = connection_options(value)
            self.options = options if self.options is None else self.options | options
        elif lower == b"content-encoding":
            self.head.encoded = value.strip().lower() not in {b"", b"identity"}


def parse_head(data: bytes, *, to_head_request: bool, upgrade: bool) -> tuple[ResponseHead | None, bytes]:
    """Parse a whole head, its empty line included. Returns it with the value of Content-Length (b"": none).

    None for an interim response, which is skipped. Heads of one engine differ in little but the length: they are
    remembered. Raises EngineProtocolError.
    """
    found = _LENGTH.search(data)
    if len(data) > MOST_KNOWN:
        return _parse(data, to_head_request, upgrade)
    if found is None:
        return _known(data, to_head_request, upgrade)
    start, end = found.span(1)
    return _known(data[:start] + b"0" + data[end:], to_head_request, upgrade)[0], data[start:end]


def around_length(data: bytes) -> tuple[bytes, bytes]:
    """Return what stands before and after the length's digits in a whole head; all of it and b"" without one."""
    found = _LENGTH.search(data)
    if found is None:
        return data, b""
    start, end = found.span(1)
    return data[:start], data[end:]


def without_id(data: bytes, told: bytes) -> bytes:
    """Return a head and what follows without the `X-Request-ID` that repeats ``told``; the same if it has none."""
    at = data.find(told, 0, MOST_KNOWN)
    start = at - len(_REQUEST_ID)
    if (
        start < 0
        or data[start:at].lower() != _REQUEST_ID
        or not data.startswith(_CRLF, at + len(told))
        or data.find(b"\r\n\r\n", 0, start + len(_CRLF)) >= 0  # it stands in the body
    ):
        return data
    return data[:start] + data[at + len(told) :]


def _parse(data: bytes, to_head_request: bool, upgrade: bool) -> tuple[ResponseHead | None, bytes]:
    if not data.startswith(b"HTTP/"):  # the parser skips empty lines before it, but not when it comes in pieces
        raise EngineProtocolError("The engine's answer is not HTTP/1.1.")
    reader = _Reader()
    parser = httptools.HttpResponseParser(reader)
    try:
        parser.feed_data(data)
    except _ParserUpgrade:
        pass
    except _ParserError as error:
        raise EngineProtocolError(f"The engine's answer is not HTTP/1.1: {error}.") from error
    head = reader.head
    length = reader.length or b""
    version = parser.get_http_version()
    if version not in {"1.1", "1.0"}:
        raise EngineProtocolError(f"The engine answered in HTTP/{version}.")
    head.status = status = parser.get_status_code()
    if status < _FIRST_FINAL:
        if status != SWITCHING_PROTOCOLS:
            return None, length
        if not upgrade:
            raise EngineProtocolError("The engine switched protocols unasked.")
        head.framing = Framing.TUNNEL
        return head, length
    _connection(reader, version)
    if to_head_request or status in _WITHOUT_BODY:
        head.framing = Framing.NONE
    else:
        _body_framing(reader)
    return head, length


_known = functools.lru_cache(maxsize=256)(_parse)


def _body_framing(reader: _Reader) -> None:
    head = reader.head
    if reader.transfer_encoding is not None:
        if reader.transfer_encoding.strip().lower() != b"chunked":
            raise EngineProtocolError("The engine used a transfer coding that was not offered.")
        head.framing = Framing.CHUNKED
    elif reader.length is not None:
        head.framing = Framing.LENGTH
    else:
        head.keep_alive = False


def _connection(reader: _Reader, version: str) -> None:
    head = reader.head
    options = reader.options
    if options is None:
        head.keep_alive = version == "1.1"
    else:
        head.keep_alive = b"close" not in options and (version == "1.1" or b"keep-alive" in options)
        if not options <= _USUAL_OPTIONS:
            head.named = frozenset(options - _USUAL_OPTIONS)
